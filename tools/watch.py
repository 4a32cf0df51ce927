"""Look at a trained agent: a video of how it plays and of what surprises it, or a map of the rooms it has been in.

Video             python tools/watch.py runs/MontezumaRevenge-v5__... --video out.mp4          (newest checkpoint)
GIF, fast         python tools/watch.py runs/.../checkpoint_000500.pt --video out.gif --speed 4 --scale 2
Best of ten       python tools/watch.py runs/.../best.pt --video out.mp4 --episodes 10 --best
Your own script   python tools/watch.py runs/... --video out.mp4 --script my_rnd.py
Rooms visited     python tools/watch.py runs/... --rooms rooms.png

Under the game runs a strip with the numbers of the current step and a plot of the intrinsic reward: the error of the
RND predictor on the frame that the step led to, with the checkpoint's observation statistics, as training computes it
(raw; "/ std" is divided by the running standard deviation of its return, which is what the agent learns from). The two
values are the agent's estimates before the step. Green marks are rewards of the game, white ones new rooms.

Nothing here knows one script from another: the checkpoint names its script, which is imported by its path.
Needs `pip install -e '.[video]'`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

try:
    import imageio_ffmpeg
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    MISSING = error.name
else:
    MISSING = None

FPS = 60  # of every emulator
# Level 1 of Montezuma's Revenge; a door to the left or right or a ladder leads to the neighbour in the picture.
PYRAMID = ((0, 1, 2), (3, 4, 5, 6, 7), (8, 9, 10, 11, 12, 13, 14), (15, 16, 17, 18, 19, 20, 21, 22, 23))
ENTRANCE = 1
INK, GRAY, LINE, PAPER = (240, 240, 245), (140, 144, 156), (58, 61, 72), (17, 18, 23)
SURPRISE, REWARD, ROOM = (255, 148, 48), (74, 222, 128), (190, 194, 204)
HEAT = np.array([(58, 24, 95), (130, 30, 110), (200, 60, 80), (244, 125, 40), (252, 230, 120)])  # few to many visits


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[str]
    """a checkpoint, or the directory of a run: then its newest checkpoint"""
    video: str = ""
    """file to write the video to: .mp4, or .gif with at most 20 frames a second; several episodes: name-1.mp4, ..."""
    rooms: str = ""
    """file to write a picture of the visited rooms to (.png); Montezuma's Revenge only"""
    script: str = ""
    """script that made the checkpoint; default: the one that the checkpoint names, next to tools/"""
    episodes: int = 1
    """episodes to record"""
    best: bool = False
    """play all --episodes first and record only the one with the highest return"""
    speed: float = 1.0
    """1: real time; 4: four times as fast"""
    greedy: bool = False
    """play the most probable action instead of sampling"""
    seed: int = 1
    """seed of the actions and the environment; another seed gives other episodes"""
    sticky: float | None = None
    """probability, in every frame, to repeat the action before; default: as in training"""
    scale: int = 3
    """height of the game's pixels in the video, 2 to 8"""
    max_steps: int | None = None
    """steps of 4 frames after which the episode ends; default: as in training"""


class UsageError(ValueError):
    """Something that the user has to change; the message says what was expected, what came and what to do."""


# === Checkpoint and script ============================================================================================


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself, or the newest checkpoint in it if it is the directory of a run."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = sorted(path.glob("checkpoint_*.pt")) or sorted(path.glob("best.pt"))
    if not found:
        raise UsageError(
            f"{path}: expected a run with checkpoint_*.pt, found none; wait for the run's first checkpoint"
        )
    return found[-1]


