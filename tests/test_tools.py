"""The tools that show what a run has produced: files read back by other libraries, numbers computed another way."""

import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, last_checkpoint
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

pytest.importorskip("imageio_ffmpeg", reason="needs the extra `video`")
pytest.importorskip("matplotlib", reason="needs the extra `video`")
sys.path.insert(0, str(ROOT / "tools"))
import export
import plot
import watch

STEPS = 25  # of an episode here, which are 100 frames


@pytest.fixture(scope="module")
def run(base_run):
    return last_checkpoint(base_run[1]).parent


@pytest.fixture(scope="module")
def loaded(run):
    """Script and state of the run's last checkpoint."""
    return watch.load(run)[1:]


def play(loaded, index=0, stride=1, replay=(), **changes):
    """The steps of an episode, which is short unless told otherwise."""
    script, state = loaded
    args = watch.checked_args(script, state, **dict(seed=1, max_episode_steps=STEPS) | changes)
    return list(watch.play(script, watch.load_networks(script, state), args, index, stride, replay))


def watched(run, out, *argv):
    """A short video by the command line; its exit code."""
    return watch.main([str(arg) for arg in (run, "--video", out, "--scale", 2, "--max-steps", STEPS, *argv)])


def video(path):
    """Images (n, H, W, 3), BGR, and images a second, as OpenCV reads them."""
    capture = cv2.VideoCapture(str(path))
    images = list(itertools.takewhile(lambda image: image is not None, (capture.read()[1] for _ in itertools.count())))
    return np.array(images), capture.get(cv2.CAP_PROP_FPS)


