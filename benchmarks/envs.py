"""Agent steps per second of VectorEnv, of its peers, and of the emulator alone, on the same cores.

    python benchmarks/envs.py --num-envs 32 --workers 1 2 --json out.json

Every side plays the same game with the same random actions, drawn beforehand: 4 frames an action, sticky actions with
probability 0.25, maximum of two frames, gray, 84x84, at most 4500 steps, no no-op or FIRE actions at the start,
unclipped rewards. A step is one action of one environment. Peers return stacks of 4 frames, VectorEnv the newest one.

    emulator only             calls `act` four times on one ALE per core and does nothing else: the upper limit
    VectorEnv                 ours
    AtariVectorEnv, EnvPool   in C++, with as many threads as workers. EnvPool (left out if not installed) plays up to
                              one no-op at the start of an episode and spends an extra turn on each reset
    AsyncVectorEnv            Gymnasium's wrappers, one process per environment

"step" waits for all environments. "send/recv" waits for one half while the other half is being stepped, as in training.

With --workers W each side, its main process included, runs on W cores. A round resets, warms up and measures every
side, one after the other, so that a change of the clock or a noisy neighbour affects all of them. Figures are steps per
second: median over the rounds, 10th and 90th percentile. The two ratios, to the emulator alone and to the fastest of
AtariVectorEnv and EnvPool, are medians of the ratios within each round.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle, product
from multiprocessing import util
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import report
from ale_py import roms
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from rnd_ppo_atari import VectorEnv

STICKY = 0.25
MAX_STEPS = 4500
WARM_UP = 8  # turns
EMULATOR = "emulator only"
PEERS = ("AtariVectorEnv", "EnvPool")
SAME_STEP = gym.vector.AutoresetMode.SAME_STEP
FORK = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


# === How environments are stepped =====================================================================================


class Side:
    """A way to step environments. Subclasses say how to start over and what one turn is."""

    steps_per_turn: int

    def reset(self) -> None:
        """Start all environments over, wherever the last turn left them."""
        raise NotImplementedError

    def turn(self) -> None:
        raise NotImplementedError

    def measure(self, seconds: float) -> float:
        """Steps per second."""
        self.reset()
        for _ in range(WARM_UP):
            self.turn()
        turns = 0
        elapsed = 0.0
        start = time.perf_counter()
        while elapsed < seconds:  # what is under way at the start makes up for what is under way at the end
            self.turn()
            turns += 1
            elapsed = time.perf_counter() - start
        return turns * self.steps_per_turn / elapsed


class StepAll(Side):
    """Step all environments and wait for all of them."""

    def __init__(self, env, actions: np.ndarray):
        self.env = env
        self.actions = cycle(actions)
        self.steps_per_turn = actions.shape[1]

    def reset(self) -> None:
        self.env.reset()

    def turn(self) -> None:
        self.env.step(next(self.actions))


class VectorEnvHalves(Side):
    """Wait for the two groups in turn, and step each again at once."""

    def __init__(self, env: VectorEnv, actions: np.ndarray):
        self.env = env
        self.actions = cycle(actions.reshape(2 * len(actions), -1))  # of the first half, the second, the first, ...
        self.steps_per_turn = actions.shape[1] // 2
        self.group = 0  # whose turn it is
        self.under_way = False

    def reset(self) -> None:
        first, second = self.group, 1 - self.group
        if self.under_way:
            self.env.recv(first)
            self.env.recv(second)
        self.env.reset()
        self.env.send(first, next(self.actions))
        self.env.send(second, next(self.actions))
        self.under_way = True

    def turn(self) -> None:
        self.env.recv(self.group)
        self.env.send(self.group, next(self.actions))
        self.group = 1 - self.group


class AtariVectorEnvHalves(Side):
    """Wait for whichever half of the environments is ready first, and step it again at once."""

    def __init__(self, env: ale_py.AtariVectorEnv, actions: np.ndarray):
        self.env = env
        self.steps_per_turn = actions.shape[1] // 2
        self.actions = cycle(actions[:, : self.steps_per_turn].copy())
        self.under_way = False

    def reset(self) -> None:
        if self.under_way:
            self.env.recv()
            self.env.recv()
        self.env.reset()  # returns the first half; the other one is on its way
        self.env.send(next(self.actions))
        self.under_way = True

    def turn(self) -> None:
        self.env.recv()
        self.env.send(next(self.actions))


class EnvPoolHalves(Side):
    """The same for EnvPool, which has to be told which environments the actions are for."""

    def __init__(self, env, actions: np.ndarray):
        self.env = env
        self.steps_per_turn = actions.shape[1] // 2
        self.actions = cycle(actions[:, : self.steps_per_turn].copy())
        self.under_way = False

    def reset(self) -> None:
        if self.under_way:
            self.env.recv()
            self.env.recv()
        self.env.async_reset()  # both halves are on their way
        self.under_way = True

    def turn(self) -> None:
        *_, info = self.env.recv()
        self.env.send(next(self.actions), info["env_id"])


class EmulatorOnly(Side):
    """Emulators without anything around them, one per core, each in a process of its own."""

    def __init__(self, env_id: str, actions: np.ndarray, workers: int):
        self.pipes = []
        for number in range(workers):
            ours, theirs = FORK.Pipe()
            choices = actions[:, number % actions.shape[1]].tolist()
            arguments = (theirs, rom_name(env_id), number, choices)
            FORK.Process(target=emulate, args=arguments, daemon=True).start()
            self.pipes.append(ours)

    def measure(self, seconds: float) -> float:
        for pipe in self.pipes:
            pipe.send(seconds)
        return sum(pipe.recv() for pipe in self.pipes)


def emulate(pipe, game: str, number: int, choices: list[int]) -> None:
    """Body of a process: runs one emulator for as many seconds as it is told, and answers with steps per second."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(game))
    act = ale.act
    actions = ale.getMinimalActionSet()
    while True:
        seconds = pipe.recv()
        steps = 0
        elapsed = 0.0
        start = time.perf_counter()
        while elapsed < seconds:
            action = actions[choices[steps % len(choices)]]
            act(action)
            act(action)
            act(action)
            act(action)
            if ale.game_over():
                ale.reset_game()
            steps += 1
            elapsed = time.perf_counter() - start
        pipe.send(steps / elapsed)


