"""Where prompts come from (``load_prompts``) and the order they are used in (``Prompts``)."""

from peergrad.prompts.order import Prompts
from peergrad.prompts.sources import load_prompts

__all__ = ["Prompts", "load_prompts"]
