"""Look at a trained agent: a video of how it plays and of what surprises it, or a map of the rooms it has been in.

Video             python tools/watch.py runs/MontezumaRevenge-v5__... --video out.mp4          (newest checkpoint)
GIF, fast         python tools/watch.py runs/.../checkpoint_000500.pt --video out.gif --speed 4 --scale 2
Best of ten       python tools/watch.py runs/.../best.pt --video out.mp4 --episodes 10 --best
Your own script   python tools/watch.py runs/... --video out.mp4 --script my_rnd.py
Training's best   python tools/watch.py runs/... --video out.mp4 --replay runs/.../best_shortest.json
Rooms visited     python tools/watch.py runs/... --rooms rooms.png

The strip under the game plots the intrinsic reward: the RND predictor's error on the frame that a step led to, with the
checkpoint's observation statistics, as in training; "/ its std" is what the agent learns from. Values are its estimates
before the step. Green marks are rewards of the game, white ones new rooms. Needs `pip install -e '.[video]'`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

try:
    import imageio_ffmpeg
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    print(f"error: expected the package {error.name}, found none: pip install -e '.[video]'", file=sys.stderr)
    sys.exit(2)

FPS = 60  # of every emulator
PYRAMID = ((0, 1, 2), (3, 4, 5, 6, 7), (8, 9, 10, 11, 12, 13, 14), (15, 16, 17, 18, 19, 20, 21, 22, 23))  # entrance: 1
INK, GRAY, LINE, PAPER = (240, 240, 245), (140, 144, 156), (70, 74, 86), (17, 18, 23)
SURPRISE, SURPRISE_DARK, REWARD = (255, 148, 48), (115, 66, 22), (74, 222, 128)
HEAT = ((58, 24, 95), (130, 30, 110), (200, 60, 80), (244, 125, 40), (252, 230, 120))  # few visits to many
# What the video shows of a step. images: of its frames, uint8 (H, W, 3), without those that are skipped; frames and
# score: of the episode so far; values: before the step; int_reward: raw, of the frame that the step led to.
Step = collections.namedtuple("Step", "images frames place score reward value int_value int_reward scaled_int_reward")
font = functools.cache(ImageFont.load_default)


class UsageError(ValueError):
    """Something that the user has to change; the message says what was expected, what came and what to do."""


def load(path: str | Path, script: str | Path = "") -> tuple:
    """Path of a checkpoint, or of the newest one of a run; the script that made it, as a module; the state in it."""
    path = Path(path)
    paths = sorted(path.glob("checkpoint_*.pt")) or sorted(path.glob("best.pt")) if path.is_dir() else [path]
    if not paths:
        raise UsageError(f"{path}: expected a run with checkpoint_*.pt, found none; wait for its first checkpoint")
    path = paths[-1]
    try:  # only for the script's name: its own load_checkpoint checks and reads everything
        name = Path(torch.load(path, map_location="meta", weights_only=True)["script"]).name
    except Exception as error:
        reason = getattr(error, "strerror", None) or "something else or a damaged one"
        raise UsageError(f"{path}: expected a checkpoint or the directory of a run, got: {reason}") from error
    script = Path(script or Path(__file__).parents[1] / f"{name}.py").resolve()
    if not script.is_file() or script.suffix != ".py":
        raise UsageError(f"{script}: expected the script {name}.py, found none; name it with --script")
    sys.path.insert(0, str(script.parent))  # as `python script.py` does: fastops may lie beside it
    spec = importlib.util.spec_from_file_location(f"watched_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
        return path, module, module.load_checkpoint(path)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{script}: expected a script of this project that can be imported, got: {error}") from error


class Watched:
    """An emulator of which somebody sees every frame: `see(game)` is called behind each.

    It executes `replay`, the actions of a recorded episode, instead of those it is told, as far as they go.
    """

    def __init__(self, game, actions, see, replay=()):
        self.game, self.see, self.replay = game, see, (actions[i] for i in replay)

    def __getattr__(self, name):
        return getattr(self.game, name)

    def act(self, action):
        reward = self.game.act(next(self.replay, action))
        self.see(self.game)
        return reward


def play(script, state, index=0, *, stride=1, seed=1, sticky=None, max_steps=None, greedy=False, replay=()):
    """Play episode `index`, the same one each time, or the actions of `replay`.

    Yields Steps, with an image for every `stride` frames (0: none).
    """
    args, agent, rnd = state["args"], script.load_agent(state), script.RNDModel()
    obs_rms, int_return_rms = script.fastops.RunningMeanStd((84, 84)), script.fastops.RunningMeanStd(())
    if "rnd" not in state:
        raise UsageError("expected a checkpoint with RND networks, got an exported one: --play of its script shows it")
    for name, part in dict(rnd=rnd, obs_rms=obs_rms, int_return_rms=int_return_rms).items():
        part.load_state_dict(state[name])
    torch.manual_seed(seed * 1_000_003 + index)
    options = dict(seed=seed, max_episode_steps=max_steps or args["max_episode_steps"])
    options["sticky_action_prob"] = args["sticky_action_prob"] if sticky is None else sticky
    env = script.Env(script.Args(**args).env_id, index, **options)
    images, frames, before, score = [], 0, np.uint8(0), 0.0

    def see(game):
        nonlocal frames, before
        image = game.getScreenRGB() if stride else None
        if stride and frames % stride == 0:  # of the last two, because some games draw an object in every other frame
            images.append(np.maximum(before, image) if stride > 1 else image)
        frames, before = frames + 1, image

    env.game = Watched(env.game, env.actions, see, replay)
    for _, reward, value, int_value, frame, _ in script.play_episode(agent, env, greedy):
        raw = script.intrinsic_reward(rnd, torch.from_numpy(frame)[None, None], obs_rms).item()
        scaled, score = raw / math.sqrt(int_return_rms.var), score + reward
        yield Step(images[:], frames, env.look()[0], score, reward, value, int_value, raw, scaled)
        images.clear()
        if 0 < len(replay) <= frames:  # it may have ended with a step limit
            break


def clock(frames: int) -> str:
    return f"{frames // FPS // 60}:{frames // FPS % 60:02d}"


def cells(step: Step, place: str = "room") -> dict[str, str]:
    """The numbers of the strip: what each is called, and how it is written. `place`: room, or column of the stage."""
    named = {"time": clock(step.frames), "score": f"{step.score:g}", place: str(step.place)}
    named |= {"value, game": f"{step.value:#.3g}", "value, intrinsic": f"{step.int_value:#.3g}"}
    named |= {"intrinsic reward": f"{step.int_reward:#.3g}", "/ its std": f"{step.scaled_int_reward:#.3g}"}
    return {name: value for name, value in named.items() if value != "None"}


class Strip:
    """The picture under the game. The time axis doubles when it is full: the episode is visible from its beginning."""

    def __init__(self, width: int, pyramid: bool = False):
        self.width, self.height, self.pyramid = width, round(width * 0.215), pyramid
        self.history, self.events, self.places = [], [], set()  # an event: step, label, color
        self.span = 300  # steps that the plot has room for

    def draw(self, step: Step) -> np.ndarray:
        """The strip after `step`, uint8 (height, width, 3)."""
        t, u = len(self.history), self.width / 840  # u: unit of length
        self.history.append(step.int_reward)
        if self.pyramid and self.places and step.place not in self.places:
            self.events.append((t, f"room {step.place}", INK))
        if step.reward:
            self.events.append((t, f"{step.reward:+g}", REWARD))
        self.places.add(step.place)
        self.span *= 1 + (t >= self.span)
        image = Image.new("RGB", (self.width, self.height), PAPER)
        pen, small, large = ImageDraw.Draw(image), font(max(10, round(13 * u))), font(round(23 * u))
        numbers = cells(step, "room" if self.pyramid else "column")
        for i, (name, value) in enumerate(numbers.items()):
            x = 12 * u + i * (self.width - 12 * u) / len(numbers)
            pen.text((x, 7 * u), name, GRAY, small)
            pen.text((x, 22 * u), value, SURPRISE if "reward" in name or "std" in name else INK, large)
        left, right, top, bottom, w, h = (round(v * u) for v in (12, 828, 76, 158, 18, 16))
        if self.pyramid:
            right -= 9 * w + h
            for room, x, y in pyramid_cells(right + h, bottom - 4 * h, w, h):
                color = SURPRISE if room == step.place else SURPRISE_DARK if room in self.places else PAPER
                pen.rectangle((x, y, x + w - 2, y + h - 2), color, LINE)
        padded = np.array(self.history + [0.0] * (self.span - t - 1))
        peaks = np.maximum.reduceat(padded, np.arange(right - left) * self.span // (right - left))
        power = 10.0 ** math.floor(math.log10(max(peaks.max(), 1e-12)))
        limit = next(m * power for m in (1, 1.5, 2, 2.5, 3, 4, 5, 7, 10) if m * power >= peaks.max())
        level = np.ceil(peaks / limit * (bottom - top)) - np.arange(bottom - top, 0, -1)[:, None]
        pen.text((left, top - 18 * u), f"{limit:g}", GRAY, small)
        pen.text((right, bottom + 4 * u), clock(self.span * 4), GRAY, small, "ra")
        free = right
        for when, label, color in reversed(self.events):  # where there is no room for all labels, the newest have it
            x, length = left + when * (right - left) / self.span, small.getlength(label)
            pen.line((x, top - 3 * u, x, bottom), color)
            if (start := min(x, right - length)) + length <= free and start > left + 40 * u:
                pen.text((start, top - 18 * u), label, color, small)
                free = start - 6 * u
        pen.line((left, bottom, right, bottom), LINE)
        shade = np.where(level < 2 * u, 1.0, np.linspace(1.0, 0.4, bottom - top)[:, None])
        plot = Image.fromarray(np.uint8(shade[..., None] * SURPRISE))
        image.paste(plot, (left, top), Image.fromarray(level >= 0))
        return np.array(image)


def pyramid_cells(x: int, y: int, width: int, height: int) -> list[tuple[int, int, int]]:
    """Room and upper left corner of all rooms of Montezuma's Revenge, in a picture 9 rooms wide and 4 high."""
    return [
        (r, x + (3 - j + i) * width, y + j * height) for j, rooms in enumerate(PYRAMID) for i, r in enumerate(rooms)
    ]


