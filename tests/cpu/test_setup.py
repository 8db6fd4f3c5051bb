"""Setting up .venv: what the lock pins, what is said to be missing, what is repaired."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "tools/setup_venv.sh"
INSTALLING = ["Makefile", "requirements-cpu.lock", "pyproject.toml", SCRIPT, ".ci/run"]
# What the script calls besides the shell's own.
# fmt: off
TOOLS = [
    "awk", "cat", "cksum", "cut", "date", "df", "dirname", "getconf", "grep", "head", "lscpu",
    "mkdir", "rm", "sed", "setsid", "sh", "sleep", "sort", "tail", "touch", "uname",
]
# fmt: on


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements-cpu.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_lock_pins_every_package_to_one_version_and_torch_to_its_cpu_build() -> None:
    assert all(re.fullmatch(r"[\w.+]+", version) for version in pins().values())
    assert pins()["torch"].endswith("+cpu")


@pytest.mark.parametrize("name", INSTALLING)
def test_no_package_registry_is_named(name: str) -> None:
    hosts = re.findall(r"\w+://([\w.-]+)", (ROOT / name).read_text())
    assert set(hosts) <= {"download.pytorch.org"}


# -- what is missing -------------------------------------------------------------------------------


def checkout(folder: Path, lock: str = "", pyproject: str = "") -> Path:
    """A checkout with nothing in it but the script and what it reads."""
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / SCRIPT, folder / SCRIPT)
    (folder / "requirements-cpu.lock").write_text(lock)
    (folder / "pyproject.toml").write_text(pyproject)
    return folder


def set_up(folder: Path, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the script in `folder`, with only the commands of `path` if that is given."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return subprocess.run(
        ["/bin/sh", folder / SCRIPT, ".venv"],
        env=inherited
        | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PYTHON": sys.executable}
        | ({"PATH": str(path)} if path else {})
        | env,
        capture_output=True,
        text=True,
    )


def commands(folder: Path, **replaced: str | None) -> Path:
    """A folder with the commands that the script needs, the `replaced` by other scripts or none."""
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if tool not in replaced and found:
            (folder / tool).symlink_to(found)
    for tool, text in replaced.items():
        if text is not None:
            (folder / tool).write_text(f"#!/bin/sh\n{text}\n")
            (folder / tool).chmod(0o755)
    return folder


OTHER_PYTHON = "echo 3.10"
NO_VENV = f'case "$2" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"'


@pytest.mark.parametrize(
    ("replaced", "env", "said"),
    [
        ({"lscpu": "exit 1"}, {}, r"lscpu: does not run, SGLang asks .*; install util-linux"),
        ({}, {"PYTHON": "python3.11"}, r"PYTHON = python3.11: does not run; install it .*3\.11"),
        ({"py": OTHER_PYTHON}, {"PYTHON": "py"}, r"PYTHON = py: is Python 3\.10, .*; install it"),
        ({"py": NO_VENV}, {"PYTHON": "py"}, r"PYTHON = py: has no module ensurepip; .*apt install"),
        ({"uname": "echo Darwin"}, {}, r"system = Darwin: must be Linux; "),
        ({"uname": "[ $1 = -s ] && echo Linux || echo ppc64le"}, {}, r"machine = ppc64le: must be"),
        ({"getconf": "echo glibc 2.31"}, {}, r"C library = glibc 2\.31: must be glibc 2\.34"),
        ({"getconf": "exit 1"}, {}, r"C library = none of GNU: must be glibc 2\.34"),
        ({"df": "echo; echo /dev/x 9 8 77 9% /"}, {}, r"disk = 77 MB free in .*: \d+ MB are nee"),
        (
            {"df": "echo; [ $2 = /tmp ] && echo / 9 8 77 || echo / 9 8 9999"},
            {"TMPDIR": "/tmp"},
            r"disk = 77 MB free in /tmp: \d+ MB are needed; make room or set TMPDIR",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line_before_anything_is_made(
    tmp_path: Path, replaced: dict[str, str | None], env: dict[str, str], said: str
) -> None:
    folder = checkout(tmp_path / "checkout")
    run = set_up(folder, commands(tmp_path / "bin", **replaced), **env)
    assert run.returncode != 0 and run.stdout == ""
    assert re.match(said, run.stderr) and run.stderr.count("\n") == 1
    assert not (folder / ".venv").exists()


def test_a_folder_that_cannot_hold_an_environment_is_said(tmp_path: Path) -> None:
    run = set_up(checkout(tmp_path / "a:b"))
    assert run.returncode != 0
    assert re.match(r"folder = .*a:b.*: must be without ':'", run.stderr)


def test_an_environment_that_somebody_else_made_is_left_alone(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "checkout")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "precious").touch()
    run = set_up(folder)
    assert run.returncode != 0
    assert re.fullmatch(r"\.venv: exists and was not made by make; move it away.*\n", run.stderr)
    assert [path.name for path in (folder / ".venv").iterdir()] == ["precious"]


def test_an_environment_of_another_checkout_is_left_alone(tmp_path: Path) -> None:
    folder, other = checkout(tmp_path / "checkout"), tmp_path / "other"
    other.mkdir()
    (other / ".unfinished").touch()
    (other / "precious").touch()
    (folder / ".venv").symlink_to(other)
    run = set_up(folder)
    assert run.returncode != 0 and re.match(r"\.venv: is a link to .*; remove the link", run.stderr)
    assert (other / "precious").exists()


# -- a whole set-up, with packages made here -------------------------------------------------------


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """Write NAME-VERSION-py3-none-any.whl to `folder`."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{info}/RECORD,,"]
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        record.append(f"{path},sha256={digest.rstrip('=')},{len(text.encode())}")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "\n".join(record) + "\n")


