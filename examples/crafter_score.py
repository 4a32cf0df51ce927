"""Score and success rates of runs of rnd_ppo_crafter.py, as Hafner 2021, arXiv:2109.06780, defines them.

    python examples/crafter_score.py RUN...                                    (RUN: the directory of a run)
    python examples/crafter_score.py RUN... --steps 1000000 --json crafter.json

The success rate of an achievement is the share of training episodes that unlock it, among those that end by --steps.
The score of a run is exp(mean of ln(1 + rate in percent)) - 1 over the 22 achievements. Several runs: their mean and
standard deviation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ACHIEVEMENTS = 22
PREFIX = "charts/episodic_"  # of what the script logs for every episode


class UsageError(ValueError):
    """The user has to change something; the message says what was expected, what was given and what to do."""


def read(run: Path, steps: int) -> dict[str, Any]:
    """Steps that count, episodes that end by then, success rates in percent and score of a run."""
    # What a killed process logged after its last checkpoint is dropped where the resumed one logged it again.
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    events.Reload()
    rates = {}
    episodes = 0
    for tag in sorted(events.Tags()["scalars"]):
        name = tag.removeprefix(PREFIX)
        if name == tag or name in ("return", "length") or name.endswith(("_mean", "_mean100")):
            continue
        unlocked = [event.value for event in events.Scalars(tag) if event.step <= steps]
        episodes = len(unlocked)
        rates[name] = 100 * float(np.mean(unlocked)) if unlocked else 0.0
    if len(rates) != ACHIEVEMENTS:
        expected = f"expected a run of rnd_ppo_crafter.py, with {ACHIEVEMENTS} achievements of each episode"
        raise UsageError(f"{run}: {expected}, found {len(rates)}")
    if not episodes:
        raise UsageError(f"{run}: expected episodes that end by step {steps}, found none; wait or raise --steps")
    reached = events.Scalars("charts/SPS")[-1].step  # logged after every rollout
    if reached < steps:
        print(f"warning: {run} ends at step {reached} of {steps}", file=sys.stderr)
    score = float(np.exp(np.mean(np.log1p(list(rates.values())))) - 1)
    return dict(run=run.resolve().name, steps=min(steps, reached), episodes=episodes, score=score, rates=rates)


def row(name: str, values: list[float], digits: int) -> str:
    text = f"{name:22}{np.mean(values):8.{digits}f}"
    if len(values) > 1:
        text += f" +- {np.std(values):.{digits}f}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--steps", type=int, default=1_000_000, help="last step that counts (default: a million)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers of every run")
    args = parser.parse_args(argv)
    try:
        runs = [read(run, args.steps) for run in args.runs]
        for name in runs[0]["rates"]:
            print(row(name, [run["rates"][name] for run in runs], 2))
        print(row("steps", [run["steps"] for run in runs], 0))
        print(row("episodes", [run["episodes"] for run in runs], 0))
        print(row("score", [run["score"] for run in runs], 2))
        if args.json:
            args.json.write_text(json.dumps(runs, indent=1) + "\n")
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
