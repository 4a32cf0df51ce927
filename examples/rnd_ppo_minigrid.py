"""PPO with Random Network Distillation (RND): the whole algorithm in one file.

Train             python SCRIPT --num-envs 128                                (SCRIPT: this file)
Resume            python SCRIPT --num-envs 128 --resume auto                  (or --resume RUN)
Play              python SCRIPT --play RUN --episodes 30                      (add --render for a window)
8 GPUs            torchrun --nproc-per-node 8 SCRIPT --num-envs 128           (128 per process)
2 machines of 8   torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                      --max-restarts 3 SCRIPT --num-envs 128 --resume auto    (on both machines)

Sections 1 to 6 are the algorithm, in the order of the paper. Sections 7 to 11 run it. Of these the algorithm uses
VectorEnv (steps the environments in worker processes), gather, average_gradients and check_same_start (join torchrun's
processes), Run and Session (log and checkpoints), check_args, find_checkpoint, start_device, rollout_metrics,
check_finite, with_bar and say.

Legend: T steps of a rollout, N environments of this process, A actions; arrays of a rollout are (T, N, ...). A plain
name (`rewards`, `values`, ...) belongs to the game's stream, which ends with the episode. A name with `int_` in front
belongs to the stream of the intrinsic reward, which does not, unless --int-episodic says so. "Burda" is Burda et al.
2018, arXiv:1810.12894, and the code published with it; "Machado" is Machado et al. 2018, arXiv:1709.06009.

Variant of rnd_ppo_atari.py: MiniGrid. `--env-id MiniGrid-MultiRoom-N4-S5-v1@1` is layout 1 of a task; without @1 every
episode has a new layout. An action is one step.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import difflib
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import filelock
import gymnasium as gym
import minigrid  # noqa: F401  # registers its tasks with Gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils import tensorboard
from tqdm import tqdm

import fastops

__version__ = "0.2.0"

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun

# === 1. Arguments =====================================================================================================


@dataclass
class Args:
    # --- experiment
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the name of the run's directory"""
    seed: int = 1
    """seed of the weights, the actions and the environments; on the CPU the same seed gives the same run"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks run; auto: CUDA if there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic of the policy network (the RND networks stay in fp32); auto: bf16 on CUDA, fp32 on the CPU"""
    compile: bool = False
    """torch.compile both networks (on CUDA with CUDA graphs); slower to start, faster to run"""
    run_dir: str = "runs"
    """directory in which each run gets a directory of its own for checkpoints and TensorBoard events"""
    track: bool = False
    """also log to Weights & Biases (`pip install wandb`)"""
    log_interval: int = 10
    """rollouts between two summary lines on screen"""
    save_interval: int = 100
    """rollouts between two checkpoints; one more is saved at the end and when the run is stopped"""
    keep_checkpoints: int = 3
    """newest checkpoints to keep; the best by mean return is kept as well"""
    resume: str = ""
    """run or checkpoint to continue; auto: the newest run in --run-dir with these arguments, else a new one"""
    # --- play (instead of training)
    play: str = ""
    """run or checkpoint to evaluate instead of training"""
    episodes: int = 10
    """episodes to play with sticky actions, and again without"""
    greedy: bool = False
    """play the most probable action instead of sampling"""
    render: bool = False
    """show the game in a window while playing"""
    json: str = ""
    """file for the evaluation report"""
    # --- environment
    env_id: str = "MiniGrid-MultiRoom-N4-S5-v1@1"
    """Gymnasium id of a task of MiniGrid, @ and the number of its layout; without: a new layout in every episode"""
    num_envs: int = 128
    """environments per process [Burda, Table 5]"""
    num_steps: int = 128
    """steps of each environment in a rollout [Burda, Table 5]"""
    total_rollouts: int = 30_000
    """rollouts to train for; the horizon of --anneal [Burda, Table 5; section 3: 1.97e9 frames at 128 environments]"""
    max_episode_steps: int = 10_000
    """steps after which an episode ends, if MiniGrid's own limit does not end it before; both ends count as terminal"""
    sticky_action_prob: float = 0.0
    """probability, in every frame, to repeat the action executed before [none in MiniGrid; Burda, Table 2: 0.25]"""
    num_workers: int = 0
    """worker processes, at most half of --num-envs; 0: one per CPU core of this process"""
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
    int_episodic: bool = False
    """end the intrinsic stream with the episode too, so that death costs future bonus [Burda, 3.1: an ablation]"""
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
    """direction in time of the discounted sum whose std scales the bonus [backward: PPO-RND; forward: Burda's code]"""
    predictor_proportion: float = -1.0
    """share of each minibatch that trains the predictor; -1: min(1, 32 / environments of all processes) [Burda, A.4]"""


# What a checkpoint never decides, because it belongs to a process and its machine.
LOCAL_ARGS = {"device", "run_dir", "track", "num_workers", "resume", "play", "episodes", "greedy", "render", "json"}
# What may change when a run is resumed. Every other argument is part of what the run means.
FREE_ARGS = LOCAL_ARGS | {"compile", "log_interval", "save_interval", "keep_checkpoints", "total_rollouts"}


class UsageError(ValueError):
    """The user has to change something; the message says what was expected, what was given and what to do."""


# === 2. The game ======================================================================================================


class Game:
    """A task of MiniGrid. The agent sees what MiniGrid shows it, 7x7 cells; a room is the cell that it is in.

    actions: what the agent chooses from, by index. noop: the index of doing nothing, which can lie outside `actions`.
    shape: (H, W) of the screen. palette: the gray of each color index, uint8 (256,), or None where `draw` writes gray.
    """

    SKIP, FPS = 1, 10  # frames per action, frames per second of a video

    @staticmethod
    def check(args: Args) -> None:
        """Raise UsageError if --env-id is not a task of MiniGrid, with a layout or without."""
        games = [name for name, spec in gym.registry.items() if "minigrid" in str(spec.entry_point)]
        task, _, layout = args.env_id.partition("@")
        if task not in games or not (layout or "0").isdecimal():
            near = ", ".join(difflib.get_close_matches(task, games, n=3, cutoff=0.5)) or Args.env_id
            raise UsageError(f"--env-id: expected a MiniGrid task with @1 or without, got {args.env_id!r}; try {near}")

    def __init__(self, env_id: str, seed: int, render_mode: str | None = None):
        task, _, layout = env_id.partition("@")
        self.env: Any = gym.make(task, render_mode=render_mode).unwrapped
        self.env.gen_obs = dict  # the symbols are not used
        self.actions = list(self.env.actions)
        self.noop, self.shape, self.palette = int(self.env.actions.done), (84, 84), None
        self.layout, self.stride = (int(layout), 0) if layout else (seed, 1)

    def reset(self, screen: np.ndarray) -> None:
        """Start an episode and draw its first screen."""
        self.set_state((self.layout + self.stride).to_bytes(8, "big"))
        self.draw(screen)

    def act(self, action: int) -> float:
        """Play one frame and return its reward."""
        self.executed.append(action)
        _, self.reward, self.ended, self.late, _ = self.env.step(action)
        return self.reward

    def over(self) -> bool:
        """Whether the episode has ended."""
        return self.ended or self.late

    def draw(self, screen: np.ndarray) -> None:
        """Write the current screen, uint8 (H, W): color indices, or gray where there is no palette."""
        fastops.rgb_to_gray(self.env.get_frame(agent_pov=True, tile_size=12), screen)

    def room(self) -> int | None:
        """The number of the room that the player is in, or None where it is not known."""
        return int(self.env.agent_pos[0] + self.env.agent_pos[1] * self.env.width)

    def statistics(self) -> dict[str, float]:
        """Further numbers to log: means of 100 episodes, and each episode's where the name begins with episodic_."""
        return dict(episodic_success=self.ended and self.reward > 0)  # lava ends an episode as well

    def get_state(self) -> bytes:
        """The state of the emulator, for a checkpoint."""
        return self.layout.to_bytes(8, "big") + self.executed

    def set_state(self, state: bytes) -> None:
        """Continue from what `get_state` returned."""
        self.layout, self.executed, self.ended, self.late = int.from_bytes(state[:8], "big"), bytearray(), False, False
        self.env.reset(seed=self.layout)
        for action in state[8:]:  # played again
            self.act(action)


