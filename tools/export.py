"""Strip a checkpoint to what `--play` needs, a tenth of its size: the policy's weights, its arguments, scores so far.

    python tools/export.py RUN models/mario_1-1.pt            (RUN: directory of a run, or one of its checkpoints)

The exported file can be played and watched, but not resumed: optimiser, RND networks and emulators are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from types import ModuleType

from watch import UsageError, load

KEEP = ("format", "script", "agent")
SCORES = ("iteration", "step", "episodes", "record", "visits")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, or the directory of a run: then its newest checkpoint")
    parser.add_argument("out", type=Path, help="file to write, .pt; it must not exist yet")
    parser.add_argument("--script", default="", help="script that made the checkpoint (default: the one it names)")
    cli = parser.parse_args(argv)
    try:
        check_target(cli.out)
        path, script, state = load(cli.checkpoint, cli.script)
        cli.out.parent.mkdir(parents=True, exist_ok=True)
        script.save_checkpoint(stripped(script, state), cli.out)
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{cli.out}: {cli.out.stat().st_size / 1e6:.1f} MB, of {path} at step {state['progress']['step']:,}")
    return 0


def check_target(out: Path) -> None:
    """Raise UsageError where an export would replace a file, or be taken for a checkpoint of a run."""
    if out.exists():
        raise UsageError(f"{out}: expected a file that does not exist yet; take another name or remove it first")
    if re.fullmatch(r"checkpoint_\d+\.pt|best\.pt", out.name):
        raise UsageError(f"{out}: expected another name, because runs name their own checkpoints so; try policy.pt")


def stripped(script: ModuleType, state: dict) -> dict:
    """The part of a checkpoint that is exported, without the paths of this machine."""
    small = {name: state[name] for name in KEEP}
    small["args"] = script.saved_args(state)
    small["progress"] = {name: state["progress"][name] for name in SCORES if name in state["progress"]}
    return small


if __name__ == "__main__":
    sys.exit(main())
