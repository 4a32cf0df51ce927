"""Learning curves of runs, from their TensorBoard event files: return, rooms, intrinsic reward, losses.

One run           python tools/plot.py runs/MontezumaRevenge-v5__rnd_ppo_atari__1__... --out curves.png
Several seeds     python tools/plot.py runs/MontezumaRevenge-v5__rnd_ppo_atari__* --out curves.png
Variants          python tools/plot.py runs/A runs/B runs/C runs/D --labels CNN CNN LSTM LSTM --out curves.png
Against time      python tools/plot.py runs/* --out curves.png --x time
Other panels      python tools/plot.py runs/* --out curves.png --panels return entropy explained losses/approx_kl
Keep the numbers  python tools/plot.py runs/* --out curves.png --json curves.json
Draw them again   python tools/plot.py curves.json --out curves.png

Runs of the same game and experiment (a run's directory is GAME__EXPERIMENT__SEED__TIME), or with the same label, form
one curve: their mean, with a band from the lowest to the highest run. Where some of them have no values, before their
first or after their last one, the curve is dotted: the mean of the others. Directories without values are skipped.
Runs that share a curve without --labels and differ in more than the seed are reported.

A panel is a short name (return, length, best, rooms, x, bonus, int_reward, predictor, entropy, explained,
int_explained, speed), a tag of TensorBoard or the last part of one. NAME=TITLE gives it a title of your own. Without
--panels the picture shows six of them, less those without values, or all that a .json has. Needs
`pip install -e '.[video]'`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    import matplotlib
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter
except ImportError as error:
    print(f"error: expected the package {error.name}, found none: pip install -e '.[video]'", file=sys.stderr)
    sys.exit(2)


class Panel(NamedTuple):
    tag: str
    title: str
    log: bool = False  # a logarithmic axis, if the values differ by a factor of ten
    floor: float = -math.inf  # lower values lie outside the panel, unless all are lower


PANELS = {  # by short name
    "return": Panel("charts/episodic_return_mean100", "return, mean of 100 episodes"),
    "length": Panel("charts/episodic_length_mean100", "steps of an episode, mean of 100"),
    "best": Panel("charts/best_return", "best return"),
    "rooms": Panel("charts/rooms_total", "rooms found"),
    "x": Panel("charts/furthest_x", "furthest x, mean of 100 episodes"),
    "bonus": Panel("rnd/int_reward_raw", "intrinsic reward, raw", log=True),
    "int_reward": Panel("rnd/int_reward", "intrinsic reward, normalised"),
    "predictor": Panel("losses/predictor_loss", "predictor loss", log=True),
    "entropy": Panel("losses/entropy", "entropy of the policy"),
    "explained": Panel("losses/explained_variance", "explained variance", floor=-1),
    "int_explained": Panel("losses/int_explained_variance", "explained variance, intrinsic", floor=-1),
    "speed": Panel("charts/SPS", "steps per second"),
}
DEFAULT = ("return", "rooms", "best", "bonus", "int_reward", "predictor")
POINTS = 500  # of a curve
# Arguments in which the seeds of an experiment may differ.
FREE_ARGS = {"seed", "compile", "log_interval", "save_interval", "keep_checkpoints", "total_rollouts"}
UNITS = (("seconds", 1), ("minutes", 60), ("hours", 3600), ("days", 86400))
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
}

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # x and y by tag
Groups = dict[str, list[Curves]]  # the curves of each run, by label


class UsageError(ValueError):
    """The user has to change something; the message says what was expected, what was given and what to do."""


# === Reading ==========================================================================================================


def read(run: str | Path, axis: str = "steps") -> Curves:
    """Every scalar in the event files of a run. x: environment steps, or seconds of training if `axis` is "time"."""
    run = Path(run)
    if not list(run.glob("*tfevents*")):
        raise UsageError(f"{run}: expected the directory of a run with TensorBoard event files, found none")
    # What a killed process logged after its last checkpoint is dropped where the resumed one logged it again.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # which warns of that
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        steps = np.array([scalar.step for scalar in scalars], float)
        values = np.array([scalar.value for scalar in scalars], float)
        finite = np.isfinite(values)
        if finite.any():
            curves[tag] = steps[finite], values[finite]
    if not curves:
        raise UsageError(f"{run}: expected values in its event files, found none; wait for its first rollout")
    return against_time(run, curves) if axis == "time" else curves


def against_time(run: Path, curves: Curves) -> Curves:
    """The same curves over seconds of training, from the logged speed: pauses before a resume do not count."""
    tag = PANELS["speed"].tag
    if tag not in curves:
        raise UsageError(f"{run}: expected a run that logs {tag}, found none; leave out --x time")
    steps, speed = curves[tag]
    # A run that began with the checkpoint of another starts with that one's steps, which took it no time.
    before = 2 * steps[0] - steps[1] if len(steps) > 1 else 0
    seconds = np.cumsum(np.diff(steps, prepend=before) / speed)
    return {tag: (np.interp(x, steps, seconds), y) for tag, (x, y) in curves.items()}


def experiment(run: str | Path) -> str:
    """Label of a run: game and experiment, or the name of its directory if that is not one of this project's."""
    name = Path(run).resolve().name
    match = re.fullmatch(r"(.+?)__(.+)__\d+__.+", name)
    return f"{match[1]} {match[2]}" if match else name


