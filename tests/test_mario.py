"""The NES side of rnd_ppo_mario.py: the game against gym-super-mario-bros, environments that share an emulator."""

import gzip
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

if not all(map(find_spec, ("stable_retro", "gym_super_mario_bros"))):
    pytest.skip("needs stable-retro and gym-super-mario-bros", allow_module_level=True)

import rnd_ppo_mario as script
from rnd_ppo_mario import ACTIONS, Args, Env, VectorEnv

# Frame by frame what gym-super-mario-bros 7.4.0 (nes-py 8.2.1) says of lists of actions: tests/data/mario.py made it.
RECORDED = json.loads(gzip.decompress((ROOT / "tests" / "data" / "mario.json.gz").read_bytes()))
GAME = Args().env_id


def blank():
    return np.zeros((84, 84), np.uint8)


def console(game=GAME):
    nes, *_ = script.make_game(game, 0)
    nes.reset_game()
    return nes


def play(nes, actions):
    """(x, clock) before and after every frame, until the game is over; was there a reward?"""
    seen, reward = [(nes.x, nes.clock_left)], 0.0
    for action in actions:
        reward += nes.act(nes.getMinimalActionSet()[action])
        seen.append((nes.x, nes.clock_left))
        if nes.game_over():
            break
    return np.array(seen), reward


# --- The game ---


@pytest.mark.parametrize("episode", range(len(RECORDED)))
def test_same_game_as_gym_super_mario_bros(episode):
    """Mario is where he is there one frame earlier, the clock as there; death and flag come one frame earlier, too."""
    there = RECORDED[episode]
    here, reward = play(console(), there["actions"])
    assert len(here) == len(there["x"]) - 1
    assert here[:, 0].tolist() == there["x"][1:]
    assert here[:-1, 1].tolist() == there["clock"][: len(here) - 1]
    assert reward == there["flag"]


def test_the_recorded_episodes_are_worth_comparing():
    assert sum(len(there["actions"]) for there in RECORDED) > 5000
    assert sum(there["flag"] for there in RECORDED) >= 1
    assert sum(not there["flag"] for there in RECORDED) >= 5
    assert len({action for there in RECORDED for action in there["actions"]}) == 7


@pytest.mark.skipif(not find_spec("nes_py"), reason="needs nes-py, which gym-super-mario-bros runs on")
def test_same_game_as_gym_super_mario_bros_live():
    from gym_super_mario_bros.actions import SIMPLE_MOVEMENT
    from gym_super_mario_bros.smb_env import SuperMarioBrosEnv
    from nes_py.wrappers import JoypadSpace

    env = JoypadSpace(SuperMarioBrosEnv(target=(1, 1)), SIMPLE_MOVEMENT)
    env.reset()
    actions = np.random.default_rng(9).integers(7, size=400).repeat(8)
    there = [40]
    for action in actions:
        *_, done, info = env.step(int(action))
        there.append(int(info["x_pos"]))
        if done:
            break
    here, _ = play(console(), actions)
    assert here[:, 0].tolist() == there[1:]


@pytest.mark.parametrize("stage", [f"{world}-{stage}" for world in range(1, 9) for stage in range(1, 5)])
def test_every_stage_begins(stage):
    """The right stage, Mario at its beginning, alive, the clock full, and he can go to the right."""
    nes = console(Args(stage=stage).env_id)
    assert f"{nes.ram[0x75F] + 1}-{nes.ram[0x75C] + 1}" == stage
    assert (nes.x, nes.clock_left in (300, 400), nes.game_over()) == (40, True, False)
    for _ in range(60):
        nes.act("R")
    assert nes.x > 60 and not nes.game_over()


def test_clock_ends_an_episode_of_noops():
    """After 401 units of 20 frames, and without the reward."""
    env, frame = Env(GAME, sticky_action_prob=0.0), blank()
    t, info = 0, None
    while info is None:
        reward, _, info = env.step(0, frame)
        t += 1
        assert reward == 0 and t < 2030
    assert t > 1980
    assert info["stats"] == dict(
        episodic_return=0.0, episodic_length=t, rooms=1, furthest_x=40, clock_left=info["stats"]["clock_left"]
    )
    assert info["places"] == {2: t}
    assert info["stats"]["clock_left"] <= 1


