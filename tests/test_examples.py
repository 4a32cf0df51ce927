"""The copies in examples/: what they make of MiniGrid and Crafter. test_scripts.py compares them with the base."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import differences
from torch.utils.tensorboard import SummaryWriter

EXAMPLES = Path(__file__).parents[1] / "examples"
GAMES = {"minigrid": "MiniGrid-MultiRoom-N2-S4-v0", "crafter": "CrafterNoReward-v1"}


def load(name):
    """The example as a module; the test is skipped where its package is missing."""
    pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location(f"rnd_ppo_{name}", EXAMPLES / f"rnd_ppo_{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=GAMES)
def example(request):
    return load(request.param)


@pytest.fixture
def minigrid():
    return load("minigrid")


@pytest.fixture
def crafter():
    return load("crafter")


def environment(script, env_id, index=0, **options):
    return script.Env(env_id, index, sticky_action_prob=0.0, **options)


def first_frame(env):
    frame = np.zeros((84, 84), np.uint8)
    env.reset(frame)
    return frame


def play(env, actions):
    """Every frame, reward and end, with the summaries of the episodes; not the index of the environment."""
    seen = []
    frame = np.zeros((84, 84), np.uint8)
    for action in actions:
        reward, done, summary = env.step(int(action), frame)
        seen.append((frame.tobytes(), reward, done, summary and dict(summary, env=0)))
        if done:
            seen.append(first_frame(env).tobytes())
    return seen


def run(script, arguments, cwd):
    command = [sys.executable, script.__file__, *arguments.split()]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# --- Both ---


@pytest.mark.slow
def test_an_example_trains_and_resumes_in_the_same_bits(example, tmp_path):
    """Two rollouts by one worker, and one rollout by one, continued by two. Episodes end within rollouts."""
    small = "--num-envs 4 --num-steps 16 --obs-norm-rollouts 1 --max-episode-steps 12 --device cpu"
    for folder, rollouts, more in (("a", 2, ""), ("b", 1, ""), ("b", 2, "--num-workers 2 --resume auto")):
        arguments = f"{small} --num-workers 1 --run-dir {folder} --total-rollouts {rollouts} {more}"
        done = run(example, arguments, tmp_path)
        assert done.returncode == 0, done.stderr
    one, other = (torch.load(*tmp_path.glob(f"{folder}/*/checkpoint_000002.pt"), weights_only=True) for folder in "ab")
    assert one["progress"]["episodes"] == 8
    for part in ("progress", "ranks", "agent", "rnd", "optimizer"):
        assert differences(one[part], other[part]) == []


def test_an_environment_continues_identically_from_a_saved_state(example, tmp_path):
    """Through a file, in the middle of an episode, into another environment that has played something else."""
    env_id = GAMES[example.__name__.removeprefix("rnd_ppo_")]
    one, other = (environment(example, env_id, i, seed=i, max_episode_steps=150) for i in (3, 8))
    actions = np.random.default_rng(0).integers(len(one.game.actions), size=600)
    play(one, actions[:250])
    play(other, actions[:33])
    torch.save(one.get_state(), tmp_path / "state.pt")
    other.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert play(one, actions[250:]) == play(other, actions[250:])


def test_an_unknown_game_is_refused_with_one_that_exists(example, tmp_path):
    known = GAMES[example.__name__.removeprefix("rnd_ppo_")]
    done = run(example, f"--env-id {known[:-1]}", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--env-id" in done.stderr and known in done.stderr


# --- MiniGrid ---


def test_a_layout_has_a_number_or_changes_with_every_episode(minigrid):
    task = GAMES["minigrid"]
    envs = [environment(minigrid, task + layout, i) for i, layout in enumerate(("@1", "@1", "@2", "", ""))]
    grids = []
    for env in envs:
        for _ in range(3):
            first_frame(env)
            grids.append(env.game.env.grid.encode().tobytes())
    assert len(set(grids[:6])) == 1
    assert len(set(grids)) == 1 + 1 + 6


def test_the_goal_ends_the_episode_as_a_success(minigrid):
    env = environment(minigrid, "MiniGrid-Empty-5x5-v0@1")
    first_frame(env)
    left, right, forward = 0, 1, 2
    *steps, (_, reward, done, summary), _ = play(env, [forward, forward, right, forward, left, right, forward])
    assert all(reward == 0 and not done for _, reward, done, _ in steps)
    assert done and reward == pytest.approx(1 - 0.9 * 7 / 100)
    assert summary["stats"]["episodic_success"] == 1
    assert set(summary["visits"]) == {5 * y + x for x, y in ((2, 1), (3, 1), (3, 2), (3, 3))}


def test_lava_ends_the_episode_without_success(minigrid):
    env = environment(minigrid, "MiniGrid-LavaGapS5-v0@1")
    first_frame(env)
    seen = play(env, np.random.default_rng(0).integers(3, size=2000))
    episodes = [item[3]["stats"] for item in seen if isinstance(item, tuple) and item[3]]
    assert {(stats["episodic_success"], stats["episodic_return"] > 0) for stats in episodes} == {(0, False), (1, True)}
    assert min(stats["episodic_length"] for stats in episodes if not stats["episodic_success"]) < 10


def test_the_frame_is_what_minigrid_renders_for_the_agent(minigrid):
    """In gray: 7 x 7 cells of 12 x 12 pixels. SKIP is 1, so nothing of the frame before shows through."""
    cv2 = pytest.importorskip("cv2")
    env = environment(minigrid, GAMES["minigrid"])
    frame = np.zeros((84, 84), np.uint8)
    for action in np.random.default_rng(0).integers(7, size=100):
        _, done, _ = env.step(int(action), frame)
        rendered = env.game.env.get_frame(agent_pov=True, tile_size=12)
        assert np.array_equal(frame, cv2.cvtColor(rendered, cv2.COLOR_RGB2GRAY))
        if done:
            env.reset(frame)


def test_a_wrong_number_of_a_layout_is_refused(minigrid, tmp_path):
    done = run(minigrid, "--env-id MiniGrid-MultiRoom-N6-v0@one", tmp_path)
    assert done.returncode == 2
    assert "@1" in done.stderr


def test_a_video_shows_all_rooms_in_color(minigrid, monkeypatch):
    """The agent sees 7 x 7 gray cells; who watches sees the goal from the start. Looking changes nothing."""
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.syspath_prepend(EXAMPLES.parent / "tools")
    import watch

    env, other = (environment(minigrid, "MiniGrid-MultiRoom-N4-S5-v0@1") for _ in range(2))
    first_frame(env), first_frame(other)
    image = watch.picture(env.game)
    assert image.shape == (200, 200, 3) and (image == (0, 255, 0)).all(-1).any()
    actions = [2, 5, 2, 1, 2, 0, 2] * 4
    assert play(env, actions) == play(other, actions)


# --- Crafter ---


def test_every_achievement_is_logged_for_each_episode(crafter):
    """Facing grass, `do` finds a sapling once in ten times."""
    env = environment(crafter, GAMES["crafter"], max_episode_steps=100)
    first_frame(env)
    *_, (_, _, done, summary), _ = play(env, [env.game.actions.index("do")] * 100)
    unlocked = {name.removeprefix("episodic_"): value for name, value in summary["stats"].items()}
    assert done and len(unlocked) == 22 + len(("return", "length"))
    assert unlocked["collect_sapling"] == 1
    assert unlocked["collect_diamond"] == 0


def test_the_reward_is_crafters_or_none(crafter):
    for env_id, reward in (("CrafterNoReward-v1", 0), ("CrafterReward-v1", 1)):
        env = environment(crafter, env_id)
        first_frame(env)
        rewards = [reward for _, reward, *_ in play(env, [env.game.actions.index("do")] * 100)]
        assert max(rewards) == reward


def test_an_episode_of_crafter_is_the_same_in_every_process(crafter):
    """Crafter draws lots from sets, whose order would be that of memory addresses."""
    program = f"""