def arguments(run: str | Path) -> dict[str, Any]:
    """The arguments that a run began with, from its first event file; empty where that does not have them."""
    file = min(Path(run).glob("*tfevents*"))
    for event in itertools.islice(EventFileLoader(str(file)).Load(), 10):  # they are written first
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                info = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
                return {name: getattr(arg, arg.WhichOneof("kind")) for name, arg in info.hparams.items()}
    return {}


def read_groups(runs: list[str], labels: list[str] | None, axis: str) -> Groups:
    """The curves of all runs that have some, by label, or by experiment. Warns of the others.

    Without labels it also warns of the runs of an experiment that differ in more than the seed from its first one.
    """
    groups: Groups = {}
    first: dict[str, dict[str, Any]] = {}  # the arguments of the first run of an experiment
    for run, label in zip(runs, labels or map(experiment, runs), strict=True):
        try:
            curves = read(run, axis)
        except (UsageError, OSError) as error:
            print(f"warning: skipped {error}", file=sys.stderr)
            continue
        groups.setdefault(label, []).append(curves)
        if not labels:
            args = arguments(run)
            before = first.setdefault(label, args)
            differing = {name for name in args.keys() & before.keys() if args[name] != before[name]} - FREE_ARGS
            flags = ", ".join("--" + name.replace("_", "-") for name in sorted(differing))
            if flags:
                expected = f"expected the arguments of the other runs of {label!r}, for their mean"
                print(f"warning: {run}: {expected}, found another {flags}; try --labels", file=sys.stderr)
    if not groups:
        raise UsageError("RUN: expected at least one run with values, found none")
    return groups


def write_json(path: Path, groups: Groups, panels: list[Panel]) -> None:
    """Keep the numbers of the panels: {label: [{tag: [x, y]} of each run]}, to six digits."""
    labels: dict[str, list[dict]] = {}
    for label, runs in groups.items():
        labels[label] = []
        for run in runs:
            kept = {}
            for panel in panels:
                if panel.tag in run:
                    x, y = run[panel.tag]
                    kept[panel.tag] = [x.tolist(), [float(f"{value:.6g}") for value in y]]
            labels[label].append(kept)
    path.write_text(json.dumps(labels, separators=(",", ":")) + "\n")


