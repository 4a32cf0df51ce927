"""The tools that show what a run has produced: files read back by other libraries, numbers computed another way."""

import itertools
import json
import math
import os
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


def save(script, state, folder, **progress):
    """The directory of a run with a checkpoint of the changed state."""
    folder.mkdir()
    assert script.save_checkpoint(dict(state, progress=dict(state["progress"], **progress)), folder)
    return folder


# === What is kept for playing =========================================================================================


def test_export(run, loaded, tmp_path, capsys):
    """Ten times as small, the script plays it, nothing else takes it."""
    script, state = loaded
    out = tmp_path / "models" / "game.pt"
    assert export.main([str(run), str(out)]) == 0
    assert out.stat().st_size < 6e6 and list(out.parent.iterdir()) == [out]
    small = script.load_checkpoint(out)
    assert small["args"] == state["args"]
    weights = script.load_agent(small).state_dict()
    assert all(torch.equal(weights[name], state["agent"][name]) for name in state["agent"])
    args = script.Args(**state["args"] | dict(play=str(out), episodes=1, max_episode_steps=5, device="cpu"))
    assert script.play(args)["episodes"][0]["episodic_length"] == 5
    capsys.readouterr()
    assert "exported" in refusal(capsys, watch.main, out, "--video", tmp_path / "a.mp4", "--script", SCRIPT)
    assert "expected a checkpoint" in refusal(capsys, export.main, tmp_path / "nowhere", out)


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
    assert images.shape[2] == 2 * 210 * 4 / 3 and 1.2 < images.shape[1] / (2 * 210) < 1.3  # the game, and the strip


