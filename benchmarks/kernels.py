"""Every fastops function against its NumPy twin, OpenCV and a torch loop, on one thread.

    python benchmarks/kernels.py                   a table
    python benchmarks/kernels.py --json out.json   and a file with all figures, the machine and the command

The sides of a comparison take turns within one run, so that a change of the clock or a noisy neighbour affects all of
them. Figures are microseconds per call: the median of the repeats, and the 10th and 90th percentile.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import ale_py
import cv2
import numpy as np
import report
import torch
from ale_py import roms

import fastops
from fastops import reference

Sides = dict[str, Callable[[int], object]]  # a call is given the number of the repeat
Comparisons = dict[str, tuple[Sides, int]]  # the sides, and how many calls are timed at once


# === The sides ========================================================================================================


def screens(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of successive Montezuma screens under random actions: gray, palette indices, and the palette."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.loadROM(roms.get_rom_path("montezuma_revenge"))
    actions = ale.getMinimalActionSet()
    rng = np.random.default_rng(0)
    grays = np.empty((count, 2, 210, 160), np.uint8)
    indices = np.empty((count, 2, 210, 160), np.uint8)
    for i in range(count):
        for _ in range(10):
            ale.act(actions[rng.integers(len(actions))])
        for k in range(2):
            ale.act(actions[0])
            grays[i, k] = ale.getScreenGrayscale()
            indices[i, k] = ale.getScreen()
        if ale.game_over():
            ale.reset_game()
    palette = np.zeros(256, np.uint8)
    palette[indices] = grays
    return grays, indices, palette


def rgb_to_gray() -> Comparisons:
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (224, 240, 3), dtype=np.uint8)
    gray = np.empty((224, 240), np.uint8)
    sides: Sides = {
        "fastops": lambda _: fastops.rgb_to_gray(color, gray),
        "numpy twin": lambda _: reference.rgb_to_gray(color, gray),
        "opencv": lambda _: cv2.cvtColor(color, cv2.COLOR_RGB2GRAY, dst=gray),
    }
    return {"rgb_to_gray, noise 224x240": (sides, 20)}


def resize(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (84, 84), interpolation=cv2.INTER_AREA)


def gray_resizes(pairs: np.ndarray) -> Sides:
    """Of pairs of gray screens."""
    out = np.empty((84, 84), np.uint8)

    def opencv(i: int) -> np.ndarray:
        a, b = pairs[i % len(pairs)]
        return resize(np.maximum(a, b))

    return {
        "fastops": lambda i: fastops.max_pool_resize(*pairs[i % len(pairs)], out),
        "numpy twin": lambda i: reference.max_pool_resize(*pairs[i % len(pairs)], out),
        "numpy maximum + opencv": opencv,
    }


def palette_resizes(pairs: np.ndarray, palette: np.ndarray) -> Sides:
    """Of pairs of screens of palette indices."""
    out = np.empty((84, 84), np.uint8)

    def numpy_lookup(i: int) -> np.ndarray:
        a, b = pairs[i % len(pairs)]
        return resize(np.maximum(palette[a], palette[b]))

    def opencv_lookup(i: int) -> np.ndarray:
        a, b = pairs[i % len(pairs)]
        return resize(np.maximum(cv2.LUT(a, palette), cv2.LUT(b, palette)))

    return {
        "fastops": lambda i: fastops.max_pool_resize(*pairs[i % len(pairs)], out, palette),
        "numpy twin": lambda i: reference.max_pool_resize(*pairs[i % len(pairs)], out, palette),
        "numpy lookup + maximum + opencv": numpy_lookup,
        "opencv LUT + maximum + opencv": opencv_lookup,
    }


def max_pool_resize() -> Comparisons:
    grays, indices, palette = screens(100)
    noise = np.random.default_rng(0).integers(0, 256, (20, 2, 210, 160), dtype=np.uint8)
    return {
        "max_pool_resize, Montezuma 210x160": (gray_resizes(grays), 20),
        "max_pool_resize, noise 210x160": (gray_resizes(noise), 20),
        "max_pool_resize, Montezuma, palette indices": (palette_resizes(indices, palette), 20),
    }


def torch_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    alive: torch.Tensor,
    last_value: torch.Tensor,
    gamma: float,
    lam: float,
) -> torch.Tensor:
    advantages = torch.empty_like(rewards)
    advantage = torch.zeros_like(last_value)
    next_value = last_value
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value * alive[t] - values[t]
        advantage = delta + gamma * lam * alive[t] * advantage
        advantages[t] = advantage
        next_value = values[t]
    return advantages


def sums() -> Comparisons:
    """Generalised advantage estimation and discounted sums."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(128, 128)).astype(np.float32)
    values = rng.normal(size=(128, 128)).astype(np.float32)
    dones = rng.random((128, 128)) < 0.01
    last = values[0].copy()
    alive = 1 - dones.astype(np.float32)
    tensors = [torch.from_numpy(array) for array in (rewards, values, alive, last)]
    carry = np.zeros(128)
    gae: Sides = {
        "fastops": lambda _: fastops.gae(rewards, values, dones, last, 0.999, 0.95),
        "numpy twin": lambda _: reference.gae(rewards, values, dones, last, 0.999, 0.95),
        "torch loop": lambda _: torch_gae(*tensors, 0.999, 0.95),
    }
    discounted_sum: Sides = {
        "fastops": lambda _: fastops.discounted_sum(rewards, carry, 0.99, True),
        "numpy twin": lambda _: reference.discounted_sum(rewards, carry, 0.99, True),
    }
    return {"gae, 128x128": (gae, 5), "discounted_sum, 128x128": (discounted_sum, 5)}