def refusal(capsys, main, *argv):
    """What `main` says when it refuses; that it is one line, with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        sys.exit(main([str(arg) for arg in argv]))
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def save(script, state, folder, **changes):
    """The directory of a run with a checkpoint of the changed state."""
    folder.mkdir()
    script.save_checkpoint(state | changes, folder / "checkpoint_000003.pt")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# === What is kept for playing =========================================================================================


def test_an_export_is_small_and_plays_as_the_checkpoint(run, loaded, tmp_path, capsys):
    script, state = loaded
    out = tmp_path / "models" / "game.pt"
    assert export.main([str(run), str(out)]) == 0
    assert out.stat().st_size < 6e6 and list(out.parent.iterdir()) == [out]
    small = script.load_checkpoint(out)[1]
    weights = script.load_agent(small).state_dict()
    assert all(torch.equal(weights[name], state["agent"][name]) for name in state["agent"])
    args = script.Args(**script.saved_args(small) | dict(play=str(out), episodes=1, max_episode_steps=5, device="cpu"))
    assert script.play(args)["episodes"][0]["episodic_length"] == 5
    with pytest.raises(script.UsageError, match="exported"):
        script.check_resumable(script.Args(), out, small)
    capsys.readouterr()
    assert "expected a checkpoint" in refusal(capsys, export.main, tmp_path / "nowhere", tmp_path / "a.pt")


def test_an_export_can_be_watched_without_the_bonus(run, loaded, tmp_path):
    assert export.main([str(run), str(tmp_path / "game.pt")]) == 0
    script, small = watch.load(tmp_path / "game.pt")[1:]
    steps = play((script, small))
    assert [step._replace(images=[]) for step in steps] == [
        step._replace(images=[], bonus=None, scaled_bonus=None) for step in play(loaded)
    ]
    assert not [name for name in watch.cells(steps[-1]) if "bonus" in name]
    assert watch.Strip(560, "Pong-v5", steps[0]).height < watch.Strip(560, "Pong-v5", play(loaded)[0]).height
    assert watched(tmp_path / "game.pt", tmp_path / "a.mp4", "--rooms", tmp_path / "rooms.png") == 0
    assert len(video(tmp_path / "a.mp4")[0]) == 4 * STEPS and (tmp_path / "rooms.png").exists()


def test_an_export_says_nothing_of_the_machine(run, tmp_path):
    assert export.main([str(run), str(tmp_path / "game.pt")]) == 0
    script, small = watch.load(tmp_path / "game.pt")[1:]
    assert not script.LOCAL_ARGS & set(small["args"]) and str(run.parent).encode() not in contents(tmp_path)["game.pt"]


def test_an_export_into_a_run_touches_no_file_of_it(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    script, _ = watch.load(copy)[1:]
    before, newest = contents(copy), script.load_checkpoint(copy)[0]
    assert export.main([str(copy), str(copy / "policy.pt")]) == 0
    after = contents(copy)
    assert after.pop("policy.pt") and after == before and script.load_checkpoint(copy)[0] == newest


def test_an_export_replaces_no_file_and_takes_no_name_of_a_checkpoint(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    before = contents(copy)
    for name in before:
        assert "does not exist yet" in refusal(capsys, export.main, copy, copy / name)
    assert "does not exist yet" in refusal(capsys, export.main, copy, tmp_path)
    for name in ("checkpoint_000999.pt", "checkpoint_1.pt", "best.pt"):
        if name not in before:
            assert "another name" in refusal(capsys, export.main, copy, copy / name)
    assert contents(copy) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs ulimit")
def test_an_export_that_cannot_be_written_leaves_nothing(run, tmp_path):
    command = f"ulimit -f 1000; exec '{sys.executable}' '{ROOT}/tools/export.py' '{run}' game.pt"  # 1000 KiB
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


# === Checkpoints of all kinds =========================================================================================


def test_a_run_plays_its_newest_checkpoint_that_is_whole(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    whole = last_checkpoint(tmp_path)
    for name in ("checkpoint_000002-keep.pt", "checkpoint_000009.pt", "checkpoint_1000000.pt"):
        (copy / name).write_bytes(whole.read_bytes()[:-1000])
    path, script, _ = watch.load(copy)
    assert path == whole and script.__file__ == str(SCRIPT)
    whole.rename(copy / "checkpoint_1000001.pt")  # newer than 000009, although it sorts before it
    assert watch.load(copy)[0].name == "checkpoint_1000001.pt"


def test_a_checkpoint_of_version_0_1_plays_with_its_bonus(loaded, tmp_path):
    """Format 1 had the statistics beside the networks, and arguments that belong to another machine."""
    script, state = loaded
    rnd = dict(state["rnd"])
    statistics = rnd.pop("_extra_state")
    args = state["args"] | dict(device="cuda", track=True, run_dir="/nowhere")
    run = save(script, state, tmp_path / "run", format=1, rnd=rnd, args=args, **statistics)
    old = play(watch.load(run)[1:], stride=0)
    assert old == play(loaded, stride=0) and all(step.bonus > 0 for step in old)


def test_a_variant_is_found_by_the_name_in_its_checkpoint(tmp_path):
    script = pytest.importorskip("rnd_ppo_atari_lstm")
    args, progress = vars(script.Args()), dict(iteration=1, step=0)
    networks = dict(agent=script.Agent(18, script.Args.lstm_size).state_dict(), rnd=script.RND().state_dict())
    state = dict(format=script.FORMAT, script="rnd_ppo_atari_lstm", args=args, progress=progress)
    run = save(script, state | networks, tmp_path / "run")
    _, found, state = watch.load(run)
    assert found.__file__ == script.__file__
    steps = play((found, state), stride=3, max_episode_steps=5)
    assert [len(step.images) for step in steps] == [2, 1, 1, 2, 1] and all(step.bonus > 0 for step in steps)


# === The video's file =================================================================================================


def test_mp4_from_anywhere_with_a_copied_script(run, tmp_path):
    """All frames, 60 a second, 4:3; relative paths, another directory, a user's copy of the script."""
    (tmp_path / "mine").mkdir()
    copy = tmp_path / "mine" / SCRIPT.name
    copy.write_text(SCRIPT.read_text() + "\nprint('the copy')\n")
    argv = [run, "--script", "mine/rnd_ppo_atari.py", "--video", "a.mp4", "--max-steps", STEPS, "--scale", 2]
    command = [sys.executable, ROOT / "tools" / "watch.py", *argv]
    done = subprocess.run([str(arg) for arg in command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(last_checkpoint(run.parent)) in done.stdout and "a.mp4: episode 1, return 0, 100 frames" in done.stdout
    assert "the copy" in done.stdout and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.mp4"]
    images, fps = video(tmp_path / "a.mp4")
    assert fps == 60 and len(images) == 4 * STEPS
    assert images.shape[2] == 2 * 210 * 4 / 3 and 1.2 < images.shape[1] / (2 * 210) < 1.5  # the game, and the strip


def test_images_are_the_games(loaded, tmp_path):
    """The video's last image shows the emulator's last screen, with each pixel where it belongs."""
    steps = play(loaded)
    last = watch.record(tmp_path / "a.mp4", iter(steps), 60, 2)
    assert last is steps[-1] and sum(len(step.images) for step in steps) == 4 * STEPS
    shown = video(tmp_path / "a.mp4")[0][-1][:420, :, ::-1].astype(float)
    screen = cv2.resize(steps[-1].images[-1], (560, 420), interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(shown - screen).mean() < 6


def test_a_gif_three_times_as_fast_has_every_ninth_frame(run, tmp_path):
    """20 a second."""
    path = tmp_path / "a.gif"
    assert watched(run, path, "--speed", 3) == 0
    with Image.open(path) as image:
        assert image.n_frames == math.ceil(4 * STEPS / 9) and image.size[0] == 560
        durations = []
        for i in range(image.n_frames):
            image.seek(i)
            durations.append(image.info["duration"])
        assert durations == [50] * image.n_frames
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize(
    "rows, columns, size",
    [
        (210, 160, (840, 630)),
        (250, 160, (1000, 750)),
        (224, 240, (822, 672)),
        (84, 84, (252, 252)),
        (160, 160, (480, 480)),
        (240, 240, (720, 720)),
        (99, 85, (256, 297)),
    ],
)
def test_pixels_have_the_shape_of_their_screen(rows, columns, size):
    """Atari fills a 4:3 screen, the pixels of the NES are 8:7, those of other games are squares."""
    assert watch.video_size(np.zeros((rows, columns, 3), np.uint8), 3) == size


def test_a_video_of_any_picture_can_be_written(tmp_path):
    """Odd sizes, too, which H.264 would refuse."""
    step = play_step(images=[np.full((99, 85, 3), 200, np.uint8)] * 3)
    watch.record(tmp_path / "a.mp4", iter([step, step]), 60, 3)
    images, _ = video(tmp_path / "a.mp4")
    assert len(images) == 6 and images.shape[2] == 256 and images[0, :297].mean() == pytest.approx(200, abs=3)


def test_a_game_without_colors_is_shown_in_its_gray(loaded):
    """That of a user, who has replaced the class Game; and in the colors of its method `picture`, if it has one."""
    script, _ = loaded
    atari = script.Game("ALE/MontezumaRevenge-v5", 0)
    screen = np.zeros(atari.shape, np.uint8)
    atari.reset(screen)

    class Own:
        shape, palette, draw = atari.shape, atari.palette, staticmethod(atari.draw)

    assert np.array_equal(watch.picture(Own()), np.stack([atari.palette[screen]] * 3, -1))
    Own.palette = None
    assert np.array_equal(watch.picture(Own()), np.stack([screen] * 3, -1))
    Own.picture = staticmethod(atari.ale.getScreenRGB)
    assert np.array_equal(watch.picture(Own()), watch.picture(atari))
    assert len(np.unique(watch.picture(atari).std(-1))) > 2  # it has colors


def test_an_own_game_has_its_own_speed(loaded, tmp_path, monkeypatch, capsys):
    """With FPS 15 and an action per frame: as long as its time of play, each image a single screen of the game."""
    script, state = loaded
    args = watch.checked_args(script, state, max_episode_steps=30, seed=1)
    networks = watch.load_networks(script, state)
    monkeypatch.setattr(script.Game, "FPS", 15, raising=False)
    monkeypatch.setattr(script.Game, "SKIP", 1)
    screens = [step.images[0] for step in watch.play(script, networks, args)]
    steps = list(watch.play(script, networks, args, stride=3))
    assert np.array_equal([image for step in steps for image in step.images], [*screens[::3], screens[-1]])
    assert steps[-1].seconds == 2 and watch.cells(steps[-1])["time"] == "0:02"

    # Every second or third screen, and the last.
    for suffix, speed, images, fps in ((".mp4", 1, 30, 15), (".mp4", 8, 16, 60), (".gif", 4, 11, 20)):
        path = tmp_path / f"a{suffix}"
        command = f"RUN --video {path} --speed {speed} --max-steps 30 --scale 2"
        watch.record_videos(watch.parse(command.split()), script, state)
        assert "30 frames, 0:02 of play" in capsys.readouterr().out
        shown, rate = video(path)
        assert (len(shown), rate) == (images, fps)


def test_an_episode_leaves_no_emulator(loaded):
    """A copy's emulator may be a process of its own: of many episodes one after the other, one is alive."""
    script, _ = loaded
    gc.disable()
    try:
        for _ in range(2):
            play(loaded, stride=0, max_episode_steps=2)
        next(watch.play(script, watch.load_networks(*loaded), watch.checked_args(*loaded)))  # not played to its end
        alive = [thing for thing in gc.get_objects() if type(thing) is script.Game]
    finally:
        gc.enable()
    assert not alive


def test_several_episodes_have_a_file_each(run, tmp_path):
    assert watched(run, tmp_path / "a.mp4", "--episodes", 3) == 0
    assert sorted(contents(tmp_path)) == ["a-1.mp4", "a-2.mp4", "a-3.mp4"]
    assert len(set(contents(tmp_path).values())) == 3


def test_best_records_the_episode_with_the_highest_return(loaded, tmp_path, capsys):
    script, state = loaded
    args = state["args"] | dict(
        env_id="ALE/Boxing-v5"
    )  # as many actions as Montezuma's Revenge, and returns that differ
    run = save(script, state, tmp_path / "run", args=args)
    assert watched(run, tmp_path / "a.mp4", "--episodes", 4, "--max-steps", 60, "--best") == 0
    said = capsys.readouterr().out
    returns = [float(text) for text in re.search("returns: (.*)", said)[1].split()]
    assert len(returns) == 4 and len(set(returns)) > 1
    assert f"a.mp4: episode {np.argmax(returns) + 1}, return {max(returns):g}, 240 frames" in said
    assert len(video(tmp_path / "a.mp4")[0]) == 240


def test_best_of_equal_returns_is_the_episode_with_the_most_rooms(loaded, monkeypatch):
    """In Mario, where most episodes return 0, the one that comes furthest."""
    script, state = loaded
    monkeypatch.setattr(script.Game, "room", lambda game: game.ale.getRAM()[42] // 8)  # of other places: how far right
    args = watch.checked_args(script, state, max_episode_steps=STEPS, seed=1)
    rooms = [len({step.room for step in play(loaded, i, stride=0)}) for i in range(4)]
    assert len(set(rooms)) > 1
    assert watch.best_episode(script, watch.load_networks(script, state), args, 4) == np.argmax(rooms)


def test_an_episode_can_be_played_again(loaded):
    """--best relies on it."""
    a, b, other = (play(loaded, index, stride=0, max_episode_steps=40) for index in (3, 3, 4))
    assert a == b != other


def test_replay_is_the_recorded_episode(run, loaded, tmp_path, capsys):
    """The best episode of the training again: as many frames, as many points, the same last picture as it had."""
    script, state = loaded
    recorded = json.loads((run / "best_episode.json").read_text())
    assert len(recorded["actions"]) == 80 and recorded["episodic_length"] == 20
    steps = play(loaded, 3, replay=recorded["actions"], seed=9, max_episode_steps=1000)
    assert steps[-1].frames == 80 and steps[-1].score == recorded["episodic_return"]
    game = script.Game(state["args"]["env_id"], 77)
    game.reset(np.zeros(game.shape, np.uint8))
    for action in recorded["actions"]:
        game.act(action)
    assert np.array_equal(steps[-1].images[-1], game.ale.getScreenRGB())

    (tmp_path / "best_shortest.json").write_text(json.dumps(recorded))  # its name in version 0.1.0
    for replay in (run / "best_episode.json", run, tmp_path / "best_shortest.json"):
        argv = [run, "--video", tmp_path / "a.mp4", "--scale", 2, "--replay", replay]
        assert watch.main([str(arg) for arg in argv]) == 0
        assert "a.mp4: replay, return 0, 80 frames" in capsys.readouterr().out
        assert len(video(tmp_path / "a.mp4")[0]) == 80


@pytest.mark.parametrize("change", [dict(rooms=2), dict(episodic_return=100.0), {}])
def test_a_replay_that_differs_from_the_recorded_episode_is_reported(change, run, tmp_path, capsys):
    """As in a game whose episodes begin differently; nothing is said of the same one."""
    recorded = json.loads((run / "best_episode.json").read_text()) | change
    (tmp_path / "a.json").write_text(json.dumps(recorded))
    argv = [run, "--video", tmp_path / "a.mp4", "--scale", 2, "--replay", tmp_path / "a.json"]
    assert watch.main([str(arg) for arg in argv]) == 0
    assert ("warning: not the recorded episode" in capsys.readouterr().out) == bool(change)


def test_a_replay_that_is_none_is_refused(run, tmp_path, capsys):
    recorded = json.loads((run / "best_episode.json").read_text())

    def refused(**changes):
        (tmp_path / "a.json").write_text(json.dumps(recorded | changes))
        return refusal(capsys, watch.main, run, "--video", tmp_path / "a.mp4", "--replay", tmp_path / "a.json")

    assert "expected an episode of MontezumaRevenge" in refused(env_id="ALE/Pong-v5")
    for wrong in (dict(actions=[]), dict(actions=["up"]), dict(actions=3), dict(episodic_return=None), dict(env_id=1)):
        assert "--replay: expected best_episode.json" in refused(**wrong)
    for actions in ([0, 18], [-1]):
        assert "expected actions from 0 to 17" in refused(actions=actions)
    for path in (run / "lock", tmp_path, tmp_path / "none.json"):
        said = refusal(capsys, watch.main, run, "--video", tmp_path / "a.mp4", "--replay", path)
        assert "--replay: expected best_episode.json" in said
    for flag in ("--best", "--greedy", "--episodes 2", "--seed 3", "--sticky 0", "--max-steps 9"):
        argv = [run, "--video", tmp_path / "a.mp4", "--replay", run, *flag.split()]
        assert "expected no --replay with it" in refusal(capsys, watch.main, *argv)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_leaves_a_video_that_plays(run, tmp_path):
    argv = [ROOT / "tools" / "watch.py", run, "--video", tmp_path / "a.mp4", "--episodes", "999", "--scale", "2"]
    with subprocess.Popen([sys.executable, *argv], stderr=subprocess.PIPE, start_new_session=True) as process:
        while not (tmp_path / "a-2.mp4").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(30) == 130 and process.stderr.read() == b""
    assert len(video(tmp_path / "a-1.mp4")[0]) == 80 and len(video(tmp_path / "a-2.mp4")[0]) > 0


def test_a_video_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    for name in ("a.mp4", "a.gif"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere" / name)
        said = refusal(capsys, watch.main, run, "--video", tmp_path / name, "--max-steps", 3, "--scale", 2)
        assert "cannot be written" in said and "No such file" in said


def test_without_the_program_ffmpeg_it_is_one_line(run, tmp_path, capsys, monkeypatch):
    """As with a wheel of imageio-ffmpeg that has none, on a system without."""

    def missing():
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(watch.imageio_ffmpeg, "get_ffmpeg_exe", missing)
    said = refusal(capsys, watch.main, run, "--video", tmp_path / "a.mp4", "--max-steps", 3)
    assert "expected the program ffmpeg, found none" in said


MEMORY = """
import sys, threading, time
from pathlib import Path
import psutil
sys.path.insert(0, sys.argv[1])
import watch

peak, me = 0, psutil.Process()
def look():
    global peak
    while True:
        rss = 0
        for process in (me, *me.children(recursive=True)):
            try:
                rss += process.memory_info().rss
            except psutil.Error:
                pass
        peak = max(peak, rss / 2**20)
        time.sleep(0.02)

_, script, state = watch.load(sys.argv[2])
state["agent"]["policy_head.bias"][0] += 1e6  # always the no-op: nobody dies
args = watch.checked_args(script, state, sticky_action_prob=0.0, max_episode_steps=int(sys.argv[4]))
networks = watch.load_networks(script, state)
threading.Thread(target=look, daemon=True).start()
for _ in watch.play(script, networks, args, stride=0):
    pass
played = peak
last = watch.record(Path(sys.argv[3]), watch.play(script, networks, args), 60, int(sys.argv[5]), "MontezumaRevenge-v5")
print(last.frames, played, peak)
"""


@pytest.mark.slow
def test_recording_needs_little_memory(run, tmp_path):
    """Less than 500 MiB more than playing, encoder included; all images together would be 1.1 GiB."""
    argv = [ROOT / "tools", run, tmp_path / "a.mp4", 300, 2]
    command = [sys.executable, "-c", MEMORY, *(str(arg) for arg in argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    frames, played, recorded = map(float, done.stdout.split())
    assert frames == 1200 and recorded - played < 500, (played, recorded)


# === The strip ========================================================================================================


def test_numbers_are_the_agents(loaded):
    """Values, rewards and bonuses against a loop of its own, with its own stacks and whitening."""
    script, state = loaded
    steps = play(loaded, 2, greedy=True, sticky_action_prob=0.5)
    agent, rnd = script.load_agent(state), script.RND()
    rnd.load_state_dict(state["rnd"])
    env = script.Env(state["args"]["env_id"], 2, seed=1, sticky_action_prob=0.5, max_episode_steps=STEPS)
    statistics = state["rnd"]["_extra_state"]
    mean, var = (np.asarray(statistics["obs_rms"][name]) for name in ("mean", "var"))
    std = math.sqrt(float(statistics["int_return_rms"]["var"]))
    stack, frame, score = np.zeros((4, 84, 84), np.uint8), np.zeros((84, 84), np.uint8), 0.0
    env.reset(frame)
    for step in steps:
        stack = np.concatenate([stack[1:], frame[None]])
        with torch.no_grad():
            logits, value, int_value = agent(torch.from_numpy(stack[None]))
            reward, _, _ = env.step(int(logits.argmax()), frame)
            x = torch.from_numpy(((frame - mean) / np.sqrt(var)).clip(-5, 5).astype(np.float32))[None, None]
            bonus = ((rnd.predictor(x) - rnd.target(x)) ** 2).mean().item()
        score += reward
        assert (step.score, step.reward, step.room) == (score, reward, env.room)
        expected = pytest.approx((value.item(), int_value.item(), bonus, bonus / std), rel=1e-4, abs=1e-6)
        assert (step.value, step.int_value, step.bonus, step.scaled_bonus) == expected
        assert np.array_equal(step.images[-1], env.game.ale.getScreenRGB())
        shown = list(watch.cells(step).values())
        assert [float(text) for text in shown[1:]] == pytest.approx(
            [score, 1, value.item(), int_value.item(), bonus, bonus / std], rel=6e-3, abs=1e-6
        )
    assert len(steps) == STEPS and len({step.bonus for step in steps}) > 15


def play_step(images=(), frames=4, room=None, score=0.0, reward=0.0, value=0.0, bonus=0.1):
    return watch.Step(list(images), frames, frames / 60, 1, room, score, reward, value, value, bonus, bonus)


def test_numbers_are_written_as_a_reader_expects():
    shown = watch.cells(play_step(frames=17999, room=7, score=1234567.0, value=-123456.7, bonus=0.05))
    assert shown == {
        "time": "4:59",
        "score": "1234567",
        "room": "7",
        "value": "-1.23e+05",
        "intrinsic value": "-1.23e+05",
        "bonus": "0.0500",
        "bonus / std": "0.0500",
    }
    assert watch.three_digits(100.0) == "100"


def draw(values, rewards=(), rooms=(), width=840, game=""):
    """The strip after steps with these bonuses."""
    strip = None
    for t, value in enumerate(values):
        room = rooms[t] if rooms else None
        reward = rewards[t] if rewards else 0.0
        step = play_step(frames=4 * t + 4, room=room, reward=reward, bonus=value)
        strip = strip or watch.Strip(width, game, step)
        image = strip.draw(step)
    return strip, image


def test_bars_are_as_high_as_the_bonus_and_marks_are_where_the_rewards_were():
    values = [1.0] * 100 + [0.5] * 50 + [0.25] * 50
    strip, image = draw(values, rewards=[0.0] * 150 + [100.0] + [0.0] * 49)
    assert image.shape == (strip.height, 840, 3) and image.dtype == np.uint8
    plot = image[strip.top : strip.bottom]
    height, width = strip.bottom - strip.top, strip.right - strip.left
    bars = (plot.astype(int) - watch.PAPER).max(-1) > 10
    for t, share in ((50, 1), (120, 0.5), (180, 0.25), (250, 0)):
        assert bars[:, strip.left + t * width // 300].sum() == math.ceil(share * height), t
    green = (plot == watch.REWARD).all(-1)[: height // 2].all(0)
    assert np.flatnonzero(green).tolist() == [strip.left + 150 * width // 300]
    strip, image = draw([0.004] * 299 + [0.1, 0.004])  # the axis has doubled, and a spike is as high as before
    bars = (image[strip.top : strip.bottom].astype(int) - watch.PAPER).max(-1) > 10
    assert len(strip.bonuses) == 600 and bars.sum(0).max() == height and (bars.sum(0) == height).sum() in (1, 2)


def test_the_axis_of_the_strip_is_in_minutes_of_play(monkeypatch):
    """It has room for 75 steps of 4 frames, then for twice as many, and so on."""
    ends = []
    monkeypatch.setattr(watch, "clock", lambda seconds: ends.append(seconds) or "0:00")
    for steps, seconds in ((75, 5), (76, 10), (301, 40)):
        draw([0.1] * steps)
        assert ends[-1] == pytest.approx(seconds)


def test_new_rooms_are_marked_in_every_game_that_has_them():
    rooms = [1, 1, 2, 2, 6]
    strip, image = draw([0.1] * 5, rooms=rooms, game="MontezumaRevenge-v5")
    assert [label for _, label, _ in strip.marks] == ["room 2", "room 6"]
    width, height = strip.room_size
    cells = watch.pyramid(strip.right + width, strip.bottom - 4 * height, width, height)
    colors = {room: tuple(image[y + 5, x + 5]) for room, x, y in cells}
    visited = {1: watch.SURPRISE_DARK, 2: watch.SURPRISE_DARK, 6: watch.SURPRISE}
    assert colors == {room: visited.get(room, watch.PAPER) for room in range(24)}
    strip, _ = draw([0.1] * 5, rooms=rooms, game="Pitfall-v5")
    assert [label for _, label, _ in strip.marks] == ["room 2", "room 6"] and not strip.has_map
    assert draw([0.1] * 5)[0].marks == []


def test_columns_and_cells_are_too_many_to_mark_each():
    many = {"SuperMarioBros-1-1-simple": "column", "MiniGrid-MultiRoom-N6-v0@1": "cell"}
    for game, name in (many | {"Pitfall-v5": "room", "Maze-1": "room"}).items():
        strip, _ = draw([0.1] * 3, rooms=[1, 2, 3], game=game)
        assert strip.place == name and name in watch.cells(play_step(room=3), name)
        assert bool(strip.marks) == (game not in many)


# Widths of 84 pixels, of the NES and of Atari at their smallest, and larger ones.
@pytest.mark.parametrize("width", [168, 252, 548, 560, 822, 840, 1120, 2240])
@pytest.mark.parametrize("bonus", [0.000123456, None])
def test_the_strip_is_legible_at_every_size(width, bonus):
    """Letters of 12 pixels at least, a gap after even the longest number, nothing cut off."""
    game = "MontezumaRevenge-v5" if width >= 560 else ""
    step = play_step(frames=17999, room=23, score=12345678.0, reward=-100.0, value=-0.000123456, bonus=bonus)
    strip = watch.Strip(width, game, step)
    image = strip.draw(step)
    assert strip.text.size >= 12 and strip.number.size >= 16
    written = (image != watch.PAPER).any(-1)
    numbers = written[: strip.top - strip.text_height - 4]
    assert numbers.any() and not numbers[:, -3:].any() and not written[:2].any() and not written[-2:].any()
    cell_width = (width - strip.margin) / strip.columns
    for column in range(1, strip.columns):
        x = round(strip.margin + column * cell_width)
        assert not numbers[:, x - 3 : x].any(), column
    for row in range(1, math.ceil(len(watch.cells(step)) / strip.columns)):
        y = round(6 * strip.unit) + row * strip.row_height
        assert not written[y - 2 : y].any(), row


# === The map of rooms =================================================================================================


def room_pixels(image):
    """Color inside each room of the map, away from its text, and of its border."""
    cells = {room: (x, y) for room, x, y in watch.pyramid(18, 92, 96, 72)}
    return {room: tuple(image.getpixel((x + 10, y + 36)) for x in (x, x - 7)) for room, (x, y) in cells.items()}


def test_the_map_colors_the_rooms_that_were_visited(loaded):
    """Exactly the rooms of a known list, the brighter the more often; the entrance has a white border."""
    _, state = loaded
    visits = {1: 1_000_000, 0: 2000, 2: 30_000, 6: 100, 11: 0, 23: 2, 99: 5}  # 11: an episode that goes on is in there
    image = watch.draw_rooms(dict(state, progress=dict(state["progress"], visits=visits)))
    found = room_pixels(image)
    assert list(found) == list(range(24))
    colored = {room: color for room, (color, _) in found.items() if color != watch.PAPER}
    assert colored == watch.room_colors({room: visits[room] for room in (0, 1, 2, 6, 11, 23)})
    by_visits = sorted(colored, key=visits.get)
    assert by_visits == sorted(colored, key=lambda room: sum(colored[room])) and len(set(colored.values())) == 6
    assert [room for room, (_, border) in found.items() if border == watch.INK] == [watch.ENTRANCE]


def test_rooms_of_a_level_lie_side_by_side():
    """And levels in the middle above each other."""
    where = {room: (x, y) for room, x, y in watch.pyramid(0, 0, 1, 1)}
    assert [where[room] for room in (1, 5, 11, 19)] == [(4, 0), (4, 1), (4, 2), (4, 3)]
    assert [where[room] for room in (0, 2, 3, 7, 8, 14, 15, 23)] == [
        (3, 0), (5, 0), (2, 1), (6, 1), (1, 2), (7, 2), (0, 3), (8, 3)
    ]  # fmt: skip
    assert len(set(where.values())) == 24


def test_the_map_of_a_run_has_its_rooms(loaded, run, tmp_path):
    path = tmp_path / "rooms.png"
    assert loaded[1]["progress"]["visits"] and watch.main([str(run), "--rooms", str(path)]) == 0
    with Image.open(path) as image:
        assert {room for room, (color, _) in room_pixels(image).items() if color != watch.PAPER} == {1}
    empty = watch.draw_rooms(dict(loaded[1], progress=dict(loaded[1]["progress"], visits={})))
    assert {color for color, _ in room_pixels(empty).values()} == {watch.PAPER}


@pytest.mark.parametrize("count, text", [(0, "0"), (999, "999"), (1000, "1k"), (12345, "12.3k"), (10**10, "10G")])
def test_steps_are_short_on_the_map(count, text):
    assert watch.short(count) == text


def test_no_map_of_other_games_or_without_the_visits(loaded, tmp_path, capsys):
    script, state = loaded
    run = save(script, state, tmp_path / "run", args=dict(state["args"], env_id="ALE/Pitfall-v5"))
    said = refusal(capsys, watch.main, run, "--rooms", tmp_path / "rooms.png")
    assert "expected MontezumaRevenge, the game whose map is known, got ALE/Pitfall-v5" in said
    run = save(script, state, tmp_path / "old", progress=dict(iteration=1, step=8))  # as version 0.1.0 exported it
    assert "exported weights without them" in refusal(capsys, watch.main, run, "--rooms", tmp_path / "rooms.png")


# === What is refused ==================================================================================================


def test_watch_refuses(run, loaded, tmp_path, capsys):
    def refused(*argv):
        return refusal(capsys, watch.main, *argv)

    out = ("--video", tmp_path / "a.mp4")
    assert "No such file" in refused(tmp_path / "nowhere.pt", *out)
    assert "with checkpoint_*.pt, found none" in refused(tmp_path, *out)
    whole = last_checkpoint(run.parent).read_bytes()
    for name, data in dict(empty=b"", text=b"hello " * 100, cut=whole[:-1000]).items():
        (tmp_path / name).write_bytes(data)
        assert "expected a checkpoint" in refused(tmp_path / name, *out)
    (tmp_path / "flipped").write_bytes(whole[:-5000] + bytes([whole[-5000] ^ 1]) + whole[-4999:])
    assert "expected a checkpoint" in refused(tmp_path / "flipped", *out)
    assert "expected a .mp4 or .gif" in refused(run, "--video", tmp_path / "a.avi")
    assert "expected a .mp4 or .gif" in refused(run, "--video", tmp_path / "no" / "a.mp4")
    assert "expected a .png" in refused(run, "--rooms", tmp_path / "rooms.mp4")
    assert "got neither" in refused(run)
    assert "--speed: expected --video" in refused(run, "--rooms", tmp_path / "rooms.png", "--speed", 4)
    assert "--rom: expected a checkpoint of a script that has" in refused(run, *out, "--rom", "a.nes")
    for flag, value in dict(scale=1, speed=0, episodes=0, sticky=1.5, seed=-1, max_steps=0).items():
        flag = "--" + flag.replace("_", "-")
        assert f"{flag}: expected a number from" in refused(run, *out, flag, value)
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob("*.png"))


def test_watch_refuses_a_script_that_is_none(run, loaded, tmp_path, capsys):
    out = ("--video", tmp_path / "a.mp4")

    def refused(text):
        (tmp_path / "other.py").write_text(text)
        return refusal(capsys, watch.main, run, *out, "--script", tmp_path / "other.py")

    assert "--script: expected" in refusal(capsys, watch.main, run, *out, "--script", tmp_path / "nowhere.py")
    assert "found no Args, Env, Game, UsageError" in refused("x = 1\n")
    assert "not_there" in refused("import not_there\n")
    assert "can be imported" in refused("import sys\nsys.exit('usage')\n")
    assert "SyntaxError" in refused("def\n")


def test_a_copy_with_another_bonus_than_rnd_is_watched_without_it(run, tmp_path, capsys):
    """One that needs arguments is refused in one line, and its weights can be exported."""
    copy = tmp_path / SCRIPT.name
    text = SCRIPT.read_text("utf-8")
    copy.write_text(re.sub(r"\bRND\b(?=[(:])", "ICM", text), "utf-8")
    assert watched(run, tmp_path / "a.mp4", "--script", copy) == 0
    assert len(video(tmp_path / "a.mp4")[0]) == 4 * STEPS
    copy.write_text(
        text.replace(
            "def __init__(self, int_gamma: float = 0.99,", "def __init__(self, actions: int, int_gamma: float = 0.99,"
        )
    )
    said = refusal(capsys, watch.main, run, "--video", tmp_path / "b.mp4", "--script", copy)
    assert "missing 1 required positional argument: 'actions'" in said


def test_watch_refuses_a_checkpoint_of_another_script(loaded, tmp_path, capsys):
    script, state = loaded
    out = ("--video", tmp_path / "a.mp4")
    run = save(script, state, tmp_path / "more", args=state["args"] | dict(temperature=1.0))
    assert "temperature" in refusal(capsys, watch.main, run, *out)
    agent = state["agent"] | {"trunk.0.weight": torch.zeros(16, 4, 8, 8)}
    run = save(script, state, tmp_path / "wide", agent=agent)
    said = refusal(capsys, watch.main, run, *out)
    assert "expected the networks of" in said and "size mismatch for trunk.0.weight" in said
    (tmp_path / "named").mkdir()
    torch.save(dict(state, script="my_rnd"), tmp_path / "named" / "checkpoint_000001.pt")
    assert "got one of my_rnd.py; name it with --script" in refusal(capsys, watch.main, tmp_path / "named", *out)


@pytest.mark.parametrize("tool, package", [("watch", "imageio_ffmpeg"), ("watch", "PIL"), ("plot", "matplotlib")])
def test_without_the_extra(tool, package, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('no', name={package!r})")
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--help"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"expected the package {package}" in done.stderr and "pip install -e '.[video]'" in done.stderr


# === Curves ===========================================================================================================


def write_run(folder, tags, rollouts, start=1.0, first=0, purge=None):
    """A run with event files in which every tag has the values start, start + 1, ..., at steps 100, 200, ...

    Continued after `first` rollouts, as by a process that was resumed there.
    """
    with SummaryWriter(str(folder), purge_step=purge) as writer:
        for i in range(first, rollouts):
            for tag in tags:
                writer.add_scalar(tag, start + i, 100 * (i + 1))
    return folder


PANELS = [plot.PANELS[name] for name in plot.DEFAULT]
TAGS = [panel.tag for panel in PANELS]


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def test_read(tmp_path):
    run = write_run(tmp_path / "run", ["a"], 5)
    x, y = plot.read(run)["a"]
    assert x.tolist() == [100, 200, 300, 400, 500] and y.tolist() == [1, 2, 3, 4, 5]
    with SummaryWriter(str(run)) as writer:
        writer.add_scalar("a", 6, 600)
        writer.add_scalar("a", math.nan, 700)
    x, y = plot.read(run)["a"]
    assert x.tolist()[-1] == 600 and y.tolist() == [1, 2, 3, 4, 5, 6]


def test_what_a_killed_process_logged_after_its_last_checkpoint_is_dropped(tmp_path):
    run = write_run(tmp_path / "run", ["a"], 5)
    time.sleep(1.1)  # the names of event files hold the second, and are read in the order of their names
    write_run(run, ["a"], 4, start=11, first=3, purge=301)
    x, y = plot.read(run)["a"]
    assert x.tolist() == [100, 200, 300, 400] and y.tolist() == [1, 2, 3, 14]


def test_time_is_that_of_training_and_starts_with_the_run(tmp_path):
    """100 steps at 10 a second, then at 5, whatever the clock on the wall says; another tag begins later."""
    with SummaryWriter(str(tmp_path)) as writer:
        for i, speed in enumerate((10, 5, 5)):
            writer.add_scalar("charts/SPS", speed, 100 * (i + 1), walltime=1e9 + 1e5 * i)
        writer.add_scalar("a", 7, 250, walltime=1e9)
    curves = plot.read(tmp_path, "time")
    assert curves["charts/SPS"][0].tolist() == [10, 30, 50]
    assert curves["a"][0].tolist() == [40]


def test_time_starts_with_the_run_that_began_with_the_checkpoint_of_another(tmp_path):
    """Its first rollout ends at step 1100; the thousand before it took this run no time."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (1100, 1200):
            writer.add_scalar("charts/SPS", 10, step)
    assert plot.read(tmp_path, "time")["charts/SPS"][0].tolist() == [10, 20]


@pytest.mark.parametrize(
    "seconds, name, unit",
    [(0.5, "seconds", 1), (119, "seconds", 1), (120, "minutes", 60), (7200, "hours", 3600), (1e6, "days", 86400)],
)
def test_time_has_a_unit_that_gives_readable_numbers(seconds, name, unit):
    assert plot.time_unit(seconds) == (name, unit)


def test_the_axis_names_its_unit(tmp_path):
    tags = ["charts/SPS", TAGS[0]]
    groups = {"a": [plot.read(write_run(tmp_path / "a", tags, 9, start=0.5), "time")]}
    figure = plot.plot(groups, PANELS[:1], "time")
    assert figure.get_supxlabel() == "minutes of training"
    expected = sum(100 / (0.5 + i) for i in range(9)) / 60
    assert figure.axes[0].get_lines()[0].get_xdata()[-1] == pytest.approx(expected)


def test_mean_and_range():
    """Curves of other lengths and other x: each counts where it has values."""
    a, b = (np.arange(0, 101, 10.0), np.full(11, 1.0)), (np.arange(0, 51, 5.0), np.full(11, 3.0))
    x, mean, low, high, count = plot.mean_and_range([a, b])
    both = x <= 50
    assert x[0] == 0 and x[-1] == 100 and (count == np.where(both, 2, 1)).all()
    assert (mean == np.where(both, 2, 1)).all() and (low == 1).all() and (high == np.where(both, 3, 1)).all()
    x, mean, *_ = plot.mean_and_range([(np.arange(100.0), np.arange(100.0) % 2)], smooth=10)
    assert np.abs(mean - 0.5).max() < 0.11


def test_experiment():
    assert plot.experiment("x/Pong-v5__lstm__3__20260101-000000/") == "Pong-v5 lstm" and plot.experiment("x/y") == "y"
    assert plot.experiment("Pong-v5__a__b__3__20260101-000000") == "Pong-v5 a__b"


def test_curves(run, tmp_path):
    """Seeds of different lengths, another experiment, a run that has only some of the tags, and a real one."""
    runs = [write_run(tmp_path / f"G__a__{i}__0", TAGS, n, i) for i, n in enumerate((5, 30))]
    runs += [write_run(tmp_path / "G__b__1__0", TAGS[:1], 10), run]
    out = tmp_path / "curves.png"
    assert plot.main([*map(str, runs), "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.size == (1800, 1040)
    figure = plot.plot({"a": [plot.read(run) for run in runs[:2]], "b": [plot.read(runs[2])]}, PANELS)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a (2 runs)", "b"]
    # For each label the mean and its continuation.
    mean, alone, *_ = figure.axes[0].get_lines()
    x = mean.get_xdata()
    mean, alone = mean.get_ydata(), alone.get_ydata()
    assert np.nanmax(x[np.isfinite(mean)]) <= 500 < x[np.isfinite(alone)].min() and x.max() == 3000
    assert np.interp(300, x, mean) == pytest.approx((2 + 3) / 2, abs=0.1) and alone[-1] == 30
    [band] = figure.axes[0].collections
    extents = band.get_paths()[0].get_extents()  # of the two seeds
    assert (extents.ymin, extents.ymax) == (0, 30)
    argv = [str(run), "--labels", "one", "--x", "time", "--smooth", "3"]
    assert plot.main([*argv, "--out", str(tmp_path / "time.svg")]) == 0


def test_kept_numbers_draw_the_same_picture(tmp_path):
    runs = [write_run(tmp_path / f"G__a__{i}__0", TAGS, n, i + 0.125) for i, n in enumerate((5, 30))]
    runs.append(write_run(tmp_path / "G__b__1__0", TAGS[:1], 10))
    kept, first, second = tmp_path / "kept.json", tmp_path / "first.png", tmp_path / "second.png"
    panels = ["--panels", "return=scores", "bonus"]
    assert plot.main([*map(str, runs), *panels, "--out", str(first), "--json", str(kept)]) == 0
    assert plot.main([str(kept), *panels, "--out", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    numbers = json.loads(kept.read_text())
    assert list(numbers) == ["G a", "G b"] and [len(group) for group in numbers.values()] == [2, 1]
    assert numbers["G a"][0]["charts/episodic_return_mean100"] == [
        [100, 200, 300, 400, 500],
        [0.125, 1.125, 2.125, 3.125, 4.125],
    ]
    assert set(numbers["G a"][0]) == {"charts/episodic_return_mean100", "rnd/int_reward_raw"}  # what was shown


def test_kept_numbers_come_alone_and_whole(tmp_path, capsys):
    out = ["--out", str(tmp_path / "a.png")]
    (tmp_path / "other.json").write_text('{"a": 1}')
    for extra in (["run"], ["--x", "time"], ["--labels", "a"]):
        assert "expected runs, or one .json alone" in refusal(capsys, plot.main, tmp_path / "a.json", *extra, *out)
    assert "expected numbers that --json wrote" in refusal(capsys, plot.main, tmp_path / "other.json", *out)
    assert "No such file" in refusal(capsys, plot.main, tmp_path / "a.json", *out)
    assert "--json: expected a file NAME.json" in refusal(capsys, plot.main, tmp_path / "run", "--json", "a.txt", *out)
    keep = ["--json", tmp_path / "kept.json", "--x", "time"]
    assert "--json: expected --x steps" in refusal(capsys, plot.main, tmp_path / "run", *keep, *out)


def test_panels_with_nothing_to_show_are_left_out(tmp_path):
    """Without values, and the rooms of a game that has none."""
    groups = {"a": [plot.read(write_run(tmp_path / "a", TAGS[:1], 3))]}
    assert titles(plot.plot(groups, plot.default_panels(groups))) == [PANELS[0].title]
    for rooms, shown in ((0, False), (1, True)):
        with SummaryWriter(str(tmp_path / "a")) as writer:
            writer.add_scalar("charts/rooms_total", rooms, 400)
        groups = {"a": [plot.read(tmp_path / "a")]}
        assert (plot.PANELS["rooms"] in plot.default_panels(groups)) == shown


def test_mario_has_a_way_instead_of_rooms(tmp_path):
    groups = {"a": [plot.read(write_run(tmp_path / "a", [*TAGS, "charts/furthest_x"], 3))]}
    found = titles(plot.plot(groups, plot.default_panels(groups)))
    assert "rooms found" not in found and found[1] == "furthest x, mean of 100 episodes" and len(found) == 6


def test_the_bonus_has_a_logarithmic_axis_where_it_falls_by_a_factor_of_ten(tmp_path):
    for rollouts, scale in ((10, "linear"), (12, "log")):
        run = write_run(tmp_path / scale, ["rnd/int_reward_raw"], rollouts)
        figure = plot.plot({"a": [plot.read(run)]}, [plot.PANELS["bonus"]])
        assert figure.axes[0].get_yscale() == scale


def test_an_outlier_does_not_hide_the_explained_variance(tmp_path):
    for start, low in ((-9.0, -1), (-30.0, -30.45)):
        run = write_run(tmp_path / str(start), ["losses/explained_variance"], 10, start=start)
        figure = plot.plot({"a": [plot.read(run)]}, [plot.PANELS["explained"]])
        assert figure.axes[0].get_ylim()[0] == pytest.approx(low)


@pytest.mark.parametrize("count, shape", [(1, (800, 520)), (2, (1200, 520)), (4, (1200, 1040)), (5, (1800, 1040))])
def test_any_number_of_panels_fits(tmp_path, count, shape):
    run = write_run(tmp_path / "run", TAGS, 3)
    argv = [str(run), "--out", str(tmp_path / "a.png"), "--panels", *TAGS[:count]]
    assert plot.main(argv) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == shape


def test_numbers_without_panels_are_all_drawn(tmp_path, monkeypatch):
    """Those that the default picture would not show, too, in the order in which they were kept."""
    run, kept = write_run(tmp_path / "run", [*TAGS, "a/b"], 3), tmp_path / "kept.json"
    keep = ["--panels", "b", "predictor", "return", "--json", str(kept), "--out", str(tmp_path / "a.png")]
    assert plot.main([str(run), *keep]) == 0
    drawn, draw_all = [], plot.plot
    monkeypatch.setattr(plot, "plot", lambda groups, panels, *rest: drawn.extend(panels) or draw_all(groups, panels))
    assert plot.main([str(kept), "--out", str(tmp_path / "b.png")]) == 0
    assert drawn == [plot.Panel("a/b", "a/b"), plot.PANELS["predictor"], plot.PANELS["return"]]


def test_a_pdf_has_truetype_fonts(tmp_path):
    """Not Type 3, which some publishers refuse."""
    run = write_run(tmp_path / "run", TAGS, 3)
    assert plot.main([str(run), "--out", str(tmp_path / "a.pdf")]) == 0
    assert b"/Type3" not in (tmp_path / "a.pdf").read_bytes()


def test_panels_are_named_by_short_names_tags_or_their_last_part():
    """Entropy and explained variance among them."""
    tags = {"losses/entropy", "losses/explained_variance", "charts/episodic_return_mean100", "time/update"}
    assert plot.find_panel("return", tags) == plot.PANELS["return"]
    assert plot.find_panel("entropy", tags) == plot.PANELS["entropy"]
    assert plot.find_panel("explained", tags) == plot.PANELS["explained"]
    assert (
        plot.find_panel("time/update", tags)
        == plot.find_panel("update", tags)
        == plot.Panel("time/update", "time/update")
    )
    assert plot.find_panel("return=places visited", tags).title == "places visited"
    with pytest.raises(plot.UsageError, match="expected some of return entropy explained or a tag .*, got rooms"):
        plot.find_panel("rooms", tags)


def test_short_names_are_those_of_what_a_run_logs(run):
    """Every quantity that the tool knows by a short name exists in a real run, but for the way of Super Mario Bros."""
    tags = set(plot.read(run))
    missing = [name for name, panel in plot.PANELS.items() if panel.tag not in tags]
    assert missing == ["x"]


def test_runs_without_values_are_skipped_with_a_warning(tmp_path, capsys):
    """As `plot.py runs/*` meets them: a file, an empty folder, a run that has just begun."""
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "new", TAGS, 0)
    good = write_run(tmp_path / "good", TAGS, 3)
    runs = [str(tmp_path / name) for name in ("notes.txt", "empty", "new")]
    out = ("--out", str(tmp_path / "a.png"))
    assert plot.main([*runs, str(good), *out]) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"warning: skipped {run}: ") for line, run in zip(warnings, runs, strict=True)] == [
        True
    ] * 3
    assert "wait for its first rollout" in warnings[2]
    (tmp_path / "a.png").unlink()
    assert plot.main([*runs, *out]) == 2
    assert "error: RUN: expected at least one run with values" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a.png").exists()


def test_runs_of_other_arguments_under_one_label_are_reported(run, tmp_path, capsys):
    """Another seed or horizon is no other experiment; a label that the user gives is their decision."""
    started = plot.arguments(run)
    assert started["int_coef"] == 1 and started["seed"] == 1
    runs = [str(tmp_path / f"G__a__{i}__0") for i in range(3)]
    for folder, changes in zip(runs, ({}, dict(int_coef=0.0), dict(seed=2, total_rollouts=7)), strict=True):
        with SummaryWriter(folder) as writer:
            for summary in hparams(started | changes, {}):
                writer.file_writer.add_summary(summary)
            writer.add_scalar(TAGS[0], 1, 100)
    out = ("--out", str(tmp_path / "a.png"))
    assert plot.main([*runs, *out]) == 0
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {runs[1]}: ") and "found another --int-coef; try --labels" in warning
    assert plot.main([*runs, *out, "--labels", "a", "a", "a"]) == 0
    assert not capsys.readouterr().err


def test_plot_refuses(run, tmp_path, capsys):
    def refused(*argv):
        return refusal(capsys, plot.main, *argv)

    out = ("--out", tmp_path / "a.png")
    assert "one for each run, got 2" in refused(run, *out, "--labels", "a", "b")
    assert "--smooth" in refused(run, *out, "--smooth", 0)
    assert "expected a .png" in refused(run, "--out", tmp_path / "a.txt")
    assert "expected a .png" in refused(run, "--out", tmp_path / "nowhere" / "a.png")
    assert "got nonsense" in refused(run, *out, "--panels", "return", "nonsense")
    assert "name their tags with --panels" in refused(write_run(tmp_path / "other", ["a"], 2), *out)
    assert not (tmp_path / "a.png").exists()
