"""Learning curves of runs: return, rooms, intrinsic reward and predictor loss from their TensorBoard event files.

One run           python tools/plot.py runs/MontezumaRevenge-v5__rnd_ppo_atari__1__... --out curves.png
Several seeds     python tools/plot.py runs/MontezumaRevenge-v5__rnd_ppo_atari__* --out curves.png
Variants          python tools/plot.py runs/A runs/B runs/C runs/D --labels CNN CNN LSTM LSTM --out curves.png
Against time      python tools/plot.py runs/* --out curves.png --x time

Runs of the same game and experiment (a run's directory is GAME__EXPERIMENT__SEED__TIME), or with the same label, are
one curve: their mean, and a band of one standard deviation. Where some of them have ended already, the curve goes on
dotted with the mean of the others. Needs `pip install -e '.[video]'`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

try:
    import matplotlib
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter
except ImportError as error:
    print(f"error: expected the package {error.name}, found none: pip install -e '.[video]'", file=sys.stderr)
    sys.exit(2)

PANELS = {  # title -> tag, is the scale logarithmic
    "return, mean of 100 episodes": ("charts/episodic_return_mean100", False),
    "rooms found": ("charts/rooms_total", False),
    "best return": ("charts/best_return", False),
    "intrinsic reward, raw": ("rnd/int_reward_raw", True),
    "intrinsic reward / its std": ("rnd/int_reward", False),
    "predictor loss": ("losses/predictor_loss", True),
}
WAY = "furthest x, mean of 100 episodes", "charts/furthest_x"  # of Super Mario Bros., instead of the rooms
POINTS = 500  # of a curve


class UsageError(ValueError):
    """Something that the user has to change; the message says what was expected, what came and what to do."""


def read(run: str | Path, axis: str = "steps") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(x, y) of every scalar in the event files of a run; x: environment steps, or hours of training."""
    run = Path(run)
    if not list(run.glob("*tfevents*")):
        raise UsageError(f"{run}: expected the directory of a run with TensorBoard event files, found none")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        steps, times, values = np.array([(e.step, e.wall_time, e.value) for e in events.Scalars(tag)]).T
        pauses = np.diff(times, prepend=times[0])  # of a run that was resumed: they do not count
        usual = np.median(pauses[1:]) if len(pauses) > 1 else 0
        hours = np.cumsum(np.where(pauses > 60 + 20 * usual, usual, pauses)) / 3600
        if (keep := np.isfinite(values)).any():
            curves[tag] = (steps if axis == "steps" else hours)[keep], values[keep]
    if not curves:
        raise UsageError(
            f"{run}: expected a run with values in its event files, found none; wait for its first rollout"
        )
    return curves


def experiment(run: str | Path) -> str:
    """Label of a run: game and experiment, or the name of its directory if that is not one of this project's."""
    name = Path(run).resolve().name
    game, *parts = name.split("__")
    return f"{game} {parts[0]}" if len(parts) == 3 else name


def mean_and_spread(curves: list[tuple[np.ndarray, np.ndarray]], smooth: int = 1):
    """Of curves (x, y) of different lengths: a common x; mean, standard deviation and number of those that reach it.

    Every curve is interpolated, and first averaged over windows of `smooth` points.
    """
    grid = np.linspace(min(x[0] for x, _ in curves), max(x[-1] for x, _ in curves), POINTS)
    rows = []
    for x, y in curves:
        window = np.ones(min(smooth, len(y)))
        y = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
        rows.append(np.interp(grid, x, y, left=np.nan, right=np.nan))
    rows = np.ma.masked_invalid(rows)
    return grid, rows.mean(0).filled(np.nan), rows.std(0).filled(np.nan), rows.count(0)


def plot(groups: dict[str, list[dict]], axis: str = "steps", smooth: int = 1):
    """Figure of six panels; `groups`: label -> curves of its runs, as `read` gives them."""
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with plt.rc_context({**style, "grid.color": "#e8e8e8", "axes.titlesize": 9, "axes.edgecolor": "#999999"}):
        figure, axes = plt.subplots(2, 3, figsize=(9, 5.2), layout="constrained")
        mario = any(WAY[1] in run for runs in groups.values() for run in runs)
        for ax, (title, (tag, log)) in zip(axes.flat, PANELS.items(), strict=True):
            if mario and tag == "charts/rooms_total":
                title, tag = WAY
            for i, (label, runs) in enumerate(groups.items()):
                name = label + (f" ({len(runs)} runs)" if len(runs) > 1 else "")
                line = dict(color=f"C{i}", lw=1.4)
                ax.plot([], [], label=name, **line)
                if curves := [run[tag] for run in runs if tag in run]:
                    x, mean, spread, count = mean_and_spread(curves, smooth)
                    few = count < len(curves)
                    ax.plot(x, np.where(few, np.nan, mean), **line)
                    ax.plot(x, np.where(few, mean, np.nan), **line, ls=":")
                    if len(curves) > 1:
                        low = np.maximum(mean - spread, mean / 10) if log else mean - spread
                        ax.fill_between(x, low, mean + spread, color=f"C{i}", alpha=0.2, lw=0)
            ax.set_title(title, loc="left")
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.margins(x=0.02)
            if not any(tag in run for runs in groups.values() for run in runs):
                ax.text(0.5, 0.5, f"no {tag}\nin these runs", ha="center", va="center", transform=ax.transAxes)
                ax.set(xticks=[], yticks=[])
            elif log:
                ax.set_yscale("log")
            else:
                ax.yaxis.set_major_formatter(lambda y, _: EngFormatter(sep="")(y) if abs(y) >= 1000 else f"{y:g}")
        figure.supxlabel("environment steps, of 4 frames each" if axis == "steps" else "hours", fontsize=8)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), frameon=False)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, with TensorBoard event files")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write, .png, .svg or .pdf")
    parser.add_argument("--x", choices=("steps", "time"), default="steps", help="horizontal axis (default: steps)")
    parser.add_argument("--labels", nargs="+", help="one for each RUN; runs with the same label become one curve")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="average over N logged points (default: 1)")
    args = parser.parse_args(argv)
    try:
        if args.labels and len(args.labels) != len(args.runs):
            raise UsageError(f"--labels: expected {len(args.runs)}, one for each run, got {len(args.labels)}")
        if args.smooth < 1:
            raise UsageError(f"--smooth: expected at least 1, got {args.smooth}")
        out = Path(args.out)
        if out.suffix not in (".png", ".svg", ".pdf") or not out.absolute().parent.is_dir():
            raise UsageError(f"--out: expected a .png, .svg or .pdf in a folder that exists, got {out}")
        groups: dict[str, list[dict]] = {}
        for run, label in zip(args.runs, args.labels or map(experiment, args.runs), strict=True):
            groups.setdefault(label, []).append(read(run, args.x))
        plot(groups, args.x, args.smooth).savefig(out, dpi=200)
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
