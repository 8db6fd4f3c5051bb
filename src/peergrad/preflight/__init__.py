"""Whether the nodes of a job can do it, asked before it starts: ``tools/preflight.py``.

Every node checks itself and says what it found in a folder that all share; the first one compares,
has those that are well take part in an all-reduce, and names the others. Whatever may hang is a
process or a thread of its own, so that there is an answer by the deadline.
"""

from peergrad.preflight.lead import main

__all__ = ["main"]
