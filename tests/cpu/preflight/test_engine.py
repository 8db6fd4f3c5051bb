"""Whether Transformer Engine is whole: of its packages, and of its import beside the GPUs."""

import textwrap
from pathlib import Path

import pytest

from peergrad.config import Config, ParallelConfig, Spec
from peergrad.preflight.engine import asks_for_engine, check_packages, needs_engine
from peergrad.preflight.probe import Probe

WHOLE = {
    "transformer-engine": "2.11.0",
    "transformer-engine-torch": "2.11.0",
    "transformer-engine-cu13": "2.11.0",
}
TORCH = """
    class cuda:
        device_count = lambda: 2
        get_device_capability = lambda index: [(9, 0), ABLE][index]
        class nccl:
            version = lambda: (2, 30, 7)
    class ones:
        def __init__(self, *_, device): assert device[0] == "cuda"
        def item(self): pass
"""


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"transformer-engine": None}, "transformer-engine = None: parallel.spec=te needs it; "),
        ({"transformer-engine": "2.12.0"}, "= '2.12.0': megatron-core is for 2.9 to below 2.12; "),
        (
            {"transformer-engine-torch": None},
            "transformer-engine-torch = None: transformer-engine 2.11.0 needs the same version of ",
        ),
        ({"transformer-engine-cu13": "2.9.0"}, "transformer-engine-cu13 = '2.9.0': transformer-e"),
        ({"transformer-engine-cu13": None, "transformer-engine-cu12": "2.11.0"}, None),
    ],
)
def test_the_parts_are_of_one_version(changes: dict[str, str | None], line: str | None) -> None:
    found = check_packages(True, (WHOLE | changes).get).wrong
    assert len(found) == (line is not None) and (line or "") in "".join(found)
    assert not check_packages(False, {}.get).wrong
    for spec, asked, needed in (("auto", True, False), ("te", True, True), ("torch", False, False)):
        config = Config(parallel=ParallelConfig(spec=Spec[spec]))
        assert (asks_for_engine(config), needs_engine(config)) == (asked, needed)


@pytest.mark.parametrize(
    ("able", "engine", "line"),
    [
        ("(9, 0)", "def get_cudnn_version(): return 92400", None),
        ("(7, 5)", None, "gpu capability = 7.5: bfloat16 needs 8.0 (Ampere) or more; choose other"),
        ("(9, 0)", "def get_cudnn_version(): return 90501", "cudnn = 90501: Transformer Engine's "),
        (
            "(9, 0)",
            "raise OSError('libnccl.so:\\n not found')",
            "imported (OSError: libnccl.so: no",
        ),
    ],
)
def test_the_probe_loads_it(
    able: str, engine: str | None, line: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that runs, with stand-ins for what it imports."""
    (tmp_path / "torch.py").write_text(textwrap.dedent(TORCH).replace("ABLE", able))
    if engine is not None:
        (tmp_path / "transformer_engine").mkdir()
        for name in ("__init__", "pytorch"):
            (tmp_path / "transformer_engine" / f"{name}.py").write_text("")
        (tmp_path / "transformer_engine_torch.py").write_text(engine)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Probe(2, engine=True) as probe:
        found = probe.found(120.0)
    assert found.facts == {"nccl that torch uses": "2.30.7"}
    assert len(found.wrong) == (line is not None) and (line or "") in "".join(found.wrong)
