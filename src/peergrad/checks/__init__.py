"""What can be known before anything is started: what is wrong, and what will run.

Two levels. ``check`` is light (no torch, no transformers): every rank runs it first. The other,
``check_inputs``, reads what the run will read (weights' headers, tokenizer, prompts, the reward
function); one process runs it. ``plan`` says on few lines what will run, ``summary``
what is perhaps not meant, too.
"""

from peergrad.checks.configuration import check
from peergrad.checks.inputs import Inputs, Source, check_inputs
from peergrad.checks.recording import settled
from peergrad.checks.summary import plan, summary, warnings_of
from peergrad.parallel.hf.source import read_model_config

__all__ = [
    "Inputs",
    "Source",
    "check",
    "check_inputs",
    "plan",
    "read_model_config",
    "settled",
    "summary",
    "warnings_of",
]
