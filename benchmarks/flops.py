"""Model FLOPs of a training step, and their share of what the device could do.

Only what the mathematics of the model asks for is counted: logits that the head computes a second
time in its backward pass, padding and recomputed activations are not, and lower the result as they
should. Answers to one prompt share it: its tokens count once. ``N`` weights in a layer's matrices,
``T`` tokens in prompts of lengths ``P`` and answers of lengths ``R``, ``S`` scored tokens, ``H``
hidden size, ``V`` vocabulary, ``A`` = heads * head_dim:

    N         = H * A (query) + 2 * H * kv_heads * head_dim + A * H (output) + 3 * H * ffn
    pairs     = sum of P (P + 1) / 2 + sum of (R P + R (R + 1) / 2)      (lower triangles only)
    attention = 4 * A * pairs                     (of queries with keys, and with values)
    forward   = layers * (2 * N * T + attention) + 2 * H * V * S
    update    = 3 * forward                       (the backward pass is two more)
    reference = forward
    MFU       = FLOPs / seconds / peak FLOP/s

The embedding is a look-up and counts nothing; the head is applied to scored rows alone.
"""

from collections.abc import Sequence

from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.tensors import layer_weights

PEAK_TFLOPS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
}
"""Dense bfloat16 TFLOP/s from the makers' data sheets, by a part of the device's name; the first
that fits counts."""


def peak_tflops(device: str) -> float | None:
    """None for a device that is not in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device), None)


def forward_flops(shape: Shape, families: Sequence[Sequence[int]], scored: int) -> int:
    """FLOPs of one forward pass over ``families``, each the tokens of a prompt and of its answers,
    with ``scored`` tokens projected to the vocabulary."""
    pairs = sum(
        n * (n + 1) // 2 + (n * family[0] if i else 0)
        for family in families
        for i, n in enumerate(family)
    )
    attention = 4 * shape.heads * shape.head_dim * pairs
    tokens = sum(map(sum, families))
    layers = shape.layers * (2 * layer_weights(shape) * tokens + attention)
    return layers + 2 * shape.hidden * shape.vocab * scored


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Share of ``peak`` TFLOP/s in [0, 1]."""
    return flops / seconds / (peak * 1e12)
