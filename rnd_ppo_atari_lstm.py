"""PPO with Random Network Distillation (RND) on Atari games: the whole algorithm in one file.

Train             python SCRIPT --num-envs 128                                (SCRIPT: this file)
Resume            python SCRIPT --num-envs 128 --resume auto                  (or --resume PATH of a checkpoint)
Play              python SCRIPT --play PATH --episodes 30                     (add --render for a window)
8 GPUs            torchrun --nproc-per-node 8 SCRIPT --num-envs 128           (128 for each process)
2 machines of 8   torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                      --max-restarts 3 SCRIPT --num-envs 128 --resume auto    (on both machines)

Legend: T steps of a rollout, N environments of this process, A actions; arrays of a rollout are (T, N, ...). A plain
name (`rewards`, `values`, ...) is the game's stream, which ends with the episode; with `int_` in front it is the stream
of the intrinsic reward, which never ends. "Burda" is Burda et al. 2018, arXiv:1810.12894, and the code published with
it; "Machado" is Machado et al. 2018, arXiv:1709.06009.

Variant of rnd_ppo_atari.py: the policy has a memory, an LSTM between its trunk and its branches, which are as wide as
the LSTM. Its state goes on from rollout to rollout and is zero where an episode begins; an update runs it again over
all T steps of a minibatch's environments, from the state at the start of the rollout.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.connection
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import ale_py  # registers its games with Gymnasium
import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

import fastops

__version__ = "0.1.0"

# === 1. Arguments =====================================================================================================


@dataclass
class Args:
    # --- experiment
    exp_name: str = Path(__file__).stem
    """name of the experiment: part of the run's directory, and what `--resume auto` looks for"""
    seed: int = 1
    """seed of the weights, the actions and the environments; on the CPU the same seed gives the same run"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks run; auto: CUDA if there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic of the policy network, the RND networks stay in fp32; auto: bf16 on CUDA, fp32 on the CPU"""
    compile: bool = False
    """torch.compile the networks' two units of work (CUDA: with CUDA graphs); slow to start, faster to run"""
    run_dir: str = "runs"
    """directory below which every run gets its own, with checkpoints and TensorBoard events"""
    track: bool = False
    """also log to Weights & Biases (`pip install 'rnd-ppo[track]'`)"""
    log_interval: int = 10
    """rollouts between two lines of summary on screen"""
    save_interval: int = 100
    """rollouts between two checkpoints; one more is written at the end and on SIGINT or SIGTERM"""
    keep_checkpoints: int = 3
    """newest checkpoints to keep; the best by mean return stays besides"""
    resume: str = ""
    """checkpoint to continue, or `auto`: the newest one of this script and game below --run-dir, if there is one"""
    # --- play (instead of training)
    play: str = ""
    """checkpoint to evaluate instead of training"""
    episodes: int = 10
    """episodes to play, with sticky actions and again without"""
    greedy: bool = False
    """play the most probable action instead of sampling"""
    render: bool = False
    """show the game in a window while playing"""
    json: str = ""
    """file for the evaluation report"""
    # --- environment
    env_id: str = "ALE/MontezumaRevenge-v5"
    """Gymnasium id of an ALE game"""
    num_envs: int = 128
    """environments of each process [Burda, Table 5]"""
    num_steps: int = 128
    """steps of each environment in a rollout [Burda, Table 5]"""
    total_rollouts: int = 30_000
    """rollouts to train for [Burda, Table 5: 1.97e9 frames at 128 environments]"""
    max_episode_steps: int = 4500
    """steps of 4 frames after which an episode ends, as if it were over [Burda, Table 2: 18000 frames]"""
    sticky_action_prob: float = 0.25
    """probability, in every frame, to repeat the action executed before [Machado; Burda, Table 2]"""
    num_workers: int = 0
    """worker processes; 0: one for each CPU core of this process"""
    lstm_size: int = 256
    """width L of the policy's LSTM [Burda's code: a GRU of 256]"""
    # --- PPO
    learning_rate: float = 1e-4
    """learning rate of Adam [Burda, Table 5]"""
    gamma: float = 0.999
    """discount factor of the game's reward [Burda, section 3.3]"""
    int_gamma: float = 0.99
    """discount factor of the intrinsic reward [Burda, Table 5]"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation, both streams [Burda, Table 5]"""
    ext_coef: float = 2.0
    """weight of the game's advantage in the sum of both [Burda, Table 5]"""
    int_coef: float = 1.0
    """weight of the intrinsic advantage in the sum of both [Burda, Table 5]"""
    ent_coef: float = 0.001
    """weight of the entropy bonus [Burda, Table 5]"""
    vf_coef: float = 0.5
    """weight of the mean squared error of each of the two value heads [Burda's code]"""
    norm_adv: bool = False
    """normalise the advantages of each minibatch [off in Burda's code]"""
    num_minibatches: int = 4
    """minibatches of a pass, each a block of whole environments [Burda, Table 5]"""
    update_epochs: int = 4
    """passes over each rollout [Burda, Table 5]"""
    clip_coef: float = 0.1
    """clip range of the probability ratio [Burda, Table 5]"""
    clip_vloss: bool = False
    """clip the change of both value predictions by the clip range [off in Burda's code]"""
    max_grad_norm: float = 0.0
    """clip the norm of the gradient; 0: never [off in Burda's code]"""
    anneal: bool = False
    """let the learning rate and the clip range fall linearly to 0 over --total-rollouts [off in Burda's code]"""
    # --- RND
    obs_norm_rollouts: int = 50
    """rollouts of random actions that start the observation statistics [Burda's code: 50]"""
    int_return_filter: Literal["backward", "forward"] = "backward"
    """scale of the intrinsic reward: running variance of its discounted sum, backward in time within each rollout (as a
    return) or forward in time through the whole run [forward: Burda's code; see the README]"""
    predictor_proportion: float = -1.0
    """share of each minibatch that trains the predictor; -1: min(1, 32 / environments of all processes) [Burda, A.4]"""


# What --resume may change; every other argument is part of what a checkpoint means.
FREE_ARGS = {"device", "compile", "run_dir", "track", "log_interval", "save_interval", "keep_checkpoints", "resume"}
FREE_ARGS |= {"play", "episodes", "greedy", "render", "json", "num_workers", "total_rollouts"}


class UsageError(ValueError):
    """Something that the user has to change; the message says what was expected, what came and what to do."""


def check_args(args: Args) -> None:
    """Raise UsageError for arguments that cannot work, before anything is created."""

    def require(names: str, fine, expected: str) -> None:
        for name in names.split():
            if not fine(value := getattr(args, name)):
                raise UsageError(f"--{name.replace('_', '-')}: expected {expected}, got {value!r}")

    counts = {field.name for field in fields(args) if field.type == "int"} - {"seed", "num_workers"}
    require(" ".join(sorted(counts)), lambda x: x >= 1, "at least 1")
    require("seed", lambda x: 0 <= x < 2**32, "a number from 0 to 4294967295")
    weights = "num_workers ext_coef int_coef ent_coef vf_coef max_grad_norm"
    require(weights, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
    require("learning_rate clip_coef", lambda x: 0 < x < math.inf, "a finite number above 0")
    require("sticky_action_prob gamma int_gamma gae_lambda", lambda x: 0 <= x <= 1, "a number from 0 to 1")
    require("predictor_proportion", lambda x: x == -1 or 0 < x <= 1, "a number above 0 and up to 1, or -1")
    whole = f"a multiple of --num-minibatches {args.num_minibatches}, as a minibatch is a block of whole environments"
    require("num_envs", lambda x: x % args.num_minibatches == 0, whole)
    require("device", lambda x: x != "cuda" or torch.cuda.is_available(), "auto or cpu, as torch finds no CUDA device")
    wandb = importlib.util.find_spec("wandb") is not None
    require("track", lambda x: not x or wandb, "the package wandb: pip install 'rnd-ppo[track]'")
    folder = next(path for path in (Path(args.run_dir).absolute() / "x").parents if path.exists())
    writable = args.play or (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK))
    require("run_dir", lambda x: writable, f"a directory that can be written to, which {folder} is not; choose another")
    check_game(args)


