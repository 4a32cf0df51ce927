"""fastops: both back ends against the specification's vectors, OpenCV, plain formulas and wrong arguments."""

import copy
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import threading
import venv
from pathlib import Path

import ale_py
import cv2
import numpy as np
import pytest
from ale_py import roms

import fastops
from fastops import reference

ROOT = Path(__file__).parents[1]
BACKENDS = {fastops.BACKEND: fastops, "numpy": reference}
FUNCTIONS = ("max_pool_resize", "rgb_to_gray", "gae", "discounted_sum", "RunningMeanStd")


@pytest.fixture(params=BACKENDS)
def ops(request):
    return BACKENDS[request.param]


# --- Frames ---


def opencv(frame_a, frame_b):
    return cv2.resize(np.maximum(frame_a, frame_b), (84, 84), interpolation=cv2.INTER_AREA)


def resized(ops, frame_a, frame_b, palette=None):
    out = np.full((84, 84), 7, np.uint8)
    assert ops.max_pool_resize(frame_a, frame_b, out, palette) is None
    return out


def random_frames(rng, height, width, kind="noise"):
    frames = rng.integers(0, 256, (2, height, width), dtype=np.uint8)
    if kind == "repeats":  # rows that equal the one above, in one frame or in both
        for frame in frames:
            for y in np.flatnonzero(rng.random(height - 1) < 0.6) + 1:
                frame[y] = frame[y - 1]
    if kind == "bright":
        frames |= 254
    return frames


