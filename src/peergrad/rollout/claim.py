"""One run's hold on its servers: between two pushes they carry what it pushed last.

The mark is the server's own weight version (``versions``), so that it lives and dies with the
server, and every answer carries it. A server keeps no lock: two runs may both find it free. So a
run writes its mark, waits, and reads it again (Fischer's algorithm): of two that wrote, at most one
finds its own.
"""

import logging
import time

from peergrad.rollout.control import Control
from peergrad.rollout.errors import ServerError
from peergrad.rollout.requests import Json
from peergrad.rollout.versions import CLAIMED, FREE, not_ours, owner, spell

log = logging.getLogger(__name__)

CLAIM_SECONDS = 1.0  # longer than a mark takes from one run's reading to its writing
CLEAN_UP_SECONDS = 5.0  # servers may be gone, or hang


def refuse_foreign(url: str, spelt: str, identity: str | None, *, takeover: bool) -> None:
    """Raise ValueError if the server at ``url`` carries weights of another run than ``identity``.

    ``spelt``: its weight version. None as identity: every run is another.
    """
    found = owner(spelt)
    if found is None or found[0] == identity or takeover:
        return
    run, version = found
    at = "nothing pushed yet" if version == CLAIMED else f"weight version {version}"
    raise ValueError(
        f"rollout.servers.urls = {url!r}: belongs to run {run!r} ({at}), "
        "and a server belongs to one run at a time; end that run, or give this one another server; "
        "if that run is dead, restart the server or set rollout.servers.takeover=true"
    )


class Claim:
    """The hold of the run ``identity`` on all servers of ``control``; with None, of nobody:
    then every method does nothing."""

    def __init__(self, control: Control, identity: str | None, *, takeover: bool = False) -> None:
        """``takeover``: also take servers that carry another run's weights."""
        self._control = control
        self._identity = identity
        self._takeover = takeover
        self._newest = CLAIMED
        self._held: set[str] = set()  # the versions that a server may carry; none before it is ours

    def check(self, version: int) -> None:
        """Before ``version`` is pushed: take the servers if this is the first push, else see that
        they still carry the last one.

        Raises ValueError if another run has one, ServerError if it was taken away since.
        """
        if self._identity is None:
            return
        if self._held:
            self._require_ours(self._identity)
        else:
            self._take(self._identity)
        # A push that fails leaves the old version on some servers and the new one on others.
        self._held.add(spell(self._identity, version))

    def confirm(self, version: int) -> None:
        """After ``version`` was pushed: ServerError if somebody else has pushed as well."""
        if self._identity is not None:
            self._newest, self._held = version, {spell(self._identity, version)}
            self._require_ours(self._identity)

    def theft(self) -> ServerError | None:
        """What somebody else has done to the servers, if they have: it explains other errors."""
        if self._identity is None or not self._held:
            return None
        answers = self._control.answers("/model_info", timeout=CLEAN_UP_SECONDS)
        for url, info in answers.items():
            if (spelt := _carried(url, info)) not in self._held:
                return not_ours(url, spelt, self._identity, self._newest)
        return None

    def release(self) -> None:
        """Leave to others the servers that are still ours; never fails, and is quick."""
        if self._identity is None or not self._held:
            return
        self._held = set()
        answers = self._control.answers("/model_info", timeout=CLEAN_UP_SECONDS)
        ours = [
            url
            for url, info in answers.items()
            if (found := owner(_carried(url, info))) and found[0] == self._identity
        ]
        try:
            self._control.post(
                "/update_weight_version", mark_payload(FREE), urls=ours, timeout=CLEAN_UP_SECONDS
            )
        except ServerError as error:
            log.info("not every server was released: %s", error)

    def _take(self, identity: str) -> None:
        began = time.monotonic()
        carried = self._read()
        for url, spelt in carried.items():
            refuse_foreign(url, spelt, identity, takeover=self._takeover)
        others = {url: found for url, spelt in carried.items() if (found := owner(spelt))}
        for url, (run, version) in others.items():
            if run != identity:
                log.warning("%s: taken over from run %r (weight version %d)", url, run, version)
        self._held = {spell(identity, CLAIMED)}
        self._control.post("/update_weight_version", mark_payload(spell(identity, CLAIMED)))
        if any(run != identity for run, _ in others.values()) or len(others) < len(carried):
            time.sleep(max(CLAIM_SECONDS, 2 * (time.monotonic() - began)))
            self._require_ours(identity)

    def _require_ours(self, identity: str) -> None:
        for url, spelt in self._read().items():
            if spelt not in self._held:
                raise not_ours(url, spelt, identity, self._newest)

    def _read(self) -> dict[str, str]:
        """The weight version of every server."""
        infos = self._control.get("/model_info")
        return {
            url: _carried(url, info) for url, info in zip(self._control.urls, infos, strict=True)
        }


def mark_payload(spelt: str) -> Json:
    """Body of /update_weight_version; the server's default would abort all that runs."""
    return {"new_version": spelt, "abort_all_requests": False}


def _carried(url: str, info: Json) -> str:
    if "weight_version" not in info:
        raise ServerError(
            f"{url}: /model_info tells no weight_version; use SGLang 0.5.21 or later", url=url
        )
    return str(info["weight_version"])
