"""Agent steps per second of VectorEnv, of its peers, and of the emulator alone, on the same cores.

    python benchmarks/envs.py                                        32 and 128 environments on all cores
    python benchmarks/envs.py --num-envs 32 --workers 1 2 --json out.json

Every side plays the same game with the same random actions, drawn beforehand: 4 frames an action, sticky actions of
0.25, maximum of the last two frames, gray, 84x84, 4500 steps at most, no no-ops and no FIRE at the start, unclipped
rewards. An agent step is one action of one environment. Peers return stacks of 4 frames, VectorEnv the newest one.

    emulator only              `act` four times on one ALE for each core, nothing else: no environment can exceed it
    VectorEnv step             the simple way: send all, wait for all
    VectorEnv send/recv        double buffering: half of them step while the caller has the other half, as in training
    AtariVectorEnv, EnvPool    with as many threads as workers, waiting for all or, "halves", for half of them
    AsyncVectorEnv             Gymnasium's wrappers, one process for each environment

EnvPool (left out if not installed: pip install envpool) plays up to one no-op after a reset, and ends an episode with a
turn that only resets; the others reset in the turn of the last step.

With --workers W each side, its main process included, runs on W cores only. A round resets, warms up and measures
every side, one after the other, so that a change of the clock or a noisy neighbour meets all of them. Figures are agent
steps per second: median over the rounds, 10th and 90th percentile. The two ratios, to the emulator alone and to the
fastest of AtariVectorEnv and EnvPool, are medians of the ratios within each round.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
from ale_py import roms
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import fastops

STICKY, MAX_STEPS, WARM_UP = 0.25, 4500, 8
LIMIT, OURS, PEERS = "emulator only", "VectorEnv", ("AtariVectorEnv", "EnvPool")


@dataclass
class Side:
    """`turn` steps `size` environments; `reset` makes every one start over, however far the last turns came."""

    size: int
    reset: Callable[[], object]
    turn: Callable[[], object]
    close: Callable[[], object]

    def measure(self, seconds: float) -> float:
        """Agent steps per second. Turns in flight at the start stand for those in flight at the end."""
        self.reset()
        for _ in range(WARM_UP):
            self.turn()
        start = time.perf_counter()
        for turns in count(1):
            self.turn()
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                return turns * self.size / elapsed
        raise AssertionError


def waiting(env, actions: np.ndarray) -> Side:
    """Step all environments, wait for all."""
    number = count()
    return Side(actions.shape[1], env.reset, lambda: env.step(actions[next(number) % len(actions)]), env.close)


def halves(env, actions: np.ndarray, reset: Callable, recv: Callable, send: Callable, flying: int) -> Side:
    """Two halves in turn. `reset` starts over, with one or both halves `flying` to be received next."""
    number, underway = count(), []

    def start() -> None:
        while underway:
            recv()
            underway.pop()
        reset()
        underway.extend(range(flying))
        for _ in range(2 - flying):
            send(actions[next(number) % len(actions)])
            underway.append(0)

    def turn() -> None:
        recv()
        send(actions[next(number) % len(actions)])

    return Side(actions.shape[1], start, turn, env.close)


def ours(env_id: str, actions: np.ndarray, workers: int, half: bool) -> Side:
    from rnd_ppo_atari import VectorEnv

    options = dict(num_workers=workers, sticky_action_prob=STICKY, max_episode_steps=MAX_STEPS)
    env = VectorEnv(env_id, actions.shape[1], num_groups=2, **options)
    if not half:
        return waiting(env, actions)
    sent, received = count(), count()
    both = actions.reshape(len(actions), 2, -1).reshape(len(actions) * 2, -1)
    return halves(
        env, both, env.reset, lambda: env.recv(next(received) % 2), lambda a: env.send(next(sent) % 2, a), 0
    )


def atari_vector_env(env_id: str, actions: np.ndarray, threads: int, half: bool) -> Side:
    num_envs = actions.shape[1]
    env = ale_py.AtariVectorEnv(
        gym.spec(env_id).kwargs["game"],
        num_envs,
        batch_size=num_envs // (1 + half),
        num_threads=threads,
        max_num_frames_per_episode=4 * MAX_STEPS,
        repeat_action_probability=STICKY,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        noop_max=0,
        reward_clipping=False,
        use_fire_reset=False,
    )
    if not half:
        return waiting(env, actions)
    return halves(env, actions[:, : num_envs // 2].copy(), env.reset, env.recv, env.send, 1)


def envpool(env_id: str, actions: np.ndarray, threads: int, half: bool) -> Side:
    import envpool

    env = envpool.make_gymnasium(
        env_id.removeprefix("ALE/"),
        num_envs=actions.shape[1],
        batch_size=actions.shape[1] // (1 + half),
        num_threads=threads,
        max_episode_steps=MAX_STEPS,
        repeat_action_probability=STICKY,
        noop_max=1,  # 0 crashes EnvPool 1.2
        use_fire_reset=False,
    )
    if not half:
        return waiting(env, actions.astype(np.int32))
    here = []

    def recv() -> None:
        here[:] = [env.recv()[-1]["env_id"]]

    some = actions[:, : actions.shape[1] // 2].astype(np.int32)
    return halves(env, some, env.async_reset, recv, lambda a: env.send(a, here[0]), 2)


def wrapped(env_id: str) -> gym.Env:
    gym.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    env = gym.make(env_id, frameskip=1, repeat_action_probability=STICKY, max_episode_steps=4 * MAX_STEPS)
    return FrameStackObservation(AtariPreprocessing(env, noop_max=0), 4)


def async_vector_env(env_id: str, actions: np.ndarray) -> Side:
    mode = gym.vector.AutoresetMode.SAME_STEP
    return waiting(gym.vector.AsyncVectorEnv([lambda: wrapped(env_id)] * actions.shape[1], autoreset_mode=mode), actions)


def emulate(conn, game: str, core: int, choices: list[int]) -> None:
    """A process that runs one emulator alone for as many seconds as it is told, and answers with steps per second."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(game))
    act, actions = ale.act, ale.getMinimalActionSet()
    with contextlib.suppress(EOFError):
        while True:
            seconds, steps, start, elapsed = conn.recv(), 0, time.perf_counter(), 0.0
            while elapsed < seconds:
                action = actions[choices[steps % len(choices)]]
                act(action)
                act(action)
                act(action)
                act(action)
                if ale.game_over():
                    ale.reset_game()
                steps, elapsed = steps + 1, time.perf_counter() - start
            conn.send(steps / elapsed)


