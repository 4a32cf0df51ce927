"""Record how a trained agent plays and what surprises it, or draw a map of the rooms that its training has seen.

Video             python tools/watch.py RUN --video out.mp4                   (RUN: directory of a run, or a checkpoint)
GIF, fast         python tools/watch.py RUN --video out.gif --speed 4 --scale 2
Best of ten       python tools/watch.py RUN --video out.mp4 --episodes 10 --best
Training's best   python tools/watch.py RUN --video out.mp4 --replay RUN/best_episode.json
Your own script   python tools/watch.py RUN --video out.mp4 --script my_rnd.py
Rooms visited     python tools/watch.py RUN --rooms rooms.png

The strip below the game shows the agent's estimates of both values before the step, and the bonus for the frame that
the step led to, with the checkpoint's statistics. The agent learns from "bonus / std". Green marks are rewards of the
game, white marks new rooms. Exported weights come without the RND networks: their strip shows no bonus. Your own class
Game is shown in gray unless it has a method `picture` that returns the screen, uint8 (H, W, 3).
Needs `pip install -e '.[video]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

try:
    import imageio_ffmpeg
    from PIL import Image, ImageDraw, ImageFont
except ImportError as problem:
    advice = "pip install -e '.[video]' in the repository, or pip install imageio-ffmpeg pillow"
    print(f"error: expected the package {problem.name}, found none: {advice}", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
FPS = 60  # of the emulators here; a copy's class Game can have another number as its FPS

INK, GRAY, LINE, PAPER = (240, 240, 245), (140, 144, 156), (70, 74, 86), (17, 18, 23)
SURPRISE, SURPRISE_DARK, REWARD = (255, 148, 48), (115, 66, 22), (74, 222, 128)

font = functools.cache(ImageFont.load_default)


class UsageError(ValueError):
    """The user has to change something; the message says what was expected, what was given and what to do."""


# === 1. The checkpoint and its script =================================================================================

# What the tools use of a script.
NEEDED = ("Args", "Env", "Game", "UsageError", "load_agent", "load_checkpoint", "play_episode", "saved_args")


def load(path: str | Path, script: str | Path = "") -> tuple[Path, ModuleType, dict]:
    """Path of a checkpoint, the newest one of a run's directory; the script that made it, as a module; its state."""
    module = import_script(Path(script) if script else find_script(Path(path)))
    try:
        path, state = module.load_checkpoint(path)
        module.saved_args(state)  # refuses arguments that the script does not have
    except module.UsageError as error:
        raise UsageError(error) from None
    return path, module, state


def find_script(path: Path) -> Path:
    """The script that a checkpoint names, which lies beside tools/ or in examples/."""
    name = script_name(path)
    for folder in (ROOT, ROOT / "examples"):
        script = folder / f"{name}.py"
        if script.is_file():
            return script
    raise UsageError(
        f"{path}: expected a checkpoint of a script in {ROOT}, got one of {name}.py; name it with --script"
    )


