"""What an installed wheel holds: an editable checkout would hide what is missing."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

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


def test_the_lock_for_gpus_satisfies_every_pin() -> None:
    """Of this project, and of the two whose versions decide all others."""
    lines = (ROOT / "requirements-gpu.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    assert pins[-1].startswith("transformer-engine[pytorch]")
    for package in ("sglang", "megatron-core"):
        wanted = [Requirement(line) for line in requires(package) or ()]
        here = {"platform_machine": "x86_64", "extra": ""}
        pins += [str(one) for one in wanted if one.marker is None or one.marker.evaluate(here)]
    for one in map(Requirement, pins):
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert one.specifier.contains(locked[name], prereleases=True), one
    engine = [version for name, version in locked.items() if name.startswith("transformer-engine")]
    assert len(engine) == 3 and len(set(engine)) == 1
    of_megatron = next(r for r in requires("megatron-core") or () if r.startswith("transformer-en"))
    assert Requirement(of_megatron).specifier.contains(engine[0])


def test_what_installs_for_gpus_reads_what_is_there(tmp_path: Path) -> None:
    for name in ("tools/gpu.Dockerfile", "tools/setup_gpu.sh", "requirements-gpu.lock"):
        assert "://" not in (ROOT / name).read_text()  # no package registry is named
    docker = (ROOT / "tools/gpu.Dockerfile").read_text()
    copied = [
        words for line in re.findall(r"^COPY (.*) \S+$", docker, re.M) for words in line.split()
    ]
    assert all((ROOT / name).exists() for name in copied)
    assert {"requirements-gpu.lock", "tools", "src", "conf"} <= set(copied)
    readme = (ROOT / "README.md").read_text()
    for command in ("tools/setup_gpu.sh .venv/bin/python", "docker build -f tools/gpu.Dockerfile"):
        assert command in " ".join(readme.split())
    without = subprocess.run(
        [ROOT / "tools/setup_gpu.sh", sys.executable],
        env={**os.environ, "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert without.returncode == 1 and without.stderr.startswith(f"error: CUDA_HOME = {tmp_path}: ")
