"""Agent steps per second of VectorEnv, of its peers, and of the emulator alone, on the same cores.

    python benchmarks/envs.py --num-envs 32 --workers 1 2 --json out.json

Every side plays the same game with the same random actions, drawn beforehand: 4 frames an action, sticky actions of
0.25, maximum of two frames, gray, 84x84, 4500 steps at most, no no-ops and no FIRE at the start, unclipped rewards. A
step is one action of one environment. Peers return stacks of 4 frames, VectorEnv the newest one.

    emulator only             `act` four times on one ALE for each core and nothing else: what nobody can exceed
    VectorEnv                 ours
    AtariVectorEnv, EnvPool   in C++, with as many threads as workers. EnvPool (left out if not installed) plays up to
                              one no-op at the start of an episode, and spends a turn of its own on each reset
    AsyncVectorEnv            Gymnasium's wrappers, one process for each environment

"step" waits for all environments, "send/recv" for half of them, while the other half goes on, as in training.

With --workers W each side, its main process included, has W cores. A round resets, warms up and measures every side,
one after the other, so that a change of the clock or a noisy neighbour meets all of them. Figures are steps per second:
median over the rounds, 10th and 90th percentile. The two ratios, to the emulator alone and to the fastest of
AtariVectorEnv and EnvPool, are medians of the ratios within each round.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import distributions
from itertools import count, product
from multiprocessing import util
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
from ale_py import roms
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import fastops
from rnd_ppo_atari import VectorEnv

STICKY, MAX_STEPS, WARM_UP, LIMIT = 0.25, 4500, 8, "emulator only"
SAME_STEP = gym.vector.AutoresetMode.SAME_STEP
WAYS = (("step", False), ("send/recv", True))
INSTALLED = {package.name: package.version for package in distributions()}
FORK = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


Side = Callable[[float], float]  # steps for so many seconds, returns steps per second


def clocked(size: int, reset: Callable[[], object], turn: Callable[[], object]) -> Side:
    """`turn` steps `size` environments; `reset` makes all start over, however far the last turns came."""

    def measure(seconds: float) -> float:
        reset()
        _ = [turn() for _ in range(WARM_UP)]
        turns, elapsed, start = 0, 0.0, time.perf_counter()
        while elapsed < seconds:  # what is under way at the start makes up for what is under way at the end
            turn()
            turns, elapsed = turns + 1, time.perf_counter() - start
        return turns * size / elapsed

    return measure


def waiting(env, actions: np.ndarray) -> Side:
    """Step all environments, wait for all."""
    number = count()
    return clocked(actions.shape[1], env.reset, lambda: env.step(actions[next(number) % len(actions)]))


def halves(actions: np.ndarray, recv: Callable, send: Callable, reset: Callable, after_reset: int) -> Side:
    """Wait for half of the environments, send them on. After `reset`, `recv` is due `after_reset` times."""
    number, due = count(), [0]

    def post() -> None:
        send(actions[next(number) % len(actions)])

    def start() -> None:
        _ = [recv() for _ in range(due[0])]
        reset()
        _ = [post() for _ in range(2 - after_reset)]
        due[0] = 2

    return clocked(actions.shape[1], start, lambda: (recv(), post()))


def vector_env(env_id: str, actions: np.ndarray, workers: int, half: bool) -> Side:
    options = dict(num_workers=workers, sticky_action_prob=STICKY, max_episode_steps=MAX_STEPS)
    env = VectorEnv(env_id, actions.shape[1], num_groups=2, **options)
    util.Finalize(None, env.close, exitpriority=1)  # atexit, where it ends its workers, is not for child processes
    if not half:
        return waiting(env, actions)
    sent, received = count(), count()
    groups = actions.reshape(2 * len(actions), -1)  # the first half's actions, the second's, the first's, ...
    return halves(groups, lambda: env.recv(next(received) % 2), lambda a: env.send(next(sent) % 2, a), env.reset, 0)


def atari_vector_env(env_id: str, actions: np.ndarray, threads: int, half: bool) -> Side:
    num_envs, size = actions.shape[1], actions.shape[1] // (1 + half)
    options = dict(batch_size=size, num_threads=threads, repeat_action_probability=STICKY, noop_max=0)
    options |= dict(max_num_frames_per_episode=4 * MAX_STEPS, reward_clipping=False, use_fire_reset=False)
    env = ale_py.AtariVectorEnv(gym.spec(env_id).kwargs["game"], num_envs, autoreset_mode=SAME_STEP, **options)
    return halves(actions[:, :size].copy(), env.recv, env.send, env.reset, 1) if half else waiting(env, actions)


def envpool(env_id: str, actions: np.ndarray, threads: int, half: bool) -> Side:
    import envpool

    num_envs, size = actions.shape[1], actions.shape[1] // (1 + half)
    options = dict(batch_size=size, num_threads=threads, repeat_action_probability=STICKY)
    options |= dict(max_episode_steps=MAX_STEPS, noop_max=1, use_fire_reset=False)  # noop_max=0 crashes EnvPool 1.2
    env = envpool.make_gymnasium(env_id.removeprefix("ALE/"), num_envs=num_envs, **options)
    actions, ready = actions[:, :size].astype(np.int32), []

    def recv() -> None:
        ready[:] = [env.recv()[-1]["env_id"]]

    return halves(actions, recv, lambda a: env.send(a, *ready), env.async_reset, 2) if half else waiting(env, actions)


def wrapped(env_id: str) -> gym.Env:
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    env = gym.make(env_id, frameskip=1, repeat_action_probability=STICKY, max_episode_steps=4 * MAX_STEPS)
    return FrameStackObservation(AtariPreprocessing(env, noop_max=0), 4)


def async_vector_env(env_id: str, actions: np.ndarray, _: int) -> Side:
    options = dict(autoreset_mode=SAME_STEP, context=FORK.get_start_method())
    return waiting(gym.vector.AsyncVectorEnv([partial(wrapped, env_id)] * actions.shape[1], **options), actions)


def emulate(conn, game: str, number: int, choices: list[int]) -> None:
    """A process that runs one emulator alone for as many seconds as it is told, and answers with steps per second."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(game))
    act, actions = ale.act, ale.getMinimalActionSet()
    while True:
        seconds, steps, elapsed, start = conn.recv(), 0, 0.0, time.perf_counter()
        while elapsed < seconds:
            action = actions[choices[steps % len(choices)]]
            _ = act(action), act(action), act(action), act(action)
            if ale.game_over():
                ale.reset_game()
            steps, elapsed = steps + 1, time.perf_counter() - start
        conn.send(steps / elapsed)