# === The environments =================================================================================================


def rom_name(env_id: str) -> str:
    return gym.spec(env_id).kwargs["game"]


def vector_env(env_id: str, num_envs: int, workers: int) -> VectorEnv:
    env = VectorEnv(
        env_id,
        num_envs,
        num_workers=workers,
        num_groups=2,
        sticky_action_prob=STICKY,
        max_episode_steps=MAX_STEPS,
    )
    # VectorEnv ends its workers at exit, which child processes of multiprocessing skip.
    util.Finalize(None, env.close, exitpriority=1)
    return env


def atari_vector_env(env_id: str, num_envs: int, batch_size: int, threads: int) -> ale_py.AtariVectorEnv:
    return ale_py.AtariVectorEnv(
        rom_name(env_id),
        num_envs,
        batch_size=batch_size,
        num_threads=threads,
        autoreset_mode=SAME_STEP,
        repeat_action_probability=STICKY,
        max_num_frames_per_episode=4 * MAX_STEPS,
        noop_max=0,
        use_fire_reset=False,
        reward_clipping=False,
    )


def envpool_env(env_id: str, num_envs: int, batch_size: int, threads: int):
    import envpool

    return envpool.make_gymnasium(
        env_id.removeprefix("ALE/"),
        num_envs=num_envs,
        batch_size=batch_size,
        num_threads=threads,
        repeat_action_probability=STICKY,
        max_episode_steps=MAX_STEPS,
        noop_max=1,  # 0 crashes EnvPool 1.2
        use_fire_reset=False,
    )