def script_name(path: Path) -> str:
    """The name of the script in a checkpoint. Everything else is left to the script's own load_checkpoint."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("checkpoint_*.pt"), reverse=True)
        if not files:
            expected = "expected the directory of a run with checkpoint_*.pt, found none"
            raise UsageError(f"{path}: {expected}; wait for the first one or name another directory")
    reason = ""
    for file in files:
        try:
            return Path(torch.load(file, map_location="meta", weights_only=True)["script"]).name
        except Exception as error:  # whatever the reason
            reason = getattr(error, "strerror", None) or "something else or a damaged one"
    raise UsageError(f"{path}: expected a checkpoint or the directory of a run, got: {reason}")


def import_script(path: Path) -> ModuleType:
    """A script as a module."""
    path = path.resolve()
    if not path.is_file() or path.suffix != ".py":
        raise UsageError(f"--script: expected a file NAME.py, found none at {path}")
    sys.path.insert(0, str(path.parent))  # as `python script.py` does: fastops may lie beside it
    spec: Any = importlib.util.spec_from_file_location(f"watched_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path}: expected a script that can be imported, got {error!r}") from error
    missing = [name for name in NEEDED if not hasattr(module, name)]
    if missing:
        raise UsageError(f"{path}: expected a script like rnd_ppo_atari.py, found no {', '.join(missing)} in it")
    return module


def checked_args(script: ModuleType, state: dict, **changes: Any) -> Any:
    """The arguments of a checkpoint with these changes (None: no change), once its game is known to start."""
    try:
        args = script.Args(**script.saved_args(state))
        for name, value in changes.items():
            if value is None:
                continue
            if not hasattr(args, name):
                raise UsageError(
                    f"--{name.replace('_', '-')}: expected a checkpoint of a script that has this argument"
                )
            args = dataclasses.replace(args, **{name: value})
        script.Game.check(args)
    except script.UsageError as error:
        raise UsageError(error) from None
    return args


def load_networks(script: ModuleType, state: dict) -> tuple[Any, Any]:
    """The agent, and RND with its statistics, or None where the weights were exported without or a copy has none."""
    try:
        agent, rnd = script.load_agent(state), None
        if "rnd" in state and hasattr(script, "RND"):
            rnd, saved = script.RND(), state["rnd"]
            if "obs_rms" in state:  # format 1 keeps the statistics beside the networks
                saved = saved | dict(_extra_state={name: state[name] for name in ("obs_rms", "int_return_rms")})
            rnd.load_state_dict(saved)
        return agent, rnd
    except (RuntimeError, KeyError, TypeError, script.UsageError) as error:
        expected = f"expected the networks of {script.__file__}, got a checkpoint of others"
        reason = " ".join(str(error.__context__ or error).split())  # a script's UsageError hides the mismatch itself
        raise UsageError(f"{expected}; name the script that made it with --script: {reason:.200}") from error


# === 2. An episode ====================================================================================================


class Step(NamedTuple):
    """What the video shows of a step."""

    images: list[np.ndarray]  # uint8 (H, W, 3), of its frames that are not skipped
    frames: int  # of the episode so far, as the next two
    seconds: float
    rooms: int
    room: int | None
    score: float  # of the episode so far
    reward: float
    value: float  # before the step, as int_value
    int_value: float
    bonus: float | None  # raw, for the frame that the step led to; None without RND
    scaled_bonus: float | None  # what the agent learns from


def play(script: ModuleType, networks: tuple, args: Any, index: int = 0, stride: int = 1, replay: tuple | list = ()):
    """Play episode `index`, the same one each time, or the actions of `replay`.

    Yields Steps, with an image of every `stride`-th frame (0: none).
    """
    agent, rnd = networks
    torch.manual_seed(args.seed * 1_000_003 + index)
    options = dict(sticky_action_prob=args.sticky_action_prob, max_episode_steps=args.max_episode_steps)
    env = script.Env(args.env_id, index, seed=args.seed, **options)
    choices = range(max(len(env.game.actions), env.game.noop + 1))
    if not set(replay) <= set(choices):
        raise UsageError(f"--replay: expected actions from 0 to {choices[-1]}, got others")
    images = film(env.game, stride, replay)
    try:
        for _, reward, value, int_value, frame, summary in script.play_episode(agent, env, args.greedy):
            bonus = scaled_bonus = None
            if rnd:
                bonus = rnd.bonus(torch.from_numpy(frame)[None, None]).item()
                scaled_bonus = bonus / float(rnd.int_return_rms.std)
            frames, rooms, score = len(env.executed), len(env.visits), env.episode_return
            ends = summary or 0 < len(replay) <= frames  # a replay may have ended with a step limit
            if ends and stride and not images:
                images.append(picture(env.game))
            so_far = frames, frames / frame_rate(script), rooms, env.room, score
            yield Step(images.copy(), *so_far, reward, value, int_value, bonus, scaled_bonus)
            images.clear()
            if ends:
                break
    finally:
        del env.game.act  # it refers to the game, which would keep the emulator alive


def frame_rate(script: ModuleType) -> float:
    """Frames per second of the game."""
    return getattr(script.Game, "FPS", FPS)


def film(game: Any, stride: int, replay: tuple | list) -> list[np.ndarray]:
    """Make `game` add every `stride`-th frame that it plays to the list returned, and play the actions of `replay`."""
    images: list[np.ndarray] = []
    number, before, act = 0, None, game.act

    def act_and_look(action: int) -> float:
        nonlocal number, before
        if number < len(replay):
            action = replay[number]
        reward = act(action)
        if stride:
            image = picture(game)
            if number % stride == 0:
                # Of two frames, because some Atari games draw an object only in every other one.
                both = stride > 1 and game.SKIP > 1 and before is not None
                images.append(np.maximum(before, image) if both else image)
            before = image
        number += 1
        return reward

    game.act = act_and_look
    return images


def picture(game: Any) -> np.ndarray:
    """The screen, uint8 (H, W, 3)."""
    if hasattr(game, "picture"):
        return game.picture()
    if hasattr(game, "ale"):
        return game.ale.getScreenRGB()
    if hasattr(game, "emulator"):
        return game.emulator.get_screen()
    if hasattr(game, "env") and hasattr(game.env, "get_full_render"):  # MiniGrid: all rooms, lit where the agent looks
        return game.env.get_full_render(highlight=True, tile_size=8)
    screen = np.zeros(game.shape, np.uint8)
    game.draw(screen)
    gray = screen if game.palette is None else game.palette[screen]
    return gray[..., None].repeat(3, axis=-1)


def read_replay(path: Path, game: str) -> dict:
    """An episode that training recorded: best_episode.json, or best_first.json and best_shortest.json of 0.1.0."""
    if path.is_dir():
        path = path / "best_episode.json"
    try:
        replay = json.loads(path.read_text())
        recorded = Path(replay["env_id"]).name
        float(replay["episodic_return"])
        if not replay["actions"] or not all(type(action) is int for action in replay["actions"]):
            raise ValueError("no list of actions")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--replay: expected best_episode.json of a run, got {path}: {error!r}") from error
    if recorded != game:
        raise UsageError(f"--replay: expected an episode of {game}, as the checkpoint, got one of {recorded}")
    return replay


# === 3. The strip below the game ======================================================================================


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def cells(step: Step, place: str = "room") -> dict[str, str]:
    """The numbers of the strip, by name. `place`: what the number of a room stands for."""
    numbers = dict(time=clock(step.seconds), score=f"{step.score:.10g}")
    if step.room is not None:
        numbers[place] = str(step.room)
    numbers["value"] = three_digits(step.value)
    numbers["intrinsic value"] = three_digits(step.int_value)
    if step.bonus is not None:
        numbers["bonus"] = three_digits(step.bonus)
        numbers["bonus / std"] = three_digits(step.scaled_bonus)
    return numbers


def three_digits(x: float) -> str:
    return f"{x:#.3g}".rstrip(".")


def round_up(x: float) -> float:
    """The smallest round number that is not below `x`."""
    power = 10.0 ** math.floor(math.log10(max(x, 1e-12)))
    return next(digit * power for digit in (1, 1.5, 2, 2.5, 3, 4, 5, 7, 10) if digit * power >= x)


class Strip:
    """The picture below the game: numbers of the step, and over time the bonus, rewards and new rooms.

    The time axis doubles when it is full, so that the episode is visible from its beginning.
    """

    def __init__(self, width: int, game: str, first: Step):
        self.width, self.unit = width, width / 840
        self.text = font(max(12, round(13 * self.unit)))
        self.number = font(max(16, round(21 * self.unit)))
        self.margin = max(8, round(12 * self.unit))
        self.has_map = "MontezumaRevenge" in game
        self.place = "room"  # whose first visit is marked, unless it is one of very many
        if "SuperMarioBros" in game:
            self.place = "column"
        elif "MiniGrid" in game:
            self.place = "cell"
        self.bonuses = np.zeros(75)  # room for so many steps
        self.steps = 0
        self.marks: list[tuple[int, str, tuple]] = []  # step, label, color
        self.rooms: set[int | None] = set()
        self.lay_out(len(cells(first, self.place)), first.bonus is not None)

    def lay_out(self, numbers: int, has_bonus: bool) -> None:
        """Give the numbers as many rows as they need, and the plot its place below them."""
        widest = max(self.number.getlength("-0.00e+00"), self.text.getlength("intrinsic value")) + self.margin
        columns = max(1, int((self.width - self.margin) / widest))
        rows = math.ceil(numbers / columns)
        self.columns = math.ceil(numbers / rows)
        self.text_height, number_height = (sum(kind.getmetrics()) for kind in (self.text, self.number))
        self.row_height = self.text_height + number_height + 4
        self.left, self.right = self.margin, self.width - self.margin
        self.room_size = round(18 * self.unit), round(16 * self.unit)
        plot_height = 16  # marks only
        if self.has_map:
            plot_height = 4 * self.room_size[1]
            self.right -= 10 * self.room_size[0]
        if has_bonus:
            plot_height = max(48, round(82 * self.unit))
        self.top = round(6 * self.unit) + rows * self.row_height + self.text_height + 4
        self.bottom = self.top + plot_height
        self.height = self.bottom + self.text_height + round(8 * self.unit)

    def draw(self, step: Step) -> np.ndarray:
        """The strip after `step`, uint8 (height, width, 3)."""
        self.remember(step)
        image = Image.new("RGB", (self.width, self.height), PAPER)
        pen = ImageDraw.Draw(image)
        self.draw_numbers(pen, step)
        if self.has_map:
            self.draw_map(pen, step.room)
        self.draw_marks(pen)
        if step.bonus is not None:
            self.draw_bonuses(image, pen)
        pen.line((self.left, self.bottom, self.right, self.bottom), LINE)
        span = clock(len(self.bonuses) * step.seconds / self.steps)
        pen.text((self.right, self.bottom + 2), span, GRAY, self.text, "ra")
        return np.array(image)

    def remember(self, step: Step) -> None:
        """Add a step to what the plot shows."""
        if self.steps == len(self.bonuses):
            self.bonuses = np.append(self.bonuses, np.zeros(self.steps))
        if step.bonus is not None:
            self.bonuses[self.steps] = step.bonus
        if self.place == "room" and self.rooms and step.room not in self.rooms:
            self.marks.append((self.steps, f"room {step.room}", INK))
        if step.reward:
            self.marks.append((self.steps, f"{step.reward:+g}", REWARD))
        self.rooms.add(step.room)
        self.steps += 1

    def draw_numbers(self, pen: ImageDraw.ImageDraw, step: Step) -> None:
        cell_width = (self.width - self.margin) / self.columns
        for i, (name, value) in enumerate(cells(step, self.place).items()):
            row, column = divmod(i, self.columns)
            x = self.margin + column * cell_width
            y = round(6 * self.unit) + row * self.row_height
            pen.text((x, y), name, GRAY, self.text)
            pen.text((x, y + self.text_height), value, SURPRISE if "bonus" in name else INK, self.number)

    def draw_map(self, pen: ImageDraw.ImageDraw, here: int | None) -> None:
        """The rooms of Montezuma's Revenge, to the right of the plot."""
        width, height = self.room_size
        for room, x, y in pyramid(self.right + width, self.bottom - 4 * height, width, height):
            color = PAPER
            if room in self.rooms:
                color = SURPRISE if room == here else SURPRISE_DARK
            pen.rectangle((x, y, x + width - 2, y + height - 2), color, LINE)

    def draw_marks(self, pen: ImageDraw.ImageDraw) -> None:
        """A line for each reward and new room. Where there is no space for all labels, the newest have it."""
        y = self.top - self.text_height - 2
        leftmost = self.left + self.text.getlength("0.00015 ")  # before it stands the limit of the plot
        free = self.right
        for when, label, color in reversed(self.marks):
            x = self.left + when * (self.right - self.left) / len(self.bonuses)
            pen.line((x, self.top - 3, x, self.bottom), color)
            length = self.text.getlength(label)
            start = min(x, self.right - length)
            if leftmost < start and start + length <= free:
                pen.text((start, y), label, color, self.text)
                free = start - 6

    def draw_bonuses(self, image: Image.Image, pen: ImageDraw.ImageDraw) -> None:
        """A bar for each column of pixels, as high as the highest bonus of the steps that fall into it."""
        width, height = self.right - self.left, self.bottom - self.top
        peaks = np.maximum.reduceat(self.bonuses, np.arange(width) * len(self.bonuses) // width)
        limit = round_up(peaks.max())
        pen.text((self.left, self.top - self.text_height - 2), f"{limit:g}", GRAY, self.text)
        inside = np.ceil(peaks / limit * height) - np.arange(height, 0, -1)[:, None]  # pixels below the end of the bar
        fading = np.linspace(1.0, 0.4, height)[:, None]
        shade = np.where(inside < 2, 1.0, fading)  # the end is bright
        bars = Image.fromarray(np.uint8(shade[..., None] * SURPRISE))
        image.paste(bars, (self.left, self.top), Image.fromarray(inside >= 0))


# === 4. The map of rooms ==============================================================================================

ENTRANCE = 1
PYRAMID = (  # the rooms of Montezuma's Revenge, level by level
    (0, 1, 2),
    (3, 4, 5, 6, 7),
    (8, 9, 10, 11, 12, 13, 14),
    (15, 16, 17, 18, 19, 20, 21, 22, 23),
)
HEAT = ((58, 24, 95), (130, 30, 110), (200, 60, 80), (244, 125, 40), (252, 230, 120))  # few visits to many


def pyramid(x: int, y: int, width: int, height: int) -> list[tuple[int, int, int]]:
    """Room and upper left corner of all rooms of Montezuma's Revenge, in a picture 9 rooms wide and 4 high."""
    corners = []
    for level, rooms in enumerate(PYRAMID):
        for i, room in enumerate(rooms):
            corners.append((room, x + (3 - level + i) * width, y + level * height))
    return corners


def room_colors(visits: dict[int, int]) -> dict[int, tuple[int, ...]]:
    """Color of every room on the map, by the logarithm of its visits."""
    most = math.log(max(2, *visits.values()))
    colors = {}
    for room, count in visits.items():
        heat = 4 * math.log(max(1, count)) / most
        colors[room] = tuple(round(np.interp(heat, range(5), channel)) for channel in zip(*HEAT, strict=True))
    return colors


def short(count: int) -> str:
    """12345 -> 12.3k"""
    power = min(3, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.3g}{('', 'k', 'M', 'G')[power]}"


def draw_rooms(state: dict) -> Image.Image:
    """The map of Montezuma's Revenge with the steps that the training of a checkpoint has spent in each room."""
    game = str(state["args"].get("env_id", state["script"]))
    if "MontezumaRevenge" not in game:
        raise UsageError(f"--rooms: expected MontezumaRevenge, the game whose map is known, got {game}; use --video")
    if "visits" not in state["progress"]:
        raise UsageError("--rooms: expected a checkpoint with the rooms visited, got exported weights without them")
    known = set(itertools.chain(*PYRAMID))
    visits = {room: count for room, count in state["progress"]["visits"].items() if room in known}
    width, height, left, top = 96, 72, 18, 92
    image = Image.new("RGB", (9 * width + 2 * left, top + 4 * height + left), PAPER)
    pen = ImageDraw.Draw(image)
    subtitle = f"in {state['progress']['episodes']:,} episodes; number and color: steps spent in the room"
    pen.text((left, 14), f"{len(visits)} of the 24 rooms of Montezuma's Revenge visited", INK, font(24))
    pen.text((left, 45), subtitle, GRAY, font(17))
    colors = room_colors(visits) if visits else {}
    for room, x, y in pyramid(left, top, width, height):
        color, name, outline, thickness = colors.get(room, PAPER), str(room), LINE, 1
        if room == ENTRANCE:
            name, outline, thickness = f"{room} entrance", INK, 4
        ink = GRAY
        if room in visits:
            ink = PAPER if sum(color) > 380 else INK
        pen.rectangle((x + 2, y + 2, x + width - 3, y + height - 3), color, outline, thickness)
        pen.text((x + 10, y + 8), name, ink, font(15))
        if room in visits:
            pen.text((x + width - 10, y + height - 11), short(visits[room]), ink, font(20), "rs")
    return image


# === 5. The video's file ==============================================================================================

FAST = ("-preset", "veryfast", "-threads", "2")
MP4 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", *FAST, "-crf", "21", "-movflags", "+faststart")
LOSSLESS = ("-c:v", "libx264rgb", *FAST, "-crf", "0")


def record(path: Path, steps: Iterator[Step], fps: float, scale: int = 3, game: str = "") -> Step:
    """Write an episode to an .mp4 or .gif and return its last step."""
    if path.suffix.lower() != ".gif":
        return write_video(path, steps, fps, scale, game, MP4)
    with tempfile.TemporaryDirectory() as folder:
        video, palette = Path(folder, "lossless.mkv"), Path(folder, "palette.png")
        last = write_video(video, steps, fps, scale, game, LOSSLESS)
        # All images share a palette, so they are read twice.
        with ffmpeg("-i", video, "-vf", "palettegen", palette):
            pass
        with ffmpeg("-i", video, "-i", palette, "-lavfi", "paletteuse=dither=none:diff_mode=rectangle", path):
            pass
    return last


def write_video(path: Path, steps: Iterator[Step], fps: float, scale: int, game: str, codec: tuple) -> Step:
    """Write image by image: an episode would fill gigabytes of memory."""
    first = next(steps)
    width, height = video_size(first.images[0], scale)
    strip = Strip(width, game, first)
    strip.height += (height + strip.height) % 2  # H.264 wants even sizes
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height + strip.height}")
    with ffmpeg(*raw, "-framerate", str(fps), "-i", "-", *codec, path) as pipe:
        for step in tqdm(itertools.chain([first], steps), path.name, leave=False, disable=None):
            below = strip.draw(step)
            for image in step.images:
                pipe.write(np.concatenate([enlarge(image, width, scale), below]))
    return step


