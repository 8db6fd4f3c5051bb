"""What a run is fed with: prompts, held-out prompts, rewards.

A module of its own, because the collector process imports it and must not load Megatron.
"""

from peergrad.config import Config
from peergrad.parallel.hf.config import read_shape
from peergrad.prompts import Prompts, load_prompts, load_tokenizer
from peergrad.rewards import RewardPool
from peergrad.rollout.collector import Parts


def collector_parts(config: Config) -> Parts:
    """What the collector process works with; runs in that process."""
    tokenizer = load_tokenizer(config.model.path)
    data, seed = config.data, config.run.seed
    records = load_prompts(data, data.source, split="train", tokenizer=tokenizer, seed=seed)
    held_out = []
    if data.held_out is not None:
        # A seed of its own kind: the held-out order must not change with run.seed.
        held_out = load_prompts(data, data.held_out, split="test", tokenizer=tokenizer, seed=0)
    return Parts(
        prompts=Prompts(records, shuffle=data.shuffle, seed=seed),
        held_out=held_out,
        scorer=RewardPool(config.reward),
        stop_token_ids=(tokenizer.eos_token_id,),
        vocab_size=read_shape(config.model.path).vocab,
    )
