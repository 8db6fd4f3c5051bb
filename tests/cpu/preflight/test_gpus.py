"""What nvidia-smi prints, read and judged. The lines are as its CSV format writes them."""

from pathlib import Path

import pytest

from peergrad.preflight import gpus as module
from peergrad.preflight.gpus import check_gpus, judge, read_gpus, read_processes, visible
from peergrad.preflight.probe import Probe
from peergrad.preflight.report import Found
from tests.waiting import PATIENCE_SECONDS

H100 = "NVIDIA H100 80GB HBM3, 580.95.05, 81559"
IDLE, GOOD = "0x0000000000000001", f"{H100}, 4, 0, 0x0000000000000001"
FIRST = "GPU-bc5610b9-79c8-fedd-8899-07539c7f868a"
SECOND = "GPU-8c35f4c9-4dff-c9a2-866f-afb5d82e1dd7"


def listing(*rows: str) -> str:
    return "".join(
        f"{i}, {uuid}, {row}\n"
        for i, (uuid, row) in enumerate(zip((FIRST, SECOND), rows, strict=False))
    )


def wrong(*rows: str, processes: str = "") -> tuple[str, ...]:
    return judge(read_gpus(listing(*rows)), read_processes(processes)).wrong


def test_idle_gpus_are_good_and_say_what_they_are() -> None:
    found = judge(read_gpus(listing(GOOD, GOOD)), [])
    assert found.wrong == found.unknown == ()
    assert found.facts == {"gpu model": "NVIDIA H100 80GB HBM3", "driver": "580.95.05"}
    (first, _) = read_gpus(listing(GOOD, GOOD))
    assert (first.uuid, first.total, first.used, first.reasons) == (FIRST, "81559", "4", IDLE)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (f"{H100}, 4, 3, {IDLE}", "gpu 0 ecc = 3: uncorrected memory errors"),
        (
            f"{H100}, 4, 0, 0x0000000000000048",
            "clock = '0x0000000000000048': hardware slowdown, hardware thermal slowdown is active",
        ),
        (f"{H100}, 4, 0, 0x0000000000000080", "power brake is active"),
        (f"{H100}, 4, 0, 0x0000000000000020", "software thermal slowdown is active"),
        (f"{H100}, 61000, 0, {IDLE}", "gpu 0 memory = '61000 MiB': of 81559 MiB in use, by a"),
        (f"{H100}, 4, 0, [GPU requires reset]", "gpu 0 = '[GPU requires reset]': nvidia-smi says"),
        (f"{H100}, 4, [Unknown Error], {IDLE}", "gpu 0 = '[Unknown Error]': nvidia-smi says so"),
    ],
)
def test_each_fault_is_one_line(row: str, said: str) -> None:
    (line,) = wrong(row, GOOD)
    assert said in line and "; " in line and "\n" not in line


def test_the_power_limit_of_a_busy_gpu_is_no_fault() -> None:
    assert wrong(f"{H100}, 4, 0, 0x0000000000000004") == ()


def test_what_a_gpu_does_not_tell_is_not_called_good() -> None:
    found = judge(read_gpus(listing(f"{H100}, 4, [N/A], [N/A]")), [])
    assert found.wrong == ()
    assert found.unknown == ("memory errors of GPUs", "slowdown of GPUs")


def test_left_over_processes_are_named_with_their_program() -> None:
    text = f"{SECOND}, 4711, 61000, /usr/bin/python3, odd name\n"
    (line,) = wrong(GOOD, GOOD, processes=text)
    assert line.startswith(
        "gpu 1 memory = '4 MiB': is used by /usr/bin/python3, odd name (pid 4711"
    )
    assert wrong(GOOD, processes=text) == ()  # on a GPU that is not ours
    served = f"{FIRST}, 12, 30, nvidia-cuda-mps-server\n"
    assert wrong(GOOD, processes=served) == ()


def test_models_must_not_be_mixed() -> None:
    (line,) = wrong(GOOD, GOOD.replace("H100", "A100"))
    assert line.startswith("gpus = 'NVIDIA A100 80GB HBM3, NVIDIA H100 80GB HBM3': are not of one")


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        (None, "01"),
        ("", ""),
        ("1", "1"),
        ("1,0", "10"),
        (SECOND, "1"),
        ("GPU-8c", "1"),
        ("0,7,1", "0"),
    ],
)
def test_only_those_that_cuda_shows_count(devices: str | None, indices: str) -> None:
    found = visible(read_gpus(listing(GOOD, GOOD)), devices)
    assert "".join(gpu.index for gpu in found) == indices


def test_something_else_than_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="nvidia-smi printed 'Unable to determine"):
        read_gpus("Unable to determine the device handle for GPU0: Unknown Error\n")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, to be written."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(module, "SECONDS", PATIENCE_SECONDS)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    return program


def test_an_older_driver_is_asked_by_the_older_name(nvidia_smi: Path) -> None:
    """And GPUs are counted."""
    nvidia_smi.write_text(
        f"""#!/bin/sh
case "$1" in
*clocks_event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'
    exit 2 ;;
*query-gpu*) printf '{listing(GOOD, GOOD)}' ;;
esac
"""
    )
    number, found = check_gpus(2)
    assert number == 2 and found.wrong == () and found.facts
    _, found = check_gpus(8)
    assert found.wrong[0].startswith("gpus = 2: 8 are asked for; ")
    assert check_gpus(None)[0] == 2


def test_a_driver_that_hangs_or_fails_is_said(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    (line,) = check_gpus(8)[1].wrong
    assert "nvidia-smi ended with status 6 (No devices were found)" in line
    nvidia_smi.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(module, "SECONDS", 0.2)
    (line,) = check_gpus(8)[1].wrong
    assert line.startswith("gpus = 8: nvidia-smi does not answer within ")


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_gpus(None) == (0, Found())
    (line,) = check_gpus(8)[1].wrong
    assert line.startswith("gpus = 8: nvidia-smi is not there; ")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("""print('{"gpus": 7, "nccl": "2.28.9"}')""", "gpus = 8: torch sees 7; "),
        ("raise SystemExit('CUDA error: no device')", "torch fails: CUDA error: no device; "),
        ("import time; time.sleep(60)", "torch has not found them within 2 s; "),
    ],
)
def test_what_torch_makes_of_them(program: str, said: str) -> None:
    with Probe(8, program) as probe:
        (line,) = probe.found(2.0 if "sleep" in program else PATIENCE_SECONDS).wrong
    assert said in line


def test_torch_says_which_nccl_it_uses() -> None:
    with Probe(8, """print('{"gpus": 8, "nccl": "2.28.9"}')""") as probe:
        found = probe.found(PATIENCE_SECONDS)
    assert found.wrong == () and found.facts == {"nccl that torch uses": "2.28.9"}
    with Probe(0) as probe:
        assert probe.found(1.0).facts is None