def test_flag_is_the_only_reward_and_the_end():
    """The recorded list of frames that reaches it, played as Env plays: the statistics are those of the episode."""
    there = next(there for there in RECORDED if there["flag"])
    env, frame = Env(GAME, sticky_action_prob=0.0), blank()
    actions, real = iter(there["actions"]), env.game.act
    env.game.act = lambda _: real(ACTIONS[next(actions)])  # frame by frame, whatever the step's action is
    rewards, info = [], None
    while info is None:
        reward, _, info = env.step(0, frame)
        rewards.append(reward)
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    stats = info["stats"]
    assert stats["episodic_return"] == 1 and stats["episodic_length"] == len(rewards)
    assert 3100 < stats["furthest_x"] < 3400 and stats["furthest_x"] == max(there["x"])
    assert stats["rooms"] == len(info["places"]) > 150
    assert stats["clock_left"] == there["clock"][-1] or abs(stats["clock_left"] - there["clock"][-1]) <= 1


def test_action_sets_are_those_of_gym_super_mario_bros():
    names = {"A": "A", "B": "B", "left": "L", "right": "R", "down": "D", "up": "U", "NOOP": ""}
    path = Path(find_spec("gym_super_mario_bros").origin).with_name("actions.py")
    theirs = {}
    exec(path.read_text(), theirs)
    sets = dict(right="RIGHT_ONLY", simple="SIMPLE_MOVEMENT", complex="COMPLEX_MOVEMENT")
    for name, theirs_name in sets.items():
        expected = ["".join(names[button] for button in buttons) for buttons in theirs[theirs_name]]
        assert console(Args(action_set=name).env_id).getMinimalActionSet() == expected


def test_buttons_do_what_they_say():
    """From one state: B makes faster, A jumps, left goes back after going right."""
    nes = console()
    for _ in range(40):
        nes.act("R")
    state, x = nes.cloneState(), nes.x

    def after(buttons, frames=30):
        nes.restoreState(state)
        for _ in range(frames):
            nes.act(buttons)
        return nes.x, int(nes.ram[0xCE])  # his height on the screen

    ground = after("")[1]
    assert after("RB")[0] > after("R")[0] > after("")[0] > after("L")[0]
    assert after("A", 15)[1] < ground == after("R")[1]
    assert x > 40


# --- Observation ---


