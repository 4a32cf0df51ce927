"""Super Mario Bros. 1-1: agent steps per second of VectorEnv, of its emulator alone, and of gym-super-mario-bros.

    python benchmarks/mario.py --json out.json
    python benchmarks/mario.py --peer PYTHON         an interpreter with gym-super-mario-bros 7.4.0 and NumPy 1

Everything runs on one core. A step is 4 frames of a random action of SIMPLE_MOVEMENT. Rounds alternate the sides.
Figures are the median, the 10th and the 90th percentile over the rounds; the ratio is the median of the ratios within
each round.

    emulator only          stable-retro's `step` and nothing else: the upper limit
    VectorEnv              also makes the observation, applies sticky actions, and puts the states of 32 environments
                           into its emulator in turn; main process and worker share the core
    gym-super-mario-bros   its `env.step` four times, without the 84x84 observation that an agent would need besides

--random STEPS plays so many steps with random actions instead: how far a policy that learned nothing gets.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from rnd_ppo_mario import Args, Game, VectorEnv

Side = Callable[[float], float]  # runs for so many seconds, returns steps per second

PEER = """
import sys, time, warnings
warnings.filterwarnings("ignore")
import numpy as np
from gym_super_mario_bros.actions import SIMPLE_MOVEMENT
from gym_super_mario_bros.smb_env import SuperMarioBrosEnv
from nes_py.wrappers import JoypadSpace
env, rng = JoypadSpace(SuperMarioBrosEnv(target=(1, 1)), SIMPLE_MOVEMENT), np.random.default_rng(0)
for line in sys.stdin:
    env.reset()
    frames, start = 0, time.perf_counter()
    while time.perf_counter() - start < float(line):
        action = int(rng.integers(7))
        for _ in range(4):
            frames += 1
            if env.step(action)[2]:
                env.reset()
                break
    print(frames / 4 / (time.perf_counter() - start), flush=True)
"""


def emulator_only(env_id: str) -> Side:
    game = Game(env_id, seed=1)
    game.reset(np.zeros(game.shape, np.uint8))
    game.act(game.noop)  # puts its state into the emulator
    machine = game.emulator
    rng = np.random.default_rng(0)
    buttons = np.array([1, 0, 0, 0, 0, 0, 1, 1, 1], np.uint8)  # B, left, right and A

    def measure(seconds: float) -> float:
        steps = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            pressed = rng.integers(2, size=9).astype(np.uint8)
            machine.set_button_mask(pressed & buttons, 0)
            for _ in range(4):
                machine.step()
            steps += 1
        return steps / (time.perf_counter() - start)

    return measure


def vector_env(env_id: str, num_envs: int) -> Side:
    """With one worker."""
    envs = VectorEnv(env_id, num_envs, num_workers=1)
    envs.reset()
    rng = np.random.default_rng(0)

    def measure(seconds: float) -> float:
        steps = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            envs.step(rng.integers(envs.num_actions, size=num_envs))
            steps += num_envs
        return steps / (time.perf_counter() - start)

    return measure


def peer(python: str) -> Side | None:
    """gym-super-mario-bros in another interpreter; None, and a line on screen, if it does not run there."""
    process = subprocess.Popen(
        [python, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin and process.stdout

    def measure(seconds: float) -> float:
        print(seconds, file=process.stdin, flush=True)
        return float(process.stdout.readline())

    try:
        measure(0.1)
    except (OSError, ValueError):
        print(f"gym-super-mario-bros does not run in {python}: name another one with --peer")
        return None
    return measure


def compare(env_id: str, args: argparse.Namespace) -> dict[str, dict]:
    """The figures of each side, which are also printed."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sides: dict[str, Side] = {}
    # First, because the worker is forked: it must not inherit an emulator.
    sides[f"VectorEnv, {args.num_envs} environments"] = vector_env(env_id, args.num_envs)
    sides["emulator only"] = emulator_only(env_id)
    if other := peer(args.peer):
        sides["gym-super-mario-bros"] = other

    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, measure in sides.items():
            rates[name].append(measure(args.seconds))

    print(f"{'steps per second on one core':32} {'median':>8} {'10 %':>8} {'90 %':>8}   of the emulator")
    figures = {}
    for name, values in rates.items():
        low, median, high = np.percentile(values, [10, 50, 90])
        ratio = float(np.median(np.divide(values, rates["emulator only"])))
        print(f"{name:32} {median:8.0f} {low:8.0f} {high:8.0f}   {ratio:.2f}")
        figures[name] = dict(median=median, low=low, high=high, ratio=ratio, values=values)
    return figures


def play_randomly(env_id: str, steps: int, num_envs: int = 32) -> dict[str, float]:
    """How far `steps` steps with uniformly random actions and sticky actions get; the figures are also printed."""
    envs = VectorEnv(env_id, num_envs)
    envs.reset()
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(steps // num_envs):
        *_, infos = envs.step(rng.integers(envs.num_actions, size=num_envs))
        episodes += [info["stats"] for info in infos]
    if not episodes:
        sys.exit(f"--random: expected enough steps to end an episode, got {steps}; try ten times as many")
    flags = [episode["episodic_return"] for episode in episodes]
    furthest = [episode["furthest_x"] for episode in episodes]
    figures = {
        "steps": steps,
        "episodes": len(episodes),
        "flags": int(sum(flags)),
        "mean_x": np.mean(furthest),
        "best_x": max(furthest),
    }
    print("  ".join(f"{name} {value:.6g}" for name, value in figures.items()))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--peer", default=sys.executable, help="interpreter with gym-super-mario-bros")
    parser.add_argument("--random", type=int, default=0, metavar="STEPS", help="play randomly instead")
    parser.add_argument("--json", default="", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    game = Args()
    Game.check(game)
    result: dict = {
        "command": " ".join(sys.argv),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "stable_retro": version("stable-retro"),
        "cores": os.cpu_count(),
    }
    if args.random:
        result |= play_randomly(game.env_id, args.random)
    else:
        result["sides"] = compare(game.env_id, args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