def emulator_only(env_id: str, actions: np.ndarray, workers: int) -> Side:
    pipes = [FORK.Pipe() for _ in range(workers)]
    for i, (_, theirs) in enumerate(pipes):
        what = (theirs, gym.spec(env_id).kwargs["game"], i, actions[:, i % actions.shape[1]].tolist())
        FORK.Process(target=emulate, args=what, daemon=True).start()

    def measure(seconds: float) -> float:
        for conn, _ in pipes:
            conn.send(seconds)
        return sum(conn.recv() for conn, _ in pipes)

    return measure


def compare(args: argparse.Namespace, num_envs: int, workers: int) -> list[dict]:
    """The rows of one number of environments and workers. Runs in a process of its own, which ends them all."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    gym.register_envs(ale_py)
    actions = np.random.default_rng(0).integers(0, wrapped(args.env_id).action_space.n, (1000, num_envs))
    what = (args.env_id, actions, workers)
    makers = {LIMIT: partial(emulator_only, *what)}  # what forks comes first, what starts threads last
    makers |= {f"VectorEnv {way}": partial(vector_env, *what, half) for way, half in WAYS}
    makers["AsyncVectorEnv step"] = partial(async_vector_env, *what)
    makers |= {f"AtariVectorEnv {way}": partial(atari_vector_env, *what, half) for way, half in WAYS}
    makers |= {f"EnvPool {way}": partial(envpool, *what, half) for way, half in WAYS if "envpool" in INSTALLED}
    sides = {name: make() for name, make in makers.items() if name.startswith(tuple(args.sides))}
    rates = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, measure in sides.items():
            rates[name].append(measure(args.seconds))

    peers = [name for name in rates if name.startswith(("AtariVectorEnv", "EnvPool"))]
    best, rows = max(peers, key=lambda name: np.median(rates[name]), default=None), []
    for name, values in rates.items():
        row = dict(num_envs=num_envs, workers=workers, side=name, rounds=args.rounds, best_peer=best)
        row |= zip(("median_sps", "p10_sps", "p90_sps"), np.percentile(values, [50, 10, 90]).tolist(), strict=True)
        for key, other in (("ratio_to_emulator", LIMIT), ("ratio_to_best_peer", best)):
            row[key] = float(np.median(np.divide(values, rates[other]))) if other in rates else None
        rows.append(row)
    return rows


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: INSTALLED.get(name) for name in ("numpy", "gymnasium", "ale-py", "envpool", "torch")},
        "fastops": fastops.BACKEND,
    }


def main() -> None:
    about = machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[32, 128], help="even numbers (default: 32 128)")
    parser.add_argument("--workers", type=int, nargs="+", default=[about["cores"]], help="default: one for each core")
    parser.add_argument("--env-id", default="ALE/MontezumaRevenge-v5", help="default: %(default)s")
    parser.add_argument("--sides", nargs="+", default=[""], help="only those whose names begin so (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2, help="for each side in each round (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    args = parser.parse_args()
    if any(n < 2 or n % 2 for n in args.num_envs) or any(not 1 <= w <= about["cores"] for w in args.workers):
        parser.error(f"expected even --num-envs, and --workers from 1 to {about['cores']}, the number of cores")

    results = []
    print(f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}; fastops runs on {about['fastops']}")
    print(f"{about['versions']}\n\n{'steps per second':29}", end="")
    print("".join(f"{title:>12}" for title in ("median", "p10", "p90", "/ emulator", "/ best peer")))
    for num_envs, workers in product(args.num_envs, args.workers):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows = process.submit(compare, args, num_envs, workers).result()
        print(f"{num_envs} environments, {workers} workers; best peer: {rows[0]['best_peer']}")
        for row in rows:
            figures = [f"{row[key]:.0f}" for key in ("median_sps", "p10_sps", "p90_sps")]
            figures += [f"{row[key] or float('nan'):.3f}" for key in ("ratio_to_emulator", "ratio_to_best_peer")]
            print(f"    {row['side']:25}" + "".join(f"{figure:>12}" for figure in figures))
        results += rows
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join([Path(sys.executable).name, *sys.argv])
        args.json.write_text(json.dumps({"command": command, "machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
