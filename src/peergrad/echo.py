"""What another rank's failure looks like here. It is no news of this rank's own."""

LOST = (  # how gloo and NCCL say that the other side has ended
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
)


class OtherRankFailed(RuntimeError):
    """Another rank has failed and says why; this one has nothing to add."""


def is_echo(error: BaseException) -> bool:
    """Whether ``error`` is, most likely, how another rank's end shows here."""
    if isinstance(error, OtherRankFailed):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
