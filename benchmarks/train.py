"""Training steps per second, where the time goes, the share of the matrix units' speed, and the memory.

    python benchmarks/train.py                                                          32 environments, fp32 and bf16
    python benchmarks/train.py --num-envs 32 128 --precision fp32 --compile no yes --json out.json

Each configuration trains for one rollout to warm up and `--rollouts` that count, in a process of its own, with the
script's own command line; the times are those that it writes to TensorBoard. A round runs every configuration once, one
after the other, so that a change of the clock or a noisy neighbour meets all of them, and before and after each run
measures the speed of torch.mm on fp32 matrices of 2048x2048, here, with as many threads as the script has.

    steps/s        one step of one environment is one action, 4 frames: median over rollouts and rounds, 10th and 90th
                   percentile
    rollout ...    seconds of the parts of a rollout of 128 steps of each environment, medians; other: the rest of it
    of mm          FLOPs of the networks in a step, times steps/s, over the speed of torch.mm (mm, GFLOP/s). update's:
                   the same within the update. Of the fp32 speed always, so bf16 can exceed 1
    / first        steps/s relative to the first configuration with as many environments: median over the rounds
    peak MiB       of all processes together, in a run of its own whose times do not count: proportional set sizes (a
                   page that n processes share counts 1/n in each; where the system has no such figure, resident set
                   sizes, which count it n times), maximum of nearly 20 samples a second

The model of the FLOPs: an addition or a multiplication is one; convolutions and linear layers only; a backward pass
costs once the forward pass for the gradient of the weights and once for that of the input, where either is needed.

    step = policy forward + both RND networks forward                                       rollout, bonus
         + epochs * (policy forward and backward + proportion * RND forward and backward)   update
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from tqdm import tqdm

import fastops
from rnd_ppo_atari import Agent, Args, RNDModel

SCRIPT = Path(__file__).parent.parent / "rnd_ppo_atari.py"
PHASES = ("rollout", "bonus", "update")
COLUMNS = {  # title: figure, digits
    "steps/s": ("median_sps", 1),
    "p10": ("p10_sps", 1),
    "p90": ("p90_sps", 1),
    "rollout": ("rollout_s", 2),
    "bonus": ("bonus_s", 2),
    "update": ("update_s", 2),
    "other": ("other_s", 2),
    "mm GF/s": ("matmul_gflops", 1),
    "of mm": ("share_of_matmul", 3),
    "update's": ("update_share_of_matmul", 3),
    "/ first": ("ratio_to_first", 3),
    "peak MiB": ("peak_mib", 0),
}
CUDA = torch.cuda.is_available()


def count(network: nn.Module, sample: torch.Tensor) -> tuple[int, int]:
    """FLOPs of a forward pass with one sample, and of the backward pass."""
    flops = [0, 0]

    def add(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        once = 2 * output.numel() * layer.weight[0].numel()
        flops[0] += once
        flops[1] += once * (layer.weight.requires_grad + inputs[0].requires_grad)

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add)
    network(sample)
    return flops[0], flops[1]


def flops_of_a_step(proportion: float) -> dict[str, float]:
    """FLOPs of each phase for one step of one environment; `proportion` of the samples train the predictor."""
    policy, policy_back = count(Agent(18, 448), torch.zeros(1, 4, 84, 84, dtype=torch.uint8))
    rnd, rnd_back = count(RNDModel(), torch.zeros(1, 1, 84, 84))
    update = Args().update_epochs * (policy + policy_back + proportion * (rnd + rnd_back))
    return {"rollout": policy, "bonus": rnd, "update": update}


def matmul_rate() -> float:
    """FLOPs per second of torch.mm on fp32 matrices of 2048x2048; with TF32 on CUDA, as in training."""
    torch.set_float32_matmul_precision("high" if CUDA else "highest")
    a, b, c = torch.rand(3, 2048, 2048, device="cuda" if CUDA else "cpu")
    rates = []
    for _ in range(9):
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        if CUDA:
            torch.cuda.synchronize()
        rates.append(2 * 2048**3 / (time.perf_counter() - start))
    return float(np.median(rates[1:]))


def memory(process: psutil.Process) -> int:
    """Bytes of a process and all its descendants."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in (process, *process.children(recursive=True)):
            info = member.memory_full_info()
            total += getattr(info, "pss", info.rss)
    return total