@contextlib.contextmanager
def ffmpeg(*arguments: str | Path):
    """Run ffmpeg; yields its standard input. OSError with its reason if it fails."""
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:  # its wheels for some platforms come without
        raise UsageError("--video: expected the program ffmpeg, found none; install it") from None
    command = [program, "-v", "error", "-y", *map(str, arguments)]
    pipes: Any = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    # In a session of its own, Ctrl-C does not reach it: it completes the file.
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    try:
        with contextlib.suppress(BrokenPipeError):  # it has failed
            yield process.stdin
    finally:
        _, errors = process.communicate()
    if process.returncode:
        reason = errors.decode(errors="replace").strip() or f"exit code {process.returncode}"
        raise OSError(f"{arguments[-1]}: cannot be written: {reason.splitlines()[0]}")


def video_size(image: np.ndarray, scale: int) -> tuple[int, int]:
    """Width and height of the game in the video: `scale` times its rows, in the shape that a television gave it."""
    rows, columns = image.shape[:2]
    width: float = columns
    if (rows, columns) in ((210, 160), (250, 160)):  # Atari fills a 4:3 screen
        width = rows * 4 / 3
    elif (rows, columns) == (224, 240):  # the NES has pixels of 8:7
        width = columns * 8 / 7
    return round(scale * width / 2) * 2, rows * scale


