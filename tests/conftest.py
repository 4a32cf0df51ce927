"""What the tests share: one thread, runs of the real script, and what they left behind."""

import contextlib
import os
import shutil
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
pytest.register_assert_rewrite("runs")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "rnd_ppo_atari.py"
# A run of the real game that takes seconds. Its episodes end within rollouts, at steps 20 and 40 of 48.
SMALL = "--num-envs 8 --num-steps 16 --obs-norm-rollouts 1 --max-episode-steps 20 --device cpu"


def run_script(arguments, cwd, check=True, script=SCRIPT):
    """`python rnd_ppo_atari.py ARGUMENTS` in the directory `cwd`."""
    if isinstance(arguments, str):
        arguments = arguments.split()
    command = [sys.executable, str(script), *arguments]
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


# Below, torch is imported late: the tests of fastops do without.


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Run main() with arguments that cannot work; the line it ends with. No run, worker or network may come first."""
    import rnd_ppo_atari as base

    def never(*_, **__):
        raise AssertionError("created before the arguments were checked")

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in base.SIGNALS}

    def run(arguments, script=base):
        for name in ("VectorEnv", "Agent"):
            monkeypatch.setattr(script, name, never)
        before = set(tmp_path.rglob("*"))
        if isinstance(arguments, str):
            arguments = arguments.split()
        monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
        assert script.main() == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1
        assert set(tmp_path.rglob("*")) == before
        return err.strip()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path):
    """Start a run, with the arguments of Run after `cwd`. What is left of it at the end is killed and removed."""
    if not Path("/proc/self/cwd").exists():
        pytest.skip("looks for processes in /proc")
    from runs import Run

    runs = []

    def start(*args, **kwargs):
        runs.append(Run(tmp_path, *args, **kwargs))
        return runs[-1]

    yield start
    for run in runs:
        for pid in run.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.wait()
    shutil.rmtree(tmp_path)  # checkpoints of 50 MB


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The directory of the run that the others have to equal: one worker, never disturbed, all checkpoints kept."""
    if not Path("/proc/self/cwd").exists():
        pytest.skip("looks for processes in /proc")
    from runs import QUICK, Run

    run = Run(tmp_path_factory.mktemp("uninterrupted"), f"{QUICK} --num-workers 1 --keep-checkpoints 99")
    run.ends()
    yield run.directory
    shutil.rmtree(run.cwd)


@pytest.fixture
def stopped(uninterrupted, tmp_path):
    """Make the next run find one that stopped: stopped(2, 4) has the checkpoints of rollouts 2 and 4, and its curves
    go further, as if it had been killed later. Returns its directory."""
    from runs import checkpoint

    def stopped(*rollouts):
        directory = tmp_path / "runs" / uninterrupted.name
        directory.mkdir(parents=True)
        for path in (*uninterrupted.glob("events.*"), *(checkpoint(uninterrupted, n) for n in rollouts)):
            shutil.copy(path, directory)
        return directory

    return stopped


@pytest.fixture
def resume(start, uninterrupted):
    """Start the run again: it has to end as if nothing had been. resume(rollouts, more arguments) returns it."""
    from runs import LENGTH, QUICK, assert_clean, assert_same_run

    def resume(rollouts=LENGTH, more="", **differing):
        run = start(f"{QUICK} --total-rollouts {rollouts} {more}")
        run.ends()
        assert_clean(run)
        assert_same_run(run, uninterrupted, rollouts, **differing)
        return run

    return resume
