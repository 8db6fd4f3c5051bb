"""The same training by TRL's GRPOTrainer; runs in TRL's environment, started by against_trl.py.

    python benchmarks/trl_grpo.py task.json out.json

Imports nothing of peergrad. TRL is used as its users would for speed on a CPU: the whole batch in
one ``generate`` call with its cache, no gradient checkpointing, no bfloat16, no logging, saving or
data loader processes. ``task.json`` is ``against_trl.Task`` as JSON; every process writes what it
measured, one row a step, to ``out.json``, the second one to ``out.json.1`` and so on.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]


class Clock(TrainerCallback):
    """Rows of seconds and outcomes, one a step.

    A step goes from the end of the one before it to its own end, whatever happens between. What
    divides it is seen from outside: the reference model's first call and the reward's.
    """

    def __init__(self, end: int) -> None:
        self.rows: list[dict[str, float]] = []
        self._end = end  # token
        self._row: dict[str, float] = {}
        self._began = self._phase_began = self._cpu = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = self._phase_began = time.perf_counter()
        self._cpu = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = self._ended("update")
        cpu, self._cpu = self._cpu, time.process_time()
        self._row["cpu"] = self._cpu - cpu  # what a busy machine does not change
        self.rows.append({**self._row, "step": now - self._began, "timestamp": time.time()})
        self._row, self._began = {}, now

    def reference_called(self, *args: Any) -> None:
        if "generate" not in self._row:  # it is called once a micro-batch
            self._ended("generate")

    def reward(
        self,
        completions: list[str],
        completion_ids: list[list[int]],
        answer: list[str],
        **kwargs: Any,
    ) -> list[float]:
        """1 for an answer that ended by itself and says nothing but the sum."""
        rewards = [
            float(ids[-1] == self._end and text.strip() == right)
            for text, ids, right in zip(completions, completion_ids, answer, strict=True)
        ]
        self._ended("reference")
        self._row["reward"] = sum(rewards) / len(rewards)
        self._row["answers"] = len(rewards)
        self._row["answer_tokens"] = sum(map(len, completion_ids))
        return rewards

    def _ended(self, phase: str) -> float:
        now = time.perf_counter()
        self._row[phase] = now - self._phase_began
        self._phase_began = now
        return now


def main(task: dict[str, Any], out: Path) -> None:
    torch.set_num_threads(task["threads"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    check_tokens(tokenizer, task)
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    clock = Clock(tokenizer.eos_token_id)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=clock.reward,
        args=arguments(task, out),
        train_dataset=Dataset.from_list(
            [{"prompt": p["text"], "answer": p["answer"]} for p in task["prompts"]]
        ),
        processing_class=tokenizer,
        optimizers=optimizer(model, task),
        callbacks=[clock],
    )
    trainer.ref_model.register_forward_pre_hook(clock.reference_called)
    trainer.train()
    assert len(clock.rows) == task["steps"], "a step is one optimizer step on one batch"
    rank = trainer.accelerator.process_index
    path = out.with_name(f"{out.name}.{rank}") if rank else out
    path.write_text(json.dumps(clock.rows), encoding="utf-8")


def check_tokens(tokenizer: Any, task: dict[str, Any]) -> None:
    """Raise ValueError unless TRL will send the very tokens that peergrad sends."""
    ours = [prompt["tokens"] for prompt in task["prompts"]]
    if tokenizer(text=[prompt["text"] for prompt in task["prompts"]])["input_ids"] != ours:
        raise ValueError("prompts: TRL makes other tokens of them than peergrad")


def arguments(task: dict[str, Any], out: Path) -> Any:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    answers = task["answers"] // processes
    micro = min(task["micro_batch"], answers)
    continuous = task["generation"] == "continuous"
    return GRPOConfig(
        output_dir=str(out.with_suffix(".trainer")),
        max_steps=task["steps"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=answers // micro,
        num_generations=task["group_size"],
        max_completion_length=task["max_new_tokens"],
        shuffle_dataset=False,
        temperature=task["temperature"],
        top_p=1.0,
        top_k=0,
        cache_implementation="static" if task["generation"] == "static" else None,
        use_transformers_continuous_batching=continuous,
        beta=task["kl"],
        epsilon=task["clip"],
        num_iterations=1,
        scale_rewards="group",
        loss_type="grpo",
        max_grad_norm=task["clip_grad"],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=task["seed"],
    )


def optimizer(model: Any, task: dict[str, Any]) -> tuple[Any, Any]:
    """AdamW and a linear warm-up that reaches its end as peergrad's does."""
    found = torch.optim.AdamW(
        model.parameters(),
        lr=task["lr"],
        betas=tuple(task["betas"]),
        eps=task["eps"],
        weight_decay=task["weight_decay"],
        fused=True,  # transformers' default
    )
    warmup = max(1, task["warmup_steps"])
    return found, torch.optim.lr_scheduler.LambdaLR(
        found, lambda step: min(1.0, (step + 1) / warmup)
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
