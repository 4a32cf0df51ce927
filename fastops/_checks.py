"""Argument checks. The compiled kernels and their NumPy twins share them, so both raise the same errors.

A wrong type or dtype raises `TypeError`; a wrong shape, layout, overlap or value raises `ValueError`. Every message
names the argument and says what was expected and what came.
"""

from __future__ import annotations

from math import inf, prod
from numbers import Integral
from sys import float_info
from typing import Any

import numpy as np
from numpy import may_share_memory

SIZE = 84  # the side of an observation; after a change here, change it in _frames.pyx and install again
MAX_SIDE = 4096  # the longest side of a frame, also in _frames.pyx: its row buffer is made for it
TINY = float_info.min
MAX = float_info.max
UINT8 = np.dtype(np.uint8)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
BOOL = np.dtype(np.bool_)


def check_array(
    name: str, value: Any, dtypes: tuple[np.dtype, ...], shape: tuple[int, ...] | int | None, writeable: bool = False
) -> None:
    """Accept a plain, aligned, C-contiguous array of one of `dtypes` in native byte order.

    `shape` is the shape, the number of axes, or None for any shape.
    """
    if type(value) is not np.ndarray:
        raise TypeError(f"{name}: expected a numpy.ndarray, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if shape is not None and value.shape != shape and value.ndim != shape:
        wanted = f"{shape} axes" if isinstance(shape, int) else f"shape {shape}"
        raise ValueError(f"{name}: expected {wanted}, got shape {value.shape}")
    flags = value.flags
    if not flags.c_contiguous or not flags.aligned:
        raise ValueError(f"{name}: expected an aligned C-contiguous array, got strides {value.strides}")
    if writeable and not flags.writeable:
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")


def check_disjoint(name: str, value: np.ndarray, other_name: str, other: np.ndarray) -> None:
    if may_share_memory(value, other):  # exact for contiguous arrays
        raise ValueError(f"{name}: expected memory of its own, got an array that overlaps {other_name}")


def check_real(name: str, value: Any, low: float, high: float) -> float:
    """Return a number in [low, high] as a float. A bool is refused: it would be a flag in the wrong place."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got one that no float can hold") from None
    if not low <= number <= high:  # true for NaN
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {value}")
    return number


def check_frames(frame_a: Any, frame_b: Any, out: Any, palette: Any) -> None:
    check_array("frame_a", frame_a, (UINT8,), 2)
    height, width = frame_a.shape
    if not (SIZE <= height <= MAX_SIDE and SIZE <= width <= MAX_SIDE):
        raise ValueError(f"frame_a: expected both sides in [{SIZE}, {MAX_SIDE}], got shape {frame_a.shape}")
    check_array("frame_b", frame_b, (UINT8,), (height, width))
    check_array("out", out, (UINT8,), (SIZE, SIZE), True)
    check_disjoint("out", out, "frame_a", frame_a)
    check_disjoint("out", out, "frame_b", frame_b)
    if palette is not None:
        check_array("palette", palette, (UINT8,), (256,))
        check_disjoint("out", out, "palette", palette)


def check_gray(rgb: Any, out: Any) -> None:
    check_array("rgb", rgb, (UINT8,), 3)
    height, width, channels = rgb.shape
    if channels != 3 or not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ValueError(f"rgb: expected shape (H, W, 3) with sides in [1, {MAX_SIDE}], got shape {rgb.shape}")
    check_array("out", out, (UINT8,), (height, width), True)
    check_disjoint("out", out, "rgb", rgb)


def check_gae(rewards: Any, values: Any, dones: Any, last_value: Any, gamma: Any, lam: Any) -> tuple[float, float]:
    check_array("rewards", rewards, (FLOAT32,), 2)
    check_array("values", values, (FLOAT32,), rewards.shape)
    if dones is not None:
        check_array("dones", dones, (FLOAT32, BOOL), rewards.shape)
    check_array("last_value", last_value, (FLOAT32,), rewards.shape[1:])
    return check_real("gamma", gamma, 0, 1), check_real("lam", lam, 0, 1)


def check_discounted_sum(rewards: Any, carry: Any, gamma: Any, reverse: Any) -> float:
    check_array("rewards", rewards, (FLOAT32,), 2)
    check_array("carry", carry, (FLOAT64,), rewards.shape[1:], writeable=True)
    check_disjoint("carry", carry, "rewards", rewards)
    if not isinstance(reverse, (bool, np.bool_)):
        raise TypeError(f"reverse: expected a bool, got {type(reverse).__name__}")
    return check_real("gamma", gamma, 0, 1)


def check_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(isinstance(side, Integral) for side in shape):
        raise TypeError(f"shape: expected a tuple of integers, got {shape!r}")
    if any(side < 1 for side in shape):
        raise ValueError(f"shape: expected positive sides, got {shape}")
    return tuple(map(int, shape))


def check_batch(name: str, batch: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return a view of `batch` (..., *shape) as (samples, features)."""
    check_array(name, batch, (UINT8, FLOAT32, FLOAT64), None)
    lead = batch.ndim - len(shape)
    if lead < 0 or batch.shape[lead:] != shape:
        raise ValueError(f"{name}: expected shape (..., {', '.join(map(str, shape))}), got shape {batch.shape}")
    return batch.reshape(prod(batch.shape[:lead]), prod(shape))


def check_normalize(x: Any, clip: Any, out: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, float]:
    samples = check_batch("x", x, shape)
    if out is not None:
        check_array("out", out, (FLOAT32,), x.shape, True)
        check_disjoint("out", out, "x", x)
    return samples, check_real("clip", clip, TINY, inf)


def check_statistics(mean: Any, var: Any, count: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, float]:
    """Return copies of `mean` and `var` as float64, and `count` as a float."""
    mean = check_finite("mean", mean, -MAX, shape)
    var = check_finite("var", var, 0, shape)
    return mean, var, check_real("count", count, TINY, MAX)


def check_finite(name: str, value: Any, low: float, shape: tuple[int, ...]) -> np.ndarray:
    """Return a float64 copy of anything that NumPy reads as real numbers of `shape`, all finite and at least `low`."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of numbers, got {type(value).__name__}") from error
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got shape {array.shape}")
    copy = np.array(array, np.float64, order="C")
    if not ((copy >= low) & (copy <= MAX)).all():
        raise ValueError(f"{name}: expected finite numbers from {low:g}, got {copy.min()} to {copy.max()}")
    return copy