# === 2. Environments ==================================================================================================

SKIP = 4  # frames that an action lasts [Burda, Table 2]


def check_game(args: Args) -> None:
    """Raise UsageError if --env-id is not an ALE game that Gymnasium knows."""
    games = [name for name, spec in gym.registry.items() if "AtariEnv" in str(spec.entry_point)]
    if args.env_id not in games:
        near = ", ".join(difflib.get_close_matches(args.env_id, games, n=3, cutoff=0.5)) or "ALE/MontezumaRevenge-v5"
        raise UsageError(f"--env-id: expected the id of an ALE game, got {args.env_id!r}; try {near}")


def make_game(env_id: str, seed: int, render_mode: str | None = None) -> tuple[Any, Any, Callable, bool]:
    """An emulator, ale_py.ALEInterface; gray of each color or None; a function: number of the room and more to log;
    whether every episode begins in the same state."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    # Gymnasium makes the game and finds the ROM; frame skip, sticky actions and the time limit are Env's.
    options: Any = dict(frameskip=1, repeat_action_probability=0.0, max_num_frames_per_episode=0)
    env: Any = gym.make(env_id, render_mode=render_mode, **options).unwrapped
    env.reset(seed=seed)
    room = {"montezuma_revenge": 3, "pitfall": 1}.get(env.spec.kwargs["game"])  # RAM byte that holds its number
    # ALE's games of this height are NTSC. Looking their colors up is faster than ALE's gray screen.
    palette = fastops.ATARI_GRAYS if env.ale.getScreenDims()[0] == 210 else None
    # ALE plays 130 frames until a game can begin, 7 ms. Where that always ends the same [tests], Env keeps the result.
    same = env.spec.kwargs["game"] in ("gravitar", "montezuma_revenge", "pitfall", "venture")
    return env.ale, palette, lambda: (None if room is None else int(env.ale.getRAM()[room]), {}), same


@functools.cache  # one pair for all Envs of a process: it stays in the core's cache
def screens(shape: tuple[int, int]) -> np.ndarray:
    """Room for the last two frames of a step, uint8 (2, H, W)."""
    return np.zeros((2, *shape), np.uint8)


class Env:
    """The game as the agent plays it: sticky actions, 4 frames an action, 84x84 gray frames, a step limit.

    As in Burda's code: in every frame the action executed before is repeated with probability `sticky_action_prob`
    (the no-op after a reset), the rewards of the frames are summed, the observation is the maximum of the last two.
    Everything random comes from `rng`, seeded by (seed, index).
    """

    def __init__(self, env_id, index=0, *, seed=1, sticky_action_prob=0.25, max_episode_steps=4500, render_mode=None):
        self.index, self.sticky_action_prob, self.max_episode_steps = index, sticky_action_prob, max_episode_steps
        self.rng = np.random.default_rng([seed, index])
        self.game, self.palette, self.look, self.same = make_game(env_id, int(self.rng.integers(2**31)), render_mode)
        self.screen = self.game.getScreenGrayscale if self.palette is None else self.game.getScreen
        self.actions = self.game.getMinimalActionSet()  # the first is the no-op
        self.frame_a, self.frame_b = screens(self.game.getScreenRGB().shape[:2])
        self.beginning: Any = None  # state and first frame, where every episode has the same
        self.reset(np.zeros((84, 84), np.uint8))

    def reset(self, out: np.ndarray) -> None:
        """Start an episode; its first frame, uint8 (84, 84), goes to `out`. No no-op or fire actions [Burda's code]."""
        self.action, self.steps, self.episode_return = 0, 0, 0.0
        self.executed = bytearray()  # the action of each frame: to watch the episode again
        self.places: dict[int, int] = {}  # steps spent in each room
        if self.beginning:
            self.game.restoreState(self.beginning[0])
            out[:] = self.beginning[1]
        else:
            self.game.reset_game()
            self.screen(self.frame_b)
            fastops.max_pool_resize(self.frame_b, self.frame_b, out, self.palette)
            self.beginning = self.same and (self.game.cloneState(), out.copy())

    def step(self, action: int, out: np.ndarray) -> tuple[float, bool, dict | None]:
        """Play one step; the newest frame goes to `out`. Unclipped reward, done, statistics of an ended episode."""
        reward, over = 0.0, False
        for frame, sticky in enumerate((self.rng.random(SKIP) < self.sticky_action_prob).tolist()):
            self.action = self.action if sticky else action
            self.executed.append(self.action)
            reward += self.game.act(self.actions[self.action])
            if over := self.game.game_over():  # a lost life is not an end
                break
            if frame == SKIP - 2:
                self.screen(self.frame_a)
        self.screen(self.frame_b)
        before = self.frame_a if frame == SKIP - 1 else self.frame_b  # an episode that ends earlier shows one frame
        fastops.max_pool_resize(before, self.frame_b, out, self.palette)
        self.steps += 1
        self.episode_return += reward
        place, stats = self.look()
        if place is not None:
            self.places[place] = self.places.get(place, 0) + 1
        done = over or self.steps >= self.max_episode_steps
        if not done:
            return reward, done, None
        stats |= dict(episodic_return=self.episode_return, episodic_length=self.steps, rooms=len(self.places))
        return reward, done, dict(env=self.index, stats=stats, places=self.places, executed=bytes(self.executed))

    def get_state(self) -> dict[str, Any]:
        """All of the environment in plain types; any Env of the same game continues from it identically."""
        state = dict(action=self.action, steps=self.steps, episode_return=self.episode_return, places={**self.places})
        state |= dict(env=self.index, executed=self.executed.decode("ascii"), rng=self.rng.bit_generator.state)
        return dict(state, game=self.game.cloneState(include_rng=True).serialize())

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_state` gave."""
        self.game.restoreState(ale_py.ALEState(state["game"]))
        self.action, self.steps, self.episode_return = state["action"], state["steps"], state["episode_return"]
        self.places, self.executed = dict(state["places"]), bytearray(state["executed"], "ascii")
        self.rng.bit_generator.state = state["rng"]


def worker(conn, inherited, env_id, first_index, options, groups, shared) -> None:
    """Body of a worker process: does to the environments `groups[g]` what the main process says, until that is gone."""
    for other in inherited:  # a fork copies the main process's ends of earlier pipes: held open, nobody sees an end
        other.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach the whole process group: the main process decides
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # Linux: the main process, once it has work, goes first
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    actions, frames, rewards, dones = (array.numpy() for array in shared)
    frames = list(frames)
    try:
        envs = {i: Env(env_id, first_index + i, **options) for group in groups for i in group}
        conn.send([dict(env=i, num_actions=len(env.actions)) for i, env in envs.items()])
        while True:
            command, group, states = conn.recv()
            replies = []
            for i in groups[group]:
                env, reply = envs[i], None
                if command == "step":
                    rewards[i], dones[i], reply = env.step(actions.item(i), frames[i])
                if command == "reset" or reply:  # same-step reset: the next observation is the new episode's first
                    env.reset(frames[i])
                if command == "get_state":
                    reply = env.get_state()
                if command == "set_state":
                    env.set_state(states[i])
                replies.append(reply)
            conn.send_bytes(pickle.dumps(replies))  # half the cost of conn.send
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the main process is gone
    except Exception:
        with contextlib.suppress(OSError):
            conn.send(traceback.format_exc())


class VectorEnv:
    """N environments in worker processes that write into shared memory; no frame is pickled.

    They form `num_groups` groups of equal size. `send(group, actions)` starts a step of one group and `recv(group)`
    waits for it, so that one group steps while the policy looks at another; `step` does both for all. Rewards are
    unclipped. At `done` the frame is already the first of the new episode. Environment i is seeded with (seed,
    first_index + i): what it does depends neither on `num_workers` (0: one for each core) nor on `num_groups`.
    `options` are those of Env: seed, sticky_action_prob, max_episode_steps.

    Raises RuntimeError, with the worker, its environments and the cause, if a worker fails or dies.
    """

    def __init__(self, env_id, num_envs, *, num_workers=0, num_groups=2, first_index=0, **options):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # under torchrun this process's share
        num_workers = min(num_workers or cores, num_envs)
        members = np.array_split(range(num_envs), min(num_groups, num_envs))
        self.groups = [slice(int(group[0]), int(group[-1]) + 1) for group in members]
        kinds = ((), torch.int64), ((84, 84), torch.uint8), ((), torch.float32), ((), torch.bool)
        shared = [torch.zeros(num_envs, *shape, dtype=dtype).share_memory_() for shape, dtype in kinds]
        self.actions, self.frames, self.rewards, self.dones = (array.numpy() for array in shared)
        fork = "fork" in torch.multiprocessing.get_all_start_methods()
        context: Any = torch.multiprocessing.get_context("fork" if fork else "spawn")
        self.closed = False
        self.workers: list[tuple[Any, Any, list[list[int]]]] = []  # process, pipe, its share of each group
        for w in range(num_workers):
            # A share of each group, so that all workers are at work on the group that is being stepped.
            mine = [[int(i) for i in group if i % num_workers == w] for group in members]
            conn, theirs = context.Pipe()
            inherited = [conn, *(pipe for _, pipe, _ in self.workers)] if fork else []
            what = (theirs, inherited, env_id, first_index, options, mine, shared)
            process = context.Process(target=worker, args=what, daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, conn, mine))
        self.num_actions = self.replies()[0]["num_actions"]
        atexit.register(self.close)  # workers do not obey the SIGTERM that multiprocessing would send them

    def send(self, group: int, actions: np.ndarray) -> None:
        """Start a step of `group`: actions int (n,). The arrays that `recv` gave for it are overwritten from now on."""
        self.actions[self.groups[group]] = actions
        self.post("step", group)

    def recv(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Wait for `group`: views of frames uint8 (n, 84, 84), rewards float32 (n,), dones bool (n,); infos."""
        here, infos = self.groups[group], self.replies()
        return self.frames[here], self.rewards[here], self.dones[here], infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Step all: actions int (N,) -> copies of frames uint8 (N, 84, 84), rewards float32 (N,), dones (N,); infos."""
        self.actions[:] = actions
        infos = self.call("step")
        return self.frames.copy(), self.rewards.copy(), self.dones.copy(), infos

    def reset(self) -> np.ndarray:
        """Start a new episode everywhere; a copy of the frames uint8 (N, 84, 84)."""
        self.call("reset")
        return self.frames.copy()

    def call(self, command: str, states: list[dict] | None = None) -> list[dict]:
        """`get_state`: the state of every environment, in order, in plain types; `set_state`: go on from `states`."""
        for group in range(len(self.groups)):
            self.post(command, group, states)
        return [reply for _ in self.groups for reply in self.replies()]

    def post(self, command: str, group: int, states: list[dict] | None = None) -> None:
        for _, conn, mine in self.workers:
            with contextlib.suppress(OSError):  # of a dead worker: `replies` says more about it
                conn.send_bytes(pickle.dumps((command, group, states and {i: states[i] for i in mine[group]})))

    def replies(self) -> list[dict]:
        """What the environments of the group posted first have to say, in their order."""
        replies: list[dict | None] = []
        for w, (process, conn, mine) in enumerate(self.workers):
            try:
                reply = conn.recv()
            except (EOFError, OSError):
                process.join(1)
                reply = f"it died with exit code {process.exitcode}"
            if isinstance(reply, str):
                raise RuntimeError(f"worker {w} (environments {sorted(i for g in mine for i in g)}) failed: {reply}")
            replies += reply
        return sorted(filter(None, replies), key=lambda reply: reply["env"])

    def close(self) -> None:
        """End the worker processes."""
        self.closed = True
        for _, conn, _ in self.workers:
            conn.close()
        for process, _, _ in self.workers:
            process.join(2)
            process.kill()


# === 3. Networks ======================================================================================================


def layer(module: Any, gain: float = math.sqrt(2)) -> Any:
    """`module` with orthogonal weights of this gain and zero bias [Burda's code]."""
    nn.init.orthogonal_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


def convolutions(channels: int, activation: nn.Module) -> list[nn.Module]:
    """(B, channels, 84, 84) -> (B, 3136). The third kernel is 4x4 in Burda's code, 3x3 in the paper and every port."""
    first, second = layer(nn.Conv2d(channels, 32, 8, stride=4)), layer(nn.Conv2d(32, 64, 4, stride=2))
    return [first, activation, second, activation, layer(nn.Conv2d(64, 64, 3)), activation, nn.Flatten()]


class Agent(nn.Module):
    """Policy and both value functions [Burda's code]; with `bf16` the trunk, 95 % of the work, runs in bfloat16.

    forward: obs uint8 (T * n, 4, 84, 84), state (2, n, L), h and c before them, starts bool (T, n), true where an
    episode begins -> logits (T * n, A), values (T * n,), int_values (T * n,), float32, and the state after them.
    """

    def __init__(self, num_actions: int, width: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        relu = nn.ReLU(inplace=True)
        self.trunk = nn.Sequential(*convolutions(4, relu), layer(nn.Linear(3136, 256)), relu)
        self.lstm = nn.LSTM(256, width)
        for name, parameter in self.lstm.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)
        self.policy_branch = layer(nn.Linear(width, width), 0.1)
        self.value_branch = layer(nn.Linear(width, width), 0.1)  # one branch for both values
        self.policy_head = layer(nn.Linear(width, num_actions), 0.01)
        self.value_head = layer(nn.Linear(width, 1), 0.01)
        self.int_value_head = layer(nn.Linear(width, 1), 0.01)
        self.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on the CPU

    def features(self, obs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            return self.trunk(obs.to(torch.bfloat16 if self.bf16 else torch.float32).div_(255)).float()

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p, v = x + F.relu(self.policy_branch(x)), x + F.relu(self.value_branch(x))
        return self.policy_head(p), self.value_head(v).squeeze(-1), self.int_value_head(v).squeeze(-1)

    def forward(self, obs: torch.Tensor, state: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, outputs = self.features(obs).unflatten(0, starts.shape), []
        # One call of the fused kernel from each step at which an episode begins, in any environment, to the next.
        cuts = [0, *(starts[1:].any(1).nonzero().flatten() + 1).tolist(), len(x)]
        for begin, end in itertools.pairwise(cuts):
            h, c = state * ~starts[begin][:, None]
            output, (h, c) = self.lstm(x[begin:end], (h[None], c[None]))
            state = torch.cat([h, c])
            outputs.append(output)
        return *self.heads(torch.cat(outputs).flatten(0, 1)), state


class RNDModel(nn.Module):
    """A fixed random network and one that learns to predict its output [Burda, A.5; slope 0.2: Burda's code].

    forward: normalised frames float32 (B, 1, 84, 84) -> error (B,), the mean square over 512 outputs: intrinsic reward
    and loss of the predictor. In fp32 always: it is the small difference of two outputs that grow alike.
    """

    def __init__(self):
        super().__init__()
        relu, slope = nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)
        self.target = nn.Sequential(*convolutions(1, slope), layer(nn.Linear(3136, 512))).requires_grad_(False)
        hidden = layer(nn.Linear(3136, 512)), relu, layer(nn.Linear(512, 512)), relu
        self.predictor = nn.Sequential(*convolutions(1, slope), *hidden, layer(nn.Linear(512, 512)))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.predictor(x) - self.target(x)).square().mean(-1)


# === 4. Rollout =======================================================================================================


class Rollout:
    """What T steps of N environments leave behind. Frames are kept once, not as stacks of four.

    frames       uint8 (T + 4, N, 84, 84): the newest frame of observation t is frames[t + 3]; three older ones before
    ages         uint8 (T + 1, N): steps since the episode's first observation, at most 3; 0 at a first observation
    actions      int64 (T, N)        logprobs     float32 (T, N)
    values       float32 (T + 1, N)  int_values   float32 (T + 1, N), the last for the bootstrap
    rewards      float32 (T, N), their sign, NumPy                     dones        float32 (T, N), NumPy
    """

    def __init__(self, num_steps: int, num_envs: int, agent: Any = None):
        device = next(agent.parameters()).device if agent else "cpu"
        width = agent.lstm.hidden_size if agent else 256
        self.states = torch.zeros(2, 2, num_envs, width, device=device)  # h, c before the first and after the last step
        options: Any = dict(dtype=torch.uint8, device=device)
        self.frames = torch.zeros(num_steps + 4, num_envs, 84, 84, **options)
        self.ages = torch.zeros(num_steps + 1, num_envs, **options)
        self.actions = torch.zeros(num_steps, num_envs, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(num_steps, num_envs, device=device)
        self.values, self.int_values = torch.zeros(2, num_steps + 1, num_envs, device=device)
        self.rewards, self.dones = np.zeros((2, num_steps, num_envs), np.float32)

    def start(self, frames: np.ndarray) -> None:
        """Make `frames`, uint8 (N, 84, 84), the first observation of new episodes, as if a rollout had just ended."""
        self.frames[-1] = torch.from_numpy(frames)
        self.ages[-1] = 0

    def seams(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the next rollout goes on from: pairs of the end of an array and the beginning that it becomes."""
        return [(self.frames[-4:], self.frames[:4]), (self.ages[-1], self.ages[0]), (self.states[1], self.states[0])]

    def inputs(self, t: int | slice, envs: Any = slice(None)) -> tuple[torch.Tensor, ...]:
        """What the agent takes at the steps `t` (with a slice: T consecutive ones) in the environments `envs`."""
        steps = slice(t, t + 1) if isinstance(t, int) else t
        state = self.states[1 if isinstance(t, int) else 0][:, envs]
        stacks = stack_frames(self.frames[steps.start : steps.stop + 3, envs], self.ages[steps, envs])
        return stacks, state, self.ages[steps, envs] == 0


def stack_frames(frames: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Observations of consecutive steps: frames uint8 (T + 3, n, 84, 84), ages (T, n) -> uint8 (T * n, 4, 84, 84).

    In channels_last memory, oldest frame first, zero where a frame is older than the episode [Burda's code].
    """
    steps = len(ages)
    stacks = torch.stack([frames[k : k + steps] for k in range(4)], dim=-1)
    inside = ages[..., None] >= torch.arange(3, -1, -1, device=ages.device)
    return stacks.mul_(inside[:, :, None, None, :]).flatten(0, 1).permute(0, 3, 1, 2)


def act(agent: nn.Module, inputs: tuple[torch.Tensor, ...], noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sample actions by the Gumbel-max trick: inputs of one step, noise (n, A) -> actions, logprobs, both values.

    `memory` is what a recurrent agent returns besides; here it is empty.
    """
    logits, values, int_values, *memory = agent(*inputs)
    actions = (logits + noise).argmax(-1)
    logprobs = logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    return actions, logprobs, values, int_values, *memory


@torch.no_grad()
def collect(agent: nn.Module, envs: VectorEnv, rollout: Rollout, act=act) -> list[dict]:
    """Fill `rollout` with T steps of each environment, going on where it ended; statistics of finished episodes.

    While the workers step one group of environments, the policy computes the actions of the other.
    """
    num_steps, num_envs = rollout.actions.shape
    device = rollout.frames.device
    for end, beginning in rollout.seams():
        beginning.copy_(end.clone())
    # All of a rollout's noise at once: what an environment does then depends neither on groups nor on timing.
    gumbel = -torch.empty(num_steps, num_envs, envs.num_actions).exponential_().log().to(device)
    infos: list[dict] = []

    def receive(group: int, t: int) -> None:
        here = envs.groups[group]
        frames, rewards, dones, finished = envs.recv(group)
        rollout.frames[t + 4, here].copy_(torch.from_numpy(frames), non_blocking=True)
        rollout.rewards[t, here], rollout.dones[t, here] = np.sign(rewards), dones
        older = (rollout.ages[t, here] + 1).clamp_(max=3)
        rollout.ages[t + 1, here] = older * torch.from_numpy(~dones).to(device)
        infos.extend(dict(info, step=t) for info in finished)

    for t in range(num_steps):
        for group, here in enumerate(envs.groups):
            if t > 0:
                receive(group, t - 1)
            inputs = rollout.inputs(t, here)
            actions, logprobs, values, int_values, state = act(agent, inputs, gumbel[t, here])
            rollout.states[1][:, here] = state
            envs.send(group, actions.cpu().numpy())
            rollout.actions[t, here], rollout.logprobs[t, here] = actions, logprobs
            rollout.values[t, here], rollout.int_values[t, here] = values, int_values
    for group, here in enumerate(envs.groups):
        receive(group, num_steps - 1)
        _, _, values, int_values, *_ = act(agent, rollout.inputs(num_steps, here), gumbel[0, here])
        rollout.values[-1, here], rollout.int_values[-1, here] = values, int_values
    return infos


# === 5. Intrinsic reward ==============================================================================================

OBS_CLIP = 5.0  # [Burda, 2.4]


def gather(value: Any) -> list:
    """The `value` of every process, in order of rank; a list of one where there is one."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def merge_batch(rms: fastops.RunningMeanStd, batch: np.ndarray) -> None:
    """Merge the batches of all processes into the running statistics, as if one process had seen them all."""
    mine = fastops.RunningMeanStd(rms.mean.shape, count=1e-300)  # this batch only
    mine.update(batch)
    for mean, var, count in gather((mine.mean, mine.var, mine.count)):
        rms.merge(mean, var, count)


def normalize_frames(frames: torch.Tensor, obs_rms: fastops.RunningMeanStd) -> torch.Tensor:
    """Input of the RND networks: frames uint8 (B, 84, 84) -> float32 (B, 1, 84, 84), whitened and clipped to +-5."""
    if frames.device.type == "cpu":
        return torch.from_numpy(obs_rms.normalize(frames.numpy(), OBS_CLIP)).unsqueeze(1)
    mean, std = (torch.from_numpy(x).to(frames.device) for x in (obs_rms.mean, obs_rms.std))
    return ((frames - mean) / std).clamp(-OBS_CLIP, OBS_CLIP).float().unsqueeze(1)


@torch.no_grad()
def intrinsic_reward(rnd: nn.Module, frames: torch.Tensor, obs_rms: fastops.RunningMeanStd) -> np.ndarray:
    """Raw bonus for reaching each next frame: uint8 (T, N, 84, 84) -> float32 (T, N)."""
    flat = frames.flatten(0, 1).split(1024)  # bounds the memory; more at once is not faster
    return torch.cat([rnd(normalize_frames(f, obs_rms)) for f in flat]).view(frames.shape[:2]).cpu().numpy()


def scale_int_rewards(raw: np.ndarray, carry: np.ndarray, int_return_rms, args: Args) -> np.ndarray:
    """Divide raw bonuses, float32 (T, N), by the running standard deviation of their discounted sum [Burda, 2.4].

    The mean is not subtracted, nothing is clipped. `carry`, float64 (N,), is the state of the forward filter, updated
    in place; the backward filter starts from zero at the end of each rollout.
    """
    if backward := args.int_return_filter == "backward":
        carry[:] = 0
    merge_batch(int_return_rms, fastops.discounted_sum(raw, carry, args.int_gamma, backward).ravel())
    return (raw / int_return_rms.std).astype(np.float32)


# === 6. Update ========================================================================================================

METRICS = ("policy_loss", "value_loss", "int_value_loss", "predictor_loss", "entropy", "approx_kl", "clipfrac")


def losses(agent: nn.Module, rnd: nn.Module, batch: dict, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum to minimise, and the values named in METRICS, of one minibatch of B samples.

    `batch`: inputs, those of the agent; actions, logprobs, advantages, returns, int_returns, values, int_values (B,);
    rnd_obs (b, 1, 84, 84), the normalised next frames of the predictor's share; clip, the clip range, ().
    """
    logits, values, int_values, *_ = agent(*batch["inputs"])
    log_probs = logits.log_softmax(-1)
    logratio = log_probs.gather(-1, batch["actions"][:, None]).squeeze(-1) - batch["logprobs"]
    # In the first minibatch after a rollout the ratio is 1: anything else means stale data or another observation.
    ratio, clip, advantages = logratio.exp(), batch["clip"], batch["advantages"]
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()

    def value_loss(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        errors = (new - returns).square()
        if args.clip_vloss:
            errors = torch.max(errors, (old + (new - old).clamp(-clip, clip) - returns).square())
        return args.vf_coef * errors.mean()

    v_loss = value_loss(values, batch["values"], batch["returns"])
    int_v_loss = value_loss(int_values, batch["int_values"], batch["int_returns"])
    predictor_loss = rnd(batch["rnd_obs"]).mean()
    loss = policy_loss - args.ent_coef * entropy + v_loss + int_v_loss + predictor_loss
    approx_kl, clipfrac = 0.5 * logratio.square().mean(), ((ratio - 1).abs() > clip).float().mean()
    metrics = (policy_loss, v_loss, int_v_loss, predictor_loss, entropy, approx_kl, clipfrac)
    return loss, torch.stack([m.detach() for m in metrics])


def optimization_step(agent, rnd, optimizer, batch: dict, args: Args, losses=losses) -> torch.Tensor:
    """One step of Adam on one minibatch; its METRICS. Gradients are averaged over all processes."""
    optimizer.zero_grad()
    loss, metrics = losses(agent, rnd, batch, args)
    loss.backward()
    # Of the policy and the predictor; the target has no gradient and is not in the optimiser.
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in params])  # one message instead of one for each tensor
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad.copy_(grad.view_as(p))
    if args.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(params, args.max_grad_norm)
    optimizer.step()
    return metrics


def advantages_and_returns(rollout: Rollout, int_rewards: np.ndarray, args: Args) -> dict[str, np.ndarray]:
    """Both streams' GAE [Schulman et al. 2016]; float32 (T, N) each.

    The game's stream ends with the episode, the intrinsic one goes on over the reset [Burda, 2.3].
    """
    values, int_values = rollout.values.cpu().numpy(), rollout.int_values.cpu().numpy()
    adv = fastops.gae(rollout.rewards, values[:-1], rollout.dones, values[-1], args.gamma, args.gae_lambda)
    int_adv = fastops.gae(int_rewards, int_values[:-1], None, int_values[-1], args.int_gamma, args.gae_lambda)
    advantages = args.ext_coef * adv + args.int_coef * int_adv
    return dict(advantages=advantages, returns=adv + values[:-1], int_returns=int_adv + int_values[:-1])


def minibatch(rollout: Rollout, targets: dict, envs: torch.Tensor, obs_rms, proportion: float, clip: float) -> dict:
    """All T steps of the environments `envs` (n,), as `losses` wants them; `targets` (T, N) tensors on the device."""
    num_steps = len(rollout.actions)
    count = num_steps * len(envs)
    arrays = dict(targets, actions=rollout.actions, logprobs=rollout.logprobs)
    arrays |= dict(values=rollout.values[:-1], int_values=rollout.int_values[:-1])
    batch = {name: array[:, envs].flatten() for name, array in arrays.items()}
    batch["inputs"] = rollout.inputs(slice(0, num_steps), envs)
    # The predictor learns from a fresh random share, so that its speed does not grow with N [Burda, A.4].
    share = torch.randperm(count)[: max(1, round(proportion * count))].to(envs.device)
    batch["rnd_obs"] = normalize_frames(rollout.frames[share // len(envs) + 4, envs[share % len(envs)]], obs_rms)
    batch["clip"] = torch.tensor(clip, device=envs.device)
    return batch


def update(agent, rnd, optimizer, rollout: Rollout, targets: dict, obs_rms, proportion, clip, args, losses=losses):
    """Train on the rollout for --update-epochs passes; METRICS, averaged over the steps.

    Each pass shuffles the environments and deals all of them out to the minibatches, so it uses every sample once.
    """
    # METRICS stay on the device until the last step is done: waiting for each would leave a GPU idle.
    targets = {name: torch.from_numpy(array).to(rollout.frames.device) for name, array in targets.items()}
    metrics = []
    for _ in range(args.update_epochs):
        for envs in torch.randperm(rollout.actions.shape[1]).to(rollout.frames.device).chunk(args.num_minibatches):
            batch = minibatch(rollout, targets, envs, obs_rms, proportion, clip)
            metrics.append(optimization_step(agent, rnd, optimizer, batch, args, losses))
    return dict(zip(METRICS, torch.stack(metrics).mean(0).tolist(), strict=True))


def explained_variance(values: torch.Tensor, returns: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns): values (T + 1, N) of which the last is not used, returns (T, N)."""
    return 1 - float(np.var(returns - values[:-1].cpu().numpy()) / max(np.var(returns), 1e-30))


# === 7. Checkpoints ===================================================================================================

FORMAT = 1  # of a checkpoint; a file of another one is refused


def snapshot(args: Args, parts: dict, rollout: Rollout, envs: VectorEnv, carry: np.ndarray, progress: dict) -> dict:
    """A copy, in plain types and tensors, of all that a run is between two rollouts; `parts`: what has a state_dict."""
    numpy = [np.asarray(item).tolist() for item in np.random.get_state()]
    rng: dict = dict(python=random.getstate(), numpy=numpy, torch=torch.get_rng_state())
    rng["cuda"] = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    local = dict(
        rng=rng,
        envs=envs.call("get_state"),
        seams=[end.clone().cpu() for end, _ in rollout.seams()],
        carry=carry.tolist(),
    )
    state = dict(format=FORMAT, script=Path(__file__).stem, args=vars(args), progress=progress, ranks=gather(local))
    # A copy, because training goes on before it is written, if it is written at all.
    return copy.deepcopy(state | {name: part.state_dict() for name, part in parts.items()})


def restore(state: dict, rank: int, parts: dict, rollout: Rollout, envs: VectorEnv, carry: np.ndarray) -> dict:
    """Put everything into the state that `snapshot` took; returns the progress."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
    local = state["ranks"][rank]
    envs.call("set_state", local["envs"])
    carry[:] = local["carry"]
    for saved, (end, _) in zip(local["seams"], rollout.seams(), strict=True):
        end.copy_(saved)
    random.setstate(local["rng"]["python"])
    np.random.set_state(tuple(local["rng"]["numpy"]))
    torch.set_rng_state(local["rng"]["torch"])
    if local["rng"]["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(local["rng"]["cuda"])
    return state["progress"]


def save_checkpoint(state: dict, run: Path, keep: int = 3, best: bool = False) -> Path | None:
    """Save `state` below `run` all or nothing; the newest `keep` and the best stay. None and a warning if it fails."""
    path, temporary = run / f"checkpoint_{state['progress']['iteration']:06d}.pt", run / "save.tmp"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())  # torch.load does not mind what follows the archive
    try:
        for target in (path, run / "best.pt") if best else (path,):
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        for old in sorted(run.glob("checkpoint_*.pt"))[:-keep]:
            old.unlink()
    except OSError as error:  # a full disk must not end the run
        tqdm.write(f"warning: no checkpoint written ({error}); the run goes on and tries again at the next save")
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return None
    return path


def load_checkpoint(path: str | Path) -> dict:
    """The state in a checkpoint of this script; executes nothing that is in the file. UsageError with the reason."""
    try:
        data = Path(path).read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise OSError("its checksum is wrong, so it is something else or damaged")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        found = f"format {state['format']} of {state['script']}"
    except Exception as error:  # whatever the reason
        reason = "there is more in it than plain types" if isinstance(error, pickle.UnpicklingError) else error
        raise UsageError(f"{path}: expected a checkpoint, cannot read it: {reason}; take another one") from None
    if found != (expected := f"format {FORMAT} of {Path(__file__).stem}"):
        raise UsageError(f"{path}: expected a checkpoint in {expected}, got {found}; use the script that wrote it")
    return state


def find_checkpoint(args: Args) -> tuple[Path, dict] | tuple[None, None]:
    """Path and state of the checkpoint that --resume means, if any."""
    if args.resume not in ("", "auto"):
        return Path(args.resume), load_checkpoint(args.resume)
    # The newest run first: its name ends with the time of its start.
    runs = Path(args.run_dir).glob(f"{Path(args.env_id).name}__{args.exp_name}__*") if args.resume else ()
    for run in sorted(runs, key=lambda run: run.name.rpartition("__")[2], reverse=True):
        for path in sorted(run.glob("checkpoint_*.pt"), reverse=True):
            try:
                return path, load_checkpoint(path)
            except UsageError as error:
                print(f"warning: {error}; trying the one before", file=sys.stderr)
    return None, None


# === 8. Play ==========================================================================================================


@torch.no_grad()
def play_episode(agent: nn.Module, env: Env, greedy: bool = False):
    """Play one episode; yields (action, reward, value, int_value, frame uint8 (84, 84), info) after every step."""
    rollout = Rollout(1, 1, agent)
    frame, info = np.zeros((84, 84), np.uint8), None
    env.reset(frame)
    rollout.start(frame[None])
    while info is None:
        gumbel = -torch.empty(1, len(env.actions)).exponential_().log().to(rollout.frames.device) * (not greedy)
        action, _, value, int_value, rollout.states[1] = act(agent, rollout.inputs(1), gumbel)
        reward, _, info = env.step(int(action.item()), frame)
        rollout.frames[:-1] = rollout.frames[1:].clone()
        rollout.frames[-1, 0] = torch.from_numpy(frame)
        rollout.ages[-1] = (rollout.ages[-1] + 1).clamp(max=3)
        yield action.item(), reward, value.item(), int_value.item(), frame, info


def load_agent(state: dict, device: torch.device | str = "cpu") -> Agent:
    """The agent of a checkpoint, ready to play."""
    agent = Agent(*state["agent"]["policy_head.weight"].shape).to(device)
    agent.load_state_dict(state["agent"])
    return agent.eval()


def play(args: Args) -> dict:
    """Evaluate the checkpoint `args.play` with sticky actions and without; the report that --json writes."""
    check_args(args)
    state = load_checkpoint(args.play)
    if args.env_id != (trained := Args(**state["args"]).env_id):
        raise UsageError(f"--play: expected a checkpoint of {args.env_id}, got one of {trained}")
    if args.render and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise UsageError("--render: expected a display, found none; record a video with tools/watch.py instead")
    if not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json: expected a file in a directory that exists, got {args.json}")
    agent = load_agent(state, "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    report: dict = dict(checkpoint=args.play, env_id=args.env_id, greedy=args.greedy, summary=[], episodes=[])
    for sticky in dict.fromkeys((args.sticky_action_prob, 0.0)):
        options: Any = dict(sticky_action_prob=sticky, max_episode_steps=args.max_episode_steps, seed=args.seed)
        options["render_mode"] = "human" if args.render else None
        for i in tqdm(range(args.episodes), f"sticky {sticky:g}", leave=False):
            *_, (*_, info) = play_episode(agent, Env(args.env_id, i, **options), args.greedy)
            episode = dict(info["stats"], sticky_action_prob=sticky, seed=[args.seed, i])
            report["episodes"].append(dict(episode, places=sorted(info["places"])))
        columns = "episodic_return", "episodic_length", "rooms"
        rows = [[e[name] for name in columns] for e in report["episodes"][-args.episodes :]]
        returns, lengths, rooms = np.array(rows).T
        error = returns.std(ddof=1) / len(returns) ** 0.5 if len(returns) > 1 else 0.0
        row = dict(sticky_action_prob=sticky, mean=returns.mean(), standard_error=error, std=returns.std())
        row |= dict(median=np.median(returns), best=returns.max(), length=lengths.mean(), rooms=rooms.mean())
        report["summary"].append({name: float(value) for name, value in row.items()})
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    return report


# === 9. Training ======================================================================================================

PLOTS = {  # the six to look at first, in TensorBoard's tab "custom scalars"
    "return": ["charts/episodic_return_mean100", "charts/best_return"],
    "rooms": ["charts/rooms", "charts/rooms_total"],
    "bonus": ["rnd/int_reward_raw", "losses/predictor_loss"],
    "explained variance": ["losses/explained_variance", "losses/int_explained_variance"],
} | {tag.rpartition("/")[2]: [tag] for tag in ("losses/entropy", "charts/SPS")}


def exit_on_signal(save, envs: VectorEnv) -> threading.Event:
    """On SIGINT or SIGTERM call `save`, then exit with 130 or 143, a second signal at once; with 1 if a worker dies.

    In a thread, because Python's own handlers wait until the call into torch that is running returns. The event is set
    once that thread is going to end the process, which the main thread then should not do first.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer)

    def leave() -> None:
        ready = multiprocessing.connection.wait([reader, *(process.sentinel for process, _, _ in envs.workers)])
        if reader in ready:
            leaving.set()
            number = os.read(reader, 1)[0]
            threading.Thread(target=lambda: os._exit(128 + os.read(reader, 1)[0]), daemon=True).start()
            path = save()
            what = f"to go on, add --resume {path}" if path else "not saved"
            print(f"\n{signal.Signals(number).name}: {what}", flush=True)
            os._exit(128 + number)
        time.sleep(0.5)  # the main thread, if it is waiting for the worker, says more about it
        for w, (process, _, shares) in enumerate(envs.workers):
            if not (process.is_alive() or envs.closed):
                mine = sorted(i for group in shares for i in group)
                what = f"worker {w} (environments {mine}) died with exit code {process.exitcode}"
                print(f"error: {what}", file=sys.stderr, flush=True)
                os._exit(1)

    leaving = threading.Event()
    threading.Thread(target=leave, daemon=True).start()
    return leaving


def open_run(args: Args, found: Path | None, state: dict | None, cleanup) -> tuple[Path, SummaryWriter]:
    """The run's directory, that of the checkpoint `found` or a new one, locked, and a TensorBoard writer."""
    name = f"{Path(args.env_id).name}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run = found.parent if found else Path(args.run_dir, name)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir: expected a directory that can be written to, got {error}") from None
    for path in run.parent.glob("*/save.tmp"):  # of runs that were killed while they saved
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(path.parent / "lock", timeout=0):
            path.unlink(missing_ok=True)
    try:
        cleanup.enter_context(filelock.FileLock(run / "lock", timeout=3))  # a killed run's workers may hold it a moment
    except filelock.Timeout:
        raise UsageError(f"{run}: expected a run that has ended, but a process is still training there") from None
    if state:  # what came after the checkpoint is about to come again
        for path in run.glob("checkpoint_*.pt"):
            if int(path.stem[11:]) > state["progress"]["iteration"]:  # damaged, or given up by going back
                path.rename(path.with_suffix(".abandoned"))
    for path in run.glob("events.out.tfevents.*"):  # in a new run: of one that began in the same second and was killed
        size = state["progress"]["events"].get(path.name) if state else 0
        os.truncate(path, min(size, path.stat().st_size)) if size else path.unlink()
    if args.track:
        import wandb

        wandb.init(project="rnd-ppo", name=run.name, id=run.name, resume="allow", sync_tensorboard=True)
    writer = SummaryWriter(str(run))
    if not state:
        rows = "".join(f"\n|{name}|{value}|" for name, value in vars(args).items())
        writer.add_text("hyperparameters", f"|argument|value|\n|-|-|{rows}")
        writer.add_custom_scalars({"RND": {title: ["Multiline", tags] for title, tags in PLOTS.items()}})
        for summary in hparams(vars(args), dict.fromkeys(PLOTS["return"] + PLOTS["rooms"], 0.0)):
            writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
    return run, writer


def check_finite(iteration: int, scalars: dict[str, float]) -> None:
    """Raise FloatingPointError, with the names of rollout and quantity, if a scalar is not finite."""
    for name, value in scalars.items():
        if not math.isfinite(value):
            what = f"{name} is {value} in rollout {iteration}"
            raise FloatingPointError(f"{what}; --resume auto goes on from the last checkpoint")


def check_health(args: Args, progress: dict, scalars: dict[str, float], num_actions: int) -> str | None:
    """One sentence about a run that looks dead."""
    if not progress["recent"] and progress["iteration"] * args.num_steps > 2 * args.max_episode_steps:
        return "no episode has ended in twice --max-episode-steps: look at the environment"
    if scalars["losses/entropy"] < 0.01 * math.log(num_actions):
        return "the entropy has collapsed, the policy hardly explores: raise --ent-coef or lower --learning-rate"
    dull = scalars["rnd/int_reward_raw"] < 1e-6
    return "the bonus has collapsed, nothing is new any more: lower --predictor-proportion" if dull else None


def train(args: Args, exit_on_signals: bool = False, found: tuple | None = None) -> Path | None:
    """Train, or go on training; the path of the last checkpoint. Under torchrun every process calls this.

    Raises UsageError for arguments that cannot work, RuntimeError if a worker fails, FloatingPointError if a loss, the
    bonus, a normaliser or a weight is no longer finite. With `exit_on_signals`, SIGINT and SIGTERM save and exit.
    """
    check_args(args)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    is_main, all_envs = rank == 0, args.num_envs * processes
    path, state = found or find_checkpoint(args)
    if state:
        done, fixed = state["progress"]["iteration"], state["args"] | dict(processes=len(state["ranks"]))
        for name, new in dict(vars(args), processes=processes).items():
            if new != fixed[name] and name not in FREE_ARGS:
                what = f"expected {fixed[name]}, as in the checkpoint, got {new}; start a new run to change it"
                raise UsageError(f"--{name.replace('_', '-')}: {what}")
        if args.total_rollouts < done:
            raise UsageError(
                f"--total-rollouts: expected {done}, which the checkpoint has, or more, got {args.total_rollouts}"
            )
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    bf16 = args.precision == "bf16" or (args.precision == "auto" and cuda)
    proportion = args.predictor_proportion if args.predictor_proportion > 0 else min(1.0, 32 / all_envs)
    with contextlib.ExitStack() as cleanup:
        run, writer = Path(), None
        if is_main:
            run, writer = open_run(args, path, state, cleanup)
        # The workers are forked before there are threads or a CUDA context to inherit.
        options = dict(sticky_action_prob=args.sticky_action_prob, max_episode_steps=args.max_episode_steps)
        options |= dict(num_workers=args.num_workers, seed=args.seed, first_index=rank * args.num_envs)
        envs = VectorEnv(args.env_id, args.num_envs, **options)
        cleanup.callback(envs.close)
        if cuda:
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32
            torch.cuda.cudart().cudaHostRegister(envs.frames.ctypes.data, envs.frames.nbytes, 0)  # asynchronous copies
        if processes > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
            cleanup.callback(dist.destroy_process_group)

        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)  # the same weights in every process ...
        agent, rnd = Agent(envs.num_actions, args.lstm_size, bf16).to(device), RNDModel().to(device)
        torch.manual_seed(args.seed + 1_000_003 * rank)  # ... but actions of its own
        mode = "reduce-overhead" if cuda else "default"
        # The two units of work: everything between one host synchronisation and the next.
        policy, loss_fn = (torch.compile(f, mode=mode) if args.compile else f for f in (act, losses))
        params = [*agent.parameters(), *rnd.predictor.parameters()]
        optimizer = torch.optim.Adam(params, lr=args.learning_rate, eps=1e-8, fused=True)
        obs_rms, int_return_rms = fastops.RunningMeanStd((84, 84)), fastops.RunningMeanStd(())
        rollout, carry = Rollout(args.num_steps, args.num_envs, agent), np.zeros(args.num_envs)
        parts = dict(agent=agent, rnd=rnd, optimizer=optimizer, obs_rms=obs_rms, int_return_rms=int_return_rms)
        progress: dict[str, Any] = dict(iteration=0, step=0, episodes=0, record=[-math.inf, 0], best_mean=-math.inf)
        progress |= dict(return_sum=0.0, recent=[], best={}, visits={}, events={}, warning=None)
        if is_main:
            print(f"{args.env_id} on {device} in {'bf16' if bf16 else 'fp32'}, fastops in {fastops.BACKEND}")
            print(f"{processes} x {args.num_envs} environments stepped by {processes} x {len(envs.workers)} workers")
            print(f"{all_envs * args.num_steps} steps and {rollout.frames.nbytes / 2**20:.0f} MiB of frames a rollout")
            print(f"the predictor learns from {proportion:g} of each minibatch")
            if len(envs.workers) < args.num_workers:
                print(f"--num-workers {args.num_workers}: more than environments, so there are {len(envs.workers)}")
            print(f"going on from {path}" if state else f"new run {run}", flush=True)
        if state:
            progress = restore(state, rank, parts, rollout, envs, carry)
        else:
            rollout.start(envs.reset())
            for _ in tqdm(range(args.obs_norm_rollouts), "random play", unit="rollout", disable=not is_main):
                for t, actions in enumerate(torch.randint(envs.num_actions, rollout.actions.shape).numpy()):
                    rollout.frames[t + 4] = torch.from_numpy(envs.step(actions)[0])
                merge_batch(obs_rms, rollout.frames[4:].cpu().numpy())
            rollout.start(envs.reset())
        saving, latest = threading.Lock(), snapshot(args, parts, rollout, envs, carry, progress)

        def save(best: bool = False) -> Path | None:
            with saving:  # a signal may ask for it at any moment
                return save_checkpoint(latest, run, args.keep_checkpoints, best) if is_main else None

        def close() -> None:
            with contextlib.suppress(OSError):
                if writer:
                    writer.close()

        cleanup.callback(close)
        if exit_on_signals:
            leaving = exit_on_signal(save, envs)
            cleanup.callback(lambda: time.sleep(60 * leaving.is_set()))
        # clocks: end of the last rollout, then begin, collected, rewarded, updated
        bar = tqdm(total=args.total_rollouts, initial=progress["iteration"], unit="rollout", disable=not is_main)
        cleanup.callback(bar.close)
        clocks, threads = [time.perf_counter()], torch.get_num_threads()
        cleanup.callback(torch.set_num_threads, threads)
        for iteration in range(progress["iteration"] + 1, args.total_rollouts + 1):
            left = 1 - (iteration - 1) / args.total_rollouts if args.anneal else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * left
            clocks = [clocks[-1], time.perf_counter()]

            torch.set_num_threads(max(1, threads // 2))  # on the CPU the workers need the cores as well
            infos = [info for infos in gather(collect(agent, envs, rollout, policy)) for info in infos]
            torch.set_num_threads(threads)
            clocks.append(time.perf_counter())

            raw = intrinsic_reward(rnd, rollout.frames[4:], obs_rms)  # with the statistics from before this rollout
            check_finite(iteration, {"rnd/int_reward_raw": float(raw.mean())})  # before it reaches the normaliser
            merge_batch(obs_rms, rollout.frames[4:].cpu().numpy())  # the predictor learns with those from after it
            int_rewards = scale_int_rewards(raw, carry, int_return_rms, args)
            clocks.append(time.perf_counter())

            targets, clip = advantages_and_returns(rollout, int_rewards, args), args.clip_coef * left
            metrics = update(agent, rnd, optimizer, rollout, targets, obs_rms, proportion, clip, args, loss_fn)
            clocks.append(time.perf_counter())

            events, replays = [], dict[str, dict]()  # tag, value, step; name and content of files
            for info in infos:
                at, stats = progress["step"] + (info["step"] + 1) * all_envs, info["stats"]
                events += [(f"charts/{name}", stats[name], at) for name in ("episodic_return", "episodic_length")]
                old, new = progress["record"], [stats["episodic_return"], -stats["episodic_length"]]
                if new > old:
                    replay = dict(stats, env_id=args.env_id, step=at, actions=[*info["executed"]])
                    replays |= dict(best_shortest=replay) | (dict(best_first=replay) if new[0] > old[0] else {})
                    progress["record"] = new
                progress["recent"].append(stats)
                progress["return_sum"] += stats["episodic_return"]
                progress["best"] = {name: max(x, progress["best"].get(name, x)) for name, x in stats.items()}
                for place, steps in info["places"].items():
                    progress["visits"][place] = progress["visits"].get(place, 0) + steps
            progress |= dict(iteration=iteration, step=progress["step"] + all_envs * args.num_steps)
            progress |= dict(episodes=progress["episodes"] + len(infos), recent=progress["recent"][-100:])
            means = {name: float(np.mean([row[name] for row in progress["recent"]])) for name in progress["best"]}
            returns, best_return = means.get("episodic_return", math.nan), progress["record"][0]
            scalars = {
                "losses/explained_variance": explained_variance(rollout.values, targets["returns"]),
                "losses/int_explained_variance": explained_variance(rollout.int_values, targets["int_returns"]),
                "rnd/int_reward_raw": float(raw.mean()),
                "rnd/int_reward": float(int_rewards.mean()),
                "rnd/int_return_std": float(int_return_rms.std),
                "rnd/obs_mean": float(obs_rms.mean.mean()),
                "rnd/obs_std": float(obs_rms.std.mean()),
                "rnd/largest_weight": torch.stack([p.detach().abs().max() for p in params]).max().item(),
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
                "charts/rooms_total": len(progress["visits"]),
                "charts/SPS": all_envs * args.num_steps / (clocks[-1] - clocks[0]),
            } | {f"losses/{name}": value for name, value in metrics.items()}
            check_finite(iteration, scalars)
            warning = check_health(args, progress, scalars, envs.num_actions)
            for i, name in enumerate(("rollout", "bonus", "update"), 1):
                scalars[f"time/{name}"] = clocks[i + 1] - clocks[i]
            for name, mean in means.items():
                scalars[f"charts/{name}" + "_mean100" * name.startswith("episodic")] = mean
                scalars[f"charts/best_{name.removeprefix('episodic_')}"] = progress["best"][name]
            if means:
                scalars["charts/episodic_return_mean"] = progress["return_sum"] / progress["episodes"]
            events += [(tag, value, progress["step"]) for tag, value in scalars.items()]
            due = iteration % args.save_interval == 0 or iteration == args.total_rollouts
            try:
                for name, replay in replays.items() if is_main else ():
                    (run / f"{name}.json").write_text(json.dumps(replay))
                if due and is_main and not writer and run.is_dir():
                    writer = SummaryWriter(str(run))
                if writer:
                    for event in events:
                        writer.add_scalar(*event)
                    writer.flush()
                    progress["events"] = {path.name: path.stat().st_size for path in run.glob("events.out.tfevents.*")}
            except OSError as error:
                tqdm.write(f"warning: events cannot be written ({error}); the next try comes with the next save")
                writer = None

            bar.set_postfix_str(
                f"{scalars['charts/SPS']:.0f} steps/s, mean {returns:.4g}, best {best_return:g}, "
                f"rooms {len(progress['visits'])}, bonus {raw.mean():.3g}, entropy {metrics['entropy']:.3g}"
            )
            bar.update()
            if is_main and "best_first" in replays:
                taken = tqdm.format_interval(bar.format_dict["elapsed"])
                tqdm.write(f"step {replays['best_first']['step']}, after {taken}: best return so far, {best_return:g}")
            if is_main and iteration % args.log_interval == 0:
                tqdm.write(
                    f"rollout {iteration}, step {progress['step']}, episode {progress['episodes']}: {bar.postfix}"
                )
            if is_main and warning and warning != progress["warning"]:
                tqdm.write(f"warning: {warning}")
            best = due and returns > progress["best_mean"]
            progress |= dict(warning=warning, best_mean=returns if best else progress["best_mean"])
            latest = snapshot(args, parts, rollout, envs, carry, progress)
            path = save(best) if due else path
        return path


def main() -> int:
    args = tyro.cli(Args)
    try:
        found = (args.play, load_checkpoint(args.play)) if args.play else find_checkpoint(args)
        if found[1]:  # what the command line leaves out is as in the checkpoint
            args = tyro.cli(Args, default=Args(**found[1]["args"] | dict(play="", resume="")))
        play(args) if args.play else train(args, exit_on_signals=True, found=found)
    except (UsageError, RuntimeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
