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
from rnd_ppo_mario import Args, Env, Game, VectorEnv

# Frame by frame what gym-super-mario-bros 7.4.0 (nes-py 8.2.1) says of lists of actions: tests/data/mario.py made it.
RECORDED = json.loads(gzip.decompress((ROOT / "tests" / "data" / "mario.json.gz").read_bytes()))
GAME = Args().env_id


def blank():
    return np.zeros((84, 84), np.uint8)


def begin(env_id=GAME):
    """A game at the beginning of an episode."""
    game = Game(env_id, 0)
    game.reset(np.zeros(game.shape, np.uint8))
    return game


def play(game, actions):
    """(x, clock) before and after every frame, until the game is over; was there a reward?"""
    seen, reward = [(game.x, game.clock_left)], 0.0
    for action in actions:
        reward += game.act(action)
        seen.append((game.x, game.clock_left))
        if game.over():
            break
    return np.array(seen), reward


# --- The game ---


@pytest.mark.parametrize("episode", range(len(RECORDED)))
def test_same_game_as_gym_super_mario_bros(episode):
    """Mario is where he is there one frame earlier, the clock as there; death and flag come one frame earlier, too."""
    there = RECORDED[episode]
    here, reward = play(begin(), there["actions"])
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
    here, _ = play(begin(), actions)
    assert here[:, 0].tolist() == there[1:]


@pytest.mark.parametrize("stage", [f"{world}-{stage}" for world in range(1, 9) for stage in range(1, 5)])
def test_every_stage_begins(stage):
    """The right stage, Mario at its beginning, alive, the clock full, and he can go to the right."""
    game = begin(Args(stage=stage).env_id)
    assert f"{game.ram[0x75F] + 1}-{game.ram[0x75C] + 1}" == stage
    assert (game.x, game.clock_left in (300, 400), game.over()) == (40, True, False)
    for _ in range(60):
        game.press("R")
    assert game.x > 60 and not game.over()


def test_clock_ends_an_episode_of_noops():
    """After 401 units of 20 frames, and without the reward."""
    env, frame = Env(GAME, sticky_action_prob=0.0), blank()
    t, summary = 0, None
    while summary is None:
        reward, _, summary = env.step(0, frame)
        t += 1
        assert reward == 0 and t < 2030
    assert t > 1980 and summary["visits"] == {2: t}
    clock_left = summary["stats"].pop("clock_left")
    assert clock_left <= 1
    assert summary["stats"] == dict(episodic_return=0.0, episodic_length=t, rooms=1, furthest_x=40)


def test_flag_is_the_only_reward_and_the_end():
    """The recorded list of frames that reaches it, played as Env plays: the statistics are those of the episode."""
    there = next(there for there in RECORDED if there["flag"])
    env, frame = Env(GAME, sticky_action_prob=0.0), blank()
    actions, real = iter(there["actions"]), env.game.act
    env.game.act = lambda _: real(next(actions))  # frame by frame, whatever the step's action is
    rewards, summary = [], None
    while summary is None:
        reward, _, summary = env.step(0, frame)
        rewards.append(reward)
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    stats = summary["stats"]
    assert stats["episodic_return"] == 1 and stats["episodic_length"] == len(rewards)
    assert 3100 < stats["furthest_x"] < 3400 and stats["furthest_x"] == max(there["x"])
    assert stats["rooms"] == len(summary["visits"]) > 150
    assert abs(stats["clock_left"] - there["clock"][-1]) <= 1


def test_action_sets_are_those_of_gym_super_mario_bros():
    names = {"A": "A", "B": "B", "left": "L", "right": "R", "down": "D", "up": "U", "NOOP": ""}
    path = Path(find_spec("gym_super_mario_bros").origin).with_name("actions.py")
    theirs = {}
    exec(path.read_text(), theirs)
    sets = dict(right="RIGHT_ONLY", simple="SIMPLE_MOVEMENT", complex="COMPLEX_MOVEMENT")
    for name, theirs_name in sets.items():
        expected = ["".join(names[button] for button in buttons) for buttons in theirs[theirs_name]]
        assert list(Game(Args(action_set=name).env_id, 0).actions) == expected


def test_buttons_do_what_they_say():
    """From one state: B makes faster, A jumps, left goes back after going right."""
    game = begin()
    for _ in range(40):
        game.press("R")
    state, x = game.get_state(), game.x

    def after(buttons, frames=30):
        game.set_state(state)
        for _ in range(frames):
            game.press(buttons)
        return game.x, int(game.ram[0xCE])  # his height on the screen

    ground = after("")[1]
    assert after("RB")[0] > after("R")[0] > after("")[0] > after("L")[0]
    assert after("A", 15)[1] < ground == after("R")[1]
    assert x > 40


# --- Observation ---