def running_statistics() -> Comparisons:
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (4096, 84, 84), dtype=np.uint8)
    numbers = rng.normal(size=(128, 128))
    ours = fastops.RunningMeanStd((84, 84))
    twin = reference.RunningMeanStd((84, 84))
    our_scalar = fastops.RunningMeanStd()
    twin_scalar = reference.RunningMeanStd()
    ours.update(batch)
    twin.update(batch)

    def numpy_by_512(_: int) -> None:
        for part in np.split(batch, 8):
            part.mean(0, dtype=np.float64)
            part.var(0, dtype=np.float64)

    frames = batch[:1024]
    out = np.empty((1024, 84, 84), np.float32)
    tensor = torch.from_numpy(frames)
    mean = torch.from_numpy(ours.mean.astype(np.float32))
    std = torch.from_numpy(ours.std.astype(np.float32))
    update: Sides = {
        "fastops": lambda _: ours.update(batch),
        "numpy twin": lambda _: twin.update(batch),
        "numpy mean and var, by 512": numpy_by_512,
    }
    update_scalar: Sides = {
        "fastops": lambda _: our_scalar.update(numbers),
        "numpy twin": lambda _: twin_scalar.update(numbers),
    }
    normalize: Sides = {
        "fastops": lambda _: ours.normalize(frames, 5, out),
        "numpy twin": lambda _: twin.normalize(frames, 5, out),
        "torch, float32": lambda _: tensor.float().sub_(mean).div_(std).clamp_(-5, 5),
    }
    return {
        "RunningMeanStd.update, uint8 4096x84x84": (update, 1),
        "RunningMeanStd.update, float64 128x128": (update_scalar, 20),
        "RunningMeanStd.normalize, uint8 1024x84x84": (normalize, 1),
    }


# === The comparison ===================================================================================================


def measure(sides: Sides, calls: int, seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds per call of each side, which take turns for so many seconds."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    repeats = 0
    end = time.perf_counter() + seconds
    while repeats < 5 or time.perf_counter() < end:
        for name, call in sides.items():
            call(0)  # the other sides have filled the caches with data of their own
            start = time.perf_counter()
            for i in range(calls):
                call(repeats * calls + i)
            times[name].append((time.perf_counter() - start) / calls * 1e6)
        repeats += 1

    figures = {}
    for name, values in times.items():
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        ratio = median / np.median(times["fastops"])
        figures[name] = {
            "median_us": median,
            "p10_us": p10,
            "p90_us": p90,
            "repeats": repeats,
            "calls": calls,
            "ratio_to_fastops": ratio,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    parser.add_argument("--seconds", type=float, default=3, help="time for each comparison (default: 3)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

    about = report.machine("numpy", "opencv-python-headless", "torch", "ale-py", "cython")
    print(
        f"{about['cpu']}, {about['cores']} cores, one thread; {about['versions']}; fastops runs on {about['fastops']}"
    )
    print(f"\n{'us per call':50} {'median':>10} {'p10':>10} {'p90':>10} {'ratio':>7}")
    comparisons = rgb_to_gray() | max_pool_resize() | sums() | running_statistics()
    results = {}
    for title, (sides, calls) in comparisons.items():
        print(title)
        results[title] = measure(sides, calls, args.seconds)
        for name, figure in results[title].items():
            columns = " ".join(f"{figure[key]:10.1f}" for key in ("median_us", "p10_us", "p90_us"))
            print(f"    {name:46} {columns} {figure['ratio_to_fastops']:7.2f}")
    if args.json:
        report.write(args.json, about, results)


if __name__ == "__main__":
    main()
