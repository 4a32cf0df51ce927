"""What the tests of the scripts share: one thread, runs of the real script, and what they left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Before NumPy and torch are imported, here and in every process the tests start: the tensors are small, and more
# threads than free cores would make the tests thirty times as slow.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell starts what runs in the background with SIGINT ignored, and every process the tests start would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "rnd_ppo_atari.py"
# A run of the real game that takes seconds. Its episodes end within rollouts, at steps 20 and 40 of 48.
SMALL = "--num-envs 8 --num-steps 16 --obs-norm-rollouts 1 --max-episode-steps 20 --device cpu"


def run_script(arguments, cwd, check=True):
    """`python rnd_ppo_atari.py ARGUMENTS` in the directory `cwd`."""
    command = [sys.executable, str(SCRIPT), *arguments.split()]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def last_checkpoint(run_dir):
    return max(Path(run_dir).glob("*/checkpoint_*.pt"))


@pytest.fixture(scope="session")
def base_run(tmp_path_factory):
    """Three rollouts, never interrupted, one worker, forward filter: what the script printed, and its --run-dir.

    `--resume auto` as under torchrun: where there is nothing to resume it starts a new run.
    """
    cwd = tmp_path_factory.mktemp("base")
    how = "--total-rollouts 3 --num-workers 1 --int-return-filter forward --run-dir runs --resume auto"
    return run_script(f"{SMALL} {how}", cwd), cwd / "runs"


@pytest.fixture(scope="session")
def resumed_run(tmp_path_factory):
    """The same three rollouts, but lost after the second and done again by another process with three workers.

    As if the first process had been killed in the third rollout's last moment: its curves are there, no checkpoint.
    """
    cwd = tmp_path_factory.mktemp("resumed")
    how = "--total-rollouts 3 --num-workers 1 --int-return-filter forward --run-dir runs --save-interval 2"
    run_script(f"{SMALL} {how}", cwd)
    last_checkpoint(cwd / "runs").unlink()
    return run_script("--num-workers 3 --run-dir runs --resume auto", cwd), cwd / "runs"
