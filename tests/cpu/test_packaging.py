"""What an installed wheel holds: an editable checkout would hide what is missing."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(folder.parent.relative_to(ROOT / "src").parts)
        for folder in (ROOT / "src").rglob("__init__.py")
    }
    assert sorted(listed) == sorted(found | {"peergrad.conf"})
