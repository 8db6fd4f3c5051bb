"""What a step costs beside the model: every cost that grows with its answer tokens, on one core.

    python benchmarks/control_plane.py            # 1, 4 and 16 million answer tokens, 10 minutes
    python benchmarks/control_plane.py --tiny     # seconds: shows that the script works

The groups are made up: 8 answers a prompt of 256 tokens, 128 to 1024 tokens an answer, random ids
below 151936 and random logprobs, so that nothing compresses better than in earnest. The way
``lines`` is what recordings and JSON would cost in pure Python (``json_lines.py``), measured in the
same run. Every function is called once on the smallest size before its first measurement.

``growth`` is the exponent p of seconds ~ tokens^p from the smallest size to the largest: 1 is
linear. What travels to all ranks is measured between two gloo ranks on this machine.
"""

import argparse
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch.distributed as dist
from client import GROUP, LONG, SHORT, as_sglang, cpu_seconds
from json_lines import parse_one_by_one, read_lines, write_lines
from machine import describe, load_average, result_path, title
from summary import spread, write_result
from synthetic import Work, make_groups
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from peergrad.algo.grading import AlgoState, grade
from peergrad.algo.report import rollout_statistics
from peergrad.algo.samples import make_samples
from peergrad.config import AlgoConfig
from peergrad.data import Group, Rollout
from peergrad.recording import read_groups, write_groups
from peergrad.rollout.answers import Asked, parse_rollout, read_answers
from peergrad.rollout.recorder import Recorder
from peergrad.rollout.stream import Taken
from peergrad.rollout.text import Decode

VOCAB = 151936
TOKENS_A_GROUP = 8 * 576
DISTINCT_ANSWERS = 50  # bodies in memory; a step's worth would be gigabytes of text
CLIENT_TOKENS = 4_000_000  # more take httpx many minutes
FILES = {"peergrad": "groups.parquet", "lines": "groups.jsonl.zst"}
ASKED = Asked(identity="run", oldest=0, newest=0, max_new_tokens=1024, vocab_size=VOCAB)
Case = tuple[str, str, Callable[[], object], Callable[[], None]]
"""Cost, way, what is measured, and what is done after each time, unmeasured."""


def nothing() -> None: ...


def new_groups(tokens: int) -> list[Group]:
    """About ``tokens`` answer tokens."""
    rng = np.random.default_rng(1)

    def filled(rollout: Rollout) -> Rollout:
        size = rollout.tokens.size
        return replace(
            rollout, logprobs=-rng.exponential(0.5, size).astype(np.float32), text="x" * 4 * size
        )

    work = Work(groups=max(2, round(tokens / TOKENS_A_GROUP)))
    return [
        replace(group, rollouts=tuple(map(filled, group.rollouts)))
        for group in make_groups(work, VOCAB)
    ]


def answer_body(group: Group) -> bytes:
    """As SGLang answers /generate."""
    return msgspec.json.encode(
        [
            as_sglang(one.text, one.tokens.tolist(), [float(str(x)) for x in one.logprobs])
            for one in group.rollouts
        ]
    )


def parse_peergrad(body: bytes) -> list[Rollout | None]:
    return [parse_rollout(one, asked=ASKED) for one in read_answers(body, "URL")]


def word_decoder() -> Decode:
    """Of a tokenizer with ``VOCAB`` made-up tokens of bytes, as those of large vocabularies are."""
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCAB)}, "w0"))
    tokenizer.decoder = ByteLevel()
    decode: Decode = partial(tokenizer.decode_batch, skip_special_tokens=False)
    return decode


def texts(groups: Sequence[Group], decode: Decode) -> list[list[str]]:
    """As ``rollout.text.Decoding`` makes them, a group at a time."""
    return [decode([one.tokens.tolist() for one in group.rollouts]) for group in groups]


def parse_lines(body: bytes) -> list[Rollout]:
    return parse_one_by_one(body.replace(b'"run:0"', b'"0"'))


def cases(groups: list[Group], folder: Path) -> Iterator[Case]:
    bodies = [answer_body(group) for group in groups[:DISTINCT_ANSWERS]]
    all_bodies = [bodies[index % len(bodies)] for index in range(len(groups))]
    parquet, lines = folder / FILES["peergrad"], folder / FILES["lines"]
    recorder = Recorder(folder)
    yield (
        "engine's answers read",
        "peergrad",
        lambda: [parse_peergrad(body) for body in all_bodies],
        nothing,
    )
    yield (
        "engine's answers read",
        "lines",
        lambda: [parse_lines(body) for body in all_bodies],
        nothing,
    )
    decode = word_decoder()
    yield "answers' texts", "peergrad", lambda: texts(groups, decode), nothing
    yield "record", "peergrad", lambda: write_groups(parquet, groups), nothing
    yield "record", "lines", lambda: write_lines(lines, groups), nothing
    yield (
        "record, of which the step waits",
        "peergrad",
        lambda: recorder.put(groups, 0),
        recorder.wait,
    )
    recorder.close()
    yield "read back", "peergrad", lambda: read_groups(parquet), nothing
    yield "read back", "lines", lambda: read_lines(lines), nothing
    parquet.unlink()
    lines.unlink()
    yield "statistics", "peergrad", lambda: rollout_statistics(groups, version=0), nothing
    yield "make samples", "peergrad", lambda: make_samples(groups), nothing
    samples, algo = make_samples(groups), AlgoConfig()
    state = AlgoState(0.0)
    yield "grade", "peergrad", lambda: grade(groups, samples, algo, state, max_tokens=1024), nothing
    data = pickle.dumps(Taken(groups))
    yield "collector's pipe: pickle", "peergrad", lambda: pickle.dumps(Taken(groups)), nothing
    yield "collector's pipe: unpickle", "peergrad", lambda: pickle.loads(data), nothing