def room_colors(visits: dict[int, int]) -> dict[int, tuple[int, ...]]:
    """Color of every visited room on the map, by the logarithm of its visits."""
    heat = {room: 4 * math.log(n) / math.log(max(2, *visits.values())) for room, n in visits.items()}
    return {room: tuple(round(np.interp(x, range(5), c)) for c in zip(*HEAT, strict=True)) for room, x in heat.items()}


def draw_rooms(state: dict) -> Image.Image:
    """The map of Montezuma's Revenge with the steps that the training of a checkpoint has spent in each room."""
    if "MontezumaRevenge" not in (game := str(state["args"].get("env_id", state["script"]))):
        raise UsageError(f"--rooms: expected MontezumaRevenge, the game whose map is known, got {game}; use --video")
    visits, episodes = state["progress"]["visits"], state["progress"]["episodes"]
    visits = {room: n for room, n in visits.items() if n > 0 and room in sum(PYRAMID, ())}
    colors, w, h, left, top = room_colors(visits), 96, 72, 18, 92
    image = Image.new("RGB", (9 * w + 2 * left, top + 4 * h + left), PAPER)
    pen, small = ImageDraw.Draw(image), font(17)
    pen.text((left, 14), f"{len(visits)} of the 24 rooms of Montezuma's Revenge visited", INK, font(24))
    pen.text((left, 45), f"in {episodes:,} episodes; number and color: steps spent in the room", GRAY, small)
    for room, x, y in pyramid_cells(left, top, w, h):
        ink = GRAY if room not in visits else PAPER if sum(colors[room]) > 380 else INK
        outline, thick, name = (INK, 4, " entrance") if room == 1 else (LINE, 1, "")
        pen.rectangle((x + 2, y + 2, x + w - 3, y + h - 3), colors.get(room, PAPER), outline, thick)
        pen.text((x + 10, y + 8), f"{room}{name}", ink, font(15))
        if room in visits:
            power = min(3, (len(str(visits[room])) - 1) // 3)
            short = f"{visits[room] / 1000**power:.3g}{' kMG'[power].strip()}"
            pen.text((x + w - 10, y + h - 11), short, ink, font(20), "rs")
    return image


def record(path: Path, steps, fps: float, scale: int = 3, pyramid: bool = False) -> Step:
    """Write the video of one episode to an .mp4 or .gif, image by image: they do not stay in memory. Its last step."""
    first = next(steps)
    rows, columns = first.images[0].shape[:2]  # Atari's 160 columns fill a 4:3 screen, pixels of the NES are 8:7
    height, width = rows * scale, round(scale * (rows * 4 / 3 if columns == 160 else columns * 8 / 7) / 2) * 2
    strip = Strip(width, pyramid)
    strip.height += (height + strip.height) % 2  # H.264 wants even sizes
    size, gif = (width, height + strip.height), path.suffix.lower() == ".gif"
    ffmpeg = ["-preset", "veryfast", "-threads", "2", "-movflags", "+faststart", "-crf", "0" if gif else "21"]
    options = dict(fps=fps, quality=None, macro_block_size=1, ffmpeg_log_level="error", output_params=ffmpeg)
    options["codec"], options["pix_fmt_out"] = ("libx264rgb", "rgb24") if gif else ("libx264", "yuv420p")
    with tempfile.TemporaryDirectory() as folder:  # a GIF's images share a palette: they are kept, and read twice
        raw, palette = (str(Path(folder, name)) for name in ("raw.mkv", "palette.png"))
        with contextlib.closing(imageio_ffmpeg.write_frames(raw if gif else str(path), size, **options)) as writer:
            writer.send(None)
            for step in tqdm(itertools.chain([first], steps), path.name, leave=False, disable=None):
                below = strip.draw(step)
                for image in step.images:  # first to a multiple of its width: sharp, although a pixel is 5.25 wide
                    wide = Image.fromarray(image).resize((math.ceil(width / columns) * columns, rows), 0)
                    wide = np.asarray(wide.resize((width, rows), Image.Resampling.BOX))
                    writer.send(np.concatenate([wide.repeat(scale, axis=0), below]))
        use = ["-i", palette, "-lavfi", "paletteuse=dither=none:diff_mode=rectangle", str(path)]
        for command in (["-vf", "palettegen", palette], use) if gif else ():
            subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", raw, *command], check=True)
    return step


def read_replay(path: str, game: str) -> dict:
    """An episode that training recorded in a run's best_first.json or best_shortest.json."""
    try:
        replay = json.loads(Path(path).read_text())
        recorded, _ = Path(replay["env_id"]).name, replay["actions"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--replay: expected best_first.json or best_shortest.json of a run, got {error!r}") from error
    if recorded != game:
        raise UsageError(f"--replay: expected an episode of {game}, as the checkpoint, got one of {recorded}")
    return replay


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    for name, *suffixes in (("video", ".mp4", ".gif"), ("rooms", ".png")):
        path = Path(getattr(args, name))
        if path.name and (path.suffix.lower() not in suffixes or not path.absolute().parent.is_dir()):
            raise UsageError(f"--{name}: expected {' or '.join(suffixes)} in a folder that exists, got {path}")
    limits = dict(
        episodes=(1, 999), speed=(0.1, 99), seed=(0, 2**31), sticky=(0, 1), scale=(2, 8), max_steps=(1, 10**5)
    )
    for name, (low, high) in limits.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')}: expected a number from {low} to {high}, got {value}")
    if not (args.video or args.rooms):
        raise UsageError("expected --video FILE or --rooms FILE, got neither")
    checkpoint, script, state = load(args.checkpoint, args.script)
    game = Path(script.Args(**state["args"]).env_id).name
    print(f"{checkpoint}: step {state['progress']['step']:,}")
    if args.rooms:
        draw_rooms(state).save(args.rooms)
    path, episodes = Path(args.video), range(args.episodes if args.video else 0)
    stride = math.ceil(FPS * args.speed / (20 if path.suffix.lower() == ".gif" else FPS) - 1e-9)
    options = dict(seed=args.seed, sticky=args.sticky, max_steps=args.max_steps, greedy=args.greedy)
    if args.replay:
        recorded = read_replay(args.replay, game)
        episodes, options = range(1), dict(replay=recorded["actions"], max_steps=10**5)
    if args.best and episodes:
        returns = [list(play(script, state, i, stride=0, **options))[-1].score for i in tqdm(episodes, disable=None)]
        print("returns:", *(f"{value:g}" for value in returns))
        episodes = [int(np.argmax(returns))]
    for i in episodes:
        out = path.with_stem(f"{path.stem}-{i + 1}") if len(episodes) > 1 else path
        steps = play(script, state, i, stride=stride, **options)
        last = record(out, steps, FPS * args.speed / stride, args.scale, "MontezumaRevenge" in game)
        if args.replay and last.score != recorded["episodic_return"]:
            print(f"warning: the replay reached {last.score:g}, not {recorded['episodic_return']:g} as in training: in")
            print("  some games (Seaquest is one) the beginning differs from episode to episode")
        print(f"{out}: episode {i + 1}, return {last.score:g}, {last.frames} frames, {clock(last.frames)} of play")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, or the directory of a run: then its newest checkpoint")
    add("--video", default="", metavar="FILE", help=".mp4, or .gif (20 images a second); several episodes: FILE-1, ...")
    add("--rooms", default="", metavar="FILE", help=".png with the map of the visited rooms (Montezuma's Revenge)")
    add("--script", default="", help="script that made the checkpoint (default: the one it names, beside tools/)")
    add("--episodes", type=int, default=1, help="episodes to record (default: 1)")
    add("--replay", default="", metavar="FILE", help="record this best_first.json or best_shortest.json of a run")
    add("--best", action="store_true", help="play all --episodes first, then record the one with the highest return")
    add("--speed", type=float, default=1, help="1: real time, 4: four times as fast, with fewer images (default: 1)")
    add("--greedy", action="store_true", help="play the most probable action instead of sampling")
    add("--seed", type=int, default=1, help="seed of actions and environment: other episodes (default: 1)")
    add("--sticky", type=float, help="probability, in every frame, to repeat the last action (default: as in training)")
    add("--scale", type=int, default=3, help="rows of the video for each row of the game, 2 to 8 (default: 3)")
    add("--max-steps", type=int, help="steps of 4 frames after which an episode ends (default: as in training)")
    torch.set_num_threads(1)  # one frame at a time is no work for more, and the encoder runs besides
    try:
        run(parser.parse_args(argv))
    except KeyboardInterrupt:
        return 130  # the file so far is complete
    except Exception as error:  # a script has its own UsageError
        if not isinstance(error, OSError | subprocess.SubprocessError) and type(error).__name__ != "UsageError":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
