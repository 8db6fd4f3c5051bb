"""What an installed wheel holds: an editable checkout would hide what is missing."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(folder.parent.relative_to(ROOT / "src").parts)
        for folder in (ROOT / "src").rglob("__init__.py")
    }
    assert sorted(listed) == sorted(found | {"peergrad.conf"})


def test_the_wheel_carries_the_license_and_the_configuration(tmp_path: Path) -> None:
    for folder in ("src", "conf"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(metadata).decode())
        text = archive.read(metadata.replace("METADATA", "licenses/LICENSE")).decode()
    assert said["License-Expression"] == "Apache-2.0"
    assert text == (ROOT / "LICENSE").read_text()
    configured = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"peergrad/conf/{path}" for path in configured} <= set(names)