def play(rom, frames):
    """Grayscale and palette-index screens of a game under random actions."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.loadROM(roms.get_rom_path(rom))
    rng, actions = np.random.default_rng(0), ale.getMinimalActionSet()
    grays, indices = [], []
    for _ in range(frames):
        ale.act(actions[rng.integers(len(actions))])
        grays.append(ale.getScreenGrayscale())
        indices.append(ale.getScreen().copy())
        if ale.game_over():
            ale.reset_game()
    return np.array(grays), np.array(indices)


@pytest.mark.parametrize("rom", ["montezuma_revenge", "breakout", "pitfall", "pacman"])
def test_resize_equals_opencv_on_real_frames_and_their_palette_indices(ops, rom):
    grays, indices = play(rom, 400)
    assert grays.shape[1:] == ((250, 160) if rom == "pacman" else (210, 160))
    palette = np.zeros(256, np.uint8)
    palette[indices] = grays
    for t in range(0, len(grays) - 1, 3):
        expected = opencv(grays[t], grays[t + 1])
        np.testing.assert_array_equal(resized(ops, grays[t], grays[t + 1]), expected)
        np.testing.assert_array_equal(resized(ops, indices[t], indices[t + 1], palette), expected)


@pytest.mark.parametrize("kind", ["noise", "repeats", "bright"])
@pytest.mark.parametrize("size", [(210, 160), (250, 160), (214, 160), (224, 240), (240, 256), (84, 84), (85, 4096)])
def test_resize_equals_opencv_on_random_frames(ops, size, kind):
    rng = np.random.default_rng(1)
    for _ in range(30 if max(size) < 300 else 3):
        a, b = random_frames(rng, *size, kind)
        np.testing.assert_array_equal(resized(ops, a, b), opencv(a, b))


def test_resize_equals_opencv_for_every_kind_of_scale(ops):
    rng = np.random.default_rng(2)
    sizes = [(84 * i, 84 * j) for i in range(1, 6) for j in range(1, 6)]  # OpenCV adds these as integers
    sizes += [(84 * i, 84) for i in range(6, 49)]  # from 49 on, 1 / (1 / k) != k
    sizes += [(84 * i, 84 * j + 1) for i in range(1, 4) for j in range(1, 4)]
    sizes += [(n, int(rng.integers(84, 400))) for n in range(84, 400)] + [(4096, 100), (100, 4096), (4095, 4095)]
    for height, width in sizes:
        for size in {(height, width), (width, height)}:
            a, b = random_frames(rng, *size)
            np.testing.assert_array_equal(resized(ops, a, b), opencv(a, b), err_msg=str(size))


def test_resize_rounds_every_two_by_two_sum_and_tie_as_opencv(ops):
    rng = np.random.default_rng(3)
    for height, width in [(168, 168), (168, 84), (84, 168), (210, 160), (168, 160)]:
        for top in (2, 3, 256):
            a = rng.integers(0, top, (height, width), dtype=np.uint8)
            np.testing.assert_array_equal(resized(ops, a, a), opencv(a, a))


def test_resize_with_any_palette_is_that_of_the_mapped_frames(ops):
    rng = np.random.default_rng(4)
    for kind in ("noise", "repeats"):
        a, b = random_frames(rng, 210, 160, kind)
        b[:100] = a[:100]
        palette = rng.integers(0, 256, 256, dtype=np.uint8)
        np.testing.assert_array_equal(resized(ops, a, b, palette), opencv(palette[a], palette[b]))


def test_gray_of_every_color_equals_opencv(ops):
    """All 2**24 colors: a truncated weight or a dropped rounding shifts some of them by one."""
    colors = np.stack(np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 3), axis=-1).reshape(4096, 4096, 3)
    out = np.empty((4096, 4096), np.uint8)
    assert ops.rgb_to_gray(colors, out) is None
    np.testing.assert_array_equal(out, cv2.cvtColor(colors, cv2.COLOR_RGB2GRAY))


def test_resize_weights_never_reach_outside_the_source():
    for length in range(84, 4097):
        for unit in (False, True):
            start, weights = reference.area_weights(length, unit)
            used = (weights > 0).sum(0)
            assert weights.shape[0] % 4 == 0 and weights.shape[0] <= 52
            assert start.min() >= 0 and (start + used).max() <= length and used.min() >= 1
            assert (start + weights.shape[0]).max() <= length + 64  # the padding behind the kernel's row
            assert (np.diff((weights > 0).astype(int), axis=0) <= 0).all()  # unused taps come last
            if not unit:
                np.testing.assert_allclose(weights.sum(0), 1, atol=0.003)


def test_resize_takes_one_frame_twice_and_readonly_frames(ops):
    a, _ = random_frames(np.random.default_rng(5), 210, 160)
    a.flags.writeable = False
    np.testing.assert_array_equal(resized(ops, a, a), opencv(a, a))


def test_resize_in_threads(ops):
    rng = np.random.default_rng(6)
    sizes = [(210, 160), (250, 160), (168, 168), (224, 240)]
    failures = []

    def work(size, seed):
        for a, b in (random_frames(np.random.default_rng(seed + i), *size) for i in range(25)):
            if not (resized(ops, a, b) == opencv(a, b)).all():
                failures.append(size)

    threads = [threading.Thread(target=work, args=(size, int(rng.integers(1 << 30)))) for size in sizes * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- Returns (vectors: specification, D2 and D3; rows there are environments) ---


def time_major(rows):
    return np.ascontiguousarray(np.array(rows, np.float32).T)


R1, R2 = time_major([[1, 2, 0.5], [0.2, 0, 4]]), time_major([[3, 0.1, 0.1], [1, 1, 1]])
REWARDS = time_major([[0, 1, 0, 0, -1], [0, 0, 1, 0, 1]])
VALUES = time_major([[0.5, 0.4, 0.3, 0.2, 0.1], [-0.2, 0, 0.6, 0.9, 1.1]])
DONES = time_major([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
LAST = np.array([0.7, 0.25], np.float32)
INT_REWARDS = time_major([[0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0, 0.25, 0.6, 0.01]])
INT_VALUES = time_major([[1, 0.9, 0.8, 0.7, 0.6], [0.3, 0.35, 0.4, 0.45, 0.5]])
INT_LAST = np.array([0.55, 0.65], np.float32)


def close(actual, expected, atol=6e-7):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_reward_filter_vectors(ops):
    carry, rms = np.zeros(2), ops.RunningMeanStd()
    sums = ops.discounted_sum(R1, carry, 0.99, False)
    close(sums, [[1, 0.2], [2.99, 0.198], [3.4601, 4.19602]])
    assert (carry == sums[-1]).all()
    rms.update(sums)
    close([rms.mean, rms.var, rms.std], [2.007319878, 2.570270222, 1.603206232], 1e-7)
    close(R1 / rms.std, time_major([[0.623750, 1.247500, 0.311875], [0.124750, 0, 2.495000]]))
    sums = ops.discounted_sum(R2, carry, 0.99, False)
    close(sums, [[6.425499, 5.154060], [6.461244, 6.102519], [6.496632, 7.041494]])
    rms.update(sums)
    close([rms.mean, rms.var, rms.std], [4.143762768, 6.014613918, 2.452470982], 1e-7)
    close(R2 / rms.std, time_major([[1.223256, 0.040775, 0.040775], [0.407752, 0.407752, 0.407752]]))


def test_reward_filter_signatures_of_the_variants(ops):
    def scales(filtered):
        rms = ops.RunningMeanStd()
        return [(rms.update(filtered(rewards)), float(rms.std))[1] for rewards in (R1, R2)]

    carry, carry_t = np.zeros(2), np.zeros(3)
    forward = scales(lambda rewards: ops.discounted_sum(rewards, carry, 0.99, False))
    backward = scales(lambda rewards: ops.discounted_sum(rewards, np.zeros(2), 0.99, True))
    over_envs = scales(lambda rewards: ops.discounted_sum(np.ascontiguousarray(rewards.T), carry_t, 0.99, False))
    close(forward, [1.603206, 2.452471])
    close(backward, [1.281547, 1.468771])
    assert not np.allclose(over_envs, forward, rtol=0.1)


def test_reward_filter_in_the_long_run(ops):
    rewards, carry, rms, scale = np.ones((128, 64), np.float32), np.zeros(64), ops.RunningMeanStd(), {}
    for rollout in range(1, 201):
        rms.update(ops.discounted_sum(rewards, carry, 0.99, False))
        scale[rollout] = float(rms.std)
    close([scale[k] for k in (1, 2, 10, 50, 200)], [20.51, 25.23, 18.03, 8.64, 4.37], 0.006)
    rms = ops.RunningMeanStd()
    rms.update(ops.discounted_sum(rewards, np.zeros(64), 0.99, True))
    close(rms.std, 20.51, 0.006)


def test_reward_filter_leaves_a_silent_environment_silent(ops):
    rewards, carry = np.zeros((50, 3), np.float32), np.zeros(3)
    rewards[:, 1] = 1
    for reverse in (False, True):
        assert (ops.discounted_sum(rewards, carry, 0.99, reverse)[:, [0, 2]] == 0).all()
    assert carry[1] > 0 == carry[0] == carry[2]


@pytest.mark.parametrize("reverse", [False, True])
def test_discounted_sum_is_the_polynomial_in_gamma(ops, reverse):
    rewards, carry = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), np.array([1.0, -2.0, 3.0])
    sums = ops.discounted_sum(rewards, carry.copy(), 0.9, reverse)
    r, f = (rewards[::-1], sums[::-1]) if reverse else (rewards, sums)
    for t in range(6):
        close(f[t], sum(0.9 ** (t - i) * r[i].astype(float) for i in range(t + 1)) + 0.9 ** (t + 1) * carry, 1e-12)


def test_gae_vectors(ops):
    advantages = ops.gae(REWARDS, VALUES, DONES, LAST, 0.999, 0.95)
    assert advantages.dtype == np.float32 and advantages.shape == (5, 2)
    close(advantages[:, 0], [0.483252, 0.614985, -0.3, -0.480384, -0.4007])
    close(advantages[:, 1], [2.02785, 1.925979, 1.397796, 0.103995, -0.1])
    close((advantages + VALUES)[:, 0], [0.983252, 1.014985, 0, -0.280384, -0.3007])
    close((advantages + VALUES)[:, 1], [1.82785, 1.925979, 1.997796, 1.003995, 1])
    intrinsic = ops.gae(INT_REWARDS, INT_VALUES, None, INT_LAST, 0.99, 0.95)
    close(intrinsic[:, 0], [0.840606, 0.903355, 0.862685, 0.712052, 0.4445])
    close(intrinsic[:, 1], [1.057827, 1.022144, 1.037899, 0.789367, 0.1535])
    both = 2 * advantages + intrinsic
    close(both[:, 0], [1.807109, 2.133325, 0.262685, -0.248716, -0.3569], 2e-6)
    close(both[:, 1], [5.113527, 4.874102, 3.833492, 0.997357, -0.0465], 2e-6)


def test_gae_signatures_of_the_wrong_variants(ops):
    close(ops.gae(INT_REWARDS, INT_VALUES, DONES, INT_LAST, 0.99, 0.95)[0, 0], -0.364744)
    close(ops.gae(REWARDS, VALUES, None, LAST, 0.999, 0.95)[0, 0], 0.252575)
    close(ops.gae(REWARDS, VALUES, DONES, LAST, 0.99, 0.95)[0, 0], 0.474266)


def test_gae_of_one_step_and_in_closed_form(ops):
    one = np.ones((1, 1), np.float32)
    value, last = np.full((1, 1), 0.5, np.float32), np.full(1, 0.7, np.float32)
    close(ops.gae(one, value, 0 * one, last, 0.999, 0.95), 1.1993)
    close(ops.gae(one, value, one, last, 0.999, 0.95), 0.5)
    rewards, zeros = np.array([[1], [0], [2]], np.float32), np.zeros((3, 1), np.float32)
    close(ops.gae(rewards, zeros, None, np.array([5], np.float32), 0.99, 1)[0], 7.811695)
    close(ops.gae(rewards, zeros, None, np.array([5], np.float32), 0, 0.5), rewards)


def test_gae_takes_dones_as_bool_or_float_or_none(ops):
    arguments = REWARDS, VALUES
    a = ops.gae(*arguments, DONES, LAST, 0.99, 0.95)
    np.testing.assert_array_equal(a, ops.gae(*arguments, DONES.astype(bool), LAST, 0.99, 0.95))
    np.testing.assert_array_equal(
        ops.gae(*arguments, None, LAST, 0.99, 0.95), ops.gae(*arguments, np.zeros_like(DONES), LAST, 0.99, 0.95)
    )


def test_gae_stops_at_an_end_of_an_episode(ops):
    rng = np.random.default_rng(7)
    rewards, values = rng.normal(size=(2, 40, 8)).astype(np.float32)
    dones = rng.random((40, 8)) < 0.1
    advantages = ops.gae(rewards, values, dones, values[0].copy(), 0.99, 0.95)
    rewards[30:] += 10
    changed = ops.gae(rewards, values, dones, values[0].copy(), 0.99, 0.95) != advantages
    for n in range(8):
        ends = np.flatnonzero(dones[:30, n])
        first = ends[-1] + 1 if len(ends) else 0
        assert not changed[:first, n].any() and changed[first:, n].all()


# --- Running statistics (specification, D1) ---

A, B = [[0, 100, 10], [0, 100, 30], [0, 104, 50]], [[0, 100, 70], [8, 100, 90]]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_statistics_vectors(ops, dtype):
    rms = ops.RunningMeanStd()
    rms.update(np.array([1, 2, 3, 4], dtype))
    close([rms.mean, rms.var, rms.count], [2.499937502, 1.250149992, 4.0001], 1e-9)
    rms.update(np.array([10, 20], dtype))
    close([rms.mean, rms.var, rms.count], [6.666555557, 43.888914802, 6.0001], 1e-9)
    once = ops.RunningMeanStd()
    once.update(np.array([1, 2, 3, 4, 10, 20], dtype))
    close([once.mean, once.var, once.count], [rms.mean, rms.var, rms.count], 1e-9)

    rms = ops.RunningMeanStd((3,))
    rms.update(np.array(A, dtype))
    close(rms.mean, [0, 101.329956, 29.999000])
    close(rms.var, [3.333222e-05, 3.897729, 266.687809])
    z = rms.normalize(np.array([[0, 104, 20], [8, 100, 90]], dtype), 5)
    close(z, [[0, 1.352423, -0.612287], [5, -0.673645, 3.674150]])
    rms.update(np.array(B, dtype))
    close(rms.mean, [1.599968, 100.797984, 49.999])
    close(rms.var, [10.239866, 2.763173, 800.034018])
    close(rms.normalize(np.array([8, 100, 90], dtype)), [2.000023, -0.480054, 1.414219])


def test_statistics_of_pixels_that_never_change(ops):
    rms = ops.RunningMeanStd((2,))
    rms.update(np.tile(np.array([0, 100], np.uint8), (819_200, 1)))
    close(rms.mean, [0, 99.9999999878], 1e-10)
    np.testing.assert_allclose(rms.var, [1.220703e-10, 1.220825e-06], rtol=1e-6)
    close(rms.std[1], 1.104910e-03, 1e-9)
    assert rms.normalize(np.array([1, 101], np.uint8), 5).tolist() == [5, 5]


def test_normalize_and_clip(ops):
    rms = ops.RunningMeanStd()
    rms.load_state_dict({"mean": 100.0, "var": 400.0, "count": 1.0})
    x = np.array([0, 50, 120, 255], np.uint8)
    assert rms.normalize(x, 5).tolist() == [-5, -2.5, 1, 5]
    assert rms.normalize(x).tolist() == [-5, -2.5, 1, 7.75]
    out = np.empty(4, np.float32)
    assert rms.normalize(x, 2, out) is out and out.tolist() == [-2, -2, 1, 2]
    assert rms.normalize(np.zeros((0, 3), np.uint8)).shape == (0, 3)


def test_normalize_without_variance_follows_ieee(ops):
    rms = ops.RunningMeanStd((3,))
    rms.load_state_dict({"mean": np.full(3, 2.0), "var": np.zeros(3), "count": 1.0})
    np.testing.assert_array_equal(rms.normalize(np.array([1, 2, 3], np.uint8), 5), [-5, np.nan, 5])
    np.testing.assert_array_equal(rms.normalize(np.array([np.nan, -np.inf, np.inf])), [np.nan, -np.inf, np.inf])


@pytest.mark.parametrize("count", [1, 2, 257, 70_000])
@pytest.mark.parametrize("features", [1, 3, 2049])
def test_uint8_statistics_are_exact(ops, count, features):
    if count * features > 10_000_000:
        features = 40
    batch = np.random.default_rng(8).integers(0, 256, (count, features), dtype=np.uint8)
    batch[:, 0] = 255  # the largest sums
    rms = ops.RunningMeanStd((features,), count=1e-300)
    rms.update(batch)
    total, squares = (batch.astype(np.int64) ** k for k in (1, 2))
    for f in range(min(features, 3)):
        s, q = int(total[:, f].sum()), int(squares[:, f].sum())
        assert rms.mean[f] == pytest.approx(s / count, rel=4e-16, abs=0)
        assert rms.var[f] == pytest.approx((count * q - s * s) / count**2, rel=1e-14, abs=1e-290)


def test_uint8_update_makes_no_float_copy(ops):
    tracemalloc = pytest.importorskip("tracemalloc")
    batch, rms = np.zeros((2000, 84, 84), np.uint8), ops.RunningMeanStd((84, 84))
    tracemalloc.start()
    rms.update(batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < batch.nbytes / 5


def test_statistics_do_not_depend_on_the_batches(ops):
    batch = np.random.default_rng(9).normal(1e4, 1e-2, (64, 5, 2))
    once, parts, merged = (ops.RunningMeanStd((5, 2)) for _ in range(3))
    once.update(batch.reshape(8, 8, 5, 2))
    for part in np.array_split(batch, 7):
        parts.update(part)
        merged.merge(part.mean(0), part.var(0), len(part))
    for rms in (parts, merged):
        np.testing.assert_allclose(rms.mean, once.mean, rtol=1e-14)
        np.testing.assert_allclose(rms.var, once.var, rtol=1e-9)
        assert rms.count == pytest.approx(once.count)


def test_statistics_let_nan_through_update_and_keep_it_out_of_merge(ops):
    rms = ops.RunningMeanStd((2,))
    rms.update(np.array([[np.nan, 1.0], [1.0, 1.0]]))
    assert np.isnan(rms.mean).tolist() == np.isnan(rms.var).tolist() == [True, False]
    rms = ops.RunningMeanStd((2,))
    for mean, var, count, name in [
        ([np.nan, 0], [1, 1], 1, "mean"),
        ([0, np.inf], [1, 1], 1, "mean"),
        ([0, 0], [1, np.inf], 1, "var"),
        ([0, 0], [1, -1], 1, "var"),
        ([0, 0, 0], [1, 1], 1, "mean"),
        ([0, 0], 1, 1, "var"),
        ([0, 0], [1, 1], 0, "count"),
        ([0, 0], [1, 1], -1, "count"),
        ([0, 0], [1, 1], np.inf, "count"),
        ([0, 0], [1, 1], np.nan, "count"),
        ([0, 0], [1, 1], 10**400, "count"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected .* got"):
            rms.merge(mean, var, count)
    for mean, var, count, name in [
        ("ab", [1, 1], 1, "mean"),
        ([0, [0, 1]], [1, 1], 1, "mean"),
        ([0, 0], [1j, 1], 1, "var"),
        ([0, 0], [True, True], 1, "var"),
        (None, [1, 1], 1, "mean"),
        ([0, 0], [1, 1], "1", "count"),
        ([0, 0], [1, 1], None, "count"),
    ]:
        with pytest.raises(TypeError, match=f"^{name}: expected .* got"):
            rms.merge(mean, var, count)
    assert rms.mean.tolist() == [0, 0] and rms.var.tolist() == [1, 1] and rms.count == 1e-4


def test_state_dict_round_trip(ops):
    rms = ops.RunningMeanStd((3,))
    rms.update(np.array(A, np.uint8))
    state = rms.state_dict()
    assert set(state) == {"mean", "var", "count"} and type(state["count"]) is float
    assert json.loads(json.dumps(state)) == state  # plain types, bit for bit
    for twin in (ops.RunningMeanStd((3,)), copy.deepcopy(rms), pickle.loads(pickle.dumps(rms))):
        twin.load_state_dict(state)
        twin.update(np.array(B, np.uint8))
        assert (rms.mean == state["mean"]).all() and rms.count == state["count"]  # copies
        reference_rms = copy.deepcopy(rms)
        reference_rms.update(np.array(B, np.uint8))
        assert (twin.mean == reference_rms.mean).all() and (twin.var == reference_rms.var).all()
    for bad, error in [
        ({**state, "mean": np.zeros(2)}, ValueError),
        ({**state, "var": (-rms.var).tolist()}, ValueError),
        ({**state, "count": np.nan}, ValueError),
        ({**state, "extra": 1}, ValueError),
        ({"mean": state["mean"]}, ValueError),
        ([1, 2, 3], TypeError),
        (None, TypeError),
    ]:
        with pytest.raises(error):
            rms.load_state_dict(bad)
        assert (rms.mean == state["mean"]).all() and (rms.var == state["var"]).all() and rms.count == state["count"]


@pytest.mark.parametrize("shape, error", [(3, TypeError), ([3], TypeError), ((3.0,), TypeError), ((0,), ValueError)])
def test_statistics_shape(ops, shape, error):
    with pytest.raises(error, match="^shape: expected .* got"):
        ops.RunningMeanStd(shape)


# --- Wrong arguments ---


def good_arguments(name):
    """The function, and well-formed arguments by name."""
    f32 = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    rms = "RunningMeanStd"
    return {
        "max_pool_resize": dict(
            frame_a=np.ones((210, 160), np.uint8), frame_b=np.ones((210, 160), np.uint8),
            out=np.ones((84, 84), np.uint8), palette=np.arange(256, dtype=np.uint8)),
        "rgb_to_gray": dict(rgb=np.ones((5, 4, 3), np.uint8), out=np.ones((5, 4), np.uint8)),
        "gae": dict(rewards=f32(5, 4), values=f32(5, 4), dones=f32(5, 4), last_value=f32(4), gamma=0.9, lam=0.9),
        "discounted_sum": dict(rewards=f32(5, 4), carry=np.ones(4), gamma=0.9, reverse=False),
        f"{rms}.update": dict(batch=f32(7, 5, 4)),
        f"{rms}.normalize": dict(x=f32(7, 5, 4), clip=5.0, out=f32(7, 5, 4)),
    }[name]  # fmt: skip


def function(ops, name):
    if name.startswith("RunningMeanStd."):
        return getattr(ops.RunningMeanStd((5, 4)), name.split(".")[1])
    return getattr(ops, name)


def bad_arrays(name, good):
    """(what, value, error) for an array argument."""
    yield "list", good.tolist(), TypeError
    yield "memoryview", memoryview(good), TypeError
    yield "bytes", bytes(good), TypeError
    yield "masked", np.ma.masked_array(good), TypeError
    yield "object", good.astype(object), TypeError
    yield "structured", good.view([("x", good.dtype)]), TypeError
    for dtype in (np.int8, np.int64, np.float16, np.complex64, "M8[s]", "S4"):
        yield str(dtype), good.astype(dtype), TypeError
    if good.itemsize > 1:
        yield "byteorder", good.astype(good.dtype.newbyteorder()), TypeError
        raw = np.zeros(good.nbytes + 1, np.uint8)[1:]
        unaligned = raw.view(good.dtype).reshape(good.shape)
        yield "unaligned", unaligned, ValueError
    yield "0d", good.ravel()[:1].reshape(()), ValueError
    yield "more axes", good[..., None], ValueError
    yield "longer", np.concatenate([good, good]), ValueError
    yield "shorter", good[:-1].copy(), ValueError
    yield "empty", good[:0].copy(), ValueError
    yield "strided", np.repeat(good, 2, axis=-1)[..., ::2], ValueError
    yield "reversed", good[..., ::-1], ValueError
    yield "broadcast", np.broadcast_to(good.ravel()[:1].reshape((1,) * good.ndim), good.shape), ValueError
    if good.ndim > 1:
        yield "fortran", np.asfortranarray(good), ValueError
        yield "transposed", np.ascontiguousarray(good.T).T, ValueError
    if name in ("out", "carry"):
        readonly = good.copy()
        readonly.flags.writeable = False
        yield "readonly", readonly, ValueError


BAD = [
    pytest.param(call, name, value, error, id=f"{call}-{name}-{what}")
    for call in (
        "max_pool_resize",
        "rgb_to_gray",
        "gae",
        "discounted_sum",
        "RunningMeanStd.update",
        "RunningMeanStd.normalize",
    )
    for name, good in good_arguments(call).items()
    if isinstance(good, np.ndarray)
    for what, value, error in bad_arrays(name, good)
    # these are fine where any number of samples is
    if not (call.startswith("Running") and name in ("batch", "x") and what in ("longer", "shorter"))
    and not (call.endswith("normalize") and what == "empty" and name == "x")
    # the first array of a call sets T and N, so that another argument is named
    and not (name == "rewards" and what in ("longer", "shorter", "empty"))
    and not (name in ("frame_a", "rgb") and what in ("longer", "shorter"))
]
BAD += [
    pytest.param(call, name, value, error, id=f"{call}-{name}-{value}")
    for call, name in [
        ("gae", "gamma"), ("gae", "lam"), ("discounted_sum", "gamma"), ("RunningMeanStd.normalize", "clip")
    ]
    for value, error in [
        ("1", TypeError), (None, TypeError), (True, TypeError), (1j, TypeError), (np.ones(1), TypeError),
        (float("nan"), ValueError), (-0.1, ValueError), (-np.inf, ValueError), (-(10**400), ValueError),
    ]
]  # fmt: skip
BAD += [
    pytest.param("gae", "gamma", 1.0001, ValueError, id="gamma above 1"),
    pytest.param("gae", "lam", 10**400, ValueError, id="lam far above 1"),
    pytest.param("discounted_sum", "gamma", np.inf, ValueError, id="gamma infinite"),
    pytest.param("discounted_sum", "reverse", 1, TypeError, id="reverse a number"),
    pytest.param("discounted_sum", "reverse", None, TypeError, id="reverse None"),
    pytest.param("RunningMeanStd.normalize", "clip", 0, ValueError, id="clip 0"),
    pytest.param("max_pool_resize", "frame_a", np.zeros((83, 160), np.uint8), ValueError, id="low frame"),
    pytest.param("max_pool_resize", "frame_a", np.zeros((210, 83), np.uint8), ValueError, id="narrow frame"),
    pytest.param("max_pool_resize", "frame_a", np.zeros((4097, 84), np.uint8), ValueError, id="tall frame"),
    pytest.param("max_pool_resize", "frame_a", np.zeros((0, 10**18), np.uint8), ValueError, id="absurd frame"),
    pytest.param("rgb_to_gray", "rgb", np.zeros((5, 4, 4), np.uint8), ValueError, id="four channels"),
    pytest.param("rgb_to_gray", "rgb", np.zeros((4097, 1, 3), np.uint8), ValueError, id="tall color frame"),
    pytest.param("max_pool_resize", "frame_b", np.zeros((160, 210), np.uint8), ValueError, id="other frame"),
]
BAD += [
    pytest.param(call, name, None, TypeError, id=f"{call}-{name}-None")
    for call, names in [
        ("max_pool_resize", ["frame_a", "frame_b", "out"]),
        ("rgb_to_gray", ["rgb", "out"]),
        ("gae", ["rewards", "values", "last_value"]),
        ("discounted_sum", ["rewards", "carry"]),
        ("RunningMeanStd.update", ["batch"]),
        ("RunningMeanStd.normalize", ["x"]),
    ]
    for name in names
]


@pytest.mark.parametrize("call, name, value, error", BAD)
def test_wrong_argument_raises_and_is_named(ops, call, name, value, error):
    arguments = good_arguments(call)
    function(ops, call)(**arguments)  # the rest is fine
    arguments = {**good_arguments(call), name: value}
    before = copy.deepcopy({k: v for k, v in arguments.items() if k in ("out", "carry") and k != name})
    with pytest.raises(error, match=f"^{name}: expected .* got"):
        function(ops, call)(**arguments)
    for key, old in before.items():
        assert (arguments[key] == old).all()


def overlapping():
    memory = np.zeros(210 * 160 + 84 * 84, np.uint8)
    frame, other = memory[: 210 * 160].reshape(210, 160), np.zeros((210, 160), np.uint8)
    out = memory[210 * 160 - 1 : -1].reshape(84, 84)  # shares one byte
    rgb, gray = memory[: 50 * 50 * 3].reshape(50, 50, 3), memory[50 * 50 * 3 - 1 :][: 50 * 50].reshape(50, 50)
    yield "rgb_to_gray", dict(rgb=rgb, out=gray), "out"
    yield "max_pool_resize", dict(frame_a=frame, frame_b=other, out=out), "out"
    yield "max_pool_resize", dict(frame_a=other, frame_b=frame, out=out), "out"
    palette = memory[210 * 160 : 210 * 160 + 256]
    yield "max_pool_resize", dict(frame_a=other, frame_b=other, out=out, palette=palette), "out"
    memory = np.zeros(100)
    rewards = memory[:10].view(np.float32).reshape(5, 4)
    yield "discounted_sum", dict(rewards=rewards, carry=memory[9:13], gamma=0.9, reverse=False), "carry"
    x = memory[:10].view(np.float32).reshape(1, 5, 4)
    yield "RunningMeanStd.normalize", dict(x=x, out=x), "out"
    yield "RunningMeanStd.normalize", dict(x=x, out=memory[5:15].view(np.float32).reshape(1, 5, 4)), "out"


@pytest.mark.parametrize("call, arguments, name", list(overlapping()))
def test_overlap_raises_and_is_named(ops, call, arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected memory of its own, got"):
        function(ops, call)(**arguments)


def test_neighbours_in_one_buffer_are_fine(ops):
    memory = np.ones(210 * 160 + 84 * 84, np.uint8)
    frame, out = memory[: 210 * 160].reshape(210, 160), memory[210 * 160 :].reshape(84, 84)
    ops.max_pool_resize(frame, frame, out)


@pytest.mark.parametrize("steps, envs", [(0, 3), (3, 0), (0, 0)])
def test_zero_sizes_compute(ops, steps, envs):
    rewards, last, carry = np.zeros((steps, envs), np.float32), np.zeros(envs, np.float32), np.ones(envs)
    assert ops.gae(rewards, rewards, None, last, 0.9, 0.9).shape == (steps, envs)
    assert ops.discounted_sum(rewards, carry, 0.9, False).shape == (steps, envs)
    assert (carry == 1).all() or steps
    rms = ops.RunningMeanStd()
    with pytest.raises(ValueError, match="^batch: expected at least one sample, got"):
        rms.update(rewards)
    assert rms.count == 1e-4


def test_compiled_helpers_check_for_themselves():
    if fastops.BACKEND == "numpy":
        pytest.skip("not compiled")
    sums, normalize = fastops._stats.sums, fastops._stats.normalize
    x, m, out = np.zeros((3, 2), np.uint8), np.ones(2), np.zeros((3, 2), np.float32)
    normalize(x, m, m, 5.0, out)
    for bad in (None, x[:, ::-1], x.astype(np.int16), np.zeros(3, np.uint8), "ab"):
        with pytest.raises((TypeError, ValueError)):
            sums(bad)
        with pytest.raises((TypeError, ValueError)):
            normalize(bad, m, m, 5.0, out)
    short = np.ones(1)
    for arguments in [
        (x, short, m, out), (x, m, short, out), (x, m, m, out[:2]),
        (x, None, m, out), (x, m, None, out), (x, m, m, None),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            normalize(*arguments[:3], 5.0, arguments[3])


def test_calls_do_not_leak(ops):
    psutil = pytest.importorskip("psutil")
    frame, out = np.zeros((84, 84), np.uint8), np.zeros((84, 84), np.uint8)
    x, carry = np.zeros((20, 50), np.float32), np.zeros(50)

    def calls(n):
        for _ in range(n):
            ops.max_pool_resize(frame, frame, out)
            ops.gae(x, x, None, x[0], 0.9, 0.9)
            ops.discounted_sum(x, carry, 0.9, True)
            for wrong in (None, frame[::-1], out.T):
                with pytest.raises((TypeError, ValueError)):
                    ops.max_pool_resize(frame, wrong, out)

    calls(200)
    before = psutil.Process().memory_info().rss
    calls(1500)  # a leaked (20, 50) result each time would be 6 MB
    assert psutil.Process().memory_info().rss - before < 3e6


# --- The package ---


@pytest.mark.parametrize("name", FUNCTIONS)
def test_documentation(ops, name):
    doc = inspect.getdoc(getattr(ops, name))
    assert "Source:" in doc and ("Raises:" in doc or name == "RunningMeanStd")
    assert doc == inspect.getdoc(getattr(reference, name))
    assert list(inspect.signature(getattr(ops, name)).parameters) == list(
        inspect.signature(getattr(reference, name)).parameters
    )


@pytest.mark.parametrize("method", ["update", "merge", "normalize", "state_dict", "load_state_dict"])
def test_documentation_of_methods(ops, method):
    assert len(inspect.getdoc(getattr(ops.RunningMeanStd, method))) > 60


def run(*command, **options):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clean copy of what is installed, and an environment with this one's packages but without fastops."""
    folder = tmp_path_factory.mktemp("install")
    root = folder / "repository"
    shutil.copytree(ROOT / "fastops", root / "fastops", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "rnd_ppo_atari.py"):
        shutil.copy(ROOT / name, root)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(("fastops", "rnd_ppo", "__editable__", "__pycache__")):
            (site / package.name).symlink_to(package)
    compiler = folder / "cc"  # optimising takes most of the time
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} "$@" -O0\n')
    compiler.chmod(0o755)
    return folder, root, python, site