def test_observation_is_the_gray_maximum_of_frames_3_and_4():
    env, frame = Env(GAME, sticky_action_prob=0.0), blank()
    env.reset(frame)
    alone = begin()

    def gray():
        return cv2.cvtColor(alone.emulator.get_screen(), cv2.COLOR_RGB2GRAY)

    assert alone.emulator.get_screen().shape == (224, 240, 3)
    for action in np.random.default_rng(0).integers(1, 5, size=20):
        env.step(int(action), frame)
        state, pictures = env.game.get_state(), []
        for _ in range(4):  # the emulator is shared: env's own state is put back by itself
            alone.act(action)
            pictures.append(gray())
        expected = cv2.resize(np.maximum(*pictures[2:]), (84, 84), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(frame, expected)
        assert env.game.get_state() == state


def test_an_episode_begins_with_the_screen_of_its_state():
    """Nintendo's console has no picture in its state: the first one is kept, and is what the emulator showed then."""
    env, frame = Env(GAME), blank()
    expected = cv2.cvtColor(env.game.emulator.get_screen(), cv2.COLOR_RGB2GRAY)  # env has just found the beginning
    np.testing.assert_array_equal(env.game.start[1], expected)
    for _ in range(30):
        env.step(1, frame)
    env.reset(frame)
    np.testing.assert_array_equal(frame, cv2.resize(expected, (84, 84), interpolation=cv2.INTER_AREA))


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
    for other in (dict(num_workers=2), dict(num_workers=1, num_groups=1), dict(num_workers=5, num_groups=1)):
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
    "flag, value, said",
    [
        ("--stage", "9-1", "--stage: expected a stage from 1-1 to 8-4, got '9-1'"),
        ("--stage", "1-11", "try 1-1"),
        ("--rom", "no/such.nes", "pip install --no-deps gym-super-mario-bros"),
        ("--rom", __file__, "--rom: expected SHA-256 ec299b99"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(fails, flag, value, said):
    line = fails([flag, value], script)
    assert line.startswith("error: ") and said in line


def test_an_unknown_action_set_is_refused(tmp_path):
    done = run_script("--action-set all", tmp_path)
    assert done.returncode == 2 and "action-set" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(monkeypatch):
    args = Args()
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(script.UsageError, match=r"stable-retro.*\.\[mario\]"):
        Game.check(args)


def test_another_cartridge_only_if_told_so(tmp_path):
    rom = tmp_path / "other.nes"
    rom.write_bytes(Path(GAME).parent.read_bytes() + b"\0")
    args = Args(rom=str(rom))
    assert args.env_id == f"{rom}/SuperMarioBros-1-1-simple"
    with pytest.raises(script.UsageError, match="--rom-unchecked accepts"):
        Game.check(args)
    Game.check(Args(rom=str(rom), rom_unchecked=True))


def watch(arguments, cwd):
    command = [sys.executable, str(ROOT / "tools" / "watch.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run whose cartridge is gone: it was played from a file that is no longer there."""
    cwd = tmp_path_factory.mktemp("mario")
    rom = cwd / "lent.nes"
    rom.write_bytes(Path(GAME).parent.read_bytes())
    small = "--num-envs 4 --num-steps 24 --obs-norm-rollouts 1 --max-episode-steps 30 --num-minibatches 2 --device cpu"
    done = run_script(f"{small} --total-rollouts 4 --rom {rom}", cwd)
    assert done.returncode == 0, done.stderr
    rom.unlink()
    [directory] = cwd.glob("runs/*")
    return directory


@pytest.mark.slow
def test_a_run_is_played_and_watched_with_a_cartridge_at_another_path(run_directory, tmp_path):
    assert run_directory.name.startswith("SuperMarioBros-1-1-simple__rnd_ppo_mario__1__")
    recent = script.load_checkpoint(run_directory)[1]["progress"]["recent"]
    assert set(recent[0]) > {"furthest_x", "clock_left"}
    best = json.loads((run_directory / "best_episode.json").read_text())
    options = ["--video", "out.mp4", "--scale", 2, "--speed", 4]
    watched = watch([run_directory, *options, "--replay", run_directory], tmp_path)
    assert watched.returncode == 0, watched.stderr
    assert f"replay, return 0, {len(best['actions'])} frames" in watched.stdout and "warning" not in watched.stdout
    assert (tmp_path / "out.mp4").stat().st_size > 10_000

    played = run_script(f"--play {run_directory} --episodes 2 --json report.json", tmp_path)
    assert played.returncode == 0, played.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["episodes"]) == 4
    furthest = np.mean([episode["furthest_x"] for episode in report["episodes"][:2]])
    assert report["summary"][0]["furthest_x"] == furthest > 40
    assert f"furthest_x {furthest:.4g}" in played.stdout


@pytest.mark.slow
def test_the_published_weights_are_watched_without_their_bonus(tmp_path):
    weights, rom = ROOT / "models" / "mario_1-1.pt", tmp_path / "mine.nes"
    options = ["--video", "out.gif", "--scale", 2, "--speed", 4, "--max-steps", 20]
    rom.write_bytes(Path(GAME).parent.read_bytes())
    watched = watch([weights, *options, "--rom", rom], tmp_path)
    assert watched.returncode == 0, watched.stderr
    assert "out.gif: episode 1, return 0, 80 frames" in watched.stdout

    rom.write_bytes(rom.read_bytes() + b"\0")
    refused = watch([weights, *options, "--rom", rom], tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--rom-unchecked accepts" in refused.stderr
    assert watch([weights, *options, "--rom", rom, "--rom-unchecked"], tmp_path).returncode == 0
    missing = watch([weights, *options, "--rom", "no.nes"], tmp_path)
    assert missing.returncode == 2 and missing.stderr.startswith("error: --rom: expected a file, got no.nes")