def read_json(path: str) -> Groups:
    """The curves that `write_json` kept."""
    try:
        labels = json.loads(Path(path).read_text())
        return {
            label: [{tag: (np.array(x), np.array(y)) for tag, (x, y) in curves.items()} for curves in runs]
            for label, runs in labels.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{path}: expected numbers that --json wrote, got something else: {error}") from None


# === Panels ===========================================================================================================


def find_panel(name: str, tags: set[str]) -> Panel:
    """The panel that the user means: a short name, a tag or the last part of one, perhaps with =TITLE."""
    name, _, title = name.partition("=")
    matches = sorted(tag for tag in tags if name in (tag, tag.rpartition("/")[2]))
    if name in PANELS:
        panel = PANELS[name]
    elif matches:
        panel = Panel(matches[0], matches[0])
    else:
        panel = Panel(name, name)
    if panel.tag not in tags:
        known = [short for short, panel in PANELS.items() if panel.tag in tags]
        raise UsageError(f"--panels: expected some of {' '.join(known)} or a tag of these runs, got {name}")
    return panel._replace(title=title or panel.title)


def default_panels(groups: Groups) -> list[Panel]:
    """The usual six, without those that have nothing to show. Super Mario Bros. has a way instead of rooms."""
    runs = [curves for group in groups.values() for curves in group]
    panels = [PANELS[name] for name in DEFAULT]
    rooms = PANELS["rooms"]
    if any(PANELS["x"].tag in curves for curves in runs):
        panels[panels.index(rooms)] = PANELS["x"]
    elif not any(curves[rooms.tag][1].any() for curves in runs if rooms.tag in curves):
        panels.remove(rooms)  # a game without rooms logs zeros
    panels = [panel for panel in panels if any(panel.tag in curves for curves in runs)]
    if not panels:
        raise UsageError("RUN: expected runs that log what the scripts log, found none; name their tags with --panels")
    return panels


# === Drawing ==========================================================================================================


def mean_and_range(curves: list[tuple[np.ndarray, np.ndarray]], smooth: int = 1):
    """Of curves (x, y) of different lengths: a common x; mean, minimum, maximum and number of those that reach it.

    Every curve is averaged over windows of `smooth` points, then interpolated.
    """
    first = min(x[0] for x, _ in curves)
    last = max(x[-1] for x, _ in curves)
    grid = np.linspace(first, last, POINTS)
    rows = []
    for x, y in curves:
        window = np.ones(min(smooth, len(y)))
        sums = np.convolve(y, window, "same")
        counts = np.convolve(np.ones_like(y), window, "same")
        rows.append(np.interp(grid, x, sums / counts, left=np.nan, right=np.nan))
    masked = np.ma.masked_invalid(rows)
    mean, low, high = (values.filled(np.nan) for values in (masked.mean(0), masked.min(0), masked.max(0)))
    return grid, mean, low, high, masked.count(0)


def draw_curve(ax, curves: list[tuple[np.ndarray, np.ndarray]], color: str, smooth: int) -> None:
    """The mean of the curves, dotted where some of them have no values, and a band from the lowest to the highest."""
    x, mean, low, high, count = mean_and_range(curves, smooth)
    incomplete = count < len(curves)
    marker = "." if x[0] == x[-1] else None  # a single point is no line
    ax.plot(x, np.where(incomplete, np.nan, mean), color=color, lw=1.4, marker=marker)
    ax.plot(x, np.where(incomplete, mean, np.nan), color=color, lw=1.4, ls=":")
    if len(curves) > 1:
        ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def format_value(value: float, _: int) -> str:
    return EngFormatter(sep="")(value) if abs(value) >= 1000 else f"{value:g}"


def draw_panel(ax, panel: Panel, groups: Groups, unit: float, smooth: int) -> None:
    curves = [[run[panel.tag] for run in runs if panel.tag in run] for runs in groups.values()]
    values = np.concatenate([y for group in curves for _, y in group])
    log = panel.log and values.min() > 0 and values.max() > 10 * values.min()
    for i, group in enumerate(curves):
        if group:
            draw_curve(ax, [(x / unit, y) for x, y in group], f"C{i}", smooth)
    ax.set_title(panel.title)
    ax.margins(x=0.02)
    ax.tick_params(labelbottom=True)
    ax.xaxis.set_major_formatter(format_value)
    if log:
        ax.set_yscale("log")
    else:
        ax.yaxis.set_major_formatter(format_value)
    if ax.get_ylim()[0] < panel.floor < values.max():
        ax.set_ylim(bottom=panel.floor)


def time_unit(longest: float) -> tuple[str, int]:
    """Name and seconds of the largest unit that fits twice into `longest` seconds."""
    fitting = [unit for unit in UNITS if longest >= 2 * unit[1]]
    return fitting[-1] if fitting else UNITS[0]


def plot(groups: Groups, panels: list[Panel], axis: str = "steps", smooth: int = 1):
    """A figure with a panel for each quantity and a curve for each label."""
    title, unit = "environment steps", 1
    if axis == "time":
        ends = [x[-1] for runs in groups.values() for curves in runs for x, _ in curves.values()]
        name, unit = time_unit(max(ends))
        title = f"{name} of training"

    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width = max(4, 3 * columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, 2.6 * rows), layout="constrained", squeeze=False, sharex=True
        )
        for ax, panel in zip(axes.flat, panels, strict=False):
            draw_panel(ax, panel, groups, unit, smooth)
        for ax in axes.flat[len(panels) :]:
            ax.remove()
        figure.supxlabel(title, fontsize=8)

        labels = [f"{label} ({len(runs)} runs)" if len(runs) > 1 else label for label, runs in groups.items()]
        lines = [plt.Line2D([], [], color=f"C{i}", lw=1.4) for i in range(len(groups))]
        longest = max(map(len, labels))
        fitting = int(16 * width / (longest + 6))  # about 16 characters to the inch
        figure.legend(lines, labels, loc="outside upper center", ncols=max(1, fitting), frameon=False)
    return figure