def enlarge(image: np.ndarray, width: int, scale: int) -> np.ndarray:
    """The picture in this width, `scale` times as high. Sharp, although a pixel can be 5.25 wide."""
    rows, columns = image.shape[:2]
    multiple = math.ceil(width / columns) * columns
    wide = Image.fromarray(image).resize((multiple, rows), Image.Resampling.NEAREST)
    wide = wide.resize((width, rows), Image.Resampling.BOX)
    return np.asarray(wide).repeat(scale, axis=0)


# === 6. The command line ==============================================================================================

LIMITS = dict(
    episodes=(1, 999),
    speed=(0.1, 99),
    seed=(0, 2**32 - 1),
    sticky=(0, 1),
    scale=(2, 8),
    max_steps=(1, 10**5),
)
NOT_IN_A_REPLAY = ("episodes", "best", "greedy", "seed", "sticky", "max_steps")
OF_A_VIDEO = (*NOT_IN_A_REPLAY, "replay", "speed", "scale", "rom", "rom_unchecked")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. UsageError if it contradicts itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, or the directory of a run: then its newest checkpoint")
    add("--video", default="", metavar="FILE", help=".mp4, or .gif (20 images a second); several episodes: FILE-1, ...")
    add("--rooms", default="", metavar="FILE", help=".png with the map of the visited rooms (Montezuma's Revenge)")
    add("--script", default="", help="script that made the checkpoint (default: the one it names)")
    add = parser.add_argument_group("video").add_argument
    add("--episodes", type=int, default=1, help="episodes to record (default: 1)")
    add("--best", action="store_true", help="play all --episodes first, then record the one with the highest return")
    add("--replay", default="", metavar="FILE", help="record this best_episode.json of a run instead of a new episode")
    add("--speed", type=float, default=1, help="1: real time, 4: four times as fast, 0.1: slow (default: 1)")
    add("--scale", type=int, default=3, help="rows of the video for each row of the game, 2 to 8 (default: 3)")
    add("--greedy", action="store_true", help="play the most probable action instead of sampling")
    add("--seed", type=int, default=1, help="seed of actions and environment: other episodes (default: 1)")
    add("--sticky", type=float, help="probability, in every frame, to repeat the last action (default: as in training)")
    add("--max-steps", type=int, help="steps after which an episode ends (default: as in training)")
    add("--rom", help="file of the cartridge (Super Mario Bros.)")
    add("--rom-unchecked", action="store_true", default=None, help="accept a cartridge that is not the expected one")
    cli = parser.parse_args(argv)

    if not (cli.video or cli.rooms):
        raise UsageError("expected --video FILE or --rooms FILE, got neither")
    check_output("video", cli.video, (".mp4", ".gif"))
    check_output("rooms", cli.rooms, (".png",))
    for name, (low, high) in LIMITS.items():
        value = getattr(cli, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"{flag(name)}: expected a number from {low} to {high}, got {value}")
    given = [name for name in OF_A_VIDEO if getattr(cli, name) != parser.get_default(name)]
    if given and not cli.video:
        raise UsageError(f"{flag(given[0])}: expected --video FILE with it")
    surplus = [name for name in given if name in NOT_IN_A_REPLAY]
    if surplus and cli.replay:
        raise UsageError(f"{flag(surplus[0])}: expected no --replay with it, which plays what was recorded")
    return cli


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_output(name: str, file: str, suffixes: tuple[str, ...]) -> None:
    path = Path(file).absolute()
    if file and (path.suffix.lower() not in suffixes or path.is_dir() or not path.parent.is_dir()):
        raise UsageError(f"--{name}: expected a {' or '.join(suffixes)} in a folder that exists, got {file}")