def timed(function: Callable[[], object], after: Callable[[], None], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        kept = function()
        seconds.append(time.perf_counter() - began)
        del kept
        after()
    return seconds


def record(cost: str, way: str, tokens: int, seconds: list[float], **more: Any) -> dict[str, Any]:
    found = spread(seconds)
    print(f"{cost:33} {way:8} {tokens:>11,} {found.text('.4f'):>26} s", flush=True)
    million = found.median / tokens * 1e6
    return {
        "cost": cost,
        "way": way,
        "tokens": tokens,
        "seconds": asdict(found),
        "each": seconds,
        "seconds_per_million": million,
        **more,
    }


def on_one_core(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for _, _, function, after in cases(new_groups(min(sizes)), Path(folder)):
            function()
            after()
        for size in sizes:
            groups = new_groups(size)
            tokens = sum(one.tokens.size for group in groups for one in group.rollouts)
            for cost, way, function, after in cases(groups, Path(folder)):
                more: dict[str, Any] = {}
                seconds = timed(function, after, repeats)
                if cost == "record":
                    more = {"bytes": (Path(folder) / FILES[way]).stat().st_size}
                records.append(record(cost, way, tokens, seconds, **more))
    return records


def broadcast(rank: int, sizes: Sequence[int], repeats: int, folder: str) -> None:
    """``Mesh.share`` of a step's groups: what ``torch.distributed`` makes of an object."""
    file = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
    records = []
    for size in (min(sizes), *sizes):  # the first is the warm-up
        taken = Taken(new_groups(size)) if rank == 0 else None
        seconds = []
        for _ in range(repeats):
            box: list[Any] = [taken]
            dist.barrier()
            began = time.perf_counter()
            dist.broadcast_object_list(box, src=0)
            dist.barrier()
            seconds.append(time.perf_counter() - began)
        if taken is not None:
            tokens = sum(one.tokens.size for group in taken.groups for one in group.rollouts)
            records.append((tokens, seconds, len(pickle.dumps(taken))))
    if rank == 0:
        (Path(folder) / "records").write_bytes(pickle.dumps(records[1:]))
    dist.destroy_process_group()


def between_ranks(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=broadcast, args=(rank, sizes, repeats, folder))
            for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        found = pickle.loads((Path(folder) / "records").read_bytes())
    return [
        record("all groups to another rank", "peergrad", tokens, seconds, bytes=size)
        for tokens, seconds, size in found
    ]


def of_the_client(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """CPU seconds to ask for a step's answers and read them: long ones, and a step of the
    quickstart's (128 groups)."""
    records = []
    for size in sizes:
        groups = max(2, round(size / TOKENS_A_GROUP))
        for way, seconds in cpu_seconds(LONG, groups, repeats):
            tokens = groups * GROUP * LONG[1]
            records.append(record("answers asked for and read", way, tokens, seconds))
    groups = 16 if max(sizes) < 1e6 else 128
    for way, seconds in cpu_seconds(SHORT, groups, repeats):
        tokens = groups * GROUP * SHORT[1]
        each = 1e3 * spread(seconds).median / groups
        cost = "the same of short ones"
        records.append(record(cost, way, tokens, seconds, milliseconds_per_group=each))
    return records


def growth(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds a million tokens at the largest size, and how they got there."""
    rows = []
    for key in dict.fromkeys((each["cost"], each["way"]) for each in records):
        mine = [each for each in records if (each["cost"], each["way"]) == key]
        small, large = mine[0], mine[-1]
        more = np.log(large["tokens"] / small["tokens"])
        power = (
            np.log(large["seconds"]["median"] / small["seconds"]["median"]) / more if more else 1
        )
        rows.append(
            {
                "cost": key[0],
                "way": key[1],
                "seconds_per_million": large["seconds_per_million"],
                "growth": float(power),
                "bytes_per_token": large.get("bytes", 0) / large["tokens"] or None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes = [20_000, 40_000] if options.tiny else [round(1e6 * x) for x in options.millions]
    repeats = 2 if options.tiny else options.repeats
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, as for all else
    described, before = describe(), load_average()
    print(f"{title(described)}\nload average {before}\n")
    records = on_one_core(sizes, repeats) + between_ranks(sizes, repeats)
    records += of_the_client([size for size in sizes if size <= CLIENT_TOKENS], repeats)
    rows = growth(records)
    print(f"\n{'cost':33} {'way':8} {'s per million':>13} {'growth':>7} {'bytes per token':>16}")
    for row in rows:
        size = f"{row['bytes_per_token']:.1f}" if row["bytes_per_token"] else ""
        print(
            f"{row['cost']:33} {row['way']:8} {row['seconds_per_million']:13.4f} "
            f"{row['growth']:7.2f} {size:>16}"
        )
    result = {
        **described,
        "load_average_before": before,
        "load_average_after": load_average(),
        "nice": os.nice(0),
        "repeats": repeats,
        "summary": rows,
        "records": records,
    }
    write_result(options.out or result_path(suffix="control-plane"), result)


if __name__ == "__main__":
    main()