def train(args: argparse.Namespace, num_envs: int, precision: str, compiled: str, sample: bool) -> dict[str, list]:
    """Run the script: seconds of each phase and steps/s of each rollout but the first; if sampled, peak of memory."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, str(SCRIPT), "--run-dir", folder, "--env-id", args.env_id]
        command += ["--num-envs", str(num_envs), "--precision", precision, *["--compile"][: compiled == "yes"]]
        command += ["--predictor-proportion", str(args.predictor_proportion), "--num-workers", str(args.workers)]
        command += ["--obs-norm-rollouts", "1", "--total-rollouts", str(2 if sample else 1 + args.rollouts)]
        peak = 0
        with subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT) as run:
            while run.poll() is None:
                peak = max(peak, memory(psutil.Process(run.pid))) if sample else 0
                time.sleep(0.05)
        if run.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}: exit code {run.returncode}\n{log.read()[-2000:]}")
        events = EventAccumulator(str(next(Path(folder).glob("*__*"))))
        events.Reload()
        scalars = {phase: [event.value for event in events.Scalars(f"time/{phase}")][1:] for phase in PHASES}
        scalars["sps"] = [event.value for event in events.Scalars("charts/SPS")][1:]
        return scalars | {"peak_mib": [peak / 2**20]}


def summary(runs: list[dict], first: list[dict], rates: list[float], steps: int, flops: dict) -> dict[str, float]:
    """Figures of a configuration: its `runs`, those to compare with and the rates of torch.mm, one each for a round."""
    seconds = {phase: np.array([run[phase] for run in runs]) for phase in PHASES}
    sps, rate = np.array([run["sps"] for run in runs]), np.array(rates)[:, None]
    row = dict(zip(("median_sps", "p10_sps", "p90_sps"), np.percentile(sps, [50, 10, 90]).tolist(), strict=True))
    row |= {f"{phase}_s": float(np.median(seconds[phase])) for phase in PHASES}
    row["other_s"] = float(np.median(steps / sps - sum(seconds.values())))
    row["share_of_matmul"] = float(np.median(sps * sum(flops.values()) / rate))
    row["update_share_of_matmul"] = float(np.median(steps * flops["update"] / seconds["update"] / rate))
    row["ratio_to_first"] = float(np.median(np.median(sps, 1) / np.median([run["sps"] for run in first], 1)))
    return row | {"matmul_gflops": float(np.median(rates)) / 1e9}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in ("numpy", "torch", "gymnasium", "ale-py")},
        "fastops": fastops.BACKEND,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[32], help="default: 32")
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="default: all"
    )
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no"], help="default: no")
    parser.add_argument("--predictor-proportion", type=float, default=0.25, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="worker processes; 0: one for each core (default)")
    parser.add_argument("--env-id", default="ALE/MontezumaRevenge-v5", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--rollouts", type=int, default=2, help="of each run, besides the first (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    args = parser.parse_args()

    about, flops = machine(), flops_of_a_step(args.predictor_proportion)
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['gpu']}, load {about['load']:.1f}"
    )
    print(f"{about['versions']}; fastops runs on {about['fastops']}")
    mflops = {f"{name}_mflop": value / 1e6 for name, value in flops.items()}
    print(f"{sum(flops.values()) / 1e6:.1f} MFLOP a step:", {name: round(value, 1) for name, value in mflops.items()})
    sides = list(product(args.num_envs, args.precision, args.compile))
    runs, rates = {side: [] for side in sides}, {side: [] for side in sides}
    peaks = {side: train(args, *side, True)["peak_mib"][0] for side in tqdm(sides, "memory", leave=False)}
    for _ in tqdm(range(args.rounds), "time", unit="round", leave=False):
        for side in sides:
            before = matmul_rate()
            runs[side].append(train(args, *side, False))
            rates[side].append((before + matmul_rate()) / 2)

    print(f"\n{'environments':20}" + "".join(f"{title:>9}" for title in COLUMNS))
    results = []
    for side in sides:
        num_envs, precision, compiled = side
        first = next(other for other in sides if other[0] == num_envs)
        row = dict(num_envs=num_envs, precision=precision, compile=compiled == "yes", rounds=args.rounds)
        row |= summary(runs[side], runs[first], rates[side], num_envs * Args().num_steps, flops)
        results.append(row | {"peak_mib": peaks[side]})
        print(f"{num_envs:6} {precision} {'compiled' if compiled == 'yes' else 'eager':8}", end="")
        print("".join(f"{results[-1][key]:9.{digits}f}" for key, digits in COLUMNS.values()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join([Path(sys.executable).name, *sys.argv])
        figures = {"command": command, "machine": about, "flops_of_a_step": mflops, "results": results}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