def test_observation_is_the_gray_maximum_of_frames_3_and_4():
    env, frame = Env(GAME, sticky_action_prob=0.0), blank()
    env.reset(frame)
    alone = console()
    gray = lambda: cv2.cvtColor(alone.getScreenRGB(), cv2.COLOR_RGB2GRAY)  # noqa: E731
    expected = cv2.resize(gray(), (84, 84), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(frame, expected)
    for action in np.random.default_rng(0).integers(1, 5, size=20):
        env.step(int(action), frame)
        state, pictures = env.game.cloneState(), []
        for _ in range(4):  # the emulator is shared: env's own state is put back by itself
            alone.act(ACTIONS[action])
            pictures.append(gray())
        expected = cv2.resize(np.maximum(*pictures[2:]), (84, 84), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(frame, expected)
        assert env.game.cloneState() == state
    assert alone.getScreenRGB().shape == (224, 240, 3)


# --- Environments that share an emulator ---


def run(envs, actions):
    try:
        frames = [envs.reset()]
        return frames, [envs.step(row) for row in actions]
    finally:
        envs.close()


def test_swapped_environments_are_those_of_each_alone():
    """Bit for bit, whatever the number of workers and groups: 5 in one emulator, 5 in two, each in its own."""
    actions = np.random.default_rng(1).integers(7, size=(150, 5))
    options = dict(seed=3, max_episode_steps=60)
    first, expected = run(VectorEnv(GAME, 5, num_workers=1, **options), actions)
    assert len({frame.tobytes() for frames, *_ in expected for frame in frames}) > 300
    assert sum(len(infos) for *_, infos in expected) >= 10
    for other in (dict(num_workers=2), dict(num_workers=1, num_groups=1), dict(num_workers=5)):
        begin, found = run(VectorEnv(GAME, 5, **other, **options), actions)
        np.testing.assert_array_equal(begin[0], first[0])
        for (frames, rewards, dones, infos), (a, b, c, d) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(frames, a)
            np.testing.assert_array_equal(rewards, b)
            np.testing.assert_array_equal(dones, c)
            assert infos == d
    for i in range(5):
        _, found = run(VectorEnv(GAME, 1, num_workers=1, first_index=i, **options), actions[:, i : i + 1])
        for (frames, *_), (all_frames, *_) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(frames[0], all_frames[i])


def test_state_goes_on_identically_in_a_fresh_process(tmp_path):
    env, frame = Env(GAME, 3), blank()
    actions = np.random.default_rng(2).integers(7, size=120).tolist()
    for action in actions[:60]:
        env.step(action, frame)
    torch.save(env.get_state(), tmp_path / "state.pt")
    code = f"""
import numpy as np, torch, rnd_ppo_mario as script
env, frame = script.Env({GAME!r}, 7, seed=9), np.zeros((84, 84), np.uint8)
env.step(3, frame)
env.set_state(torch.load("state.pt", weights_only=True))
print([(*env.step(action, frame)[:2], env.game.furthest_x, int(frame.sum())) for action in {actions[60:]}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), check=True)  # fmt: skip
    expected = [(*env.step(action, frame)[:2], env.game.furthest_x, int(frame.sum())) for action in actions[60:]]
    assert done.stdout.strip() == str(expected)


# --- The script ---


def run_script(arguments, cwd):
    command = [sys.executable, str(ROOT / "rnd_ppo_mario.py"), *arguments.split()]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--stage 9-1", "--stage: expected a stage from 1-1 to 8-4, got '9-1'"),
        ("--stage 1-11", "try 1-1"),
        ("--action-set all", "action-set"),
        ("--rom no/such.nes", "pip install --no-deps gym-super-mario-bros"),
        (f"--rom {__file__}", "--rom: expected SHA-256 ec299b99"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, tmp_path):
    done = run_script(arguments, tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    if "action-set" not in arguments:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_missing_packages_are_named(monkeypatch):
    args = Args()
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(script.UsageError, match=r"stable-retro.*\.\[mario\]"):
        script.check_game(args)


def test_another_cartridge_only_if_told_so(tmp_path):
    rom = tmp_path / "other.nes"
    rom.write_bytes(Path(GAME).parent.read_bytes() + b"\0")
    args = Args(rom=str(rom))
    assert args.env_id == f"{rom}/SuperMarioBros-1-1-simple"
    with pytest.raises(script.UsageError, match="--rom-unchecked goes on"):
        script.check_game(args)
    script.check_game(Args(rom=str(rom), rom_unchecked=True))


@pytest.mark.slow
def test_the_best_episode_of_a_run_can_be_watched_and_its_checkpoint_played(tmp_path):
    small = "--num-envs 4 --num-steps 24 --obs-norm-rollouts 1 --max-episode-steps 30 --num-minibatches 2 --device cpu"
    done = run_script(f"{small} --total-rollouts 4", tmp_path)
    assert done.returncode == 0, done.stderr
    [run] = tmp_path.glob("runs/*")
    recent = script.load_checkpoint(run / "checkpoint_000004.pt")["progress"]["recent"]
    assert set(recent[0]) > {"furthest_x", "clock_left"}
    assert run.name.startswith("SuperMarioBros-1-1-simple__rnd_ppo_mario__1__")
    best = json.loads((run / "best_shortest.json").read_text())
    command = [sys.executable, str(ROOT / "tools" / "watch.py"), str(run), "--video", "out.mp4", "--scale", "2"]
    command += ["--speed", "4", "--replay", str(run / "best_shortest.json")]
    watched = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert watched.returncode == 0, watched.stderr
    assert f"{len(best['actions'])} frames" in watched.stdout and "warning" not in watched.stdout
    assert (tmp_path / "out.mp4").stat().st_size > 10_000
    played = run_script(f"--play {run / 'checkpoint_000004.pt'} --episodes 2 --json report.json", tmp_path)
    assert played.returncode == 0, played.stderr
    assert len(json.loads((tmp_path / "report.json").read_text())["episodes"]) == 4