# === Start ============================================================================================================


def check_args(args: argparse.Namespace) -> None:
    if args.labels and len(args.labels) != len(args.runs):
        raise UsageError(f"--labels: expected {len(args.runs)}, one for each run, got {len(args.labels)}")
    if any(run.endswith(".json") for run in args.runs) and (len(args.runs) > 1 or args.labels or args.x == "time"):
        raise UsageError("RUN: expected runs, or one .json alone: it has its labels and its x already")
    if args.json and args.x == "time":
        raise UsageError("--json: expected --x steps, got time: the numbers would be drawn again as steps")
    if args.json and args.json.suffix != ".json":
        raise UsageError(f"--json: expected a file NAME.json, got {args.json}")
    if args.smooth < 1:
        raise UsageError(f"--smooth: expected at least 1, got {args.smooth}")
    if args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.absolute().parent.is_dir():
        raise UsageError(f"--out: expected a .png, .svg or .pdf in a folder that exists, got {args.out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or one .json")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="picture to write, .png, .svg or .pdf")
    time = "time is that of training without random play and pauses, a run from another's checkpoint begins at 0"
    parser.add_argument("--x", choices=("steps", "time"), default="steps", help=f"default: steps; {time}")
    parser.add_argument("--labels", nargs="+", help="one for each RUN; runs with the same label become one curve")
    parser.add_argument("--panels", nargs="+", metavar="NAME", help="what to show (default: six panels)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="average over N logged points (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers that the picture shows")
    args = parser.parse_args(argv)
    try:
        check_args(args)
        if args.runs[0].endswith(".json"):
            groups = read_json(args.runs[0])
        else:
            groups = read_groups(args.runs, args.labels, args.x)
        tags = dict.fromkeys(tag for runs in groups.values() for curves in runs for tag in curves)
        if args.panels:
            panels = [find_panel(name, set(tags)) for name in args.panels]
        elif args.runs[0].endswith(".json"):  # all that was kept
            known = {panel.tag: panel for panel in PANELS.values()}
            panels = [known.get(tag, Panel(tag, tag)) for tag in tags]
        else:
            panels = default_panels(groups)
        if args.json:
            write_json(args.json, groups, panels)
        with plt.rc_context({"pdf.fonttype": 42}):  # TrueType: some publishers refuse the default
            plot(groups, panels, args.x, args.smooth).savefig(args.out, dpi=200)
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
