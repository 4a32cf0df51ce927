"""Training steps per second, where the time goes, the share of the matrix units' speed, and the memory.

    python benchmarks/train.py                                                          32 environments, fp32 and bf16
    python benchmarks/train.py --num-envs 32 128 --precision fp32 --compile no yes --json out.json

Each configuration runs the script in a process of its own, for one rollout to warm up and `--rollouts` that count. The
times are those that the script writes to TensorBoard. A round runs every configuration once, one after the other, so
that a change of the clock or a noisy neighbour affects all of them. Before and after each run the benchmark measures
the speed of torch.mm on fp32 matrices of 2048x2048, with as many threads as the script uses.

    steps/s        a step is one action of one environment, 4 frames: median over rollouts and rounds, 10th and 90th
                   percentile
    rollout ...    seconds of each part of a rollout, which is 128 steps of each environment: medians. other: the rest
    of mm          FLOPs of the networks per step, times steps/s, over the speed of torch.mm (mm, GFLOP/s). update's:
                   the same within the update. Always relative to the fp32 speed, so bf16 can exceed 1
    / first        steps/s relative to the first configuration with as many environments: median over the rounds
    peak MiB       memory of all processes together, in an extra run whose times do not count: the largest of nearly 20
                   samples a second. Proportional set sizes: a page that n processes share counts 1/n in each. Where the
                   system has no such figure, resident set sizes, which count it n times

The model of the FLOPs: an addition or a multiplication is one; only convolutions and linear layers count; a backward
pass costs as much as the forward pass for the gradient of the weights, and as much again for the gradient of the input,
where either is needed.

    step = policy forward + both RND networks forward                                       rollout, bonus
         + epochs * (policy forward and backward + proportion * RND forward and backward)   update
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import report
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from tqdm import tqdm

from rnd_ppo_atari import RND, Agent, Args

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


# === FLOPs ============================================================================================================


def count_flops(network: nn.Module, sample: torch.Tensor) -> tuple[int, int]:
    """FLOPs of a forward pass with one sample, and of the backward pass."""
    forward = 0
    backward = 0

    def add(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal forward, backward
        flops = 2 * output.numel() * layer.weight[0].numel()
        forward += flops
        if layer.weight.requires_grad:
            backward += flops
        if inputs[0].requires_grad:
            backward += flops

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add)
    network(sample)
    return forward, backward


def flops_per_step(proportion: float) -> dict[str, float]:
    """FLOPs of each phase for one step of one environment; `proportion` of the samples train the predictor."""
    policy, policy_backward = count_flops(Agent(18, 448), torch.zeros(1, 4, 84, 84, dtype=torch.uint8))
    rnd, rnd_backward = count_flops(RND(), torch.zeros(1, 1, 84, 84))
    epoch = policy + policy_backward + proportion * (rnd + rnd_backward)
    return {"rollout": policy, "bonus": rnd, "update": Args().update_epochs * epoch}


def matmul_rate() -> float:
    """FLOPs per second of torch.mm on fp32 matrices of 2048x2048, without TF32, as in training."""
    torch.set_float32_matmul_precision("highest")
    a, b, c = torch.rand(3, 2048, 2048, device="cuda" if CUDA else "cpu")
    rates = []
    for _ in range(9):
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        if CUDA:
            torch.cuda.synchronize()
        rates.append(2 * 2048**3 / (time.perf_counter() - start))
    return float(np.median(rates[1:]))


# === Runs of the script ===============================================================================================


@dataclass
class Configuration:
    """One way to run the script, and what was measured in each round."""

    num_envs: int
    precision: str
    compiled: bool
    peak_mib: float = 0.0
    times: list[dict[str, list[float]]] = field(default_factory=list)  # steps/s and seconds of each phase, by rollout
    matmul_rates: list[float] = field(default_factory=list)

    def name(self) -> str:
        return f"{self.num_envs:6} {self.precision} {'compiled' if self.compiled else 'eager':8}"

    def command(self, args: argparse.Namespace, rollouts: int, folder: str) -> list[str]:
        flags = {
            "--run-dir": folder,
            "--env-id": args.env_id,
            "--num-envs": self.num_envs,
            "--precision": self.precision,
            "--predictor-proportion": args.predictor_proportion,
            "--num-workers": args.workers,
            "--obs-norm-rollouts": 1,
            "--total-rollouts": rollouts,
        }
        command = [sys.executable, str(SCRIPT)]
        for flag, value in flags.items():
            command += [flag, str(value)]
        if self.compiled:
            command.append("--compile")
        return command

    def measure_memory(self, args: argparse.Namespace) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.peak_mib = run(self.command(args, 2, folder), folder, sample_memory=True) / 2**20

    def measure_speed(self, args: argparse.Namespace) -> None:
        before = matmul_rate()
        with tempfile.TemporaryDirectory() as folder:
            run(self.command(args, 1 + args.rollouts, folder), folder)
            self.times.append(read_times(folder))
        self.matmul_rates.append((before + matmul_rate()) / 2)


def memory(process: psutil.Process) -> int:
    """Bytes of a process and all its descendants."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in (process, *process.children(recursive=True)):
            try:
                info = member.memory_full_info()
            except psutil.AccessDenied:  # on macOS
                info = member.memory_info()
            total += getattr(info, "pss", info.rss)
    return total


