"""What a server answered, whichever HTTP client asked."""

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from peergrad.rollout.errors import ServerError, ServerUnavailable, quote


@dataclass(frozen=True)
class Reply:
    """An answer of the server ``url``.

    Example:
        ``Reply("http://localhost:30000", "/model_info", 200, b'{"weight_version": "default"}')``
    """

    url: str
    path: str
    status: int
    content: bytes

    def checked(self) -> "Reply":
        """Itself if it is a 2xx answer; else raises ServerError with the server's own message,
        ServerUnavailable if another attempt may succeed."""
        if 200 <= self.status < 300:
            return self
        kind = ServerUnavailable if self.status >= 500 else ServerError
        said = f"{self.url}: {self.path} answered {self.status}: {self._message()}"
        raise kind(said, url=self.url)

    def json(self) -> Any:
        """What it says. Raises ServerError if that is no JSON."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as error:
            raise self.no_json() from error

    def no_json(self) -> ServerError:
        return ServerError(
            f"{self.url}: answered {self.path} with no JSON but {quote(self._text())!r}; is this "
            "an SGLang server?",
            url=self.url,
        )

    def _text(self) -> str:
        return self.content.decode(errors="replace")

    def _message(self) -> str:
        """SGLang answers {"message"}, {"error"} or {"error": {"message"}}, else plain text."""
        try:
            body = json.loads(self.content)
            body = body.get("error", body)
            return quote(str(body["message"] if isinstance(body, dict) else body))
        except (ValueError, KeyError, AttributeError, RecursionError):
            return quote(self._text()) or _phrase(self.status)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "nothing"