def wrapped_env(env_id: str) -> gym.Env:
    """One environment in Gymnasium's wrappers."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    env = gym.make(env_id, frameskip=1, repeat_action_probability=STICKY, max_episode_steps=4 * MAX_STEPS)
    return FrameStackObservation(AtariPreprocessing(env, noop_max=0), 4)


def async_vector_env(env_id: str, num_envs: int) -> gym.vector.AsyncVectorEnv:
    makers = [partial(wrapped_env, env_id)] * num_envs
    return gym.vector.AsyncVectorEnv(makers, autoreset_mode=SAME_STEP, context=FORK.get_start_method())


def make_sides(env_id: str, actions: np.ndarray, workers: int, wanted: list[str]) -> dict[str, Side]:
    """The sides whose names begin as one of those `wanted`. What forks comes first, what starts threads last."""
    num_envs = actions.shape[1]
    half = num_envs // 2
    makers = {
        EMULATOR: lambda: EmulatorOnly(env_id, actions, workers),
        "VectorEnv step": lambda: StepAll(vector_env(env_id, num_envs, workers), actions),
        "VectorEnv send/recv": lambda: VectorEnvHalves(vector_env(env_id, num_envs, workers), actions),
        "AsyncVectorEnv step": lambda: StepAll(async_vector_env(env_id, num_envs), actions),
        "AtariVectorEnv step": lambda: StepAll(atari_vector_env(env_id, num_envs, num_envs, workers), actions),
        "AtariVectorEnv send/recv": lambda: AtariVectorEnvHalves(
            atari_vector_env(env_id, num_envs, half, workers), actions
        ),
    }
    if report.installed("envpool"):
        int32 = actions.astype(np.int32)
        makers["EnvPool step"] = lambda: StepAll(envpool_env(env_id, num_envs, num_envs, workers), int32)
        makers["EnvPool send/recv"] = lambda: EnvPoolHalves(envpool_env(env_id, num_envs, half, workers), int32)
    return {name: make() for name, make in makers.items() if name.startswith(tuple(wanted))}


# === The comparison ===================================================================================================


def compare(args: argparse.Namespace, num_envs: int, workers: int) -> list[dict]:
    """The figures of one number of environments and workers. Runs in a process of its own, whose end ends all sides."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    gym.register_envs(ale_py)
    num_actions = wrapped_env(args.env_id).action_space.n
    actions = np.random.default_rng(0).integers(0, num_actions, (1000, num_envs))
    sides = make_sides(args.env_id, actions, workers, args.sides)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            rates[name].append(side.measure(args.seconds))
    return [dict(num_envs=num_envs, workers=workers, **row) for row in summaries(rates)]


def summaries(rates: dict[str, list[float]]) -> list[dict]:
    """Percentiles and ratios of each side, from its steps per second in each round."""
    peers = [name for name in rates if name.startswith(PEERS)]
    best_peer = max(peers, key=lambda name: np.median(rates[name]), default=None)

    def ratio(name: str, other: str | None) -> float | None:
        if other not in rates:
            return None
        return float(np.median(np.divide(rates[name], rates[other])))

    rows = []
    for name, values in rates.items():
        median, p10, p90 = np.percentile(values, [50, 10, 90]).tolist()
        row = {
            "side": name,
            "rounds": len(values),
            "best_peer": best_peer,
            "median_sps": median,
            "p10_sps": p10,
            "p90_sps": p90,
            "ratio_to_emulator": ratio(name, EMULATOR),
            "ratio_to_best_peer": ratio(name, best_peer),
        }
        rows.append(row)
    return rows


def print_rows(rows: list[dict]) -> None:
    first = rows[0]
    print(f"{first['num_envs']} environments, {first['workers']} workers; best peer: {first['best_peer']}")
    for row in rows:
        cells = [f"{row[key]:12.0f}" for key in ("median_sps", "p10_sps", "p90_sps")]
        for key in ("ratio_to_emulator", "ratio_to_best_peer"):
            value = row[key]
            cells.append(f"{'nan':>12}" if value is None else f"{value:12.3f}")
        print(f"    {row['side']:25}" + "".join(cells))


def main() -> None:
    about = report.machine("numpy", "gymnasium", "ale-py", "envpool", "torch")
    cores = report.cores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[32, 128], help="even numbers (default: 32 128)")
    parser.add_argument("--workers", type=int, nargs="+", default=[cores], help="default: one per core")
    parser.add_argument("--env-id", default="ALE/MontezumaRevenge-v5", help="default: %(default)s")
    parser.add_argument("--sides", nargs="+", default=[""], help="only sides whose names begin so (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2, help="for each side in each round (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    args = parser.parse_args()
    if any(num_envs < 2 or num_envs % 2 for num_envs in args.num_envs):
        parser.error(f"--num-envs: expected even numbers, got {args.num_envs}")
    if any(not 1 <= workers <= cores for workers in args.workers):
        parser.error(f"--workers: expected numbers from 1 to {cores}, the number of cores, got {args.workers}")

    print(f"{about['cpu']}, {cores} cores, load {about['load']}; fastops runs on {about['fastops']}")
    print(f"{about['versions']}\n")
    titles = ("median", "p10", "p90", "/ emulator", "/ best peer")
    print(f"{'steps per second':29}" + "".join(f"{title:>12}" for title in titles))
    results = []
    for num_envs, workers in product(args.num_envs, args.workers):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows = process.submit(compare, args, num_envs, workers).result()
        print_rows(rows)
        results += rows
    if args.json:
        report.write(args.json, about, results)


if __name__ == "__main__":
    main()