def torch_wheel(folder: Path, cuda: str | None) -> Path:
    version = f"class version:\n    cuda = {cuda!r}\n    hip = None\n"
    wheel(folder, "torch", "1.0+cpu", {"torch/__init__.py": version})
    return folder


# An in-tree build backend, so that the package itself installs without setuptools.
BACKEND = """
import shutil
def build_editable(folder, *_):
    return shutil.copy("own-1-py3-none-any.whl", folder).rpartition("/")[2]
def get_requires_for_build_editable(*_):
    return []
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "own"
version = "1"
"""


@pytest.mark.slow
def test_a_failed_set_up_ends_in_one_line_and_the_next_one_repairs_it(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "a checkout", "setuptools==1\ntorch==1.0+cpu\n", PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    wheel(folder, "own", "1", {})
    wheel(tmp_path / "index", "setuptools", "1", {})
    common = {"PIP_FIND_LINKS": str(tmp_path / "index")}

    run = set_up(folder, **common, TORCH_INDEX=str(tmp_path))
    assert run.returncode != 0 and not (folder / ".venv" / ".ready").exists()
    said = run.stderr.strip().splitlines()
    assert len(said) == 1
    assert re.match(r"\.venv: TORCH_INDEX = .*: ERROR: No matching distribution", said[0])
    assert "; run make again, if a download" in said[0] and ".venv/setup.log" in said[0]

    cuda = torch_wheel(tmp_path / "cuda", "13.0")
    run = set_up(folder, **common, TORCH_INDEX=str(cuda))
    assert run.returncode != 0 and not (folder / ".venv" / ".ready").exists()
    assert re.match(r"\.venv: torch is built for CUDA 13\.0: must be the CPU build; ", run.stderr)

    # The same version again: only an environment made anew takes the other file.
    cpu = torch_wheel(tmp_path / "cpu", None)
    run = set_up(folder, **common, TORCH_INDEX=str(cpu))
    assert run.returncode == 0 and run.stderr == ""
    assert (folder / ".venv" / ".ready").exists()
    assert not (folder / ".venv" / ".unfinished").exists()

    run = set_up(folder)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