def load(checkpoint: Path, script: str | Path = "") -> tuple[Any, dict]:
    """The script that made `checkpoint`, or the one given, as a module, and the state in the checkpoint."""
    if not script:
        try:  # the name is needed to import the script, whose load_checkpoint does everything else
            data = io.BytesIO(checkpoint.read_bytes()[:-32])
            name = Path(torch.load(data, map_location="meta", weights_only=True)["script"]).name
        except OSError as error:
            raise UsageError(f"{checkpoint}: expected a checkpoint or a run, got: {error.strerror}") from error
        except Exception as error:
            raise UsageError(
                f"{checkpoint}: not a checkpoint of this project, or a damaged one; take another"
            ) from error
        script = Path(__file__).resolve().parents[1] / f"{name}.py"
    script = Path(script).resolve()
    if not script.is_file():
        raise UsageError(f"{script}: expected the script that made {checkpoint}, found nothing; name it with --script")
    sys.path.insert(0, str(script.parent))  # as for `python script.py`: fastops may lie beside it
    spec: Any = importlib.util.spec_from_file_location(f"watched_{script.stem}", script)
    if spec is None:
        raise UsageError(f"{script}: expected a Python script, .py; name it with --script")
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UsageError(f"{script}: its import of {error.name} failed ({error}); install what it needs") from error
    if not hasattr(module, "load_checkpoint"):
        raise UsageError(f"{script}: expected one of this project's scripts or a copy, found no load_checkpoint in it")
    return module, module.load_checkpoint(checkpoint)


# === Playing ==========================================================================================================


@dataclass
class Step:
    """One step of the agent as the video shows it."""

    images: list[np.ndarray]  # of its frames, uint8 (H, W, 3), without those that are skipped
    frames: int  # emulator frames of the episode so far
    place: int | None
    score: float
    reward: float
    value: float  # both before the step
    int_value: float
    int_reward: float  # raw, of the frame that the step led to
    scaled_int_reward: float
    info: dict | None  # statistics of the episode, at its last step


def play(script, state: dict, index: int, *, seed=1, sticky=None, max_steps=None, greedy=False, stride=1):
    """Play episode number `index` of a checkpoint; yields a Step after every step.

    Of `stride` frames one image is kept, the maximum of the last two, because some games draw an object in every other
    frame only. `stride` 0: no images.
    """
    args = state["args"]
    agent, rnd, int_return_rms = script.load_agent(state), script.RNDModel(), script.fastops.RunningMeanStd(())
    obs_rms = script.fastops.RunningMeanStd((84, 84))
    for part, name in ((rnd, "rnd"), (obs_rms, "obs_rms"), (int_return_rms, "int_return_rms")):
        part.load_state_dict(state[name])
    options = dict(sticky_action_prob=args["sticky_action_prob"] if sticky is None else sticky)
    options["max_episode_steps"] = max_steps or args["max_episode_steps"]
    torch.manual_seed(seed * 1_000_003 + index)  # any episode can be played again
    env = script.Env(args["env_id"], index, seed=seed, **options)
    game, act = env.game, env.game.act
    images: list[np.ndarray] = []
    frames, before, score = 0, None, 0.0

    def act_and_look(action: int) -> tuple[float, bool]:
        nonlocal frames, before
        result = act(action)
        frames += 1
        if stride and frames % stride in (0, 1 % stride):
            image = game.rgb()
            if frames % stride == 1 % stride:
                images.append(image if stride == 1 or before is None else np.maximum(before, image))
            before = image
        return result

    game.act = act_and_look
    try:
        for _, reward, value, int_value, frame, info in script.play_episode(agent, env, greedy):
            int_reward = script.intrinsic_reward(rnd, torch.from_numpy(frame)[None, None], obs_rms).item()
            score += reward
            scaled = int_reward / math.sqrt(int_return_rms.var)
            yield Step(images[:], frames, game.place(), score, reward, value, int_value, int_reward, scaled, info)
            images.clear()
    finally:
        del game.act


# === Drawing ==========================================================================================================


@functools.cache
def font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def number(x: float) -> str:
    return f"{x:#.3g}"


def clock(frames: int) -> str:
    return f"{frames // FPS // 60}:{frames // FPS % 60:02d}"


def cells(step: Step) -> list[tuple[str, str]]:
    """The numbers of the strip: what each is, and how it is written."""
    place = [] if step.place is None else [("room", str(step.place))]
    rows = [("time", clock(step.frames)), *place, ("score", f"{step.score:g}")]
    rows += [("value, game", number(step.value)), ("value, intrinsic", number(step.int_value))]
    return [*rows, ("intrinsic reward", number(step.int_reward)), ("/ std", number(step.scaled_int_reward))]


