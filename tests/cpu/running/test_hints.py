"""What was probably meant: no hint names what does not exist, and the doc's names all lead home."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from peergrad.running.hints import (
    ABROAD,
    ANYWHERE,
    distance,
    likeliest,
    meant,
    plain,
    remedy,
    unknown_key,
    unknown_option,
)
from peergrad.running.keys import groups, is_free, is_section, keys
from peergrad.running.synonyms import ABSENT, MEANT, VALUES

DOC = Path(__file__).parents[3] / "docs" / "migrating.md"
LEAVES = [key for key in keys() if not is_section(key)]
NAME = re.compile(r"[a-z_0-9]+(?:\.[a-z_0-9-]+)+")


def named(phrase: str) -> set[str]:
    """The keys in a phrase, and ``group=option``."""
    found = {key.rstrip(".") for key in NAME.findall(phrase) if not key[0].isdigit()}
    return found | {f"{g}={o}" for g in groups() for o in groups()[g] if f"{g}={o}" in phrase}


@pytest.mark.parametrize("phrase", sorted({p for some in MEANT.values() for p in some}))
def test_every_phrase_names_what_exists(phrase: str) -> None:
    assert named(phrase)
    for key in named(phrase):
        group, _, option = key.partition("=")
        assert key in keys() or is_free(key) or option in groups().get(group, []), key
    for key, value in re.findall(r"([a-z_0-9]+(?:\.[a-z_0-9]+)+)=([a-z_0-9.-]+)", phrase):
        members = getattr(getattr(keys()[key], "enum_type", None), "__members__", None)
        assert members is None or value.rstrip(",") in members, f"{key}={value}"
    group = re.match(r"([a-z]+)=(\w+)", phrase)
    assert group is None or group[2] in groups()[group[1]]


def test_no_name_is_an_existing_key_or_both_known_and_absent() -> None:
    assert not set(MEANT) & set(keys())
    assert not set(MEANT) & ABSENT
    assert all(name == plain(name) for name in [*MEANT, *ABSENT])
    options = {f"{group}={option}" for group in groups() for option in groups()[group]}
    assert not set(MEANT) & options


def test_every_value_belongs_to_some_choice() -> None:
    members = {name for node in keys().values() for name in getattr(node, "enum_type", None) or ()}
    names = {getattr(member, "name", "") for member in members}
    assert set(VALUES.values()) <= names


# The tables of docs/migrating.md.


def rows() -> Iterator[tuple[str, str]]:
    for line in DOC.read_text().splitlines():
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if line.startswith("| ") and len(cells) == 3 and cells[0] not in ("theirs", "mark"):
            yield cells[0], cells[1]


def theirs(cell: str) -> list[tuple[str, str]]:
    """The (name, value) pairs in backticks; without a name of its own, a value is skipped."""
    found = []
    for text in re.findall(r"`([^`]+)`", cell):
        flag = re.fullmatch(r"(--[a-z-]+)(?: ([\w.-]+))?", text)
        option = re.fullmatch(r"([a-z_0-9][a-z_0-9.]*)(?:: (.+))?", text)
        if flag:
            found.append((flag[1], flag[2] or ""))
        elif option:
            values = [value.strip() for value in (option[2] or "").split(",")]
            found += [(option[1], value) for value in values]
    return found


def ours(cell: str) -> set[str]:
    """The keys in backticks, with ``algo.`` put back, without values."""
    found = set()
    for text in re.findall(r"`([^`]+)`", cell):
        for word in re.split(r"[ ,]+", text):
            key = word.partition("=")[0]
            found |= {name for name in (key, f"algo.{key}") if name in keys() and name != "algo"}
            found |= {word} if re.fullmatch(r"algo=\w+", word) else set()
    return found


# Cells with keys of ours beside words that no user would type as a key.
PROSE = [
    "decoupled without proximal logprobs",
    "(aggregation is fixed)",
    "(no entropy bonus)",
    "level sequence, action mask, metric ratio, agg mean",
    "the same, agg sum",
    "action clamp, level token; level sequence, agg mean",
    "(default)",
    "(log ratio held within ±20)",
    "`seq-mean-token-mean`, `seq-mean-token-sum`",
    'the same as `"lo_hi"`',
]


def wanted() -> dict[tuple[str, str], set[str]]:
    """(name, value) -> our keys in all rows that list it; values count as names in verl's rows."""
    found: dict[tuple[str, str], set[str]] = {}
    for left, right in rows():
        for pair in theirs(left) if ours(right) else []:
            found.setdefault(pair, set()).update(ours(right))
    return found