def run(command: list[str], folder: str, sample_memory: bool = False) -> int:
    """Run the script to its end; the peak of its memory in bytes, if sampled."""
    peak = 0
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                if sample_memory:
                    peak = max(peak, memory(psutil.Process(process.pid)))
                time.sleep(0.05)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{log.read()[-2000:]}")
    return peak


def read_times(folder: str) -> dict[str, list[float]]:
    """Steps per second and seconds of each phase, for each rollout but the first, from the events of the run."""
    [run_folder] = Path(folder).glob("*__*")
    events = EventAccumulator(str(run_folder))
    events.Reload()
    tags = {"sps": "charts/SPS"}
    for phase in PHASES:
        tags[phase] = f"time/{phase}"
    return {name: [event.value for event in events.Scalars(tag)][1:] for name, tag in tags.items()}


# === The comparison ===================================================================================================


def summary(configuration: Configuration, first: Configuration, flops: dict[str, float]) -> dict[str, object]:
    """The figures of a configuration; `first` is the one to compare its speed with."""
    times = {name: np.array([row[name] for row in configuration.times]) for name in ("sps", *PHASES)}
    sps = times["sps"]  # (rounds, rollouts)
    first_sps = np.array([row["sps"] for row in first.times])
    rates = np.array(configuration.matmul_rates)[:, None]
    steps = configuration.num_envs * Args().num_steps
    phases = sum(times[phase] for phase in PHASES)

    median, p10, p90 = np.percentile(sps, [50, 10, 90])
    row = {
        "median_sps": median,
        "p10_sps": p10,
        "p90_sps": p90,
        "rollout_s": np.median(times["rollout"]),
        "bonus_s": np.median(times["bonus"]),
        "update_s": np.median(times["update"]),
        "other_s": np.median(steps / sps - phases),
        "share_of_matmul": np.median(sps * sum(flops.values()) / rates),
        "update_share_of_matmul": np.median(steps * flops["update"] / times["update"] / rates),
        "ratio_to_first": np.median(np.median(sps, 1) / np.median(first_sps, 1)),
        "matmul_gflops": np.median(rates) / 1e9,
        "peak_mib": configuration.peak_mib,
    }
    return {
        "num_envs": configuration.num_envs,
        "precision": configuration.precision,
        "compile": configuration.compiled,
        "rounds": len(configuration.times),
        **{name: float(value) for name, value in row.items()},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    precisions = ["fp32", "bf16"]
    parser.add_argument("--num-envs", type=int, nargs="+", default=[32], help="default: 32")
    parser.add_argument("--precision", nargs="+", choices=precisions, default=precisions, help="default: all")
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no"], help="default: no")
    parser.add_argument("--predictor-proportion", type=float, default=0.25, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="worker processes; 0: one per core (default)")
    parser.add_argument("--env-id", default="ALE/MontezumaRevenge-v5", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--rollouts", type=int, default=2, help="of each run, besides the first (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    about = report.machine("numpy", "torch", "gymnasium", "ale-py")
    about["threads"] = torch.get_num_threads()
    about["gpu"] = torch.cuda.get_device_name() if CUDA else None
    flops = flops_per_step(args.predictor_proportion)
    mflops = {f"{name}_mflop": value / 1e6 for name, value in flops.items()}
    print(f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['gpu']}, load {about['load']}")
    print(f"{about['versions']}; fastops runs on {about['fastops']}")
    print(f"{sum(mflops.values()):.1f} MFLOP a step:", {name: round(value, 1) for name, value in mflops.items()})

    configurations = [
        Configuration(num_envs, precision, compiled == "yes")
        for num_envs, precision, compiled in product(args.num_envs, args.precision, args.compile)
    ]
    for configuration in tqdm(configurations, "memory", leave=False):
        configuration.measure_memory(args)
    for _ in tqdm(range(args.rounds), "time", unit="round", leave=False):
        for configuration in configurations:
            configuration.measure_speed(args)

    print(f"\n{'environments':20}" + "".join(f"{title:>9}" for title in COLUMNS))
    results = []
    for configuration in configurations:
        first = next(other for other in configurations if other.num_envs == configuration.num_envs)
        row = summary(configuration, first, flops)
        cells = [f"{row[figure]:9.{digits}f}" for figure, digits in COLUMNS.values()]
        print(configuration.name() + "".join(cells))
        results.append(row)
    if args.json:
        report.write(args.json, about, results, flops_of_a_step=mflops)


if __name__ == "__main__":
    main()
