"""A config.json, whose values are checked as they are taken."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from peergrad.config import require
from peergrad.parallel.hf.strict_json import parse


def read_model_config(path: str, key: str) -> dict[str, Any]:
    """config.json of the HF folder ``path``, which ``key`` names; ValueError if there is none."""
    try:
        found = parse((Path(path) / "config.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        rule = "must be a folder with an HF checkpoint (config.json is missing)"
        remedy = "correct the path, or make a tiny model with tools/make_tiny_model.py"
        raise ValueError(f"{key} = {path!r}: {rule}; {remedy}") from error
    except OSError as error:
        rule = f"its config.json cannot be read ({error.strerror})"
        raise ValueError(
            f"{key} = {path!r}: {rule}; correct the path or its permissions"
        ) from error
    except ValueError as error:
        rule = f"config.json is not JSON ({error})"
        raise ValueError(f"{key} = {path!r}: {rule}; download it again") from error
    require(isinstance(found, dict), key, path, "config.json holds no object", "download it again")
    model: dict[str, Any] = found
    return model


class Source:
    """The values of one config.json."""

    def __init__(self, path: str, key: str) -> None:
        self.path, self.key, self.values = path, key, read_model_config(path, key)

    def refuse(
        self, name: str, rule: str, remedy: str = "choose another model", *, default: Any = None
    ) -> NoReturn:
        """Raise ValueError; ``default``: the value if there is none."""
        value = json.dumps(self.values.get(name, default))
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise ValueError(
            f"{self.key} = {self.path!r}: {name} = {shown} in config.json {rule}; {remedy}"
        )

    def size(self, name: str, default: int | None = None, *, null: int | None = None) -> int:
        """A positive whole number; ``null``: what a null stands for."""
        value = self.values.get(name, default)
        if value is None and name in self.values and null is not None:
            return null
        if name not in self.values and default is None:
            rule, remedy = f"config.json has no {name}", "choose another model"
            raise ValueError(f"{self.key} = {self.path!r}: {rule}; {remedy}")
        if type(value) is not int or value < 1:
            self.refuse(name, "must be a positive whole number", "correct it")
        return value

    def number(self, name: str, default: float) -> float:
        # transformers insists on a decimal point, and so does the engine that loads through it.
        value = self.values.get(name, default)
        if not (isinstance(value, float) and 0 < value < math.inf):
            self.refuse(name, "must be a positive number, such as 1e-6", "correct it")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false", "correct it")
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.values.get(name)
        if value not in choices:
            self.refuse(name, f"must be {' or '.join(choices)}")
        return str(value)