class Strip:
    """The picture under the game. The time axis grows by doubling, so that it shows the episode from its beginning."""

    def __init__(self, width: int, unit: float, pyramid: bool):
        self.width, self.unit, self.height, self.pyramid = width, unit, round(180 * unit), pyramid
        self.history: list[float] = []
        self.events: list[tuple[int, str, tuple]] = []
        self.places: set[int | None] = set()
        self.span = 256  # steps that the plot has room for

    def draw(self, step: Step) -> np.ndarray:
        """The strip after `step`, uint8 (height, width, 3)."""
        u, t = self.unit, len(self.history)
        self.history.append(step.int_reward)
        if step.reward:
            self.events.append((t, f"{step.reward:+g}", REWARD))
        if self.places and step.place not in self.places:
            self.events.append((t, f"room {step.place}", ROOM))
        self.places.add(step.place)
        while len(self.history) > self.span:
            self.span *= 2

        image = Image.new("RGB", (self.width, self.height), PAPER)
        pen = ImageDraw.Draw(image)
        for i, (name, value) in enumerate(items := cells(step)):
            x = 12 * u + i * (self.width - 12 * u) / len(items)
            color = SURPRISE if i >= len(items) - 2 else INK
            pen.text((x, 8 * u), name, GRAY, font(13 * u))
            pen.text((x, 23 * u), value, color, font(23 * u))

        left, right, top, bottom = (round(v * u) for v in (12, self.width / u - 12, 66, 160))
        if self.pyramid:
            w, h = round(14 * u), round(11 * u)
            right -= 9 * w + round(20 * u)
            for room, x, y in pyramid_cells(self.width - 12 * u - 9 * w, top + 14 * u, w, h):
                color = SURPRISE if room == step.place else (110, 80, 60) if room in self.places else PAPER
                pen.rectangle((x, y, x + w - 2, y + h - 2), color, LINE)
        columns = right - left
        padded = np.zeros(self.span, np.float32)
        padded[: t + 1] = self.history
        peaks = np.maximum.reduceat(padded, np.arange(columns) * self.span // columns)
        limit = nice_limit(max(self.history))
        heights = np.ceil(peaks / limit * (bottom - top)).astype(int)
        pixels = np.array(image)
        area = pixels[top:bottom, left:right]
        rows = np.arange(bottom - top, 0, -1)[:, None]
        area[rows <= heights] = np.array(SURPRISE) * 0.45
        area[(rows <= heights) & (rows > heights - 2 * u)] = SURPRISE

        image = Image.fromarray(pixels)
        pen = ImageDraw.Draw(image)
        pen.line((left, bottom, right, bottom), LINE)
        free = 0.0
        for when, label, color in self.events:
            x = left + when * columns / self.span
            pen.line((x, top, x, bottom), color)
            if x > free:
                pen.text((x + 3 * u, top), label, color, font(12 * u))
                free = x + 8 * u + font(12 * u).getlength(label)
        pen.text((left, bottom + 4 * u), "0:00", GRAY, font(12 * u))
        pen.text((right, bottom + 4 * u), clock(self.span * 4), GRAY, font(12 * u), "ra")
        pen.text((left, top), number(limit), GRAY, font(12 * u))
        return np.array(image)


def nice_limit(x: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... times a power of ten: an axis limit that seldom changes."""
    power = 10.0 ** math.floor(math.log10(max(x, 1e-12)))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= x * 0.999)


def pyramid_cells(x: float, y: float, width: float, height: float) -> Iterator[tuple[int, float, float]]:
    """(room, x, y) of the upper left corner of every room of Montezuma's Revenge; the base is 9 rooms wide."""
    for level, rooms in enumerate(PYRAMID):
        for i, room in enumerate(rooms):
            yield room, x + (3 - level + i) * width, y + level * height


def room_colors(visits: dict[int, int]) -> dict[int, tuple[int, int, int]]:
    """Color of every visited room on the map, by the logarithm of its visits."""
    most = max(visits.values(), default=1)
    return {room: heat(math.log(n) / math.log(max(most, 2))) for room, n in visits.items() if n > 0}


def heat(x: float) -> tuple[int, int, int]:
    r, g, b = (round(np.interp(x, np.linspace(0, 1, len(HEAT)), channel)) for channel in HEAT.T)
    return r, g, b


# === Files ============================================================================================================


@contextlib.contextmanager
def encoder(path: Path, size: tuple[int, int], fps: float):
    """A function that adds an image, uint8 (H, W, 3), to the .mp4 or .gif. No image stays in memory."""
    with tempfile.TemporaryDirectory() as folder:
        gif = path.suffix.lower() == ".gif"  # one palette for all images: kept without loss, read twice
        out = Path(folder, "lossless.mkv") if gif else path
        codec = (
            ["-codec:v", "libx264rgb", "-qp", "0", "-preset", "ultrafast"] if gif else ["-crf", "20", "-preset", "fast"]
        )
        options: dict = dict(
            quality=None, macro_block_size=1, ffmpeg_log_level="error", pix_fmt_out="rgb24" if gif else "yuv420p"
        )
        options["output_params"] = [*codec, "-threads", "2", "-movflags", "+faststart"]
        writer = imageio_ffmpeg.write_frames(
            str(out), size, fps=fps, codec="libx264rgb" if gif else "libx264", **options
        )
        writer.send(None)
        with contextlib.closing(writer):
            yield lambda image: writer.send(np.ascontiguousarray(image))
        if gif:
            ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(out)]
            palette = str(Path(folder, "palette.png"))
            subprocess.run([*ffmpeg, "-vf", "palettegen=stats_mode=full", palette], check=True)
            use = ["-i", palette, "-lavfi", "paletteuse=dither=none:diff_mode=rectangle", "-loop", "0", str(path)]
            subprocess.run([*ffmpeg, *use], check=True)


def timing(path: Path, speed: float) -> tuple[int, float]:
    """Emulator frames for each image of the file, and its images a second."""
    stride = math.ceil(FPS * speed / (20 if path.suffix.lower() == ".gif" else FPS) - 1e-9)
    return stride, FPS * speed / stride


def record(path: Path, steps: Iterator[Step], fps: float, scale: int = 3, pyramid: bool = False) -> Step:
    """Write the video of one episode, image by image; its last step."""
    step = next(steps)
    height, columns = step.images[0].shape[0] * scale, step.images[0].shape[1]
    # Pixels are wide: Atari's 160 columns fill a 4:3 screen, those of the NES are 8:7. H.264 wants even sizes.
    width = round((height * 4 / 3 if columns == 160 else columns * scale * 8 / 7) / 2) * 2
    strip = Strip(width, width / 840, pyramid)
    strip.height += (height + strip.height) % 2
    with encoder(path, (width, height + strip.height), fps) as add:
        for step in itertools.chain([step], steps):
            below = strip.draw(step)
            for image in step.images:  # sharp, although the pixels' width may not be whole
                large = Image.fromarray(image).resize((math.ceil(width / columns) * columns, height), 0)
                add(np.concatenate([large.resize((width, height), Image.Resampling.BOX), below]))
    return step


def draw_rooms(state: dict, path: Path) -> None:
    """Write the picture of the rooms that a checkpoint has visits of."""
    args, progress = state["args"], state["progress"]
    if "MontezumaRevenge" not in args.get("env_id", ""):
        raise UsageError(
            f"--rooms: expected MontezumaRevenge, whose map is known, got {args.get('env_id')}; use --video"
        )
    visits = {room: n for room, n in progress["visits"].items() if any(room in level for level in PYRAMID)}
    colors, most = room_colors(visits), max(visits.values(), default=1)
    w, h, left, top = 96, 72, 18, 84
    image = Image.new("RGB", (9 * w + 2 * left, top + 4 * h + 84), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((left, 14), "Rooms of Montezuma's Revenge, level 1", INK, font(24))
    title = f"{len(visits)} of 24 visited in {progress['episodes']:,} episodes, {progress['step']:,} steps"
    pen.text((left, 46), title, GRAY, font(17))
    for room, x, y in pyramid_cells(left, top, w, h):
        color = colors.get(room)
        pen.rectangle((x + 2, y + 2, x + w - 3, y + h - 3), color or PAPER, LINE)
        bright = color is not None and sum(color) > 380
        pen.text((x + 9, y + 6), str(room), (PAPER if bright else INK) if color else LINE, font(17))
        if color:
            pen.text((x + w - 9, y + h - 8), short(visits[room]), PAPER if bright else INK, font(17), "rs")
        if room == ENTRANCE:
            pen.rectangle((x + 2, y + 2, x + w - 3, y + h - 3), None, INK, 3)
            pen.text((x + w / 2, y - 6), "entrance", INK, font(15), "ms")
    y, right = top + 4 * h + 30, left + 9 * w
    for x in range(left, right):
        pen.line((x, y, x, y + 14), heat((x - left) / (right - left)))
    for power in range(int(math.log10(most)) + 1):
        x = left + (right - left) * power / math.log10(max(most, 2))
        pen.text((x, y + 18), short(10**power), GRAY, font(15), "la" if power == 0 else "ma")
    pen.text((left, y - 6), "steps spent in the room", GRAY, font(15), "ls")
    image.save(path)


def short(n: int) -> str:
    """1234567 as 1.2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.3g}{suffix}"
    return str(n)


def check(args: Args) -> None:
    """Raise UsageError for arguments that cannot work."""
    if MISSING:
        raise UsageError(f"pictures need {MISSING}, which is not installed; pip install -e '.[video]'")
    if not (args.video or args.rooms):
        raise UsageError("expected --video FILE or --rooms FILE, got neither")
    for name, suffixes in (("video", (".mp4", ".gif")), ("rooms", (".png",))):
        path = Path(value := getattr(args, name))
        if value and (path.suffix.lower() not in suffixes or not path.absolute().parent.is_dir()):
            raise UsageError(f"--{name}: expected a file {' or '.join(suffixes)} in an existing folder, got {value}")
    for name, low, high in (("episodes", 1, 10**6), ("speed", 0.05, 100), ("scale", 2, 8), ("sticky", 0, 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{name}: expected a number from {low} to {high}, got {value}")
    if args.seed < 0 or (args.max_steps is not None and args.max_steps < 1):
        raise UsageError(
            f"expected --seed of 0 or more and --max-steps of 1 or more, got {args.seed}, {args.max_steps}"
        )


def run(args: Args) -> None:
    """Do what the command line asks for."""
    check(args)
    checkpoint = find_checkpoint(args.checkpoint)
    script, state = load(checkpoint, args.script)
    print(f"checkpoint {checkpoint}, step {state['progress']['step']:,}")
    if args.rooms:
        draw_rooms(state, Path(args.rooms))
        print(args.rooms)
    if not args.video:
        return
    path = Path(args.video)
    stride, fps = timing(path, args.speed)
    options: dict = dict(seed=args.seed, sticky=args.sticky, max_steps=args.max_steps, greedy=args.greedy)
    episodes = list(range(args.episodes))
    if args.best:
        returns = []
        for i in episodes:
            *_, last = play(script, state, i, **options, stride=0)
            returns.append(last.score)
            print(f"episode {i + 1}: return {last.score:g}")
        episodes = [int(np.argmax(returns))]
    for i in episodes:
        out = path.with_stem(f"{path.stem}-{i + 1}") if len(episodes) > 1 else path
        steps = play(script, state, i, **options, stride=stride)
        pyramid = "MontezumaRevenge" in state["args"].get("env_id", "")
        shown = tqdm(steps, out.name, unit="step", leave=False, disable=not sys.stderr.isatty())
        last = record(out, iter(shown), fps, args.scale, pyramid)
        print(f"{out}: episode {i + 1}, return {last.score:g}, {last.frames} frames ({clock(last.frames)})")


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        run(args)
    except KeyboardInterrupt:
        return 130  # the file is complete up to here
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: cannot write: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ != "UsageError":  # a script has its own
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
