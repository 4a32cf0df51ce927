"""Every fastops function against its NumPy twin, OpenCV and a torch loop, on one thread.

    python benchmarks/kernels.py                   a table
    python benchmarks/kernels.py --json out.json   and a file with all figures, the machine and the command

The sides of a comparison take turns within one run: a change of the clock or a noisy neighbour meets all of them.
Figures are microseconds per call: the median of the repeats, and the 10th and 90th percentile.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ale_py
import cv2
import numpy as np
import torch
from ale_py import roms

import fastops
from fastops import reference

Sides = dict[str, Callable[[int], object]]  # a call is given the number of the repeat


def screens(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of successive Montezuma screens under random actions: gray, palette indices, and the palette."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.loadROM(roms.get_rom_path("montezuma_revenge"))
    rng, actions = np.random.default_rng(0), ale.getMinimalActionSet()
    grays, indices = np.empty((count, 2, 210, 160), np.uint8), np.empty((count, 2, 210, 160), np.uint8)
    for i in range(count):
        for _ in range(10):
            ale.act(actions[rng.integers(len(actions))])
        for k in range(2):
            ale.act(actions[0])
            grays[i, k], indices[i, k] = ale.getScreenGrayscale(), ale.getScreen()
        if ale.game_over():
            ale.reset_game()
    palette = np.zeros(256, np.uint8)
    palette[indices] = grays
    return grays, indices, palette


def torch_gae(rewards, values, alive, last_value, gamma, lam):
    advantages, advantage, next_value = torch.empty_like(rewards), torch.zeros_like(last_value), last_value
    for t in range(len(rewards) - 1, -1, -1):
        delta = rewards[t] + gamma * next_value * alive[t] - values[t]
        advantage = delta + gamma * lam * alive[t] * advantage
        advantages[t], next_value = advantage, values[t]
    return advantages


def comparisons() -> dict[str, tuple[Sides, int]]:
    """The sides, and how many calls one repeat times."""
    rng = np.random.default_rng(0)
    grays, indices, palette = screens(100)
    noise = rng.integers(0, 256, (20, 2, 210, 160), dtype=np.uint8)
    out = np.empty((84, 84), np.uint8)

    def resizes(frames: np.ndarray) -> Sides:
        def opencv(i: int) -> object:
            a, b = frames[i % len(frames)]
            return cv2.resize(np.maximum(a, b), (84, 84), interpolation=cv2.INTER_AREA)

        return {
            "fastops": lambda i: fastops.max_pool_resize(*frames[i % len(frames)], out),
            "numpy twin": lambda i: reference.max_pool_resize(*frames[i % len(frames)], out),
            "numpy maximum + opencv": opencv,
        }

    def opencv_palette(i: int) -> object:
        a, b = indices[i % len(indices)]
        return cv2.resize(np.maximum(palette[a], palette[b]), (84, 84), interpolation=cv2.INTER_AREA)

    def opencv_lut(i: int) -> object:
        a, b = indices[i % len(indices)]
        return cv2.resize(np.maximum(cv2.LUT(a, palette), cv2.LUT(b, palette)), (84, 84), interpolation=cv2.INTER_AREA)

    rewards, values = rng.normal(size=(2, 128, 128)).astype(np.float32)
    dones, last = rng.random((128, 128)) < 0.01, values[0].copy()
    tensors = [torch.from_numpy(array) for array in (rewards, values, 1 - dones.astype(np.float32), last)]
    carry = np.zeros(128)

    batch = rng.integers(0, 256, (4096, 84, 84), dtype=np.uint8)
    normalised = np.empty((1024, 84, 84), np.float32)
    statistics = {"fastops": fastops.RunningMeanStd((84, 84)), "numpy twin": reference.RunningMeanStd((84, 84))}
    for rms in statistics.values():
        rms.update(batch)
    tensor, mean, std = (torch.from_numpy(x) for x in (batch[:1024], rms.mean.astype("f"), rms.std.astype("f")))
    sums = rng.normal(size=(128, 128))
    scalar = {"fastops": fastops.RunningMeanStd(), "numpy twin": reference.RunningMeanStd()}

    color, gray = rng.integers(0, 256, (224, 240, 3), dtype=np.uint8), np.empty((224, 240), np.uint8)

    return {
        "rgb_to_gray, noise 224x240": (
            {
                "fastops": lambda i: fastops.rgb_to_gray(color, gray),
                "numpy twin": lambda i: reference.rgb_to_gray(color, gray),
                "opencv": lambda i: cv2.cvtColor(color, cv2.COLOR_RGB2GRAY, dst=gray),
            },
            20,
        ),
        "max_pool_resize, Montezuma 210x160": (resizes(grays), 20),
        "max_pool_resize, noise 210x160": (resizes(noise), 20),
        "max_pool_resize, Montezuma, palette indices": (
            {
                "fastops": lambda i: fastops.max_pool_resize(*indices[i % len(indices)], out, palette),
                "numpy twin": lambda i: reference.max_pool_resize(*indices[i % len(indices)], out, palette),
                "numpy lookup + maximum + opencv": opencv_palette,
                "opencv LUT + maximum + opencv": opencv_lut,
            },
            20,
        ),
        "gae, 128x128": (
            {
                "fastops": lambda i: fastops.gae(rewards, values, dones, last, 0.999, 0.95),
                "numpy twin": lambda i: reference.gae(rewards, values, dones, last, 0.999, 0.95),
                "torch loop": lambda i: torch_gae(*tensors, 0.999, 0.95),
            },
            5,
        ),
        "discounted_sum, 128x128": (
            {
                "fastops": lambda i: fastops.discounted_sum(rewards, carry, 0.99, True),
                "numpy twin": lambda i: reference.discounted_sum(rewards, carry, 0.99, True),
            },
            5,
        ),
        "RunningMeanStd.update, uint8 4096x84x84": (
            {
                **{name: lambda i, rms=rms: rms.update(batch) for name, rms in statistics.items()},
                "numpy mean and var, by 512": lambda i: [
                    (part.mean(0, dtype=np.float64), part.var(0, dtype=np.float64)) for part in np.split(batch, 8)
                ],
            },
            1,
        ),
        "RunningMeanStd.update, float64 128x128": (
            {name: lambda i, rms=rms: rms.update(sums) for name, rms in scalar.items()},
            20,
        ),
        "RunningMeanStd.normalize, uint8 1024x84x84": (
            {
                **{name: lambda i, r=rms: r.normalize(batch[:1024], 5, normalised) for name, rms in statistics.items()},
                "torch, float32": lambda i: tensor.float().sub_(mean).div_(std).clamp_(-5, 5),
            },
            1,
        ),
    }


def measure(sides: Sides, calls: int, seconds: float) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    repeat, end = 0, time.perf_counter() + seconds
    while repeat < 5 or time.perf_counter() < end:
        for name, call in sides.items():
            call(0)  # what the other side left in the caches is not this side's fault
            start = time.perf_counter()
            for i in range(calls):
                call(repeat * calls + i)
            times[name].append((time.perf_counter() - start) / calls * 1e6)
        repeat += 1
    figures = {}
    for name, values in times.items():
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        figures[name] = {"median_us": median, "p10_us": p10, "p90_us": p90, "repeats": repeat, "calls": calls}
    for figure in figures.values():
        figure["ratio_to_fastops"] = figure["median_us"] / figures["fastops"]["median_us"]
    return figures


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = ("numpy", "opencv-python-headless", "torch", "ale-py", "cython")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in packages},
        "fastops": fastops.BACKEND,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    parser.add_argument("--seconds", type=float, default=3, help="time for each comparison (default: 3)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

    results, about = {}, machine()
    print(
        f"{about['cpu']}, {about['cores']} cores, one thread; {about['versions']}; fastops runs on {about['fastops']}\n"
    )
    print(f"{'us per call':50} {'median':>10} {'p10':>10} {'p90':>10} {'ratio':>7}")
    for title, (sides, calls) in comparisons().items():
        results[title] = measure(sides, calls, args.seconds)
        print(title)
        for name, figure in results[title].items():
            columns = " ".join(f"{figure[key]:10.1f}" for key in ("median_us", "p10_us", "p90_us"))
            print(f"    {name:46} {columns} {figure['ratio_to_fastops']:7.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join([Path(sys.executable).name, *sys.argv])
        args.json.write_text(json.dumps({"command": command, "machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