def record_videos(cli: argparse.Namespace, script: ModuleType, state: dict) -> None:
    """Record what the command line asks for."""
    changes = dict(seed=cli.seed, greedy=cli.greedy, sticky_action_prob=cli.sticky, max_episode_steps=cli.max_steps)
    args = checked_args(script, state, rom=cli.rom, rom_unchecked=cli.rom_unchecked, **changes)
    networks = load_networks(script, state)
    game, path = Path(args.env_id).name, Path(cli.video)
    rate = frame_rate(script) * cli.speed
    stride = math.ceil(rate / (20 if path.suffix.lower() == ".gif" else FPS) - 1e-9)
    fps = rate / stride
    if cli.replay:
        replay = read_replay(Path(cli.replay), game)
        args = dataclasses.replace(args, max_episode_steps=10**9)  # it ends where it ended
        last = record(path, play(script, networks, args, 0, stride, replay["actions"]), fps, cli.scale, game)
        report(path, "replay", last)
        reached = last.score, last.frames, last.rooms
        if reached != (replay["episodic_return"], len(replay["actions"]), replay.get("rooms", last.rooms)):
            print(f"warning: not the recorded episode, whose return was {replay['episodic_return']:g}: in some games")
            print("  (Seaquest is one) the beginning differs from episode to episode")
        return
    episodes = [best_episode(script, networks, args, cli.episodes)] if cli.best else range(cli.episodes)
    for i in episodes:
        out = path.with_stem(f"{path.stem}-{i + 1}") if len(episodes) > 1 else path
        last = record(out, play(script, networks, args, i, stride), fps, cli.scale, game)
        report(out, f"episode {i + 1}", last)


def best_episode(script: ModuleType, networks: tuple, args: Any, episodes: int) -> int:
    """The number of the episode with the highest return; of equal ones, that with the most rooms."""
    scores = []
    for i in tqdm(range(episodes), "episodes", leave=False, disable=None):
        steps = list(play(script, networks, args, i, stride=0))
        scores.append((steps[-1].score, steps[-1].rooms))
    print("returns:", *(f"{score:.10g}" for score, _ in scores))
    return scores.index(max(scores))


def report(path: Path, name: str, last: Step) -> None:
    print(f"{path}: {name}, return {last.score:.10g}, {last.frames} frames, {clock(last.seconds)} of play")


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)  # one frame at a time is no work for more, and the encoder runs besides
    try:
        cli = parse(argv)
        path, script, state = load(cli.checkpoint, cli.script)
        print(f"{path}: step {state['progress']['step']:,}")
        if cli.rooms:
            draw_rooms(state).save(cli.rooms)
        if cli.video:
            record_videos(cli, script, state)
    except KeyboardInterrupt:
        return 130  # the file so far is complete
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
