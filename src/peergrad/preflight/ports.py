"""Whether ports are free, and who holds those that are not."""

import errno
import socket
from collections.abc import Sequence

import psutil

from peergrad.preflight.report import Found, problem


def check_ports(ports: Sequence[int]) -> Found:
    holders = None
    wrong = []
    for port in ports:
        reason = _refused(port)
        if reason is None:
            continue
        holders = _holders() if holders is None else holders
        who = holders.get(port, "a process that this user cannot see")
        rule = f"is taken by {who}" if reason == errno.EADDRINUSE else "may not be used"
        wrong.append(problem("port", port, rule, "end that process, or choose another port"))
    return Found(tuple(wrong))


def _refused(port: int) -> int | None:
    """Why nobody could listen there now, as an errno. Like a server, this minds no connection that
    has just ended; it does not listen, so that two may ask at once."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            return error.errno
    return None


def _holders() -> dict[int, str]:
    """Port -> program and process that listens there, as far as one may see."""
    found = {}
    for there in psutil.net_connections("tcp"):
        if there.status == psutil.CONN_LISTEN and there.pid is not None:
            found[there.laddr.port] = f"{program(there.pid)} (pid {there.pid})"
    return found


def program(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "a process"
