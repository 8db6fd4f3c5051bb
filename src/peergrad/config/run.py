"""Every section that has no file of its own: run, model, kernels, data, reward, ..."""

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from peergrad.config.rules import at_least, finite, optional_positive, require, seconds

Dtype = Enum("Dtype", ["float32", "bfloat16"])
RewardKind = Enum("RewardKind", ["arithmetic", "gsm8k", "math", "function"])
OnError = Enum("OnError", ["zero", "drop", "stop"])
Logprob = Enum("Logprob", ["auto", "fused_linear", "from_logits", "reference"])

LARGEST_REWARD = 1e9
"""Squares of larger ones, summed over a batch, leave float32."""

WANDB_REFUSES = "/\\#?%:"
"""Characters that W&B allows neither in a project nor in an identifier."""

TEMPLATE_OURS = {
    *("messages", "conversation", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""Arguments of a chat that are no variables of its template, or that follow from other keys."""


CHAT_ONLY = {"system": "null", "template_args": "{}", "continue_final_message": "false"}
"""Keys of ``data`` that only a chat has, and what takes them back where a preset has set them."""


def _is_time(text: str) -> bool:
    with suppress(ValueError):
        datetime.fromisoformat(text)
        return True
    return False


@dataclass(kw_only=True)
class RunConfig:
    name: str = "run"
    """Folder of this run under ``root``."""
    root: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """Seeds prompt order and every generator of the trainer."""
    steps: int = 100
    """Optimizer-side length of the run: rollout batches trained on, counted from the start."""
    epochs: float | None = None
    """Passes over the prompts of data.source, in place of ``steps``: rounded up to whole steps.
    Groups that dynamic sampling drops take further prompts."""
    until: str | None = None
    """When the machine is taken away, as ``2026-12-31T08:00`` or with an offset from UTC such as
    ``+01:00``; null: at the end of the Slurm job, if this is one. See checkpoint.before."""
    resume: bool = False
    """Continue from the newest complete checkpoint of ``root/name``. Without it a run folder that
    already holds a run is refused."""

    def __post_init__(self) -> None:
        at_least("run.steps", self.steps, 1)
        optional_positive("run.epochs", self.epochs, "use null for a run of run.steps")
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            "run.name",
            self.name,
            "must be a plain folder name",
            "put the path into run.root",
        )
        rule, remedy = "must consist of printable characters", "choose another"
        for key in ("name", "root"):
            value = getattr(self, key)
            require(value.isprintable(), f"run.{key}", value, rule, remedy)
        size = len(self.name.encode())
        require(size <= 200, "run.name", self.name, f"is {size} bytes long", "use at most 200")
        require(bool(self.root), "run.root", self.root, "is empty", "use . for this folder")
        require(
            self.until is None or _is_time(self.until),
            "run.until",
            self.until,
            "must be a date and a time",
            "write it as 2026-12-31T08:00, with an offset such as +01:00 where clocks differ",
        )
        # The engine's own generators take no more than 32 bits, and each server adds its number.
        require(
            0 <= self.seed < 2**31,
            "run.seed",
            self.seed,
            "must lie in [0, 2147483647]",
            "use 0",
        )


@dataclass(kw_only=True)
class ModelConfig:
    path: str = "???"
    """Folder of the HF checkpoint: config.json, tokenizer and safetensors. Mandatory."""
    weights: str | None = None
    """A Megatron checkpoint (tools/hf_to_megatron.py) to take the weights from instead."""
    reference: str | None = None
    """HF checkpoint of the reference model; default: ``path``. Loaded only if algo.kl.coef > 0."""
    dtype: Dtype = Dtype.bfloat16
    """Precision of parameters and layers; logprobs, losses and main gradients are always
    float32."""


@dataclass(kw_only=True)
class KernelsConfig:
    logprob: Logprob = Logprob.auto
    """From hidden states to logprobs and gradients: ``fused_linear`` takes the loss's gradient
    while a chunk's logits exist, ``from_logits`` makes all logits of a micro-batch, ``reference``
    is plain PyTorch; ``auto`` is ``fused_linear`` on a GPU with Triton, else ``reference``."""
    chunk_mb: int | None = None
    """MiB for the rows whose logits exist at a time, a chunk: its logits, their gradient and hidden
    states. More rows mean fewer passes over the head's float32 gradient. null: 4096 on a GPU, 128
    on a CPU. ``from_logits`` knows no chunks."""
    chunk: int | None = None
    """Rows of a chunk, instead of ``chunk_mb``; null: as many as fit there."""
    logits: Dtype = Dtype.float32
    """Precision of logits between projection and softmax. ``bfloat16`` halves a chunk's memory and
    imitates an engine that rounds there, at about 2 % noise on every ratio."""

    def __post_init__(self) -> None:
        if self.chunk is not None:
            at_least("kernels.chunk", self.chunk, 1)
        if self.chunk_mb is not None:
            at_least("kernels.chunk_mb", self.chunk_mb, 1)
        require(
            self.chunk is None or self.chunk_mb is None,
            "kernels.chunk_mb",
            self.chunk_mb,
            f"has no effect with kernels.chunk = {self.chunk}, which says the rows themselves",
            "set one of the two",
        )


@dataclass(kw_only=True)
class DataConfig:
    source: Any = "???"
    """``arithmetic`` (generated), or a .jsonl / .parquet file of training prompts, or a list of
    files, as in ``[a.jsonl,b.parquet]``. Mandatory."""
    held_out: Any = None
    """The same for evaluation; null: no evaluation."""
    prompt_key: str = "prompt"
    """Column that holds the prompt: a string, or a list of chat messages, which may be stored as
    JSON text. A value inside of a column: ``column.name``."""
    answer_key: str = "answer"
    """Column that holds the right answer, handed to the reward: a string or a number. A value
    inside of a column: ``reward_model.ground_truth``."""
    chat: bool = False
    """Render prompts through the tokenizer's chat template. Rewards find the messages in
    ``prompt.extra["messages"]``."""
    system: str | None = None
    """System message put first when ``chat`` is on."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, as in ``{enable_thinking: false}``."""
    continue_final_message: bool = False
    """A conversation that ends with a message of the assistant: the answer continues it."""
    shuffle: bool = True
    """A new order every epoch, a function of run.seed and the epoch alone."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out, and counted in the log."""

    def __post_init__(self) -> None:
        at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        _check_source("data.source", self.source)
        if self.held_out is not None:
            _check_source("data.held_out", self.held_out)
        for key in CHAT_ONLY:
            value = getattr(self, key)
            unset = value is None or not (value or key == "system")
            rule = "has no effect without data.chat"
            remedy = f"set data.chat=true, or data.{key}={CHAT_ONLY[key]}"
            require(unset or self.chat, f"data.{key}", value, rule, remedy)
        system = self.system or ""
        rule, remedy = "must be text without NUL characters, and UTF-8", "correct it"
        require(_is_text(system), "data.system", self.system, rule, remedy)
        ours = TEMPLATE_OURS & set(self.template_args)
        rule, remedy = f"{', '.join(sorted(ours))} is set here", "remove it"
        require(not ours, "data.template_args", self.template_args, rule, remedy)
        require(
            self.prompt_key != self.answer_key,
            "data.answer_key",
            self.answer_key,
            "is also data.prompt_key: every prompt would be its own answer",
            "name the column of the right answers",
        )


def _check_source(key: str, value: Any) -> None:
    """A path or a list of paths."""
    names = value if isinstance(value, list) else [value]
    fine = bool(names) and all(isinstance(name, str) and _is_text(name) and name for name in names)
    rule = "must be the path of a file, or a list of such"
    require(fine, key, value, rule, f"write it as in {key}=a.jsonl or '{key}=[a.jsonl,b.jsonl]'")


def _is_text(value: str) -> bool:
    """Whether ``value`` can be written as UTF-8, and holds no NUL character."""
    return "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)


@dataclass(kw_only=True)
class RewardConfig:
    kind: RewardKind = RewardKind.arithmetic
    """``arithmetic`` (exact match), ``gsm8k`` (final number), ``math`` (equal expressions, by
    math-verify), ``function`` (your own)."""
    function: str | None = None
    """``package.module:callable`` taking (prompt, rollout) of one answer and returning a number of
    at most 1e9, or a dictionary with it as ``score``, whose other numbers become metrics; also
    ``async def``. Of the rollout, ``text`` is what was sampled, special tokens and all, but for the
    tokenizer's own end token; ``tokens`` are the ids."""
    workers: int = 1
    """Processes that compute rewards of the kinds ``math`` and ``function``, one at a time each."""
    timeout: float = 10.0
    """Seconds one reward may take. The first one of each process may take 60 if that is more: it
    loads what the function needs."""
    on_error: OnError = OnError.zero
    """A reward that fails or takes too long: reward 0 (``zero``), its answer left out of its group
    and of evaluations (``drop``; a group with fewer than two answers left is replaced by another
    prompt's), or the end of the run (``stop``). A step or an evaluation of which all rewards fail
    ends the run whatever this says."""

    def __post_init__(self) -> None:
        at_least("reward.workers", self.workers, 1)
        most, remedy = 1024, "use about as many as there are cores"
        require(
            self.workers <= most, "reward.workers", self.workers, f"must be at most {most}", remedy
        )
        seconds("reward.timeout", self.timeout, 10)
        require(
            (self.function is not None) == (self.kind is RewardKind.function),
            "reward.function",
            self.function,
            "is needed with reward.kind=function and only there",
            "name it as package.module:callable"
            if self.function is None
            else "set reward.kind=function, or remove it",
        )
        module, _, name = (self.function or "m:f").partition(":")
        require(
            all(part.isidentifier() for part in [*module.split("."), *name.split(".")]),
            "reward.function",
            self.function,
            "must look like package.module:callable",
            "name the module as Python imports it, without .py",
        )


@dataclass(kw_only=True)
class EvaluationConfig:
    every: int = 10
    """Steps between evaluations; 0 turns them off. The first comes before the first step."""
    prompts: int = 256
    """Held-out prompts, the first of the held-out set's own fixed order."""
    temperature: float = 0.0
    """0 is greedy."""
    samples: int = 1
    """Answers per prompt; pass@1 is their mean."""
    pass_reward: float = 1.0
    """An answer passes when its reward reaches this, but for rounding."""

    def __post_init__(self) -> None:
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.prompts", self.prompts, 1)
        at_least("evaluation.temperature", self.temperature, 0, "use 0 for greedy answers")
        finite("evaluation.pass_reward", self.pass_reward, "use 1")
        require(
            self.pass_reward <= LARGEST_REWARD,
            "evaluation.pass_reward",
            self.pass_reward,
            f"is beyond the largest reward, {LARGEST_REWARD:g}",
            "use 1",
        )
        at_least("evaluation.samples", self.samples, 1)
        require(
            self.samples == 1 or self.temperature > 0,
            "evaluation.samples",
            self.samples,
            "greedy answers are all the same",
            "set evaluation.temperature or evaluation.samples=1",
        )


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; the end of the run always gets one. 0: only the end."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    async_save: bool = True
    """Write while the training goes on, from a copy that each rank takes of its share in the host's
    memory. A run that fails in between resumes from the checkpoint before."""
    before: float = 5.0
    """Minutes to be left when the machine is taken away (run.until, or the end of the Slurm job):
    the run saves, stops with status 75, and can be resumed. A step that would end later is not
    begun. 0: the very end."""
    fallback: bool = False
    """On resume, if the newest checkpoint is damaged, use the newest one that is complete."""

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 0)
        require(
            0 <= self.before < 1e6,
            "checkpoint.before",
            self.before,
            "must be minutes, 0 or more",
            "set 0 to go on to the very end",
        )


@dataclass(kw_only=True)
class LoggerConfig:
    console: bool = True
    """Live table in a terminal, one line a step elsewhere."""
    tensorboard: bool = True
    """Event files under ``tensorboard/`` of the run."""
    wandb: str = "off"
    """``off``, ``offline`` or ``online``."""
    wandb_project: str = "peergrad"

    def __post_init__(self) -> None:
        require(
            self.wandb in ("off", "offline", "online"),
            "logger.wandb",
            self.wandb,
            "must be off, offline or online",
            "use offline where there is no network",
        )
        project = self.wandb_project
        plain = project.isprintable() and not set(project) & set(WANDB_REFUSES)
        require(
            self.wandb == "off" or (plain and 0 < len(project) <= 128),
            "logger.wandb_project",
            project,
            f"must be 1 to 128 characters, none of {' '.join(WANDB_REFUSES)}",
            "choose another",
        )
