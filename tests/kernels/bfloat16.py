"""Mends Triton's interpreter, which multiplies bfloat16 as integers and rounds towards zero.

Only the interpreter is touched, never a kernel: casts to and from bfloat16 go through float32 with
round-to-nearest-even, and dot products are taken in float32, as tensor cores do.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def mend() -> None:
    """Patch the interpreter of this process; call once, before the first launch."""
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, value, to):
        have, want = value.dtype.scalar, to.scalar
        if have == tl.bfloat16 != want:
            wide = handle(_widen(value.data).reshape(value.data.shape), tl.float32)
            return wide if want == tl.float32 else cast(self, wide, to)
        if want == tl.bfloat16 != have:
            data = _narrow(value.data.astype(np.float32)).reshape(value.data.shape)
            return handle(data, want)
        return cast(self, value, to)

    def wide(operand):
        kind = operand.dtype.scalar
        if kind == tl.bfloat16:
            return handle(_widen(operand.data).reshape(operand.data.shape), tl.float32)
        return (
            handle(operand.data.astype(np.float32), tl.float32) if kind == tl.float16 else operand
        )

    def create_dot(self, a, b, d, *rest):
        return dot(self, wide(a), wide(b), d, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