def reached(name: str, value: str) -> set[str]:
    keys_named = {key for phrase in meant(name, value) for key in named(phrase)}
    return {key.partition("=")[0] if "." in key else key for key in keys_named}


def test_cells_that_are_prose() -> None:
    assert [left for left, right in rows() if ours(right) and not theirs(left)] == PROSE


@pytest.mark.parametrize(("name", "value"), sorted(wanted()))
def test_names_of_other_trainers_lead_to_the_keys_of_the_document(name: str, value: str) -> None:
    if plain(name) not in keys() and name != "kimi15_tau":  # its row speaks of its neighbours
        assert reached(name, value) & wanted()[name, value]


def test_every_key_of_the_document_is_reached_from_a_name_beside_it() -> None:
    asked = {key for some in wanted().values() for key in some}
    found = {key for pair, some in wanted().items() for key in some & reached(*pair)}
    itself = {plain(name) for name, _ in wanted()}
    assert asked - found - itself == set()


def without_counterpart() -> list[tuple[str, str]]:
    names = {name for name, _ in wanted()}
    pairs = {pair for left, right in rows() if not right for pair in theirs(left)}
    return sorted(p for p in pairs if p not in wanted() and (p[1] or p[0] not in names))


@pytest.mark.parametrize(("name", "value"), without_counterpart())
def test_what_has_no_counterpart_points_to_the_document(name: str, value: str) -> None:
    said = remedy(name, value)
    refused = {"did you mean rollout.top_p?", "did you mean rollout.top_k?"}  # and it says why
    assert plain(name) in keys() or said == ABROAD or said in refused


# Misspelt keys.


def typos(leaf: str) -> list[str]:
    """One letter left out, doubled, replaced, two exchanged: at the start, the middle, the end."""
    found = set()
    for i in {0, len(leaf) // 2, len(leaf) - 1}:
        found |= {leaf[:i] + leaf[i + 1 :], leaf[:i] + leaf[i] + leaf[i:]}
        found.add(leaf[:i] + ("q" if leaf[i] != "q" else "z") + leaf[i + 1 :])
        if i + 1 < len(leaf):
            found.add(leaf[:i] + leaf[i + 1] + leaf[i] + leaf[i + 2 :])
    return sorted(found - {leaf, ""})


@pytest.mark.parametrize("key", LEAVES)
def test_a_typing_error_in_the_last_name_leads_back(key: str) -> None:
    section, _, leaf = key.rpartition(".")
    for typo in typos(leaf):
        wrong = f"{section}.{typo}"
        if wrong in keys():
            continue
        found = {name for phrase in meant(wrong) for name in named(phrase)}
        assert key in found, (wrong, found)


@pytest.mark.parametrize("key", LEAVES)
def test_a_key_without_its_section_or_in_a_wrong_one_is_found_unless_common(key: str) -> None:
    leaf = key.rpartition(".")[2]
    same = [other for other in keys() if other.rpartition(".")[2] == leaf]
    if len(same) <= 3 and leaf not in keys() and leaf not in groups():
        assert meant(leaf) == same


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("optim.learning_rate", "1", "did you mean optim.lr?"),
        ("lr", "1", "did you mean optim.lr?"),
        ("optm.eps", "1", "did you mean optim.eps?"),
        ("alg", "dapo", "did you mean algo?"),
        ("experimnt", "x", "did you mean experiment?"),
        ("kl.coef", "1", "did you mean algo.kl.coef?"),
        ("algo/kl", "1", "did you mean algo.kl?"),
        ("run.steps.x", "1", "did you mean run.steps?"),
        ("algo.clip_low", "1", "did you mean algo.surrogate.clip_low?"),
        ("optim.beta", "1", "did you mean optim.beta1 or optim.beta2?"),
        ("beta", "1", "did you mean algo.kl.coef with algo.kl.place=loss?"),
        ("algo.advantage.epsilon", "1", "did you mean algo.advantage.eps?"),
        ("rollout.servers.tp", "2", "did you mean rollout.servers.tensor?"),
        ("train_batch_size", "1", "did you mean rollout.batch_size (in rollouts, not prompts)?"),
        ("every", "1", "did you mean evaluation.every or checkpoint.every?"),
        ("eval_every", "1", "did you mean evaluation.every?"),
        ("warmup", "1", "did you mean optim.warmup_steps?"),
        ("data.path", "x", "did you mean data.source?"),
        ("loss_agg_mode", "token-mean", "did you mean algo.aggregation=token_mean?"),
        ("algorithm.adv_estimator", "gae", ABROAD),
        ("loss_mode", "geo_mean", ABROAD),
        (
            "loss_type",
            "luspo",
            "did you mean algo.surrogate.kind=gspo with algo.aggregation=seq_mean_token_sum?",
        ),
        ("a.b", "1", ANYWHERE),
        ("foo", "1", ANYWHERE),
        ("optim.foo", "1", ANYWHERE),
        ("checkpoint.name", "x", ANYWHERE),  # run.name is another thing
        ("tokens", "1", ANYWHERE),  # too many keys have the word
    ],
)
def test_remedies(key: str, value: str, hint: str) -> None:
    assert remedy(key, value) == hint


