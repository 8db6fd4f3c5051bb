"""Weight versions as servers spell them: ``<run>:<n>``.

``<run>`` is the identity of the run that pushed the weights and ``n`` its training step. So every
answer tells whose weights it was drawn from, and a server shows to whom it belongs. Whatever is
spelt otherwise belongs to nobody: SGLang's own ``default``, or ``0``. Inside peergrad a version is
``n`` alone. Without an identity (tools and tests that have a server to themselves) it is ``n`` to
the servers as well.
"""

import re

from peergrad.rollout.errors import ServerError

FREE = "0"  # what a run leaves behind
CLAIMED = -1  # taken, nothing pushed yet


def spell(identity: str | None, version: int) -> str:
    """How the servers call ``version`` of the run ``identity``."""
    if identity is not None and ("\n" in identity or not identity):
        raise ValueError(f"identity = {identity!r}: must be a line of text; use the run's folder")
    return str(version) if identity is None else f"{identity}:{version}"


def owner(spelt: str) -> tuple[str, int] | None:
    """The run that pushed these weights and its version; None if no run did."""
    run, _, number = spelt.rpartition(":")
    return (run, int(number)) if run and re.fullmatch(r"-?[0-9]+", number) else None


def number(
    spelt: object,
    url: str,
    identity: str | None,
    newest: int | None,
    oldest: int | None = None,
) -> int:
    """The version of an answer of the server ``url``.

    Raises ServerError if the weights are not those of ``identity``, if they are of a later version
    than ``newest``, the last that this run has let the servers have, or of an earlier one than
    ``oldest``, which all of them held when the answer was asked for.
    """
    spelt = str(spelt)
    found = owner(spelt)
    if identity is None:
        return found[1] if found else _plain(spelt, url)
    if found is None or found[0] != identity:
        raise not_ours(url, spelt, identity, newest, "answered with")
    if newest is not None and found[1] > newest:
        raise not_ours(url, spelt, identity, newest, "answered with")
    if oldest is not None and found[1] < oldest:
        raise ServerError(
            f"{url}: answered with version {found[1]} of this run's weights to a request of "
            f"version {oldest}, so it has missed a weight sync: was the server restarted?; resume "
            "this run to load its weights again",
            url=url,
        )
    return found[1]


def _plain(spelt: str, url: str) -> int:
    if not re.fullmatch(r"-?[0-9]+", spelt):
        raise ServerError(
            f"{url}: weight versions must be whole numbers, got {spelt!r}; start external servers "
            "with --weight-version 0",
            url=url,
        )
    return int(spelt)


def not_ours(
    url: str, spelt: str, identity: str, newest: int | None, does: str = "holds"
) -> ServerError:
    """The error of a run that finds other weights on a server than it has pushed."""
    found = owner(spelt)
    at = "has pushed none" if newest is None or newest < 0 else f"is at version {newest}"
    if found is None:
        text = (
            f"{does} weights {spelt!r} that no run has pushed, while this run {at}: the server was "
            "restarted or released by hand; resume this run to load its weights again"
        )
    elif found[0] == identity:
        text = (
            f"{does} version {found[1]} of this run's weights, while this process {at}: another "
            "process of the same run is alive; end one of them"
        )
    else:
        run, version = found
        what = f"{does} weights of run {run!r} (version {version})"
        if version == CLAIMED:
            what = f"was taken by run {run!r}"
        text = (
            f"{what} while this run {at}: a server belongs to one run at a time; give each run "
            "servers of its own"
        )
    return ServerError(f"{url}: {text}", url=url)
