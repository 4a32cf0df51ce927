"""The functions of `fastops` in NumPy, for machines where no compiler is available, and as the reference of the tests.

The compiled functions give the same bits. Their docstrings are those of this file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._checks import (
    SIZE,
    UINT8,
    check_batch,
    check_discounted_sum,
    check_frames,
    check_gae,
    check_gray,
    check_normalize,
    check_shape,
    check_statistics,
)

__all__ = ["ATARI_GRAYS", "RunningMeanStd", "discounted_sum", "gae", "max_pool_resize", "rgb_to_gray"]


# --- Frames ---


def area_weights(length: int, unit: bool) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The weights of `length` source pixels in the 84 output pixels along one axis.

    Returns `start` (84,) and `weights` (taps, 84). Output pixel i is the sum over k of
    `weights[k, i] * source[start[i] + k]`. A weight is the share of the output pixel's interval that the source pixel
    covers, or 1 if `unit`. As in OpenCV, less than 1e-3 of a source pixel does not count. The number of taps is a
    multiple of four, because the compiled kernel takes four at a time; unused taps come last with weight 0.
    """
    scale = 1.0 / (SIZE / length)
    begin = np.arange(SIZE) * scale
    end = begin + scale
    width = np.minimum(scale, length - begin)
    last = np.minimum(np.floor(end), length - 1).astype(np.int32)  # pixels covered in full: first <= i < last
    first = np.minimum(np.ceil(begin).astype(np.int32), last)
    head, tail = first - begin, end - last
    start = np.where(head > 1e-3, first - 1, first)
    stop = np.where(tail > 1e-3, last + 1, last)

    source = start + np.arange(-(-(stop - start).max() // 4) * 4)[:, None]
    weights = np.where(source < first, head / width, 1.0 / width)
    weights = np.where(source == last, np.minimum(np.minimum(tail, 1.0), width) / width, weights)
    weights = np.where(unit, 1.0, weights) * (source < stop)
    return start.astype(np.int32), weights.astype(np.float32)


def area_plan(height: int, width: int) -> tuple[Any, ...]:
    """`start` and `weights` of the rows, the same of the columns, `factor` and `bias`.

    The resize ends with `rint(weighted_sum * factor + bias)`. If both scales are integers, OpenCV adds the source
    pixels with weight 1 and multiplies the sum by 1 / area. It rounds halves to even, except at a scale of 2x2, where
    it rounds them up. (A scale is the reciprocal of a reciprocal, so not every multiple of 84 gives an integer.)
    """
    scales = [1.0 / (SIZE / length) for length in (height, width)]
    unit = all(abs(scale - round(scale)) < np.finfo(np.float64).eps for scale in scales)
    area = round(scales[0]) * round(scales[1])
    factor = np.float32(1) / np.float32(area) if unit else np.float32(1)
    bias = np.float32(0.125 if unit and scales == [2.0, 2.0] else 0)  # sums are multiples of 1/4: only k + 1/2 changes
    return *area_weights(height, unit), *area_weights(width, unit), factor, bias


_cached_plan = functools.lru_cache(maxsize=64)(area_plan)


def _area_sum(source: NDArray[Any], start: NDArray[np.int32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    total = np.zeros((len(source), SIZE), np.float32)
    for k, weight in enumerate(weights):
        total += source[:, np.minimum(start + k, source.shape[1] - 1)] * weight
    return total


# The gray of each color of an NTSC Atari 2600, uint8 (256,), read-only: `ATARI_GRAYS[ale.getScreen()]` equals
# `ale.getScreenGrayscale()`. The lowest bit of a color has no meaning. Read from the screens of ALE 0.12.
ATARI_GRAYS = np.frombuffer(
    bytes.fromhex(
        "004a6f8eaac0d6ec405f7a94acc1d6e93f576e8396a7b8c73b556b8194a7b7c7"
        "2c445a6e8092a1b0334a5f738495a4b2273f556b7d8f9fae16314960748899a9"
        "1129405568798999203c556d8296a8ba28455f788da2b6c82b4a657f97adc1d4"
        "2847627c93a9bdcf294a68849db5cbdf2f4f6b859db3c8dc2f4f6b859db3c8dc"
    ),
    np.uint8,
).repeat(2)
ATARI_GRAYS.flags.writeable = False


def rgb_to_gray(rgb: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Write the luma of a color frame into `out`.

        out = round(0.299 * red + 0.587 * green + 0.114 * blue)

    with weights rounded to multiples of 2**-15, bit-equal to `cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)`.

    Args:
        rgb: uint8 (H, W, 3), C-contiguous, 1 <= H, W <= 4096.
        out: uint8 (H, W), C-contiguous, written in place. It may not overlap `rgb`.

    Raises:
        TypeError: an argument is not an array or has another dtype.
        ValueError: wrong shape, not contiguous, `out` read-only or overlapping.

    Source: ITU-R BT.601, section 2.5.1, which OpenCV and ALE's own gray screen follow.
    """
    check_gray(rgb, out)
    out[:] = (rgb @ np.array([9798, 19235, 3735]) + 2**14) >> 15


def max_pool_resize(
    frame_a: NDArray[np.uint8],
    frame_b: NDArray[np.uint8],
    out: NDArray[np.uint8],
    palette: NDArray[np.uint8] | None = None,
) -> None:
    """Write the pixelwise maximum of two frames, area-resized to 84x84, into `out`.

    Every output pixel is the mean of the source rectangle it covers, rounded to the nearest integer:

        out[i, j] = round(sum_y wy[i, y] * (sum_x wx[j, x] * max(frame_a[y, x], frame_b[y, x])))

    in float32, in OpenCV's order of additions, bit-equal to
    `cv2.resize(np.maximum(frame_a, frame_b), (84, 84), interpolation=cv2.INTER_AREA)`.

    Args:
        frame_a, frame_b: uint8 (H, W), C-contiguous, 84 <= H, W <= 4096 (below 84 OpenCV would interpolate). They may
            be the same array.
        out: uint8 (84, 84), C-contiguous, written in place. It may not overlap the others.
        palette: uint8 (256,) or None. If given, the frames hold palette indices, and the result is that of
            `palette[frame_a]` and `palette[frame_b]`. `ATARI_GRAYS` is the palette for ALE's `getScreen`.

    Raises:
        TypeError: an argument is not an array or has another dtype.
        ValueError: wrong shape, not contiguous, `out` read-only or overlapping.

    Source: Mnih et al. 2015 (Methods, preprocessing); Burda et al. 2018 (Table 2; by area: their code).
    """
    check_frames(frame_a, frame_b, out, palette)
    y_start, y_weights, x_start, x_weights, factor, bias = _cached_plan(*frame_a.shape)
    if palette is not None:
        frame_a, frame_b = palette[frame_a], palette[frame_b]
    rows = _area_sum(np.maximum(frame_a, frame_b), x_start, x_weights)
    out[:] = np.rint(_area_sum(rows.T, y_start, y_weights).T * factor + bias)


# --- Returns ---


def gae(
    rewards: NDArray[np.float32],
    values: NDArray[np.float32],
    dones: NDArray[np.float32] | NDArray[np.bool_] | None,
    last_value: NDArray[np.float32],
    gamma: float,
    lam: float,
) -> NDArray[np.float32]:
    """Generalised advantage estimation, along time and per environment.

        delta[t] = rewards[t] + gamma * values[t + 1] * (1 - dones[t]) - values[t],    values[T] = last_value
        A[t]     = delta[t] + gamma * lam * (1 - dones[t]) * A[t + 1],                 A[T] = 0

    computed in float64 and rounded to float32 at the end. NaN and infinity propagate.

    Args:
        rewards, values: float32 (T, N): T steps of N environments.
        dones: float32 or bool (T, N), 1 where step t ended the episode, so that `values[t + 1]` belongs to the next
            episode. None means one endless episode, as for the intrinsic reward (Burda et al. 2018, section 2.3).
        last_value: float32 (N,), the values of the observations after the last step.
        gamma, lam: numbers in [0, 1].

    Returns:
        The advantages, a new float32 (T, N). The value targets are `advantages + values`.

    Raises:
        TypeError: an argument is not an array, has another dtype, or is not a number.
        ValueError: wrong shape, not contiguous, or out of range.

    Source: Schulman et al. 2016, eq. 16.
    """
    gamma, lam = check_gae(rewards, values, dones, last_value, gamma, lam)
    advantages = np.empty_like(rewards)
    next_value, advantage = last_value.astype(np.float64), np.zeros(last_value.shape)
    with np.errstate(all="ignore"):
        for t in reversed(range(len(rewards))):
            alive = 1.0 if dones is None else 1.0 - dones[t].astype(np.float64)
            delta = rewards[t] + gamma * next_value * alive - values[t]
            advantage = delta + gamma * lam * alive * advantage
            next_value = values[t].astype(np.float64)
            advantages[t] = advantage
    return advantages


def discounted_sum(
    rewards: NDArray[np.float32], carry: NDArray[np.float64], gamma: float, reverse: bool
) -> NDArray[np.float64]:
    """Discounted running sums of the rewards, along time and per environment.

        forward:  f[t] = gamma * f[t - 1] + rewards[t],  t = 0 ... T - 1,  f[-1] = carry
        reverse:  f[t] = gamma * f[t + 1] + rewards[t],  t = T - 1 ... 0,  f[T] = carry

    RND divides the intrinsic rewards by the standard deviation of these sums. NaN and infinity propagate.

    Args:
        rewards: float32 (T, N): T steps of N environments.
        carry: float64 (N,), C-contiguous, updated in place to the last sum in the direction of the run (unchanged if
            T is 0).
        gamma: a number in [0, 1].
        reverse: False to run forward in time, True to run backward.

    Returns:
        All sums, a new float64 (T, N).

    Raises:
        TypeError: an argument is not an array, has another dtype, or is not a number or a bool.
        ValueError: wrong shape, not contiguous, out of range, `carry` read-only or overlapping `rewards`.

    Source: Burda et al. 2018, section 2.4 (the normalisation of the intrinsic reward).
    """
    gamma = check_discounted_sum(rewards, carry, gamma, reverse)
    sums = np.empty(rewards.shape)
    with np.errstate(all="ignore"):
        for t in reversed(range(len(rewards))) if reverse else range(len(rewards)):
            carry[:] = gamma * carry + rewards[t]
            sums[t] = carry
    return sums


# --- Statistics ---


class RunningMeanStd:
    """Mean and variance of all samples so far, per element of `shape`, in float64.

    They start as mean 0 and variance 1 with the weight of `count` samples. A batch of n samples with mean m and
    population variance v is merged as (Chan et al. 1979)

        delta = m - mean,    total = count + n
        mean <- mean + delta * n / total
        var  <- (var * count + v * n + delta**2 * count * n / total) / total

    so the result does not depend on how the samples are cut into batches, up to rounding. float32 is not precise
    enough: the variance of a pixel that never changes falls to 1e-10.

    Attributes:
        mean, var: float64 arrays of `shape`.
        count: float, the number of samples, including the initial ones.

    Source: Burda et al. 2018, section 2.4 (observations and intrinsic returns).

    Example:
        >>> rms = RunningMeanStd((84, 84))
        >>> rms.update(frames)  # uint8 (T, N, 84, 84)
        >>> normalised = rms.normalize(frames, clip=5)  # float32 (T, N, 84, 84)
    """

    def __init__(self, shape: tuple[int, ...] = (), count: float = 1e-4) -> None:
        """Start with mean 0 and variance 1.

        Args:
            shape: of one sample, a tuple of positive integers.
            count: the weight of the initial mean and variance in samples, positive and finite.

        Raises:
            TypeError: `shape` is not a tuple of integers, or `count` not a number.
            ValueError: out of range.
        """
        shape = check_shape(shape)
        self.mean: NDArray[np.float64]
        self.var: NDArray[np.float64]
        self.count: float
        self.mean, self.var, self.count = check_statistics(np.zeros(shape), np.ones(shape), count, shape)

    @property
    def std(self) -> NDArray[np.float64]:
        """The standard deviation, sqrt(var)."""
        return np.sqrt(self.var)

    def update(self, batch: NDArray[Any]) -> None:
        """Merge a batch of samples. Its last axes are `shape`; the axes before them count samples.

        uint8 is summed exactly, in integers and without a float copy. NaN and infinity in a float batch propagate into
        mean and var, where the training loop finds them.

        Args:
            batch: uint8, float32 or float64 (..., *shape), C-contiguous, at least one sample.

        Raises:
            TypeError: not an array, or another dtype.
            ValueError: wrong shape, not contiguous, or empty.
        """
        samples = check_batch("batch", batch, self.mean.shape)
        count = len(samples)
        if count == 0:
            raise ValueError(f"batch: expected at least one sample, got shape {batch.shape}")
        if samples.dtype == UINT8:
            # Sums about the integer nearest to the mean are exact and small, so no digits of the variance cancel.
            total, squares = (sums.astype(np.int64) for sums in self._sums(samples))
            centre = (total + count // 2) // count
            rest = total - centre * count
            mean = centre + rest / count
            var = (squares - centre * (2 * total - centre * count) - rest / count * rest) / count
        else:
            with np.errstate(all="ignore"):
                mean = samples.mean(0, dtype=np.float64)
                var = np.square(samples - mean).mean(0)
        self._merge(mean.reshape(self.mean.shape), var.reshape(self.var.shape), count)

    def merge(self, mean: Any, var: Any, count: float) -> None:
        """Merge the statistics of other samples, for instance of another process.

        Args:
            mean, var: real arrays of `shape`, finite. `var` is the population variance, not negative.
            count: the number of samples, positive and finite.

        Raises:
            TypeError: not numbers.
            ValueError: wrong shape or value.
        """
        self._merge(*check_statistics(mean, var, count, self.mean.shape))

    def normalize(
        self, x: NDArray[Any], clip: float = np.inf, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return `clip((x - mean) / sqrt(var), -clip, clip)`, computed in float64, rounded to float32, without epsilon.

        Args:
            x: uint8, float32 or float64 (..., *shape), C-contiguous.
            clip: a positive number. Infinity, the default, does not clip.
            out: float32 of x's shape, C-contiguous, not overlapping x, or None for a new array.

        Returns:
            `out`, or the new array.

        Raises:
            TypeError: not an array, or another dtype; clip not a number.
            ValueError: wrong shape, not contiguous, `out` read-only or overlapping, clip not positive.
        """
        samples, clip = check_normalize(x, clip, out, self.mean.shape)
        result = np.empty(x.shape, np.float32) if out is None else out
        self._normalize(samples, self.mean.ravel(), self.std.ravel(), clip, result.reshape(samples.shape))
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return {"mean": nested lists, "var": nested lists, "count": float}: plain types, for any file format."""
        return {
            "mean": np.asarray(self.mean).tolist(),
            "var": np.asarray(self.var).tolist(),
            "count": float(self.count),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. Anything else raises and changes nothing.

        Raises:
            TypeError: not a mapping, or its values are not numbers.
            ValueError: missing or unknown keys, wrong shape or value.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
        if set(state) != {"mean", "var", "count"}:
            raise ValueError(f"state: expected the keys mean, var, count, got {sorted(map(str, state))}")
        self.mean, self.var, self.count = check_statistics(**state, shape=self.mean.shape)

    def _merge(self, mean: NDArray[np.float64], var: NDArray[np.float64], count: float) -> None:
        total = self.count + count
        with np.errstate(all="ignore"):
            delta = mean - self.mean
            self.mean = self.mean + delta * (count / total)
            self.var = (self.var * self.count + var * count + delta**2 * (self.count * count / total)) / total
        self.count = total

    # The compiled back end replaces these two. Samples are (S, F): S samples of F features, which is `shape` flattened.

    @staticmethod
    def _sums(samples: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Sum and sum of squares over the samples."""
        return samples.sum(0, dtype=np.uint64), np.einsum("sf,sf->f", samples, samples, dtype=np.uint64)

    @staticmethod
    def _normalize(samples: Any, mean: Any, std: Any, clip: float, out: NDArray[np.float32]) -> None:
        with np.errstate(all="ignore"):
            out[:] = np.clip((samples - mean) / std, -clip, clip)
