"""Several processes: two of them do what one does with all the data, and stay identical."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rnd_ppo_atari as rnd_ppo

ROOT = Path(__file__).parent.parent

STEP = """
import sys
import numpy as np, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import rnd_ppo_atari as R
sys.path.insert(0, {tests!r})
from test_distributed import one_step
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.save(one_step(range(16 * rank, 16 * rank + 16)), {out!r} + f"/rank{{rank}}.pt")
dist.destroy_process_group()
"""

TRAIN = """
import sys
import torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import rnd_ppo_atari as R
kept, make = [], R.Session
def keep(*args):
    kept.append(make(*args))
    return kept[-1]
R.Session = keep
destroy = dist.destroy_process_group
def compare_and_destroy():
    parameters = [*kept[0].agent.parameters(), *kept[0].rnd.parameters()]
    statistics = torch.tensor([kept[0].rnd.int_return_rms.mean, kept[0].rnd.int_return_rms.std], dtype=torch.float32)
    weights = torch.cat([*(p.detach().flatten() for p in parameters), statistics.flatten()])
    others = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(others, weights)
    # In one piece: torchrun's processes do not buffer what they print, so pieces of both can mix.
    print(f"EQUAL {{all(torch.equal(weights, other) for other in others)}}\\n", end="")
    destroy()
dist.destroy_process_group = compare_and_destroy
options = dict(num_envs=4, num_steps=8, obs_norm_rollouts=1, max_episode_steps=3, num_workers=1)
R.train(R.Args(total_rollouts=10, run_dir={out!r}, **options))
"""

RESUME = """
import sys
sys.path.insert(0, {root!r})
import rnd_ppo_atari as R
options = dict(num_envs=4, num_steps=8, obs_norm_rollouts=1, max_episode_steps=3, num_workers=1)
try:
    R.train(R.Args(total_rollouts=20, run_dir={out!r} + "/elsewhere" * R.RANK, resume="auto", **options))
except R.UsageError as error:
    print(f"REFUSED {{error}}\\n", end="")
"""


def one_step(envs):
    """One optimisation step on the environments `envs` of 32 with made-up data: both networks' state after it."""
    torch.manual_seed(0)
    agent, rnd = rnd_ppo.Agent(6, 448), rnd_ppo.RND()
    generator = torch.Generator().manual_seed(1)
    rollout = rnd_ppo.Rollout(4, 32)
    rollout.frames = torch.randint(0, 256, rollout.frames.shape, generator=generator, dtype=torch.uint8)
    rollout.ages[:] = 3
    rollout.actions = torch.randint(0, 6, rollout.actions.shape, generator=generator)
    rollout.logprobs -= 1.8
    columns = torch.tensor(list(envs))
    targets = {
        name: torch.randn(4, 32, generator=generator)[:, columns] for name in ("advantages", "returns", "int_returns")
    }
    for name in ("frames", "ages", "actions", "logprobs", "values", "int_values"):
        setattr(rollout, name, getattr(rollout, name)[:, columns])
    rollout.num_envs = len(columns)
    rnd.observe(rollout.next_frames.contiguous())
    optimizer = torch.optim.Adam([*agent.parameters(), *rnd.predictor.parameters()], lr=1e-4, eps=1e-8)
    args = rnd_ppo.Args(update_epochs=1, num_minibatches=1, predictor_proportion=1.0)
    rnd_ppo.update(agent, rnd, optimizer, rollout, targets, 0.1, args)
    return agent.state_dict(), rnd.state_dict()


def torchrun(code: str, tmp_path: Path) -> str:
    script = tmp_path / "driver.py"
    script.write_text(code.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    """Rules out wrong averaging of gradients and statistics that see one process's environments only."""
    torchrun(STEP, tmp_path)
    agent, rnd = one_step(range(32))
    statistics = rnd.pop("_extra_state")["obs_rms"]
    for rank in (0, 1):
        agent2, rnd2 = torch.load(tmp_path / f"rank{rank}.pt")
        statistics2 = rnd2.pop("_extra_state")["obs_rms"]
        for one, two in ((agent, agent2), (rnd, rnd2)):
            assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
        np.testing.assert_allclose(statistics["mean"], statistics2["mean"], rtol=1e-12)
        np.testing.assert_allclose(statistics["var"], statistics2["var"], rtol=1e-9)
        assert statistics2["count"] == pytest.approx(statistics["count"])


@pytest.mark.slow
def test_processes_end_with_identical_weights(tmp_path):
    """Ten rollouts on two processes with environments of their own."""
    assert torchrun(TRAIN, tmp_path).count("EQUAL True") == 2
    [path] = tmp_path.glob("MontezumaRevenge-v5__*/checkpoint_000010.pt")
    _, state = rnd_ppo.load_checkpoint(path)
    assert len(state["ranks"]) == 2 and state["progress"]["step"] == 10 * 8 * 8
    first, second = (rank["envs"] for rank in state["ranks"])
    assert len(first) == len(second) == 4
    assert all(a["rng"] != b["rng"] for a, b in zip(first, second, strict=True))
    first, second = (rank["rng"] for rank in state["ranks"])  # from which actions are drawn
    assert not torch.equal(first, second)
    ends = EventAccumulator(str(path.parent), dict(scalars=0)).Reload().Scalars("charts/episodic_length")
    steps = [event.step for event in ends]
    assert len(steps) == 26 * 8 and steps == sorted(steps)

    refusals = re.findall("REFUSED (.*)", torchrun(RESUME, tmp_path))
    assert len(refusals) == 2
    assert all(
        "same checkpoint in every process, got" in line and "checkpoint_000010.pt, None" in line for line in refusals
    )