import sys, hashlib, numpy as np
sys.path.insert(0, {str(EXAMPLES)!r})
import rnd_ppo_crafter as script
junk = [object() for _ in range(int(sys.argv[1]))]
env = script.Env("CrafterNoReward-v1", 0, sticky_action_prob=0.0, max_episode_steps=1000)
frame, seen = np.zeros((84, 84), np.uint8), hashlib.sha256()
for action in np.random.default_rng(0).integers(17, size=600):
    _, done, _ = env.step(int(action), frame)
    seen.update(frame.tobytes())
    if done:
        env.reset(frame)
print(seen.hexdigest())
"""
    outputs = set()
    for number in ("0", "100000"):
        environment = dict(os.environ, PYTHONHASHSEED=number)
        command = [sys.executable, "-c", program, number]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_the_frame_is_the_mean_of_the_colors_of_the_nearest_pixels(crafter):
    env = environment(crafter, GAMES["crafter"])
    frame = first_frame(env)
    gray = env.game.rgb.mean(-1).astype(np.uint8)
    assert gray.shape == (64, 64)
    for row in range(84):
        for column in range(84):
            y, x = (16 * (2 * i + 1) / 42 for i in (row, column))  # of 64 in 84, at the middle of a pixel
            near = gray[[int(y), int(y - 0.01)]][:, [int(x), int(x - 0.01)]]  # on an edge either side will do
            assert frame[row, column] in near


def write_run(folder, episodes):
    """Event files of a run: `episodes` are (step, unlocked achievements)."""
    with SummaryWriter(str(folder)) as writer:
        for step, unlocked in episodes:
            for number in range(22):
                writer.add_scalar(f"charts/episodic_achievement_{number}", number in unlocked, step)
            writer.add_scalar("charts/episodic_return", 0.0, step)
            writer.add_scalar("charts/episodic_achievement_0_mean100", 0.5, step)
        writer.add_scalar("charts/SPS", 100.0, 128 * math.ceil(step / 128))  # the rollout in which the last one ends


def score(arguments, cwd):
    command = [sys.executable, EXAMPLES / "crafter_score.py", *arguments.split()]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_score_is_that_of_the_paper(tmp_path):
    """Two achievements of 22, in all and in half of the episodes that count: ((1 + 100) (1 + 50))^(1/22) - 1."""
    write_run(tmp_path / "a", [(100, {0, 7}), (900, {0}), (1001, {0, 1, 2, 3})])
    write_run(tmp_path / "b", [(500, {0})])
    done = score("a b --steps 1000 --json out.json", tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = json.loads((tmp_path / "out.json").read_text())
    assert (a["episodes"], b["episodes"]) == (2, 1)
    assert (a["steps"], b["steps"]) == (1000, 512)
    assert done.stderr == "warning: b ends at step 512 of 1000\n"
    assert a["rates"]["achievement_7"] == 50 and a["rates"]["achievement_3"] == 0
    assert a["score"] == pytest.approx((101 * 51) ** (1 / 22) - 1)
    assert b["score"] == pytest.approx(101 ** (1 / 22) - 1)
    line = re.search(r"^score +(\S+) \+- (\S+)$", done.stdout, re.M)
    assert float(line[1]) == pytest.approx((a["score"] + b["score"]) / 2, abs=0.006)
    assert float(line[2]) == pytest.approx(abs(a["score"] - b["score"]) / 2, abs=0.006)


def test_runs_without_a_score_are_refused(tmp_path):
    write_run(tmp_path / "late", [(100, {0})])
    with SummaryWriter(str(tmp_path / "other")) as writer:
        writer.add_scalar("charts/episodic_return", 1.0, 1)
    (tmp_path / "empty").mkdir()
    for arguments, reason in (("late --steps 99", "--steps"), ("other", "rnd_ppo_crafter"), ("empty", "found 0")):
        done = score(arguments, tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1 and reason in done.stderr
