"""Super Mario Bros. 1-1: agent steps per second of VectorEnv, of its emulator alone, and of gym-super-mario-bros.

    python benchmarks/mario.py --json out.json
    python benchmarks/mario.py --peer PYTHON         an interpreter with gym-super-mario-bros 7.4.0 and NumPy 1

Everything runs on one core. A step is 4 frames with the same random actions of SIMPLE_MOVEMENT. "emulator only" is
stable-retro's `step` and nothing else: what nobody can exceed. VectorEnv also makes the observation, sticks, and puts
the states of 32 environments into its emulator in turn; main process and worker share the core. gym-super-mario-bros is
its `env.step` four times, without the observation of 84x84 that an agent would need besides. Rounds alternate the
sides; figures are medians, 10th and 90th percentile over the rounds, the ratio is the median of those within a round.

--random STEPS plays so many steps with random actions instead: how far a policy that learned nothing gets.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from rnd_ppo_mario import NES, Args, VectorEnv, check_game

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


def emulator_only(env_id: str):
    """A side: steps per second of one emulator, over so many seconds."""
    nes, rng = NES(env_id, None), np.random.default_rng(0)
    machine = nes.machine
    nes.reset_game()
    nes.act("")  # its state is in the machine now

    def measure(seconds: float) -> float:
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            machine.set_button_mask(rng.integers(2, size=9).astype(np.uint8) & [1, 0, 0, 0, 0, 0, 1, 1, 1], 0)
            for _ in range(4):
                machine.step()
            steps += 1
        return steps / (time.perf_counter() - start)

    return measure


def vector_env(env_id: str, num_envs: int):
    """A side: steps per second of VectorEnv with one worker."""
    envs, rng = VectorEnv(env_id, num_envs, num_workers=1), np.random.default_rng(0)
    envs.reset()

    def measure(seconds: float) -> float:
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            envs.step(rng.integers(envs.num_actions, size=num_envs))
            steps += num_envs
        return steps / (time.perf_counter() - start)

    return measure


def peer(python: str):
    """A side: gym-super-mario-bros in another interpreter; None, and the reason on screen, if it does not run there."""
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


def random_policy(env_id: str, steps: int, num_envs: int = 32) -> dict:
    """What `steps` steps with uniformly random actions and sticky actions reach."""
    envs, rng, stats = VectorEnv(env_id, num_envs), np.random.default_rng(0), []
    envs.reset()
    for _ in range(steps // num_envs):
        *_, infos = envs.step(rng.integers(envs.num_actions, size=num_envs))
        stats += [info["stats"] for info in infos]
    flags, furthest = ([s[name] for s in stats] for name in ("episodic_return", "furthest_x"))
    return dict(steps=steps, episodes=len(stats), flags=int(sum(flags)), mean_x=np.mean(furthest), best_x=max(furthest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--peer", default=sys.executable, help="interpreter with gym-super-mario-bros")
    parser.add_argument("--random", type=int, default=0, metavar="STEPS", help="play randomly instead")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args()
    game = Args()
    check_game(game)
    result: dict = dict(command=" ".join(sys.argv), machine=platform.processor() or platform.machine())
    result |= dict(python=platform.python_version(), stable_retro=version("stable-retro"), cores=os.cpu_count())
    if args.random:
        result |= random_policy(game.env_id, args.random)
        print("  ".join(f"{name} {value:.6g}" for name, value in list(result.items())[-5:]))
    else:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        # The worker is forked before there is an emulator to inherit.
        sides = {f"VectorEnv, {args.num_envs} environments": vector_env(game.env_id, args.num_envs)}
        sides |= {"emulator only": emulator_only(game.env_id), "gym-super-mario-bros": peer(args.peer)}
        sides = {name: side for name, side in sides.items() if side}
        rounds = [{name: side(args.seconds) for name, side in sides.items()} for _ in range(args.rounds)]
        print(f"{'steps per second on one core':32} {'median':>8} {'10 %':>8} {'90 %':>8}   of the emulator")
        result["sides"] = {}
        for name in sides:
            values = [r[name] for r in rounds]
            low, median, high = np.percentile(values, [10, 50, 90])
            ratio = float(np.median([r[name] / r["emulator only"] for r in rounds]))
            print(f"{name:32} {median:8.0f} {low:8.0f} {high:8.0f}   {ratio:.2f}")
            result["sides"][name] = dict(median=median, low=low, high=high, ratio=ratio, values=values)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