def install(checkout, *options, compiler=None):
    folder, root, python, _ = checkout
    environment = {**os.environ, "CC": str(compiler or folder / "cc")}
    environment.pop("PYTHONPATH", None)
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(
        *pip, "install", "--no-deps", "--no-build-isolation", "--force-reinstall", "-q", *options, root, env=environment
    )


def backend(checkout, cwd):
    """(BACKEND, where _stats was found, warnings) of a fresh interpreter in `cwd`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    code = "import fastops; print(fastops.BACKEND); print(getattr(fastops, '_stats', fastops).__file__)"
    result = run(checkout[2], "-c", code, cwd=cwd, env=environment)
    return *result.stdout.split("\n")[:2], result.stderr


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="needs a shell script as compiler")
def test_compiled_kernels_are_used_however_installed_and_from_wherever_run(checkout):
    folder, root, _, site = checkout

    install(checkout)
    for cwd in (root, folder):
        name, where, warnings = backend(checkout, cwd)
        assert name == "cython" and Path(where).is_relative_to(site) and not warnings

    for source in sorted(root.glob("fastops/*.pyx")):
        text = source.read_text()
        source.write_text(text + "\n# changed since\n")
        name, _, warnings = backend(checkout, root)
        assert name == "numpy" and f"was not built from {source}" in warnings
        assert backend(checkout, folder)[0] == "cython"  # the installed ones still agree
        source.write_text(text)
        assert backend(checkout, root)[0] == "cython"

    with (root / "fastops" / "_checks.py").open("a") as checks:  # the kernels import it from beside fastops/__init__.py
        checks.write("# changed since\n")
    assert backend(checkout, root)[0] == "cython"

    checks = root / "fastops" / "_checks.py"
    text = checks.read_text()
    for changed in (text.replace("SIZE = 84", "SIZE = 100"), text.replace("MAX_SIDE = 4096", "MAX_SIDE = 10000")):
        checks.write_text(changed)  # the kernels would write behind their arrays
        name, _, warnings = backend(checkout, root)
        assert name == "numpy" and "_frames.pyx has SIZE 84 and MAX_SIDE 4096, not those of _checks.py" in warnings
    checks.write_text(text)
    assert backend(checkout, root)[0] == "cython"

    source = root / "fastops" / "_stats.pyx"
    text = source.read_text()
    source.write_text(text + "\n# changed since\n")
    install(checkout, "--editable")
    for cwd in (root, folder):
        name, where, warnings = backend(checkout, cwd)
        assert name == "cython" and Path(where).is_relative_to(root) and not warnings
    source.write_text(text)
    assert f"was not built from {source}" in backend(checkout, folder)[2]
    for binary in root.glob("fastops/*.so"):
        binary.unlink()

    install(checkout, compiler="/bin/false")  # puts the kernels that are left in build/ into the wheel
    assert [backend(checkout, cwd)[0] for cwd in (root, folder)] == ["cython", "cython"]
    source.write_text(text + "\n# changed since\n")
    install(checkout, compiler="/bin/false")
    for cwd in (root, folder):
        name, _, warnings = backend(checkout, cwd)
        assert name == "numpy" and "was not built from" in warnings

    shutil.rmtree(root / "build")
    install(checkout, compiler="/bin/false")
    for cwd in (root, folder):
        name, _, warnings = backend(checkout, cwd)
        assert name == "numpy" and not warnings