class Env:
    """The game as the agent plays it: sticky actions, 4 frames per action, 84x84 gray frames, a step limit.

    As in Burda's code: in every frame the previous action is repeated with probability `sticky_action_prob` (after a
    reset it is the no-op), the rewards of the frames are summed, the observation is the maximum of the last two.
    All randomness comes from `rng`, seeded by (seed, index).
    """

    def __init__(self, env_id, index=0, *, seed=1, sticky_action_prob=0.25, max_episode_steps=4500, render_mode=None):
        self.index = index
        self.sticky_action_prob = sticky_action_prob
        self.max_episode_steps = max_episode_steps
        self.rng = np.random.default_rng([seed, index])
        self.game = Game(env_id, int(self.rng.integers(2**31)), render_mode)
        self.screens = np.zeros((2, *self.game.shape), np.uint8)  # the last two of a step
        self.reset(np.zeros((84, 84), np.uint8))

    def reset(self, out: np.ndarray) -> None:
        """Start an episode and write its first frame, uint8 (84, 84), to `out`. No random no-ops [Burda's code]."""
        self.last_action, self.steps, self.episode_return = self.game.noop, 0, 0.0
        self.visits: dict[int, int] = {}  # steps spent in each room
        self.executed = bytearray()  # the action of each frame, so that the episode can be watched again
        screen = self.screens[1]
        self.game.reset(screen)
        self.room = self.game.room()
        fastops.max_pool_resize(screen, screen, out, self.game.palette)

    def step(self, action: int, out: np.ndarray) -> tuple[float, bool, dict | None]:
        """Play one step and write the newest frame to `out`.

        Returns the unclipped reward, whether the episode is done, and then its summary.
        """
        reward = 0.0
        for frame, sticky in enumerate((self.rng.random(self.game.SKIP) < self.sticky_action_prob).tolist()):
            if not sticky:
                self.last_action = action
            reward += float(self.game.act(self.last_action))
            self.executed.append(self.last_action)
            over = self.game.over()
            if over:
                break
            if frame == self.game.SKIP - 2:
                self.game.draw(self.screens[0])
        older, newest = self.screens
        self.game.draw(newest)
        if frame < self.game.SKIP - 1 or self.game.SKIP == 1:
            older = newest  # an episode that ends earlier shows its last screen only
        fastops.max_pool_resize(older, newest, out, self.game.palette)

        self.steps += 1
        self.episode_return += reward
        self.room = self.game.room()
        if self.room is not None:
            self.visits[int(self.room)] = self.visits.get(self.room, 0) + 1
        done = over or self.steps >= self.max_episode_steps
        return reward, done, self.summary() if done else None

    def summary(self) -> dict[str, Any]:
        """What the log needs to know about the episode, in plain types."""
        stats = {name: float(value) for name, value in self.game.statistics().items()}
        stats |= dict(episodic_return=self.episode_return, episodic_length=self.steps)
        if self.visits:
            stats["rooms"] = len(self.visits)
        return dict(env=self.index, stats=stats, visits=self.visits, executed=bytes(self.executed))

    def get_state(self) -> dict[str, Any]:
        """The complete state in plain types; any Env of the same game continues from it identically."""
        state = {name: copy.copy(getattr(self, name)) for name in ("last_action", "steps", "episode_return", "visits")}
        state["executed"] = self.executed.decode("latin-1")
        return state | dict(rng=self.rng.bit_generator.state, game=self.game.get_state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from what `get_state` returned."""
        for name in ("last_action", "steps", "episode_return"):
            setattr(self, name, state[name])
        self.visits, self.executed = dict(state["visits"]), bytearray(state["executed"], "latin-1")
        self.rng.bit_generator.state = state["rng"]
        self.game.set_state(state["game"])
        self.room = self.game.room()


# === 3. Networks ======================================================================================================


def layer(module: Any, gain: float = math.sqrt(2)) -> Any:
    """`module` with orthogonal weights of this gain and zero bias [Burda's code]."""
    nn.init.orthogonal_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


def convolutions(channels: int, activation: nn.Module) -> list[nn.Module]:
    """(B, channels, 84, 84) -> (B, 3136). The policy's third kernel is 4x4 in Burda's code, 3x3 in every port."""
    first = layer(nn.Conv2d(channels, 32, 8, stride=4))
    second = layer(nn.Conv2d(32, 64, 4, stride=2))
    third = layer(nn.Conv2d(64, 64, 3))
    return [first, activation, second, activation, third, activation, nn.Flatten()]


class Agent(nn.Module):
    """Policy and both value functions [Burda's code]; with `bf16` the trunk, 95 % of the work, runs in bfloat16.

    forward: obs uint8 (B, 4, 84, 84) -> logits (B, A), values (B,), int_values (B,), float32.
    """

    def __init__(self, num_actions: int, width: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        relu = nn.ReLU(inplace=True)
        hidden = layer(nn.Linear(3136, 256)), relu, layer(nn.Linear(256, width)), relu
        self.trunk = nn.Sequential(*convolutions(4, relu), *hidden)
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
        p = x + F.relu(self.policy_branch(x))
        v = x + F.relu(self.value_branch(x))
        return self.policy_head(p), self.value_head(v).squeeze(-1), self.int_value_head(v).squeeze(-1)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.heads(self.features(obs))


def merge_batch(rms: fastops.RunningMeanStd, batch: np.ndarray) -> None:
    """Merge the batches of all processes into the running statistics, as if one process had seen them all."""
    local = fastops.RunningMeanStd(rms.mean.shape, count=1e-300)  # statistics of this process's batch alone
    local.update(batch)
    for mean, var, count in gather((local.mean, local.var, local.count)):
        rms.merge(mean, var, count)


class RND(nn.Module):
    """The intrinsic reward: a fixed random network, one that learns to predict its output, and both normalisers.

    forward: normalised frames float32 (B, 1, 84, 84) -> error (B,), the mean square over 512 outputs. It is the raw
    bonus and the predictor's loss [Burda, A.5; slope 0.2: Burda's code]. Always in fp32: the error is the small
    difference of two outputs that grow alike.
    """

    OBS_CLIP = 5.0  # [Burda, 2.4]

    def __init__(self, int_gamma: float = 0.99, int_return_filter: str = "backward"):
        super().__init__()
        if int_return_filter not in ("backward", "forward"):
            raise ValueError(f"int_return_filter: expected 'backward' or 'forward', got {int_return_filter!r}")
        relu, slope = nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)
        self.target = nn.Sequential(*convolutions(1, slope), layer(nn.Linear(3136, 512))).requires_grad_(False)
        hidden = layer(nn.Linear(3136, 512)), relu, layer(nn.Linear(512, 512)), relu
        self.predictor = nn.Sequential(*convolutions(1, slope), *hidden, layer(nn.Linear(512, 512)))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.int_gamma, self.int_return_filter = int_gamma, int_return_filter
        self.obs_rms = fastops.RunningMeanStd((84, 84))
        self.int_return_rms = fastops.RunningMeanStd(())
        self.carry = np.zeros(0)  # the forward filter's running sum of each environment of this process

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.predictor(x) - self.target(x)).square().mean(-1)

    def normalize(self, frames: torch.Tensor) -> torch.Tensor:
        """Whiten frames per pixel and clip to +-5: uint8 (B, 84, 84) -> float32 (B, 1, 84, 84)."""
        if frames.device.type == "cpu":
            return torch.from_numpy(self.obs_rms.normalize(frames.numpy(), self.OBS_CLIP)).unsqueeze(1)
        mean, std = (torch.from_numpy(x).to(frames.device) for x in (self.obs_rms.mean, self.obs_rms.std))
        return ((frames - mean) / std).clamp(-self.OBS_CLIP, self.OBS_CLIP).float().unsqueeze(1)

    def observe(self, frames: torch.Tensor) -> None:
        """Add frames, uint8 (T, N, 84, 84), to the observation statistics."""
        merge_batch(self.obs_rms, frames.cpu().numpy())

    @torch.no_grad()
    def bonus(self, frames: torch.Tensor) -> np.ndarray:
        """Raw bonus for reaching each frame: uint8 (T, N, 84, 84) -> float32 (T, N). FloatingPointError if infinite."""
        parts = frames.flatten(0, 1).split(1024)  # bounds the memory; larger parts are not faster
        # Cloned, because with --compile on CUDA the next call overwrites the output of the last.
        raw = torch.cat([self(self.normalize(part)).clone() for part in parts])
        check_finite({"rnd/int_reward_raw": raw.mean().item()})
        return raw.view(frames.shape[:2]).cpu().numpy()

    def scale(self, raw: np.ndarray) -> np.ndarray:
        """Divide raw bonuses, float32 (T, N), by the running standard deviation of their discounted sum [Burda, 2.4].

        The backward filter starts from zero at the end of each rollout; the forward filter never restarts.
        """
        backward = self.int_return_filter == "backward"
        if backward or not self.carry.size:
            self.carry = np.zeros(raw.shape[1])
        sums = fastops.discounted_sum(raw, self.carry, self.int_gamma, backward)
        merge_batch(self.int_return_rms, sums.ravel())
        return (raw / self.int_return_rms.std).astype(np.float32)

    def get_extra_state(self) -> dict[str, Any]:
        """The part of `state_dict` that holds no weights; the same in all processes."""
        return dict(obs_rms=self.obs_rms.state_dict(), int_return_rms=self.int_return_rms.state_dict())

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.obs_rms.load_state_dict(state["obs_rms"])
        self.int_return_rms.load_state_dict(state["int_return_rms"])


# === 4. Rollout =======================================================================================================


def stack_frames(frames: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Observations of consecutive steps: frames uint8 (T + 3, n, 84, 84), ages (T, n) -> uint8 (T * n, 4, 84, 84).

    In channels_last memory, oldest frame first, zero where a frame is older than the episode [Burda's code].
    """
    steps = len(ages)
    inside = [(ages >= 3 - k).to(torch.uint8)[:, :, None, None] for k in range(4)]
    stacks = torch.stack([frames[k : k + steps] * inside[k] for k in range(4)], dim=-1)
    return stacks.flatten(0, 1).permute(0, 3, 1, 2)


class Rollout:
    """T steps of N environments. Frames are stored once, not as stacks of four.

    frames       uint8 (T + 4, N, 84, 84): the newest frame of observation t is frames[t + 3], after three older ones
    ages         uint8 (T + 1, N): steps since the episode's first observation, at most 3; 0 at a first observation
    actions      int64 (T, N)        logprobs     float32 (T, N)
    values       float32 (T + 1, N)  int_values   float32 (T + 1, N), the last for the bootstrap
    rewards      float32 (T, N), their sign, NumPy                     dones        float32 (T, N), NumPy
    """

    def __init__(self, num_steps: int, num_envs: int, agent: Any = None):
        device = next(agent.parameters()).device if agent else "cpu"
        self.num_steps, self.num_envs, self.device = num_steps, num_envs, device
        self.frames = torch.zeros(num_steps + 4, num_envs, 84, 84, dtype=torch.uint8, device=device)
        self.ages = torch.zeros(num_steps + 1, num_envs, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(num_steps, num_envs, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(num_steps, num_envs, device=device)
        self.values = torch.zeros(num_steps + 1, num_envs, device=device)
        self.int_values = torch.zeros(num_steps + 1, num_envs, device=device)
        self.rewards = np.zeros((num_steps, num_envs), np.float32)
        self.dones = np.zeros((num_steps, num_envs), np.float32)

    @property
    def next_frames(self) -> torch.Tensor:
        """The frame that each step led to, uint8 (T, N, 84, 84)."""
        return self.frames[4:]

    def start_episodes(self, frames: np.ndarray) -> None:
        """Make `frames`, uint8 (N, 84, 84), the first observations of new episodes, as if a rollout had just ended."""
        self.frames[-1] = torch.from_numpy(frames)
        self.ages[-1] = 0

    def tail(self) -> dict[str, torch.Tensor]:
        """Views of what the next rollout continues from; a checkpoint holds them."""
        return dict(frames=self.frames[-4:], ages=self.ages[-1])

    def begin(self) -> None:
        """Begin where the last rollout ended."""
        self.frames[:4] = self.frames[-4:].clone()
        self.ages[0] = self.ages[-1]

    def observation(self, t: int, envs: slice) -> tuple[torch.Tensor, ...]:
        """What the agent needs to act at step `t` in the environments `envs`."""
        return (stack_frames(self.frames[t : t + 4, envs], self.ages[t : t + 1, envs]),)

    def sequences(self, envs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the agent needs to learn from all T steps of the environments `envs`."""
        return (stack_frames(self.frames[:-1, envs], self.ages[:-1, envs]),)

    def add(self, t: int, envs: slice, frames: np.ndarray, rewards: np.ndarray, dones: np.ndarray) -> None:
        """Store what step `t` led to in the environments `envs`: frames uint8 (n, 84, 84), rewards, dones bool (n,)."""
        self.frames[t + 4, envs].copy_(torch.from_numpy(frames), non_blocking=True)
        self.rewards[t, envs] = np.sign(rewards)
        self.dones[t, envs] = dones
        older = (self.ages[t, envs] + 1).clamp_(max=3)
        self.ages[t + 1, envs] = older * torch.from_numpy(~dones).to(self.device)


def act(logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample actions by the Gumbel-max trick: logits, Gumbel noise (n, A) -> actions int64 (n,), logprobs (n,)."""
    actions = (logits + noise).argmax(-1)
    return actions, logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)


@torch.no_grad()
def collect(agent: nn.Module, envs: VectorEnv, rollout: Rollout) -> list[dict]:
    """Fill `rollout` with T steps of each environment, from where it ended; return the episodes that ended meanwhile.

    While the workers step one group of environments, the policy computes the actions of the other.
    """
    rollout.begin()
    # All of a rollout's noise at once: an action then depends neither on the groups nor on which of them is faster.
    noise = -torch.empty(rollout.num_steps, rollout.num_envs, envs.num_actions).exponential_().log().to(rollout.device)
    episodes: list[dict] = []
    for t in range(rollout.num_steps + 1):
        for group, members in enumerate(envs.groups):
            if t > 0:
                frames, rewards, dones, ended = envs.recv(group)
                rollout.add(t - 1, members, frames, rewards, dones)
                episodes += [dict(episode, t=t - 1) for episode in ended]
            logits, values, int_values = agent(*rollout.observation(t, members))
            if t < rollout.num_steps:  # the last observation only gives the values for the bootstrap
                actions, logprobs = act(logits, noise[t, members])
                envs.send(group, actions.cpu().numpy())
                rollout.actions[t, members], rollout.logprobs[t, members] = actions, logprobs
            rollout.values[t, members], rollout.int_values[t, members] = values, int_values
    return episodes


# === 5. Update ========================================================================================================

METRICS = ("policy_loss", "value_loss", "int_value_loss", "predictor_loss", "entropy", "approx_kl", "clipfrac")


def advantages_and_returns(rollout: Rollout, int_rewards: np.ndarray, args: Args) -> dict[str, torch.Tensor]:
    """Generalised advantage estimation [Schulman et al. 2016] of both streams, float32 (T, N) on the device.

    The game's stream ends with the episode. The intrinsic stream continues over the reset [Burda, 2.3], unless
    --int-episodic ends it too.
    """
    values, int_values = rollout.values.cpu().numpy(), rollout.int_values.cpu().numpy()
    int_dones = rollout.dones if args.int_episodic else None
    adv = fastops.gae(rollout.rewards, values[:-1], rollout.dones, values[-1], args.gamma, args.gae_lambda)
    int_adv = fastops.gae(int_rewards, int_values[:-1], int_dones, int_values[-1], args.int_gamma, args.gae_lambda)
    advantages = args.ext_coef * adv + args.int_coef * int_adv
    targets = dict(advantages=advantages, returns=adv + values[:-1], int_returns=int_adv + int_values[:-1])
    return {name: torch.from_numpy(array).to(rollout.device) for name, array in targets.items()}


def minibatch(rollout: Rollout, targets: dict, rnd: RND, envs: torch.Tensor, args: Args) -> dict:
    """All T steps of the environments `envs` (n,), as `losses` takes them."""
    arrays = targets | dict(actions=rollout.actions, logprobs=rollout.logprobs)
    arrays |= dict(values=rollout.values[:-1], int_values=rollout.int_values[:-1])
    batch: dict[str, Any] = {name: array[:, envs].flatten() for name, array in arrays.items()}
    batch["inputs"] = rollout.sequences(envs)
    # The predictor learns from a fresh random share, so that its speed does not grow with N [Burda, A.4].
    proportion = args.predictor_proportion
    if proportion < 0:
        proportion = min(1.0, 32 / (rollout.num_envs * PROCESSES))
    size = rollout.num_steps * len(envs)
    share = torch.randperm(size)[: max(1, round(proportion * size))].to(rollout.device)
    batch["rnd_obs"] = rnd.normalize(rollout.next_frames[share // len(envs), envs[share % len(envs)]])
    return batch


def losses(agent: nn.Module, rnd: nn.Module, batch: dict, clip: float, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum to minimise, and the values named in METRICS, of one minibatch of B samples.

    `batch`: inputs, those of the agent; actions, logprobs, advantages, returns, int_returns, values, int_values (B,);
    rnd_obs (b, 1, 84, 84), the normalised next frames of the predictor's share.
    """
    logits, values, int_values, *_ = agent(*batch["inputs"])
    log_probs = logits.log_softmax(-1)
    logratio = log_probs.gather(-1, batch["actions"][:, None]).squeeze(-1) - batch["logprobs"]
    ratio = logratio.exp()  # 1 in the first minibatch after a rollout: anything else means stale or misplaced data

    advantages = batch["advantages"]
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()

    def value_loss(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        errors = (new - returns).square()
        if args.clip_vloss:
            clipped = old + (new - old).clamp(-clip, clip)
            errors = torch.max(errors, (clipped - returns).square())
        return args.vf_coef * errors.mean()

    v_loss = value_loss(values, batch["values"], batch["returns"])
    int_v_loss = value_loss(int_values, batch["int_values"], batch["int_returns"])
    predictor_loss = rnd(batch["rnd_obs"]).mean()
    loss = policy_loss - args.ent_coef * entropy + v_loss + int_v_loss + predictor_loss

    approx_kl = 0.5 * logratio.square().mean()
    clipfrac = ((ratio - 1).abs() > clip).float().mean()
    metrics = (policy_loss, v_loss, int_v_loss, predictor_loss, entropy, approx_kl, clipfrac)
    return loss, torch.stack([metric.detach() for metric in metrics])


def update(agent, rnd, optimizer, rollout: Rollout, targets: dict, clip: float, args: Args) -> dict[str, float]:
    """Train on the rollout for --update-epochs passes; return METRICS, averaged over the optimiser steps.

    Each pass shuffles the environments and deals all of them out to the minibatches, so it uses every sample once.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]  # the policy's and the predictor's
    metrics = []  # on the device until the last step is done: waiting for each would leave a GPU idle
    for _ in range(args.update_epochs):
        for envs in torch.randperm(rollout.num_envs).to(rollout.device).chunk(args.num_minibatches):
            batch = minibatch(rollout, targets, rnd, envs, args)
            optimizer.zero_grad()
            loss, values = losses(agent, rnd, batch, clip, args)
            loss.backward()
            average_gradients(params)
            if args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(params, args.max_grad_norm)
            optimizer.step()
            metrics.append(values)
    means = torch.stack(metrics).mean(0).tolist()
    return {f"losses/{name}": mean for name, mean in zip(METRICS, means, strict=True)}


# === 6. Training ======================================================================================================


def random_play(envs: VectorEnv, rollout: Rollout, rnd: RND, rollouts: int) -> None:
    """Start the observation statistics with random actions, then start every environment anew [Burda, 2.4]."""
    envs.reset()
    for _ in with_bar("random play", rollouts):
        for t, actions in enumerate(torch.randint(envs.num_actions, rollout.actions.shape).numpy()):
            rollout.next_frames[t] = torch.from_numpy(envs.step(actions)[0])
        rnd.observe(rollout.next_frames)
    rollout.start_episodes(envs.reset())


def train(args: Args) -> Path | None:
    """Train, or continue a run; return the path of the last checkpoint. Under torchrun every process calls this.

    Raises UsageError for arguments that cannot work, ChildProcessError if a worker fails, FloatingPointError after NaN.
    """
    check_args(args)
    path, state = find_checkpoint(args)
    options = dict(sticky_action_prob=args.sticky_action_prob, max_episode_steps=args.max_episode_steps, seed=args.seed)
    options |= dict(num_workers=args.num_workers, first_index=RANK * args.num_envs)  # no two environments are alike
    with Run(args, path, state) as run, contextlib.closing(VectorEnv(args.env_id, args.num_envs, **options)) as envs:
        device, bf16 = start_device(args)  # after the workers, which are forked
        check_same_start(path)
        torch.manual_seed(args.seed)  # the same weights in every process ...
        agent = Agent(envs.num_actions, 448, bf16).to(device)
        rnd = RND(args.int_gamma, args.int_return_filter).to(device)
        torch.manual_seed(args.seed + 1_000_003 * RANK)  # ... but actions of its own
        params = [*agent.parameters(), *rnd.predictor.parameters()]
        optimizer = torch.optim.Adam(params, lr=args.learning_rate, eps=1e-8, fused=True)
        if args.compile:
            mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs
            agent.compile(mode=mode, dynamic=False)
            rnd.compile(mode=mode, dynamic=False)
        rollout = Rollout(args.num_steps, args.num_envs, agent)
        session = Session(args, agent, rnd, optimizer, rollout, envs)
        if state:
            session.restore(state)
        else:
            random_play(envs, rollout, rnd, args.obs_norm_rollouts)
        run.keep(session.snapshot(run.progress))

        for iteration in range(run.progress.iteration + 1, args.total_rollouts + 1):
            left = 1 - (iteration - 1) / args.total_rollouts if args.anneal else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * left

            run.phase("rollout")
            episodes = collect(agent, envs, rollout)

            run.phase("bonus")
            raw = rnd.bonus(rollout.next_frames)  # with the statistics from before this rollout
            rnd.observe(rollout.next_frames)  # the predictor learns with those from after it
            int_rewards = rnd.scale(raw)

            run.phase("update")
            targets = advantages_and_returns(rollout, int_rewards, args)
            metrics = update(agent, rnd, optimizer, rollout, targets, args.clip_coef * left, args)

            run.phase("rest")
            metrics |= rollout_metrics(rollout, targets, raw, int_rewards, rnd, optimizer)
            run.log(gather((metrics, episodes, envs.rooms.tolist())))
            run.keep(session.snapshot(run.progress))  # in case a signal comes; saved now and then
    return run.path


# ---------------------- The algorithm ends here. What follows runs it. ------------------------------------------------

# === 7. Workers =======================================================================================================


class VectorEnv:
    """N environments in worker processes that write into shared memory; no frame is pickled.

    They form `num_groups` groups. `send(group, actions)` starts a step of one group and `recv(group)` waits for it, so
    that one group steps while the policy works on another; `step` does both for all. Rewards are unclipped. Where an
    episode is done, the frame is already the first of the next. Environment i is seeded with (seed, first_index + i):
    results depend neither on `num_workers` (0: one per core) nor on `num_groups`. `options` are those of Env. `rooms`,
    int64 (N,), is the room that each player is in, -1 where it is not known.

    Raises ChildProcessError, naming the worker, its environments and the cause, if one fails, dies or cannot start.
    """

    def __init__(self, env_id, num_envs, *, num_workers=0, num_groups=2, first_index=0, **options):
        shapes = ((), torch.int64), ((84, 84), torch.uint8), ((), torch.float32), ((), torch.bool), ((), torch.int64)
        groups = split(range(num_envs), min(num_groups, num_envs))
        self.groups = [slice(group.start, group.stop) for group in groups]
        self.workers: list[tuple[Any, Any, list[range]]] = []  # process, pipe, its part of each group
        num_workers = min(num_workers or cores(), max(map(len, groups)))
        method = "fork" if sys.platform == "linux" else "spawn"
        context: Any = torch.multiprocessing.get_context(method)
        atexit.register(self.close)  # workers ignore the SIGTERM that multiprocessing would send them
        try:
            arrays = [torch.zeros(num_envs, *shape, dtype=dtype).share_memory_() for shape, dtype in shapes]
            self.actions, self.frames, self.rewards, self.dones, self.rooms = (array.numpy() for array in arrays)
            for number in range(num_workers):
                # A part of each group, so that all workers are busy with the group that is being stepped.
                part = [split(group, num_workers)[number] for group in groups]
                ours, theirs = context.Pipe()
                inherited = [ours, *(pipe for _, pipe, _ in self.workers)] if method == "fork" else []
                arguments = (theirs, inherited, part, arrays, env_id, first_index, options)
                process = context.Process(target=worker, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.workers.append((process, ours, part))
            self.num_actions = self.replies()[0]
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, ChildProcessError):  # which says more already
                problem = f"cannot start {num_workers} workers ({error}); try fewer --num-workers"
                raise ChildProcessError(problem) from error
            raise

    def send(self, group: int, actions: np.ndarray) -> None:
        """Start a step of `group`, actions int (n,). It overwrites the arrays that `recv` returned for this group."""
        self.actions[self.groups[group]] = actions
        self.post("step", group)

    def recv(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Wait for `group`: views of frames uint8 (n, 84, 84), rewards float32 (n,), dones bool (n,); and episodes."""
        episodes = [reply for reply in self.replies() if reply]
        members = self.groups[group]
        return self.frames[members], self.rewards[members], self.dones[members], episodes

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Step all: actions int (N,) -> copies of frames uint8 (N, 84, 84), rewards, dones (N,); ended episodes."""
        self.actions[:] = actions
        episodes = [reply for reply in self.call("step") if reply]
        return self.frames.copy(), self.rewards.copy(), self.dones.copy(), episodes

    def reset(self) -> np.ndarray:
        """Start a new episode everywhere; return a copy of the frames uint8 (N, 84, 84)."""
        self.call("reset")
        return self.frames.copy()

    def call(self, command: str, states: list[dict] | None = None) -> list:
        """Give all environments a command, "reset", "get_state" or "set_state" with their `states`; their replies."""
        for group in range(len(self.groups)):
            self.post(command, group, states)
        return [reply for _ in self.groups for reply in self.replies()]

    def post(self, command: str, group: int, states: list[dict] | None = None) -> None:
        """Give the environments of `group` a command."""
        for _, pipe, part in self.workers:
            argument = {i: states[i] for i in part[group]} if states else None
            with contextlib.suppress(OSError):  # a dead worker: `replies` reports it
                pipe.send_bytes(pickle.dumps((command, group, argument)))  # half the cost of pipe.send

    def replies(self) -> list:
        """Wait for the group that was given a command first: one reply per environment, in order."""
        replies: list = []
        for number, (process, pipe, part) in enumerate(self.workers):
            try:
                reply = pipe.recv()
            except (EOFError, OSError):
                process.join(1)
                reply = f"it died with exit code {process.exitcode}"
            if isinstance(reply, str):
                members = sorted(i for group in part for i in group)
                raise ChildProcessError(f"worker {number} (environments {members}) failed: {reply}")
            replies += reply
        return replies

    def close(self) -> None:
        """End the worker processes."""
        atexit.unregister(self.close)
        for _, pipe, _ in self.workers:
            pipe.close()
        for process, _, _ in self.workers:
            process.join(2)
            process.kill()


def worker(pipe, inherited, groups, arrays, env_id, first_index, options) -> None:
    """Body of a worker process: steps its part of each group on command, until the main process exits."""
    for other in inherited:  # a forked worker holds copies of its siblings' pipes: open, they would hide an exit
        other.close()
    for number in SIGNALS:  # the main process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # on Linux the main process goes first once it has work
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    actions, frames, rewards, dones, rooms = (array.numpy() for array in arrays)
    try:
        envs = {i: Env(env_id, first_index + i, **options) for group in groups for i in group}
        pipe.send([len(env.game.actions) for env in envs.values()])
        while True:
            command, group, states = pipe.recv()
            replies = []
            for i in groups[group]:
                env, reply = envs[i], None
                if command == "step":
                    rewards[i], dones[i], reply = env.step(int(actions[i]), frames[i])
                if command == "reset" or reply:  # the frame after an end is the first of the next episode
                    env.reset(frames[i])
                if command == "get_state":
                    reply = env.get_state()
                if command == "set_state":
                    env.set_state(states[i])
                rooms[i] = -1 if env.room is None else env.room
                replies.append(reply)
            pipe.send_bytes(pickle.dumps(replies))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the main process is gone
    except Exception:
        with contextlib.suppress(OSError):
            pipe.send(traceback.format_exc())


def cores() -> int:
    """CPU cores of this process; under torchrun its share of them."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def split(indices: range, parts: int) -> list[range]:
    """Cut a range into consecutive parts whose lengths differ by at most one."""
    ends = [len(indices) * k // parts for k in range(parts + 1)]
    return [indices[ends[k] : ends[k + 1]] for k in range(parts)]


def gather(value: Any) -> list:
    """The `value` of every process, in order of rank; a list of one without torchrun."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same_start(path: Path | None) -> None:
    """Raise UsageError unless all processes continue from the same checkpoint, or all begin."""
    found = [file and "/".join(file.parts[-2:]) for file in gather(path)]
    if len(set(found)) > 1:
        problem = f"--resume: expected the same checkpoint in every process, got {', '.join(map(str, found))}"
        raise UsageError(f"{problem}; --run-dir must be on a disk that all machines see: start again when they do")


def average_gradients(params: list[Any]) -> None:
    """Average the gradients over all processes, in one message instead of one per tensor."""
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(grad.view_as(p))


# === 8. Log ===========================================================================================================

PLOTS = {  # shown first in TensorBoard, in the tab "custom scalars"
    "return": ["charts/episodic_return_mean100", "charts/best_return"],
    "rooms": ["charts/rooms", "charts/rooms_total"],
    "bonus": ["rnd/int_reward_raw", "losses/predictor_loss"],
    "explained variance": ["losses/explained_variance", "losses/int_explained_variance"],
    "entropy": ["losses/entropy"],
    "SPS": ["charts/SPS"],
}


@contextlib.contextmanager
def mute_when_gone():
    """The run goes on without a screen: what is said to a terminal or pipe that is gone goes nowhere from then on."""
    try:
        yield
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Print a line above the progress bar, once for all processes."""
    with mute_when_gone():
        if RANK == 0:
            tqdm.write(text)
            sys.stdout.flush()


def with_bar(title: str, number: int):
    """Count from 0 to `number` - 1 beside a progress bar."""
    bar = tqdm(desc=title, total=number, delay=0.1, dynamic_ncols=True, leave=False, disable=RANK > 0)
    for i in range(number):
        yield i
        with mute_when_gone():
            bar.update()
    with mute_when_gone():
        bar.close()


def close_events(writer: tensorboard.SummaryWriter) -> None:
    """Close the event file; what cannot be written any more is given up."""
    with contextlib.suppress(OSError):  # the disk is full
        writer.close()


@dataclass
class Progress:
    """Counters and scores of a run: the part of the log that a checkpoint holds."""

    iteration: int = 0
    step: int = 0  # one action in one environment, 4 frames
    episodes: int = 0
    return_sum: float = 0.0
    record: list[float] = field(default_factory=list)  # highest return of an episode, minus its steps
    best_mean: float | None = None  # highest mean return of 100 episodes at a checkpoint
    recent: list[dict] = field(default_factory=list)  # statistics of the last 100 episodes
    best: dict[str, float] = field(default_factory=dict)  # the highest value of each statistic
    visits: dict[int, int] = field(default_factory=dict)  # steps spent in each room, in episodes that ended

    def add(self, episode: dict) -> bool:
        """Count an ended episode; return whether it is the best: the highest return, in the fewest steps."""
        stats = episode["stats"]
        self.episodes += 1
        self.return_sum += stats["episodic_return"]
        self.recent = [*self.recent, stats][-100:]
        for name, value in stats.items():
            self.best[name] = max(value, self.best.get(name, value))
        for room, steps in episode["visits"].items():
            self.visits[room] = self.visits.get(room, 0) + steps
        score = [stats["episodic_return"], -stats["episodic_length"]]
        is_best = not self.record or score > self.record
        if is_best:
            self.record = score
        return is_best

    def mean_return(self) -> float | None:
        """Mean return of the last 100 episodes."""
        return float(np.mean([stats["episodic_return"] for stats in self.recent])) if self.recent else None

    def update_best(self) -> None:
        """At a checkpoint: raise the best mean to that of the last 100 episodes, once there are as many."""
        mean = self.mean_return()
        if mean is not None and len(self.recent) == 100:  # short episodes end first: a mean of fewer says little
            self.best_mean = mean if self.best_mean is None else max(mean, self.best_mean)

    def is_best(self) -> bool:
        """Whether the mean return is the best one; until there is a best mean, the newest is the best."""
        return bool(self.recent) and self.best_mean in (None, self.mean_return())

    def scalars(self) -> dict[str, float]:
        """Means over the last 100 episodes, bests and totals, by tag."""
        scalars: dict[str, float] = {"charts/rooms_total": len(self.visits)} if self.visits else {}
        for name, best in self.best.items():
            suffix = "_mean100" if name.startswith("episodic") else ""
            values = [stats[name] for stats in self.recent if name in stats]  # a copy's statistics may have changed
            scalars[f"charts/{name}{suffix}"] = float(np.mean(values or [best]))
            scalars[f"charts/best_{name.removeprefix('episodic_')}"] = best
        if self.episodes:
            scalars["charts/episodic_return_mean"] = self.return_sum / self.episodes
        return scalars


class Run:
    """The directory of a run, locked while it trains: checkpoints, TensorBoard events, replays. Rank 0 writes them.

    A run continues in place from its newest checkpoint. From any other (older, moved, copied) a new run starts, so that
    nothing is overwritten. When training ends early, the state after the last whole rollout is saved.
    """

    def __init__(self, args: Args, path: Path | None, state: dict | None):
        self.args, self.path, self.state = args, path, state
        self.in_place = path is not None and is_newest(path, state)
        new = Path(args.run_dir, f"{run_prefix(args)}{time.strftime('%Y%m%d-%H%M%S')}")
        self.dir = path.parent if path and self.in_place else new
        self.progress = Progress(**state["progress"]) if state else Progress()
        self.latest: dict = {}  # the state after the last whole rollout
        self.due = not self.in_place  # whether `keep` saves the latest state
        self.writer: tensorboard.SummaryWriter | None = None
        self.retry = 0  # iteration at which to open it (again)
        self.bar: tqdm | None = None
        self.clock, self.times, self.warning = ("", 0.0), dict[str, float](), ""
        self.threads = torch.get_num_threads()

    def __enter__(self) -> Run:
        if RANK > 0:
            return self
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.dir / "lock", timeout=3)  # the workers of a killed run may hold it
            self.lock.acquire()
            if self.path and self.in_place and not is_newest(self.path, self.state):
                self.lock.release()
                raise UsageError(f"{self.dir}: a process that trained there has saved meanwhile; start again")
            for path in self.dir.glob("*.pt.tmp"):  # of a process that was killed while it saved
                path.unlink()
        except filelock.Timeout:
            raise UsageError(f"{self.dir}: expected a run that has ended, but a process trains there") from None
        except OSError as error:
            raise UsageError(f"--run-dir: expected a directory that can be written to, got {error}") from None
        self.describe()
        if self.args.track:
            import wandb

            name, config = re.sub(r"[^\w.-]", "-", self.dir.name)[-128:], reported_args(self.args)
            try:
                wandb.init(project="rnd-ppo", name=name, id=name, resume="allow", sync_tensorboard=True, config=config)
            except Exception as error:  # not logged in, no network, ...
                self.lock.release()
                reason = str(error).partition("\n")[0]
                raise UsageError(f"--track: expected Weights & Biases, got: {reason}; try WANDB_MODE=offline") from None
        return self

    def describe(self) -> None:
        """Print what is about to run."""
        args = self.args
        device, bf16 = choose_device(args)
        frames = args.num_envs * (args.num_steps + 4) * 84 * 84 / 2**20
        say(f"{args.env_id} on {device.type} in {'bf16' if bf16 else 'fp32'}, fastops in {fastops.BACKEND}")
        say(f"{PROCESSES} x {args.num_envs} environments, {frames:.0f} MiB of frames per rollout")
        say(f"run {self.dir}" + (f", continued from {self.path}" if self.path else ""))
        if bf16 and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
            say("warning: without AVX-512 a CPU is far slower in bf16 than in fp32; expected --precision fp32 or auto")
        if not self.state:
            say(f"{args.obs_norm_rollouts} rollouts of random play come first, to start the observation statistics")
        elif args.anneal and args.total_rollouts != self.state["args"]["total_rollouts"]:
            say("warning: --anneal ends at another --total-rollouts than before, so the learning rate jumps")

    def __exit__(self, kind: type | None, *_: object) -> None:
        torch.set_num_threads(self.threads)
        with mute_when_gone():
            if self.bar is not None:
                self.bar.close()
        if RANK == 0:
            if self.latest and self.path != self.newest() and kind is not FloatingPointError:
                try:
                    self.save()
                except Exception as error:  # a run that was told to stop stops, whatever happens
                    say(f"warning: not saved: {error!r}")
            if self.writer:
                # In a thread: a signal may have left a lock of the writer taken, and then `close` waits forever.
                closing = threading.Thread(target=close_events, args=[self.writer], daemon=True)
                closing.start()
                closing.join(10)
            if self.args.track:
                sys.modules["wandb"].finish()
            self.say_what_next()
            self.lock.release()
        if dist.is_initialized():
            dist.destroy_process_group()

    def say_what_next(self) -> None:
        if not self.latest or not self.path:
            left = "the run is as it was" if self.in_place else f"nothing to continue in {self.dir}"
            say(f"stopped before the first save: {left}")
            return
        script = script_path()
        folder = Path(script).parent
        tools = [path for path in (folder / "tools", folder.parent / "tools") if (path / "watch.py").exists()]
        say(f"saved {self.path}\nRUN='{self.dir}'")
        finished = self.progress.iteration >= self.args.total_rollouts
        longer = f" --total-rollouts {2 * self.progress.iteration}" if finished else ""
        commands = {
            "continue": f'python {script} --resume "$RUN"{longer}',
            "evaluate": f'python {script} --play "$RUN"',
            "curves": 'tensorboard --logdir "$RUN"',
        }
        if tools:
            commands["video"] = f'python {tools[0] / "watch.py"} "$RUN" --video out.mp4'
        for purpose, command in commands.items():
            say(f"{command:62} # {purpose}")

    def phase(self, name: str) -> None:
        """Stop the clock of the last phase and start that of this one."""
        resting = self.threads // 2 if name == "rollout" else 0  # the workers need the cores as well
        torch.set_num_threads(self.threads - resting)
        now = time.perf_counter()
        previous, start = self.clock
        if previous:
            self.times[previous] = now - start
        self.clock = name, now

    def log(self, parts: list[tuple[dict[str, float], list[dict], list[int]]]) -> None:
        """Log a rollout: of every process its metrics, the episodes that ended, and the rooms of all players."""
        progress, args = self.progress, self.args
        width = args.num_envs * PROCESSES  # environment steps for each step of the rollout
        events: list[tuple[str, float, int]] = []
        for _, episodes, rooms in parts:
            for episode in episodes:
                step = progress.step + (episode["t"] + 1) * width
                for name, value in episode["stats"].items():
                    if name.startswith("episodic"):
                        events.append((f"charts/{name}", value, step))
                if progress.add(episode) and RANK == 0:
                    self.write_replay(episode, step)
            for room in set(rooms) - {-1}:
                progress.visits.setdefault(room, 0)
        progress.iteration += 1
        progress.step += width * args.num_steps
        self.due = progress.iteration % args.save_interval == 0 or progress.iteration == args.total_rollouts
        if self.due:
            progress.update_best()
        metrics = {name: float(np.mean([of_process[name] for of_process, *_ in parts])) for name in parts[0][0]}
        scalars = metrics | progress.scalars() | {f"time/{name}": seconds for name, seconds in self.times.items()}
        scalars["charts/SPS"] = width * args.num_steps / sum(self.times.values())
        check_finite(scalars)
        if RANK == 0:
            events.sort(key=lambda event: event[2])  # by step: the processes' episodes come one process after the other
            self.write_events(events + [(tag, value, progress.step) for tag, value in scalars.items()])
            self.show(scalars)

    def write_replay(self, episode: dict, step: int) -> None:
        """Write the actions of the best episode so far, for tools/watch.py."""
        replay = dict(episode["stats"], env_id=self.args.env_id, step=step, actions=list(episode["executed"]))
        say(f"step {step}: best so far, return {replay['episodic_return']:g} in {replay['episodic_length']} steps")
        with contextlib.suppress(OSError):
            (self.dir / "best_episode.json").write_text(json.dumps(replay))

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """Write scalars for TensorBoard. A full disk does not end the run."""
        try:
            if self.writer is None and self.progress.iteration >= self.retry:
                self.writer = self.open_writer()
            if self.writer:
                for event in events:
                    self.writer.add_scalar(*event)
                self.writer.flush()
        except OSError as error:
            say(f"warning: events cannot be written ({error}); the next try comes with the next save")
            self.writer, self.retry = None, self.progress.iteration + self.args.save_interval

    def open_writer(self) -> tensorboard.SummaryWriter:
        """Continue the curves: TensorBoard drops what an earlier process wrote after the checkpoint."""
        rollout = self.args.num_envs * PROCESSES * self.args.num_steps
        first = not any(self.dir.glob("events.out.tfevents.*"))
        writer = tensorboard.SummaryWriter(str(self.dir), purge_step=self.progress.step - rollout + 1)
        if first:
            args = reported_args(self.args)
            plots = {title: tags for title, tags in PLOTS.items() if title != "rooms" or self.progress.visits}
            writer.add_custom_scalars({"RND": {title: ["Multiline", tags] for title, tags in plots.items()}})
            for summary in tensorboard.summary.hparams(args, dict.fromkeys(PLOTS["return"] + PLOTS["rooms"], 0.0)):
                writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        return writer

    def show(self, scalars: dict[str, float]) -> None:
        """Renew the progress bar; print a line every --log-interval rollouts, and when the run begins to look dead."""
        progress = self.progress
        scores = {
            "return": progress.mean_return(),
            "best": progress.record[0] if progress.record else None,
            "rooms": len(progress.visits) or None,
        }
        summary = " ".join(f"{name} {'-' if score is None else f'{score:.5g}'}" for name, score in scores.items())
        summary += f" bonus {scalars['rnd/int_reward_raw']:.3g} entropy {scalars['losses/entropy']:.3g}"
        speed = f"{scalars['charts/SPS']:.0f} steps/s"
        with mute_when_gone():
            if self.bar is None:
                bar_format = "{n_fmt}/{total_fmt} {desc} {remaining} left{postfix}"
                done, total = progress.iteration - 1, self.args.total_rollouts
                self.bar = tqdm(initial=done, total=total, bar_format=bar_format, dynamic_ncols=True)
            self.bar.set_description_str(summary, refresh=False)
            self.bar.set_postfix_str(speed, refresh=False)
            self.bar.update()
        if progress.iteration % self.args.log_interval == 0:
            say(f"rollout {progress.iteration}, step {progress.step}: {summary}, {speed}")
        warning = check_health(self.args, progress, scalars)
        if warning and warning != self.warning:
            say(f"warning: {warning}")
        self.warning = warning

    def keep(self, state: dict) -> None:
        """Keep the state after a rollout, in case training ends early, and save it when it is due."""
        self.latest = state | dict(run=self.dir.resolve().name)
        if RANK > 0 or not self.due:
            return
        try:
            self.save()
        except OSError as error:  # a full disk does not end the run
            say(f"warning: saving failed ({error}); the next try comes with the next save")

    def newest(self) -> Path:
        """Where the latest state belongs."""
        return self.dir / f"checkpoint_{self.latest['progress']['iteration']:06d}.pt"

    def save(self) -> None:
        """Save the latest state and remove checkpoints that are older than the newest --keep-checkpoints."""
        save_checkpoint(self.latest, self.newest())
        for old in checkpoints(self.dir)[: -self.args.keep_checkpoints]:
            old.unlink()
        if self.due and Progress(**self.latest["progress"]).is_best():
            save_checkpoint(self.latest, self.dir / "best.pt")
        self.path = self.newest()  # only now: a signal or a full disk before it makes the next save write both again


def reported_args(args: Args) -> dict[str, Any]:
    """The arguments that describe a run."""
    return {name: value for name, value in vars(args).items() if name not in LOCAL_ARGS}


def rollout_metrics(rollout, targets, raw, int_rewards, rnd, optimizer) -> dict[str, float]:
    """What the log says of a rollout besides the losses."""

    def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        return 1 - (returns - values[:-1]).var() / returns.var().clamp(min=1e-30)

    params = [p for group in optimizer.param_groups for p in group["params"]]
    on_device = {
        "losses/explained_variance": explained_variance(rollout.values, targets["returns"]),
        "losses/int_explained_variance": explained_variance(rollout.int_values, targets["int_returns"]),
        "rnd/largest_weight": torch.stack([p.detach().abs().max() for p in params]).max(),
    }
    return dict(zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True)) | {
        "rnd/int_reward_raw": float(raw.mean()),
        "rnd/int_reward": float(int_rewards.mean()),
        "rnd/int_return_std": float(rnd.int_return_rms.std),
        "rnd/obs_mean": float(rnd.obs_rms.mean.mean()),
        "rnd/obs_std": float(rnd.obs_rms.std.mean()),
        "charts/learning_rate": optimizer.param_groups[0]["lr"],
    }


def check_finite(scalars: dict[str, float]) -> None:
    """Raise FloatingPointError, naming the quantity, if a scalar is not finite."""
    for name, value in scalars.items():
        if not math.isfinite(value):
            advice = "start again with a lower learning rate or clipped gradients (--max-grad-norm 0.5)"
            raise FloatingPointError(f"{name} is {value}; {advice}: on a CPU, --resume would repeat this run")


def check_health(args: Args, progress: Progress, scalars: dict[str, float]) -> str:
    """One sentence about a run that looks dead."""
    if not progress.recent and progress.iteration * args.num_steps > 2 * args.max_episode_steps:
        return "no episode has ended in twice --max-episode-steps: look at the environment"
    if scalars["losses/entropy"] < 0.02:
        return "the entropy has collapsed, the policy hardly explores: raise --ent-coef or lower --learning-rate"
    if scalars["rnd/int_reward_raw"] < 1e-6:
        return "the bonus has collapsed, nothing is new any more: lower --predictor-proportion"
    return ""


# === 9. Checkpoints ===================================================================================================

FORMAT = 2  # of a checkpoint; files of format 1 can be played


@dataclass
class Session:
    """Everything that changes while a run trains; with Progress, everything that a checkpoint holds."""

    args: Args
    agent: nn.Module
    rnd: RND
    optimizer: torch.optim.Optimizer
    rollout: Rollout
    envs: VectorEnv

    def snapshot(self, progress: Progress) -> dict:
        """A copy in plain types and tensors, taken between two rollouts."""
        local = dict(  # what each process has of its own
            envs=self.envs.call("get_state"),
            rollout={name: view.to("cpu", copy=True) for name, view in self.rollout.tail().items()},
            carry=self.rnd.carry.tolist(),
            rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        )
        state = dict(  # what is the same in all processes
            format=FORMAT,
            script=Path(__file__).stem,
            args=vars(self.args),
            progress=vars(progress),
            ranks=gather(local),
            agent=self.agent.state_dict(),
            rnd=self.rnd.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        return copy.deepcopy(state)  # training continues before it is saved

    def restore(self, state: dict) -> None:
        """Continue from a snapshot. Raises UsageError if it is of another algorithm."""
        with refuse_other_networks():
            self.agent.load_state_dict(state["agent"])
            self.rnd.load_state_dict(state["rnd"])
            self.optimizer.load_state_dict(state["optimizer"])
        local = state["ranks"][RANK]
        self.envs.call("set_state", local["envs"])
        for name, view in self.rollout.tail().items():
            view.copy_(local["rollout"][name])
        self.rnd.carry = np.array(local["carry"])
        torch.set_rng_state(local["rng"])
        if local["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(local["cuda_rng"])


@contextlib.contextmanager
def refuse_other_networks():
    """Raise UsageError where a checkpoint does not fit the networks: the script has changed since."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        advice = "rename a script when you change its algorithm, or give another --run-dir"
        raise UsageError(f"expected a checkpoint of this script's networks, got others; {advice}: {reason}") from None


def check_plain(value: Any, key: str) -> None:
    """Raise UsageError, naming the key, for what `load_checkpoint` would refuse."""
    if type(value).__name__ in ("dict", "OrderedDict"):
        for name, item in value.items():
            check_plain(name, f"a key of {key}")
            check_plain(item, f"{key}[{name!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{key}[{i}]")
    elif value is not None and type(value) not in (bool, int, float, str, bytes, torch.Tensor):
        raise UsageError(f"{key}: expected plain types and tensors in a checkpoint, got {type(value)}: {value!r:.60}")


def save_checkpoint(state: dict, path: Path) -> None:
    """Write a checkpoint all or nothing: killed at any moment, `path` is the old file or the new one."""
    check_plain(state, "state")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    checksum = hashlib.sha256(buffer.getbuffer()).digest()  # torch.load ignores what follows its archive
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.write(checksum)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> tuple[Path, dict]:
    """Path and state of a checkpoint, or of the newest readable one of a run's directory; executes nothing in it.

    Raises UsageError with the reason why it cannot be read.
    """
    path = Path(path)
    if os.path.isdir(path):
        for newest in reversed(checkpoints(path)):
            try:
                return load_checkpoint(newest)
            except UsageError as problem:
                say(f"warning: {problem}")
        raise UsageError(f"{path}: expected a run with checkpoint_*.pt, found none that can be read")
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise OSError("its checksum is wrong, so it is damaged or something else")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        found = f"format {state['format']} of {state['script']}"
    except Exception as error:  # whatever the reason
        reason = "it holds more than plain types" if type(error).__name__ == "UnpicklingError" else error
        raise UsageError(f"{path}: expected a checkpoint, cannot read it: {reason}; take another one") from None
    expected = [f"format {number} of {Path(__file__).stem}" for number in (FORMAT, 1)]
    if found not in expected:
        raise UsageError(f"{path}: expected a checkpoint in {expected[0]}, got {found}; use the script that wrote it")
    return path, state


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = []
    for path in run.iterdir():
        match = re.fullmatch(r"checkpoint_(\d{6}|[1-9]\d{6,})\.pt", path.name)  # a user's copies have other names
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def is_newest(path: Path, state: Any) -> bool:
    """Whether a checkpoint is the newest of the run whose directory it lies in, and that can be written to."""
    run = path.parent
    return state["run"] == run.resolve().name and [path] == checkpoints(run)[-1:] and os.access(run, os.W_OK)


def saved_args(state: dict) -> dict[str, Any]:
    """The arguments that a checkpoint decides. One that is new in this script has its default."""
    known = {field.name for field in fields(Args)}
    if unknown := set(state["args"]) - known:
        raise UsageError(f"expected a checkpoint with arguments of this script, got also {', '.join(sorted(unknown))}")
    return {name: value for name, value in state["args"].items() if name not in LOCAL_ARGS}


def check_resumable(args: Args, path: Path, state: dict) -> None:
    """Raise UsageError where these arguments cannot continue the checkpoint."""
    if state["format"] != FORMAT or "optimizer" not in state:
        raise UsageError(f"{path}: expected a checkpoint of a run, got exported or old weights; use --play with them")
    for name, saved in vars(Args(**saved_args(state))).items():
        value, flag = getattr(args, name), name.replace("_", "-")
        if value != saved and name not in FREE_ARGS:
            raise UsageError(f"--{flag}: expected {saved}, as in {path}, got {value}; start a new run to change it")
    if len(state["ranks"]) != PROCESSES:
        expected = f"expected torchrun with {len(state['ranks'])} processes, as in {path}, got {PROCESSES}"
        raise UsageError(f"{expected}; set --nproc-per-node and --nnodes")
    done = state["progress"]["iteration"]
    if args.total_rollouts < done and args.resume != "auto":  # for which such a run is complete
        raise UsageError(f"--total-rollouts: expected at least {done}, as in {path}, got {args.total_rollouts}")


def find_checkpoint(args: Args) -> tuple[Path, dict] | tuple[None, None]:
    """Path and state of the checkpoint that --resume names, if any. UsageError if the arguments contradict it."""
    if not args.resume:
        return None, None
    if args.resume != "auto":
        path, state = load_checkpoint(args.resume)
        check_resumable(args, path, state)
        return path, state
    times, problem = {}, None
    for run in Path(args.run_dir).iterdir() if os.path.isdir(args.run_dir) else ():
        with contextlib.suppress(OSError):  # the folder of another user
            if run.name.startswith(run_prefix(args)) and run.is_dir() and checkpoints(run):
                times[run] = checkpoints(run)[-1].stat().st_mtime
    for run in sorted(times, key=times.__getitem__, reverse=True):  # the newest checkpoint first
        try:
            path, state = load_checkpoint(run)
            check_resumable(args, path, state)
            return path, state
        except UsageError as error:
            problem = problem or error
    if problem:
        say(f"no run that these arguments continue, so a new one starts: {problem}")
    return None, None


def run_prefix(args: Args) -> str:
    """How the name of a run's directory begins; the time of its start follows."""
    return f"{Path(args.env_id).name}__{args.exp_name}__{args.seed}__"


# === 10. Play =========================================================================================================


@torch.no_grad()
def play_episode(agent: nn.Module, env: Env, greedy: bool = False):
    """Play one episode; yields (action, reward, value, int_value, frame uint8 (84, 84), summary) after every step."""
    rollout, frame, summary = Rollout(1, 1, agent), np.zeros((84, 84), np.uint8), None
    env.reset(frame)
    rollout.start_episodes(frame[None])
    while summary is None:
        rollout.begin()
        logits, value, int_value = agent(*rollout.observation(0, slice(None)))
        noise = -torch.empty(1, len(env.game.actions)).exponential_().log().to(rollout.device)
        action, _ = act(logits, noise * (not greedy))
        reward, done, summary = env.step(int(action), frame)
        rollout.add(0, slice(None), frame[None], np.array([reward]), np.array([done]))
        yield int(action), reward, float(value), float(int_value), frame, summary


def load_agent(state: dict, device: torch.device | str = "cpu", bf16: bool = False) -> Agent:
    """The agent of a checkpoint, ready to play. Raises UsageError if it has other networks."""
    num_actions, width = state["agent"]["policy_head.weight"].shape
    agent = Agent(num_actions, width, bf16).to(device)
    with refuse_other_networks():
        agent.load_state_dict(state["agent"])
    return agent.eval()


def play(args: Args) -> dict:
    """Evaluate the checkpoint `args.play` with sticky actions and without; return the report that --json writes."""
    check_args(args)
    path, state = load_checkpoint(args.play)
    trained = Args(**saved_args(state)).env_id
    if Path(args.env_id).name != Path(trained).name:
        raise UsageError(f"--play: expected a checkpoint of {args.env_id}, got one of {trained}")
    agent = load_agent(state, *start_device(args))
    torch.manual_seed(args.seed)
    how = {name: getattr(args, name) for name in ("env_id", "seed", "greedy", "max_episode_steps")}
    report: dict = dict(checkpoint=str(path), step=state["progress"]["step"], **how, summary=[], episodes=[])
    for sticky in dict.fromkeys((args.sticky_action_prob, 0.0)):
        options: dict[str, Any] = dict(seed=args.seed, sticky_action_prob=sticky)
        options |= dict(max_episode_steps=args.max_episode_steps, render_mode="human" if args.render else None)
        episodes = []
        for i in with_bar(f"sticky {sticky:g}", args.episodes):
            *_, last_step = play_episode(agent, Env(args.env_id, i, **options), args.greedy)
            summary = last_step[-1]
            episodes.append(summary["stats"] | dict(sticky_action_prob=sticky, visits=sorted(summary["visits"])))
        report["episodes"] += episodes
        report["summary"].append(dict(sticky_action_prob=sticky, **summarize(episodes)))
        say("  ".join(f"{name} {value:.4g}" for name, value in report["summary"][-1].items()))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    return report


def summarize(episodes: list[dict]) -> dict[str, float]:
    """Mean, spread and best of the returns; means of the other statistics."""
    returns = np.array([episode["episodic_return"] for episode in episodes])
    std = returns.std(ddof=1) if len(returns) > 1 else 0.0
    row = dict(mean=returns.mean(), standard_error=std / len(returns) ** 0.5, std=std, median=np.median(returns))
    row["best"] = returns.max()
    for name in episodes[0]:
        if name not in ("episodic_return", "sticky_action_prob", "visits"):
            row[name.removeprefix("episodic_")] = np.mean([episode[name] for episode in episodes])
    return {name: float(value) for name, value in row.items()}


# === 11. Start ========================================================================================================

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
FLAGS_ELSEWHERE = {  # here: in CleanRL, OpenAI, PPO-RND and rlcode; more in docs/choices.md
    "--num-envs": {"num-env", "n-envs", "n-workers"},
    "--total-rollouts, of --num-envs x --num-steps steps": {"total-timesteps", "num-timesteps", "total-frames"},
    "--obs-norm-rollouts": {"num-iterations-obs-norm-init"},
    "--predictor-proportion": {"update-proportion", "proportion-of-exp-used-for-predictor-update"},
    "--int-episodic": {"use-news"},
    "--gamma (the game's) and --int-gamma": {"gamma-ext"},
    "--int-coef and --ext-coef": {"int-coeff", "ext-coeff"},
    "--gae-lambda": {"lam"},
    "--anneal": {"anneal-lr"},
    "--device": {"cuda"},
    "--play RUN": {"do-test", "test"},
    "--track": {"wandb"},
    "tools/watch.py RUN --video FILE": {"capture-video"},
}


def check_args(args: Args) -> None:
    """Raise UsageError for arguments that cannot work, before anything is created."""

    def require(valid: bool, name: str, expected: str) -> None:
        if not valid:
            raise UsageError(f"--{name.replace('_', '-')}: expected {expected}, got {getattr(args, name)!r}")

    for name in [argument.name for argument in fields(args) if argument.type == "int"]:
        require(getattr(args, name) >= 1 or name in ("seed", "num_workers"), name, "at least 1")
    for name in ("num_workers", "ext_coef", "int_coef", "ent_coef", "vf_coef", "max_grad_norm"):
        require(0 <= getattr(args, name) < math.inf, name, "a finite number, 0 or more")
    for name in ("learning_rate", "clip_coef"):
        require(0 < getattr(args, name) < math.inf, name, "a finite number above 0")
    for name in ("sticky_action_prob", "gamma", "int_gamma", "gae_lambda"):
        require(0 <= getattr(args, name) <= 1, name, "a number from 0 to 1")
    require(0 <= args.seed < 2**32, "seed", "a number from 0 to 4294967295")
    share, blocks = args.predictor_proportion, args.num_minibatches
    require(share == -1 or 0 < share <= 1, "predictor_proportion", "a number above 0 and up to 1, or -1")
    require(args.num_envs % blocks == 0, "num_envs", f"a multiple of --num-minibatches, {blocks}")
    samples = args.num_envs // blocks * args.num_steps
    require(not args.norm_adv or samples > 1, "norm_adv", "minibatches of two samples or more")
    require(args.num_envs * args.num_steps > 1, "num_steps", "2 or more with one environment")
    require(args.device != "cuda" or torch.cuda.is_available(), "device", "auto or cpu, as torch finds no CUDA device")
    require(Path(args.exp_name).name == args.exp_name, "exp_name", "a name without slashes")
    has_wandb = importlib.util.find_spec("wandb") is not None
    require(not args.track or has_wandb, "track", "the package wandb: pip install wandb")
    for name in ("episodes", "greedy", "render", "json") if not args.play else ():
        require(getattr(args, name) == getattr(Args, name), name, "--play with it")
    report = Path(args.json).absolute()
    writable = not os.path.isdir(report) and os.access(report if os.path.exists(report) else report.parent, os.W_OK)
    require(not args.json or writable, "json", "a file that can be written")
    display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    require(not args.render or bool(display), "render", "a display; record a video with tools/watch.py instead")
    if (PROCESSES > 1 or RANK > 0) and "MASTER_ADDR" not in os.environ:
        raise UsageError(f"RANK {RANK}, WORLD_SIZE {PROCESSES}: expected torchrun to set them; use it or unset them")
    Game.check(args)


def choose_device(args: Args) -> tuple[torch.device, bool]:
    """The device of the networks, and whether the policy runs in bfloat16."""
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    return device, args.precision == "bf16" or (args.precision == "auto" and cuda)


def start_device(args: Args) -> tuple[torch.device, bool]:
    """Prepare the device that `choose_device` names; join the processes of torchrun."""
    device, bf16 = choose_device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # no TF32: fp32 is what the bonus needs, and the policy has bf16
        torch.backends.cudnn.allow_tf32 = False
        if args.precision == "auto" and torch.cuda.get_device_capability()[0] < 8:  # older than Ampere
            say("warning: this GPU does not compute in bf16, so the policy runs in fp32")
            bf16 = False
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, bf16


def stop(number: int, _: object) -> None:
    """Leave `train`, which saves. A second Ctrl-C or SIGTERM ends the process at once, but not under torchrun."""
    for other in SIGNALS:
        # torchrun repeats the first signal, a shell whose terminal closes repeats SIGHUP.
        repeats = PROCESSES > 1 or other == getattr(signal, "SIGHUP", None)
        signal.signal(other, signal.SIG_IGN if repeats else signal.SIG_DFL)
    raise SystemExit(128 + number)


def parse_args() -> Args:
    """The command line; what it leaves out is as in the checkpoint of --play or --resume PATH."""
    if {"-h", "--help"} & set(sys.argv):
        print_help()
        sys.exit(0)
    flags = {word.partition("=")[0].removeprefix("--").replace("_", "-") for word in sys.argv if word.startswith("--")}
    for here, elsewhere in FLAGS_ELSEWHERE.items():
        if found := flags & elsewhere:
            raise UsageError(f"--{found.pop()}: expected an argument of this script; use {here}")
    args = tyro.cli(Args)
    source = args.play or args.resume
    if source in ("", "auto"):
        return args
    _, state = load_checkpoint(source)
    return tyro.cli(Args, default=Args(**saved_args(state)))


def script_path() -> str:
    """This file, as a command names it."""
    try:
        return os.path.relpath(__file__)
    except ValueError:  # Windows: the working directory is on another drive
        return __file__


def print_help() -> None:
    """What tyro says about the arguments, in the groups that the source has."""
    title, _, _, *legend = (__doc__ or "").split("\n\n")
    example = f"Example: python {script_path()} --num-envs 128 --resume auto"
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        tyro.cli(Args, description="\n\n".join([title, example, *legend]), args=["--help"])
    lines = text.getvalue().splitlines()
    for group, name in re.findall(r"# --- (.*)\n *(\w+):", inspect.getsource(Args)):
        first = next(i for i, line in enumerate(lines) if f" --{name.replace('_', '-')} " in line)
        lines[first:first] = ["", group]
    print("\n".join(line if line.startswith(" ") else textwrap.fill(line, 80) for line in lines))


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # for terminals that know ASCII only
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        args = parse_args()
        play(args) if args.play else train(args)
    except (UsageError, FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
