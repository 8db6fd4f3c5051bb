"""Whether Weights & Biases knows who is logging; without a key it asks, and nobody answers."""

import netrc
import os
from configparser import ConfigParser
from configparser import Error as ParserError
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

from peergrad.config import Config, require

HOST = "https://api.wandb.ai"


def check_account(config: Config) -> None:
    """Raise ValueError if W&B is to be told online and finds no key where it looks for one: in the
    environment, a netrc file, its own settings."""
    if config.logger.wandb != "online":
        return
    settings = _wandb_settings()
    url = os.environ.get("WANDB_BASE_URL") or settings.get("base_url", HOST)
    host = urlparse(url).netloc
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    environment = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    require(
        any(os.environ.get(name) for name in environment)
        or "api_key" in settings
        or any(_has_login(file, host) for file in files),
        "logger.wandb",
        "online",
        f"needs a key, and neither WANDB_API_KEY nor {files[0]} has one for {host}",
        "run wandb login, or set logger.wandb=offline",
    )


def _wandb_settings() -> dict[str, str]:
    folder = os.environ.get("WANDB_CONFIG_DIR", Path.home() / ".config" / "wandb")
    parser = ConfigParser(default_section="none", interpolation=None)
    with suppress(ParserError, OSError, UnicodeDecodeError):
        parser.read([Path(folder) / "settings", Path("wandb") / "settings"])
    return dict(parser["default"]) if parser.has_section("default") else {}


def _has_login(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