EVERYDAY = (
    "learning_rate lr batch_size train_batch_size n num_generations n_samples_per_prompt kl_coef "
    "beta kl_loss_coef max_response_length max_completion_length max_new_tokens tp pp seed steps "
    "tensor_model_parallel_size max_steps num_epochs output_dir save_freq save_interval wandb "
    "model_name_or_path tokenizer gpu_memory_utilization rollout.n"
)


@pytest.mark.parametrize("name", EVERYDAY.split())
def test_everyday_names_are_known(name: str) -> None:
    assert remedy(name).startswith("did you mean ")


def test_lines() -> None:
    assert unknown_key("algo.surrogate.clip_lo", "0.1") == (
        "algo.surrogate.clip_lo: there is no such key in algo.surrogate; "
        "did you mean algo.surrogate.clip_low?"
    )
    assert unknown_key("lr") == "lr: there is no such key; did you mean optim.lr?"
    assert unknown_option("data", "json") == (
        "data = 'json': must be one of arithmetic, gsm8k, jsonl; did you mean data=jsonl?"
    )
    assert unknown_option("data", "zzz") == (
        "data = 'zzz': must be one of arithmetic, gsm8k, jsonl; choose one of them"
    )


@pytest.mark.parametrize(
    ("option", "likely"),
    [
        ("algo=grpo", "algo=deepseekmath"),
        ("algo=ppo", "algo=deepseekmath (there is no critic)"),
        ("algo=dappo", "algo=dapo"),
        ("algo=DAPO", "algo=dapo"),
        ("algo=dr-grpo", "algo=dr_grpo"),
        ("algo=dapo.yaml", "algo=dapo"),
        ("optim=adam", "optim=adamw"),
        ("rollout=sglang", "rollout=managed"),
        ("rollout=vllm", "rollout=managed (the engine is SGLang)"),
        ("parallel=tp2", "parallel=tensor2"),
        ("parallel=tp4", "parallel.tensor=4"),
        ("experiment=gsm8k", "experiment=gsm8k_qwen3_0p6b"),
        ("experiment=quick", "experiment=quickstart_cpu"),
    ],
)
def test_likeliest_options(option: str, likely: str) -> None:
    group, _, name = option.partition("=")
    assert unknown_option(group, name).endswith(f"; did you mean {likely}?")


@pytest.mark.parametrize(
    ("value", "names", "likely"),
    [
        ("bf16", ["float32", "bfloat16"], ["bfloat16"]),
        ("fp32", ["float32", "bfloat16"], ["float32"]),
        ("BFloat16", ["float32", "bfloat16"], ["bfloat16"]),
        ("token-mean", ["seq_mean_token_mean", "token_mean"], ["token_mean"]),
        ("cos", ["constant", "linear", "cosine"], ["cosine"]),
        ("xyz", ["constant", "linear", "cosine"], []),
    ],
)
def test_likeliest_values(value: str, names: list[str], likely: list[str]) -> None:
    assert likeliest(value, names) == likely


@pytest.mark.parametrize(
    ("one", "other", "errors"),
    [("lr", "lr", 0), ("lr", "l", 1), ("lr", "rl", 1), ("beta", "bets", 1), ("", "abc", 3),
     ("epochs", "epcohs", 1), ("seed", "steps", 3)],
)  # fmt: skip
def test_distance(one: str, other: str, errors: int) -> None:
    assert distance(one, other) == distance(other, one) == errors
