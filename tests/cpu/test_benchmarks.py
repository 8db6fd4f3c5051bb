"""The arithmetic behind the benchmarks' figures, by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.flops import forward_flops, mfu, peak_tflops
from benchmarks.summary import (
    Spread,
    aligned,
    all_keys,
    middle,
    phase_seconds,
    spread,
    summarise,
)
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.rope import Rope
from peergrad.parallel.hf.tensors import layer_weights

SHAPE = Shape(
    family="qwen3",
    layers=2,
    hidden=4,
    heads=3,
    kv_heads=1,
    head_dim=2,
    ffn=8,
    vocab=10,
    max_length=64,
    norm_eps=1e-6,
    rope=Rope(1e6),
    qk_norm=True,
    tied=True,
)


def test_spread_is_median_and_linear_percentiles() -> None:
    # Five sorted values lie at 0, .25, .5, .75, 1: the 10th percentile is .4 of the way from the
    # first to the second, the 90th .6 of the way from the fourth to the fifth.
    found = spread([10.0, 2.0, 1.0, 4.0, 3.0])
    assert found == Spread(median=3.0, p10=pytest.approx(1.4), p90=pytest.approx(7.6), count=5)
    assert found.text(".1f") == "3.0 (1.4-7.6)"


def test_one_outlier_leaves_the_median_alone() -> None:
    assert spread([1.0, 1.0, 1.0, 1.0, 500.0]).median == 1.0


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no measured step is left"):
        spread([])


def test_phases_and_rest_add_up_to_the_step() -> None:
    row = {"time/rollout": 2.0, "reward/mean": 0.4, "time/update": 0.5, "time/step": 2.75}
    found = phase_seconds(row)
    assert found == {"rollout": 2.0, "update": 0.5, "rest": 0.25, "step": 2.75}
    assert list(found)[-2:] == ["rest", "step"]


def test_parts_and_other_add_up_to_their_phase_and_phases_to_the_step() -> None:
    # A part's block ends before its phase's, so that it is the earlier key.
    row = {
        "time/rollout": 2.0,
        "time/sync/pause": 0.125,
        "time/sync/load/send": 0.25,
        "time/sync/load": 0.5,
        "time/sync": 1.0,
        "time/step": 3.5,
    }
    found = phase_seconds(row)
    assert found == {
        "rollout": 2.0,
        "sync": 1.0,
        "sync/pause": 0.125,
        "sync/load": 0.5,
        "sync/load/send": 0.25,
        "sync/load/other": 0.25,
        "sync/other": 0.375,
        "rest": 0.5,
        "step": 3.5,
    }
    assert list(found)[:3] == ["rollout", "sync", "sync/pause"]
    assert list(found)[-3:] == ["sync/other", "rest", "step"]


def test_a_phase_without_a_time_of_its_own_is_its_parts() -> None:
    found = phase_seconds({"time/sync/pause": 0.25, "time/sync/load": 0.5, "time/step": 1.0})
    assert (found["sync"], found["sync/other"], found["rest"]) == (0.75, 0.0, 0.25)


def test_what_only_some_steps_have_keeps_its_place_and_is_zero_elsewhere() -> None:
    rows = [{"rollout": 1.0, "step": 2.0}, {"rollout": 1.0, "old": 0.5, "step": 3.0}]
    assert all_keys(rows) == ["rollout", "old", "step"]
    assert aligned(rows) == [{"rollout": 1.0, "old": 0.0, "step": 2.0}, rows[1]]


def test_the_middle_half_adds_up_and_a_slow_step_leaves_it_alone() -> None:
    # Of four steps the second and the third are kept, in order of their seconds.
    rows = [
        {"update": 90.0, "rest": 10.0, "step": 100.0},
        {"update": 1.0, "rest": 0.0, "step": 1.0},
        {"update": 2.0, "rest": 1.0, "step": 3.0},
        {"update": 1.0, "rest": 1.0, "step": 2.0},
    ]
    assert middle(rows) == {"update": 1.5, "rest": 1.0, "step": 2.5}
    assert middle(rows[:1]) == rows[0]


def test_summarise_goes_by_quantity() -> None:
    found = summarise([{"update": 1.0, "step": 4.0}, {"update": 3.0, "step": 8.0}])
    assert {key: value.median for key, value in found.items()} == {"update": 2.0, "step": 6.0}


def test_forward_flops_by_hand() -> None:
    # Query and output 4 x 6 each, key and value 4 x 2 each, MLP three of 4 x 8.
    assert layer_weights(SHAPE) == 24 + 24 + 8 + 8 + 96 == 160
    # Sequences of 3 and 2 tokens: 6 + 3 pairs of query and key, 4 FLOPs in each of 6 channels.
    matrices, attention, head = 2 * 160 * 5, 4 * 6 * 9, 2 * 4 * 10 * 4
    assert (matrices, attention, head) == (1600, 216, 320)
    assert forward_flops(SHAPE, [[3], [2]], scored=4) == 2 * (1600 + 216) + 320 == 3952
    # An answer of 2 to a prompt of 3: 6 pairs of the prompt, 4 + 5 of the answer.
    assert forward_flops(SHAPE, [[3, 2]], scored=4) == 2 * (1600 + 4 * 6 * 15) + 320


def test_mfu_is_achieved_over_peak() -> None:
    # Reference and update are four forward passes: 15808 FLOPs in 2 s, of 1e-8 TFLOP/s = 1e4.
    assert mfu(4 * 3952, seconds=2.0, peak=1e-8) == pytest.approx(0.7904)


def test_peak_goes_by_the_most_special_name() -> None:
    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("Some Other Device") is None


@pytest.mark.slow  # it starts three processes that load torch
def test_control_plane_benchmark_runs(tmp_path: Path) -> None:
    """Every cost at two sizes, its growth, and what travels; the peers do the same work."""
    script, out = Path(__file__).parents[2] / "benchmarks" / "control_plane.py", tmp_path / "o.json"
    command = [sys.executable, str(script), "--tiny", "--repeats=1", f"--out={out}"]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    summary = {(row["cost"], row["way"]): row for row in result["summary"]}
    for cost in ("engine's answers read", "record", "read back"):
        assert {way for name, way in summary if name == cost} == {"peergrad", "lines"}
    short = "the same of short ones"  # of one size
    for cost in ("answers asked for and read", short):
        assert {way for name, way in summary if name == cost} == {"peergrad", "httpx"}
    for (cost, way), row in summary.items():
        mine = [r for r in result["records"] if (r["cost"], r["way"]) == (cost, way)]
        assert len(mine) == (1 if cost == short else 2)
        small, large = mine[0]["tokens"], mine[-1]["tokens"]
        assert cost == short or small < 20_000 * 1.5 < large
        one, two = (r["seconds"]["median"] for r in (mine[0], mine[-1]))
        assert two == pytest.approx(one * (large / small) ** row["growth"])
        assert row["seconds_per_million"] == pytest.approx(two / large * 1e6)
    # Token, logprob and four characters of text; a prompt and an id now and then.
    assert 8 < summary["all groups to another rank", "peergrad"]["bytes_per_token"] < 16


def test_the_logprob_benchmark_of_a_cpu_measures_every_way() -> None:
    import logprob_cpu

    records = logprob_cpu.measure(logprob_cpu.TINY, [1])
    assert [sum(r["table"] == table for r in records) for table in logprob_cpu.TABLES] == [4, 3, 5]
    for record in records:
        times = record["milliseconds"]
        assert 0 < times["forward"]["median"] <= times.get("both", times["forward"])["median"]


@pytest.mark.slow
def test_logprob_benchmark_runs_and_is_right(tmp_path: Path) -> None:
    """Small sizes on the CPU: what can run does, what cannot says why, and none is wrong. Peers are
    not compiled, which would take a minute."""
    script, out = Path(__file__).parents[2] / "benchmarks" / "logprob.py", tmp_path / "out.json"
    command = [sys.executable, str(script), "--tiny", "--warmup=1", "--repeats=2"]
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    subprocess.run([*command, f"--out={out}"], check=True, capture_output=True, env=env)
    records = json.loads(out.read_text())["records"]
    assert records[0]["floors"].keys() == {"bytes_per_second", "flops_per_second"}
    measured = [r for r in records if "seconds" in r]
    assert {r["method"].split(",")[0].split()[0] for r in measured} >= {"peergrad", "megatron"}
    for record in records[1:]:
        if record["method"].startswith(("peergrad", "torch eager", "megatron")):
            assert "seconds" in record or "need a GPU" in record["missing"], record
    ours = [r for r in measured if r["method"].startswith("peergrad")]
    for record in ours:
        rounded = record["sizes"]["hidden"] and "float32" not in record["method"]
        assert record["errors"]["logp"] < (3e-2 if rounded else 2e-6), record
        assert record["errors"].get("gradient", 0) < 5e-3, record
