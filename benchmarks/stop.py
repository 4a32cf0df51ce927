"""Seconds from SIGTERM to the exit of a training run: during a rollout, an update and a save.

    python benchmarks/stop.py --num-envs 128 --json out.json

Each run trains as a user's would. It is told to stop in the middle of its second rollout or update, or as soon as its
second save begins. A run that stops saves the state after the last whole rollout; the benchmark loads that
checkpoint, and fails if it cannot.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import report

from rnd_ppo_atari import checkpoints, load_checkpoint

SCRIPT = Path(__file__).parent.parent / "rnd_ppo_atari.py"
MOMENTS = ("rollout", "update", "save")
# The script, except that it prints which phase begins.
ANNOUNCING = """
import sys
import rnd_ppo_atari as script

def announcing(method, name=None):
    def call(self, *arguments, **options):
        print("begin", name or arguments[0], flush=True)
        return method(self, *arguments, **options)
    return call

script.Run.phase = announcing(script.Run.phase)
script.Run.save = announcing(script.Run.save, "save")
sys.exit(script.main())
"""


def seconds_to_exit(moment: str, num_envs: int) -> float:
    """Train, send SIGTERM when this happens for the second time, and wait for the end."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--num-envs {num_envs} --obs-norm-rollouts 1 --save-interval 1"
        command = [sys.executable, "-c", ANNOUNCING, *flags.split(), "--run-dir", folder]
        options = dict(cwd=SCRIPT.parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        with subprocess.Popen(command, **options) as run:
            begun: dict[str, float] = {}  # when each phase began last
            durations: dict[str, float] = {}
            phase = ""
            for line in run.stdout:
                word, _, name = line.strip().partition(" ")
                if word != "begin":
                    continue
                second = name in begun
                if phase:
                    durations[phase] = time.perf_counter() - begun[phase]
                phase = name
                begun[phase] = time.perf_counter()
                if second and name == moment:
                    break
            else:
                sys.exit(f"expected a run that reaches its second {moment}, but it ended; try: {SCRIPT} {flags}")
            time.sleep(0 if moment == "save" else durations[moment] / 2)
            start = time.perf_counter()
            run.send_signal(signal.SIGTERM)
            run.communicate()
            seconds = time.perf_counter() - start
        [directory] = Path(folder).iterdir()
        path, _ = load_checkpoint(checkpoints(directory)[-1])
        print(f"{moment:10} {seconds:6.2f} s, exit code {run.returncode}, {path.name} loads", flush=True)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    args = parser.parse_args()

    about = report.machine("torch", "ale-py")
    print(f"{about['cpu']}, {about['cores']} cores, load {about['load']}; {args.num_envs} environments")
    seconds: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    for _ in range(args.rounds):
        for moment in MOMENTS:
            seconds[moment].append(seconds_to_exit(moment, args.num_envs))
    for moment, times in seconds.items():
        print(f"{moment:10} median {np.median(times):.2f} s, largest {max(times):.2f} s")
    if args.json:
        report.write(args.json, about, seconds, num_envs=args.num_envs)


if __name__ == "__main__":
    main()
