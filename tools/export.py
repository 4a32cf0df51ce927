"""Keep of a checkpoint what `--play` needs, a tenth of its size: the weights of the policy, arguments, scores so far.

    python tools/export.py runs/.../best.pt models/mario_1-1.pt

The file can be played, but not resumed or watched with its bonus: optimiser, RND networks and emulators are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from watch import load

KEEP = ("format", "script", "args", "agent")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, or the directory of a run: then its newest checkpoint")
    parser.add_argument("out", type=Path, help="file to write, .pt")
    parser.add_argument("--script", default="", help="script that made the checkpoint (default: the one it names)")
    args = parser.parse_args(argv)
    try:
        path, script, state = load(args.checkpoint, args.script)
        small = {name: state[name] for name in KEEP}
        small["progress"] = {name: state["progress"][name] for name in ("iteration", "step", "episodes", "record")}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        saved = script.save_checkpoint(small, args.out.parent)
        if not saved:
            return 1
        saved.replace(args.out)
    except Exception as error:  # a script has its own UsageError
        if not isinstance(error, OSError) and type(error).__name__ != "UsageError":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, of {path} at step {small['progress']['step']:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
