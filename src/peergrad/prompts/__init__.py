"""Where prompts come from (``load_prompts``) and the order they are used in (``Prompts``)."""

from peergrad.prompts.files import GENERATED, check_source, paths
from peergrad.prompts.order import Prompts
from peergrad.prompts.sources import Loaded, load_prompts, read_prompts, source_name
from peergrad.prompts.table import Table
from peergrad.prompts.tokenizer import TokenizerFacts, load_tokenizer, tokenizer_facts

__all__ = [
    "GENERATED",
    "Loaded",
    "Prompts",
    "Table",
    "TokenizerFacts",
    "check_source",
    "load_prompts",
    "load_tokenizer",
    "paths",
    "read_prompts",
    "source_name",
    "tokenizer_facts",
]
