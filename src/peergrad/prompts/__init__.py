"""Where prompts come from (``load_prompts``) and the order they are used in (``Prompts``)."""

from peergrad.prompts.order import Prompts
from peergrad.prompts.sources import Loaded, check_source, load_prompts, read_prompts
from peergrad.prompts.tokenizer import TokenizerFacts, load_tokenizer, tokenizer_facts

__all__ = [
    "Loaded",
    "Prompts",
    "TokenizerFacts",
    "check_source",
    "load_prompts",
    "load_tokenizer",
    "read_prompts",
    "tokenizer_facts",
]