def test_images_are_the_games(loaded, tmp_path):
    """The video's last image shows the emulator's last screen, with each pixel where it belongs."""
    steps = list(watch.play(*loaded, max_steps=STEPS))
    last = watch.record(tmp_path / "a.mp4", iter(steps), 60, 2)
    assert last is steps[-1] and sum(len(step.images) for step in steps) == 4 * STEPS
    shown = video(tmp_path / "a.mp4")[0][-1][:420, :, ::-1].astype(float)
    screen = cv2.resize(steps[-1].images[-1], (560, 420), interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(shown - screen).mean() < 6


def test_gif(run, tmp_path):
    """Three times as fast: every ninth frame, 20 a second."""
    path = tmp_path / "a.gif"
    assert watch.main([str(run), "--video", str(path), "--max-steps", str(STEPS), "--scale", "2", "--speed", "3"]) == 0
    with Image.open(path) as image:
        assert image.n_frames == math.ceil(4 * STEPS / 9) and image.size[0] == 560
        durations = []
        for i in range(image.n_frames):
            image.seek(i)
            durations.append(image.info["duration"])
        assert durations == [50] * image.n_frames
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def fake_play(script, state, index, *, stride, **_):
    for t in range(5):
        images = [np.full((210, 160, 3), 40 * index, np.uint8)] * 4 if stride else []
        yield watch.Step(images, 4 * t + 4, None, [3.0, 7.0, 5.0][index], 0.0, 0.0, 0.0, 0.1, 0.1)


@pytest.mark.parametrize("best", [False, True])
def test_several_episodes(run, tmp_path, monkeypatch, capsys, best):
    monkeypatch.setattr(watch, "play", fake_play)
    argv = [str(run), "--video", str(tmp_path / "a.mp4"), "--episodes", "3", "--scale", "2"]
    assert watch.main([*argv, "--best"] if best else argv) == 0
    names = ["a.mp4"] if best else ["a-1.mp4", "a-2.mp4", "a-3.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert ("episode 2, return 7" in capsys.readouterr().out) and video(tmp_path / names[0])[0].shape[0] == 20


def test_an_episode_can_be_played_again(loaded):
    """What --best relies on."""
    a, b, other = ([step[1:] for step in watch.play(*loaded, i, stride=0, max_steps=40)] for i in (3, 3, 4))
    assert a == b != other


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
options = dict(sticky=0.0, max_steps=int(sys.argv[4]))
threading.Thread(target=look, daemon=True).start()
for _ in watch.play(script, state, stride=0, **options):
    pass
played = peak
last = watch.record(Path(sys.argv[3]), watch.play(script, state, **options), 60, int(sys.argv[5]), True)
print(last.frames, played, peak)
"""


@pytest.mark.slow
def test_replay(run, loaded, tmp_path, capsys):
    """The best episode of the training again: as many frames, as many points, the same last picture as it had."""
    script, state = loaded
    recorded = json.loads((run / "best_shortest.json").read_text())
    assert len(recorded["actions"]) == 80 and recorded["episodic_length"] == 20
    steps = list(watch.play(script, state, 3, seed=9, sticky=0.25, replay=recorded["actions"]))
    assert steps[-1].frames == 80 and steps[-1].score == recorded["episodic_return"]
    game, *_ = script.make_game(state["args"]["env_id"], 77)
    game.reset_game()
    for action in recorded["actions"]:
        game.act(game.getMinimalActionSet()[action])
    assert np.array_equal(steps[-1].images[-1], game.getScreenRGB())
    argv = [run, "--video", tmp_path / "a.mp4", "--scale", "2", "--replay"]
    assert watch.main([str(arg) for arg in (*argv, run / "best_shortest.json")]) == 0
    assert "80 frames" in capsys.readouterr().out
    (tmp_path / "other.json").write_text(json.dumps(dict(recorded, env_id="ALE/Pong-v5")))
    assert "expected an episode of MontezumaRevenge" in refusal(capsys, watch.main, *argv, tmp_path / "other.json")
    assert "--replay: expected best_first.json" in refusal(capsys, watch.main, *argv, run / "lock")


def test_memory(run, tmp_path):
    """Recording takes less than 500 MiB more than playing, encoder included; all images together would be 3.3 GiB."""
    argv = [ROOT / "tools", run, tmp_path / "a.mp4", 900, 2]
    command = [sys.executable, "-c", MEMORY, *(str(arg) for arg in argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    frames, played, recorded = map(float, done.stdout.split())
    assert frames == 3600 and recorded - played < 500, (played, recorded)


# === The strip ========================================================================================================


def test_numbers_are_the_agents(loaded):
    """Values, rewards and intrinsic rewards against a loop of its own, with its own stacks and whitening."""
    script, state = loaded
    steps = list(watch.play(script, state, 2, greedy=True, max_steps=STEPS, sticky=0.5))
    args, agent, rnd = state["args"], script.load_agent(state), script.RNDModel()
    rnd.load_state_dict(state["rnd"])
    env = script.Env(args["env_id"], 2, seed=1, sticky_action_prob=0.5, max_episode_steps=STEPS)
    mean, var = (np.asarray(state["obs_rms"][name]) for name in ("mean", "var"))
    std = math.sqrt(float(state["int_return_rms"]["var"]))
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
        assert (step.score, step.reward, step.place) == (score, reward, env.look()[0])
        expected = pytest.approx((value.item(), int_value.item(), bonus, bonus / std), rel=1e-4, abs=1e-6)
        assert (step.value, step.int_value, step.int_reward, step.scaled_int_reward) == expected
        assert np.array_equal(step.images[-1], env.game.getScreenRGB())
        shown = list(watch.cells(step).values())
        assert [float(text) for text in shown[1:]] == pytest.approx(
            [score, 1, value.item(), int_value.item(), bonus, bonus / std], rel=6e-3, abs=1e-6
        )
    assert len(steps) == STEPS and len({step.int_reward for step in steps}) > 15


def test_variant_with_a_memory(tmp_path):
    """A checkpoint names its script: nothing in the tools is about one of them."""
    script = pytest.importorskip("rnd_ppo_atari_lstm")
    agent, args = script.Agent(18, script.Args.lstm_size), vars(script.Args())
    parts = dict(agent=agent, rnd=script.RNDModel(), obs_rms=script.fastops.RunningMeanStd((84, 84)))
    parts["int_return_rms"] = script.fastops.RunningMeanStd(())
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= dict(format=script.FORMAT, script="rnd_ppo_atari_lstm", args=args, progress=dict(iteration=1, step=0))
    run = save(script, state, tmp_path / "run")
    _, found, state = watch.load(run)
    assert found.__file__ == script.__file__
    steps = list(watch.play(found, state, max_steps=5, stride=3))
    assert [len(step.images) for step in steps] == [2, 1, 1, 2, 1] and all(step.int_reward > 0 for step in steps)


def draw(values, rewards=(), places=(), width=840):
    """The strip after steps with these intrinsic rewards."""
    strip = watch.Strip(width, bool(places))
    for t, value in enumerate(values):
        place = places[t] if places else None
        reward = rewards[t] if rewards else 0.0
        picture = strip.draw(watch.Step([], 4 * t + 4, place, 0.0, reward, 0.0, 0.0, value, value))
    return strip, picture


def test_plot_of_the_strip():
    """Bars as high as the intrinsic rewards in proportion to the axis limit, marks where the rewards were."""
    values = [1.0] * 100 + [0.5] * 50 + [0.25] * 50
    strip, picture = draw(values, rewards=[0.0] * 150 + [100.0] + [0.0] * 49)
    assert picture.shape == (strip.height, 840, 3) and picture.dtype == np.uint8
    bars = (picture[76:158].astype(int) - watch.PAPER).max(-1) > 10
    for t, height in ((50, 82), (120, 41), (180, 21), (250, 0)):
        assert bars[:, 12 + t * 816 // 300].sum() == height, t
    green = (picture == watch.REWARD).all(-1)[76:116].all(0)
    assert np.flatnonzero(green).tolist() == [12 + 150 * 816 // 300]
    strip, picture = draw([0.004] * 299 + [0.1, 0.004])  # the axis has doubled, and a spike is as high as before
    bars = (picture[76:158].astype(int) - watch.PAPER).max(-1) > 10
    assert strip.span == 600 and bars.sum(0).max() == 82 and (bars.sum(0) == 82).sum() in (1, 2)


def test_rooms_in_the_strip():
    strip, picture = draw([0.1] * 5, places=[1, 1, 2, 2, 6])
    assert [label for _, label, _ in strip.events] == ["room 2", "room 6"]
    colors = [tuple(picture[y + 5, x + 5]) for x, y in strip_rooms().values()]
    expected = {1: watch.SURPRISE_DARK, 2: watch.SURPRISE_DARK, 6: watch.SURPRISE}
    assert colors == [expected.get(room, watch.PAPER) for room in strip_rooms()]


def strip_rooms():
    return {room: (x, y) for room, x, y in watch.pyramid_cells(828 - 9 * 18, 158 - 4 * 16, 18, 16)}


@pytest.mark.parametrize("scale", [2, 3, 8])
def test_nothing_overlaps_in_the_strip(scale):
    """Even the longest number ends before the next one begins."""
    numbers = [-0.000123456, -123456.7, -1.5e-9]
    steps = [watch.Step([], 17999, 23, 123456.0, 0.0, x, x, abs(x), abs(x)) for x in numbers]
    u = scale * 280 / 840
    for name, value in (cell for step in steps for cell in watch.cells(step).items()):
        assert watch.font(max(10, round(13 * u))).getlength(name) < 118 * u - 3, name
        assert watch.font(round(21 * u)).getlength(value) < 118 * u - 3, value


# === The map of rooms =================================================================================================


def room_pixels(image):
    """Color inside each room of the map, away from its text, and of its border."""
    cells = {room: (x, y) for room, x, y in watch.pyramid_cells(18, 92, 96, 72)}
    return {room: tuple(image.getpixel((x + 10, y + 36)) for x in (x, x - 7)) for room, (x, y) in cells.items()}


def test_rooms(loaded):
    """Exactly the rooms of a known list are colored, the brighter the more often; the entrance has a white border."""
    _, state = loaded
    visits = {1: 1_000_000, 0: 2000, 2: 30_000, 6: 100, 11: 0, 23: 1, 99: 5}
    image = watch.draw_rooms(dict(state, progress=dict(state["progress"], visits=visits)))
    found = room_pixels(image)
    assert list(found) == list(range(24))
    colored = {room: color for room, (color, _) in found.items() if color != watch.PAPER}
    assert colored == watch.room_colors({room: visits[room] for room in (0, 1, 2, 6, 23)})
    by_visits = sorted(colored, key=visits.get)
    assert by_visits == sorted(colored, key=lambda room: sum(colored[room])) and len(set(colored.values())) == 5
    assert [room for room, (_, border) in found.items() if border == watch.INK] == [1]


def test_pyramid():
    """Rooms of a level lie side by side, levels in the middle above each other."""
    where = {room: (x, y) for room, x, y in watch.pyramid_cells(0, 0, 1, 1)}
    assert [where[room] for room in (1, 5, 11, 19)] == [(4, 0), (4, 1), (4, 2), (4, 3)]
    assert [where[room] for room in (0, 2, 3, 7, 8, 14, 15, 23)] == [
        (3, 0), (5, 0), (2, 1), (6, 1), (1, 2), (7, 2), (0, 3), (8, 3)
    ]  # fmt: skip
    assert len(set(where.values())) == 24


def test_rooms_of_a_run(loaded, run, tmp_path):
    path = tmp_path / "rooms.png"
    assert loaded[1]["progress"]["visits"] and watch.main([str(run), "--rooms", str(path)]) == 0
    with Image.open(path) as image:
        assert {room for room, (color, _) in room_pixels(image).items() if color != watch.PAPER} == {1}
    empty = watch.draw_rooms(dict(loaded[1], progress=dict(loaded[1]["progress"], visits={})))
    assert {color for color, _ in room_pixels(empty).values()} == {watch.PAPER}


def test_no_map(loaded, tmp_path, capsys):
    script, state = loaded
    run = save(script, dict(state, args=dict(state["args"], env_id="ALE/Pitfall-v5")), tmp_path / "run")
    said = refusal(capsys, watch.main, run, "--rooms", tmp_path / "rooms.png")
    assert "expected MontezumaRevenge, the game whose map is known, got ALE/Pitfall-v5" in said


# === What is refused ==================================================================================================


def test_watch_refuses(run, tmp_path, capsys):
    def refused(*argv):
        return refusal(capsys, watch.main, *argv)

    out = ("--video", tmp_path / "a.mp4")
    assert "No such file" in refused(tmp_path / "nowhere.pt", *out)
    assert "expected a run with checkpoint_*.pt, found none" in refused(tmp_path, *out)
    whole = last_checkpoint(run.parent).read_bytes()
    for name, data in dict(empty=b"", text=b"hello " * 100, cut=whole[:-1000]).items():
        (tmp_path / name).write_bytes(data)
        assert "expected a checkpoint" in refused(tmp_path / name, *out)
    (tmp_path / "flipped").write_bytes(whole[:-5000] + bytes([whole[-5000] ^ 1]) + whole[-4999:])
    assert "expected a checkpoint" in refused(tmp_path / "flipped", *out)
    assert "name it with --script" in refused(run, *out, "--script", tmp_path / "nowhere.py")
    (tmp_path / "other.py").write_text("x = 1\n")
    assert "expected a script of this project" in refused(run, *out, "--script", tmp_path / "other.py")
    (tmp_path / "other.py").write_text("import not_there\n")
    assert "not_there" in refused(run, *out, "--script", tmp_path / "other.py")
    assert "expected .mp4 or .gif" in refused(run, "--video", tmp_path / "a.avi")
    assert "expected .mp4 or .gif" in refused(run, "--video", tmp_path / "no" / "a.mp4")
    assert "expected .png" in refused(run, "--rooms", tmp_path / "rooms.mp4")
    assert "got neither" in refused(run)
    for flag, value in dict(scale=1, speed=0, episodes=0, sticky=1.5, seed=-1, max_steps=0).items():
        flag = "--" + flag.replace("_", "-")
        assert f"{flag}: expected a number from" in refused(run, *out, flag, value)
    assert not list(tmp_path.glob("*.mp4"))


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


def test_mean_and_spread():
    """Curves of other lengths and other x: each counts where it has values."""
    a, b = (np.arange(0, 101, 10.0), np.full(11, 1.0)), (np.arange(0, 51, 5.0), np.full(11, 3.0))
    x, mean, spread, count = plot.mean_and_spread([a, b])
    both = x <= 50
    assert x[0] == 0 and x[-1] == 100 and (count == np.where(both, 2, 1)).all()
    assert (mean == np.where(both, 2, 1)).all() and (spread == np.where(both, 1, 0)).all()
    x, mean, *_ = plot.mean_and_spread([(np.arange(100.0), np.arange(100.0) % 2)], smooth=10)
    assert np.abs(mean - 0.5).max() < 0.11


def test_experiment():
    assert plot.experiment("x/Pong-v5__lstm__3__20260101-000000/") == "Pong-v5 lstm" and plot.experiment("x/y") == "y"


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
    assert band.get_paths()[0].get_extents().ymin < mean[0] - 0.4  # of the two seeds
    argv = [str(run), "--labels", "one", "--x", "time", "--smooth", "3"]
    assert plot.main([*argv, "--out", str(tmp_path / "time.svg")]) == 0


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