class Limit:
    def __init__(self, env_id: str, actions: np.ndarray, cores: list[int]):
        self.conns = []
        for core, choices in zip(cores, actions.T.tolist(), strict=False):
            conn, theirs = multiprocessing.Pipe()
            arguments = (theirs, gym.spec(env_id).kwargs["game"], core, choices)
            multiprocessing.Process(target=emulate, args=arguments, daemon=True).start()
            self.conns.append(conn)

    def measure(self, seconds: float) -> float:
        for conn in self.conns:
            conn.send(seconds)
        return sum(conn.recv() for conn in self.conns)

    def close(self) -> None:
        for conn in self.conns:
            conn.close()


def compare(args: argparse.Namespace, num_envs: int, workers: int) -> list[dict]:
    """The rows of one number of environments and workers. Runs in a process of its own, confined to as many cores."""
    cores = sorted(os.sched_getaffinity(0))[:workers] if hasattr(os, "sched_getaffinity") else list(range(workers))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    gym.register_envs(ale_py)
    env = wrapped(args.env_id)
    actions = np.random.default_rng(0).integers(0, env.action_space.n, (1000, num_envs))
    env.close()
    makers = {LIMIT: lambda: Limit(args.env_id, actions, cores)}
    for half, name in enumerate(("step", "send/recv")):  # what forks comes first, what starts threads last
        makers[f"{OURS} {name}"] = lambda half=half: ours(args.env_id, actions, workers, bool(half))
    makers["AsyncVectorEnv"] = lambda: async_vector_env(args.env_id, actions)
    for peer, make in zip(PEERS, (atari_vector_env, envpool), strict=True):
        for half, name in enumerate((peer, f"{peer} halves")):
            makers[name] = lambda make=make, half=half: make(args.env_id, actions, workers, bool(half))
    if installed("envpool") is None:
        makers = {name: make for name, make in makers.items() if not name.startswith("EnvPool")}
    sides = {name: make() for name, make in makers.items() if name.startswith(tuple(args.sides))}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            rates[name].append(side.measure(args.seconds))
    for side in sides.values():
        side.close()

    medians = {name: float(np.median(values)) for name, values in rates.items()}
    best = max((name for name in rates if name.startswith(PEERS)), key=medians.__getitem__, default=None)
    rows = []
    for name, values in rates.items():
        p10, median, p90 = (float(x) for x in np.percentile(values, [10, 50, 90]))
        row = {"num_envs": num_envs, "workers": workers, "side": name, "median_sps": median, "p10_sps": p10}
        row |= {"p90_sps": p90, "rounds": args.rounds, "best_peer": best}
        for title, other in (("ratio_to_emulator", LIMIT), ("ratio_to_best_peer", best)):
            row[title] = float(np.median(np.divide(values, rates[other]))) if other in rates else None
        rows.append(row)
    return rows


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in ("numpy", "gymnasium", "ale-py", "envpool", "torch")},
        "fastops": fastops.BACKEND,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = machine()
    parser.add_argument("--num-envs", type=int, nargs="+", default=[32, 128], help="even numbers (default: 32 128)")
    parser.add_argument("--workers", type=int, nargs="+", default=[about["cores"]], help="default: one for each core")
    parser.add_argument("--env-id", default="ALE/MontezumaRevenge-v5", help="default: %(default)s")
    parser.add_argument("--sides", nargs="+", default=[""], help="only those whose names begin so (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2, help="of each side in each round (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    args = parser.parse_args()

    print(f"{about['cpu']}, {about['cores']} cores, load {about['load']}; {about['versions']}\n")
    head = f"{'agent steps per second':24} {'median':>8} {'p10':>8} {'p90':>8} {'/ emulator':>11} {'/ best peer':>11}"
    results = []
    for num_envs in args.num_envs:
        for workers in args.workers:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                rows = process.submit(compare, args, num_envs, workers).result()
            print(f"{num_envs} environments, {workers} workers; best peer: {rows[0]['best_peer']}\n{head}")
            for row in rows:
                rates = " ".join(f"{row[key]:8.0f}" for key in ("median_sps", "p10_sps", "p90_sps"))
                ratios = (row["ratio_to_emulator"], row["ratio_to_best_peer"])
                print(f"    {row['side']:20} {rates} " + " ".join("          -" if r is None else f"{r:11.3f}" for r in ratios))
            results += rows
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join([Path(sys.executable).name, *sys.argv])
        args.json.write_text(json.dumps({"command": command, "machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
