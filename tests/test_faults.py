"""A run is never lost: every fault is done to a real run of the real game, which then ends as if nothing had been."""

import contextlib
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
from conftest import SCRIPT, SMALL, last_checkpoint, run_script
from runs import (
    QUICK,
    assert_clean,
    assert_same_run,
    broken_emulator,
    checkpoint,
    curves,
    die,
    differences,
    few_files,
    gates,
    long_call,
    not_finite,
    numpy_game,
    odd_game,
    raises,
    reader_leaves,
    signal_while_events_are_locked,
    slow_disk,
)

import rnd_ppo_atari as script

SOON = 10.0  # seconds from a signal, or the death of a worker, to the exit: a save and the end of all processes

QUIET = f"{QUICK} --save-interval 1000"  # nothing is saved before the end
# The best mean is looked at with every save, and only there.
UNSAVED = ["best_mean"]


# --- Killed ---


def killed_after(run, rollouts, seconds):
    """SIGKILL to the run so long after its start; False if it has ended before."""
    run.until(lambda: run.code is not None or run.stdout.count(", step ") >= rollouts)
    time.sleep(seconds)
    if run.code is not None:
        return False
    print(f"{run.kill():.3f} s until the workers were gone, checkpoints {run.saved()}")
    return True


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_moments(start, resume):
    """SIGKILL after random times, again and again, and another number of workers each time; every save is slow, so
    that many of the moments lie inside one. In the end: the run that was never disturbed."""
    moments = random.Random(4)
    for workers in (3, 1, 4, 2, 3, 1, 4, 2):
        run = start(f"{QUICK} --num-workers {workers}", fault=(slow_disk, 0.1))
        if not killed_after(run, moments.randint(0, 3), moments.uniform(0, 0.3)):
            break
    assert run.resumed
    resume()


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(start, resume):
    """One run that dies once in each of its phases, right before or after each call that changes something on disk."""
    phases = [
        ("rollout", 4),
        ("bonus", 1),
        ("statistics", 2, True),
        ("minibatch", 2),
        ("curves", 5),
        ("curves flushed", 3, True),
        ("snapshot", 3),
        ("checkpoint", 1, True),
        ("checkpoint on disk", 1, True),
        ("checkpoint renamed", 1),
        ("checkpoint renamed", 1, True),
        ("old checkpoint removed", 1, True),
        ("restore", 1, True),
    ]
    for number, phase in enumerate(phases):
        run = start(f"{QUICK} --num-workers {number % 3 + 1}", fault=(die, *phase))
        run.dies()
    assert run.resumed
    resume()


def test_killed_inside_a_save(start, stopped, uninterrupted):
    """The half-made file is not taken for a checkpoint, and the next start removes it."""
    stopped(2)
    run = start(f"{QUICK} --total-rollouts 4", fault=(slow_disk, 60, 2))
    temporary = run.until_saving(4)
    run.kill()
    assert temporary.exists() and run.saved() == [2]
    run = start(f"{QUICK} --num-workers 2 --total-rollouts 4")
    run.until_said("continued from")
    assert_clean(run)
    run.ends()
    assert_same_run(run, uninterrupted, 4)


def test_killed_inside_the_first_save(start, resume):
    """After random play. There is nothing to resume then; the next start begins a new run, and what is half-made is
    not taken for a checkpoint."""
    run = start(f"{QUICK} --total-rollouts 2", fault=(slow_disk, 60))
    temporary = run.until_saving(0)
    run.kill()
    temporary.unlink()
    time.sleep(1)  # the directory's name has the second of its start
    run = resume(2)
    assert not run.resumed


def test_killed_while_all_workers_are_at_work(start):
    """Four workers that each hold copies of the main process's pipes see its end at once, again and again."""
    times = []
    for moment in (0.0, 0.05, 0.2):
        run = start(f"{QUICK} --num-envs 8 --num-workers 4 --num-steps 512 --run-dir runs{moment}")
        run.until_said("random play:")
        assert len(run.workers()) == 4
        time.sleep(moment)
        times.append(round(run.kill(), 3))
    print(f"seconds until the workers were gone: {times}")


# --- Signals ---


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True], ids=["main", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_exits(start, resume, number, everywhere):
    """Ctrl-C reaches the whole process group, and so does the SIGTERM of Slurm, systemd and torchrun; `kill` and
    Kubernetes send it to the main process only. The real command line and its exit code."""
    run = start(QUIET, command="python")
    run.until_rollout(3)
    (os.killpg if everywhere else os.kill)(run.pid, number)
    took = run.ends(128 + number, SOON)
    print(f"{number.name}: {took:.2f} s to the exit, {run.saved()}")
    assert "Traceback" not in run.stderr
    [path] = run.offered
    assert run.script.load_checkpoint(path)[1]["progress"]["iteration"] >= 2  # 3 may have been in progress still
    resume(more=f"--num-workers 2 --save-interval 1000 --resume {path if everywhere else 'auto'}", ignore=UNSAVED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_inside_a_long_call_into_torch(start, resume, number):
    """It is waited for, and nothing after it: what is saved is the state before that rollout."""
    run = start(f"{QUICK} --total-rollouts 4", fault=(long_call, 4))
    run.until_said("inside torch")
    assert run.saved() == [0, 2]
    os.kill(run.pid, number)
    took = run.ends(128 + number)
    print(f"{number.name} inside torch: {took:.2f} s to the exit")
    assert "torch is back" not in run.stdout
    assert run.saved() == [0, 2, 3]
    resume(4)


def test_signal_inside_a_save(start, resume):
    """That save is given up and the same state saved again: the file is whole."""
    run = start(f"{QUICK} --total-rollouts 4", fault=(slow_disk, 1, 2))
    run.until_saving(2)
    os.kill(run.pid, signal.SIGTERM)
    run.ends(128 + signal.SIGTERM, SOON)
    assert run.saved() == [0, 2]
    resume(4)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_at_once(start, stopped, second):
    """While the first one's save hangs on a slow disk; the checkpoint before it stays."""
    stopped(2)
    run = start(f"{QUIET} --total-rollouts 100", fault=(slow_disk, 60, 2))
    run.until_rollout(4)
    os.kill(run.pid, signal.SIGINT)
    path = run.until_saving()
    assert run.code is None and path != checkpoint(path.parent, 2)
    os.kill(run.pid, second)
    took = run.ends(-second, 1.0)
    print(f"second signal: {took:.2f} s to the exit")
    assert run.saved() == [2]
    run.load(2)


def test_a_terminal_that_closes_twice_saves(start):
    """The shell sends SIGHUP to its jobs, and the kernel sends it again when the shell ends."""
    run = start(QUIET, fault=(slow_disk, 1, 2))
    run.until_rollout(3)
    os.kill(run.pid, signal.SIGHUP)
    run.until_saving()
    os.kill(run.pid, signal.SIGHUP)
    run.ends(128 + signal.SIGHUP, SOON)
    assert run.saved()[-1] >= 2


def test_a_best_that_was_not_written_is_written_by_the_next_save(start):
    """The disk is full for the second of the two files, and no longer at the end."""
    run = start(f"{QUICK} --total-rollouts 2", fault=(raises, "checkpoint", 3, OSError("no space")))
    run.ends()
    best = script.load_checkpoint(run.directory / "best.pt")[1]["progress"]
    assert best["iteration"] == 2 and "warning: saving failed (no space)" in run.stdout


def test_signal_with_a_full_disk(start):
    """Nothing can be saved: the line says so, and the checkpoint offered is one that there is, not None."""
    run = start(f"{QUIET} --total-rollouts 1000")
    run.until_rollout(2)
    run.limit_files(2**20)
    os.kill(run.pid, signal.SIGTERM)
    run.ends(128 + signal.SIGTERM, SOON)
    assert "warning: not saved: OSError(27, 'File too large')" in run.stdout
    [path] = run.offered
    run.script.load_checkpoint(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_first_rollout(start, number):
    """There is nothing to save during the random play: it just ends, with the same exit code for the shell."""
    run = start(f"{QUICK} --obs-norm-rollouts 100000")
    run.until_said("random play:")
    os.killpg(run.pid, number)
    code, took = run.wait(SOON)
    assert code == 128 + number and took < SOON
    run.nothing_left()
    assert "Traceback" not in run.stderr
    assert "stopped before the first save: nothing to continue in runs/" in run.stdout


def test_what_a_save_raises_at_a_signal_does_not_keep_the_run(start):
    """Whatever it is, as when the environment's packages were removed: the line says so, and the run ends."""
    run = start(QUIET, fault=(raises, "checkpoint", 2, ModuleNotFoundError("No module named 'gone'")))
    run.until_rollout(3)
    os.kill(run.pid, signal.SIGTERM)
    run.ends(128 + signal.SIGTERM, SOON)
    assert "warning: not saved: ModuleNotFoundError" in run.stdout
    assert run.saved() == [0]


def test_signal_while_the_event_file_is_written(start):
    """It can leave a lock of TensorBoard's writer taken: closing the file would wait forever."""
    run = start(f"{QUICK} --total-rollouts 1000 --save-interval 1000", fault=(signal_while_events_are_locked, 100))
    run.ends(128 + signal.SIGTERM)
    assert run.saved()[-1] > 0
    assert "--resume" in run.stdout and "--total-rollouts" not in run.stdout  # it continues without a new end


@pytest.mark.slow
def test_packages_removed_under_a_running_process(start, tmp_path, monkeypatch):
    """Python finds its packages through a link that is removed. At a signal the run is saved all the same."""
    packages = tmp_path / "packages"
    packages.symlink_to(Path(torch.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", str(packages))
    run = start(QUIET, command="python -S")
    run.until_rollout(3)
    packages.unlink()
    os.kill(run.pid, signal.SIGTERM)
    run.ends(128 + signal.SIGTERM, SOON)
    assert "Traceback" not in run.said and "warning" not in run.said
    [path] = run.offered
    assert run.script.load_checkpoint(path)[1]["progress"]["iteration"] >= 2


@pytest.mark.parametrize("moment, streams", [("random play", (1, 2)), ("update", (1,)), ("update", (2,))], ids=str)
def test_a_reader_that_leaves_does_not_stop_the_run(start, uninterrupted, moment, streams):
    """`| head`, `2>&1 | head`, and a terminal that goes after `nohup`: the run goes on without a screen."""
    run = start(f"{QUICK} --total-rollouts 4", fault=(reader_leaves, moment, *streams))
    run.ends()
    assert_same_run(run, uninterrupted, 4)


# --- A copy with a changed algorithm ---


def changed(tmp_path, *changes):
    """The path of a copy of the script, in which each (old, new) was replaced."""
    text = SCRIPT.read_text("utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "mine.py").write_text(text, "utf-8")
    return tmp_path / "mine.py"


def test_a_mistake_in_a_copy_is_shown_with_its_place(tmp_path):
    """Shapes that do not fit are no matter of the arguments: a traceback, not one line."""
    copy = changed(tmp_path, ("nn.Linear(3136, 256)", "nn.Linear(1024, 256)"))
    done = run_script(f"{SMALL} --total-rollouts 1", tmp_path, check=False, script=copy)
    assert done.returncode == 1 and "error: " not in done.stderr
    assert "Traceback" in done.stderr and "in collect" in done.stderr and "3136" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        ("nn.Linear(3136, 256)), relu", "nn.Linear(3136, 128)), relu, layer(nn.Linear(128, 256)), relu"),
        ('self.rnd.load_state_dict(state["rnd"])', 'self.rnd.load_state_dict(state["novelty"])'),
        ("fused=True)", 'fused=True)\n        optimizer.add_param_group({"params": [torch.zeros(1)]})'),
    ],
    ids=["network", "state", "optimizer"],
)
def test_a_run_of_an_algorithm_that_has_changed_since_is_refused(base_run, tmp_path, change):
    """One line says why and what to do; the run stays as it is."""
    shutil.copytree(base_run[1], tmp_path / "runs")
    copy = changed(tmp_path, change).rename(tmp_path / SCRIPT.name)
    before = {path: path.read_bytes() for path in tmp_path.glob("runs/*/*.pt")}
    how = "--int-return-filter forward --total-rollouts 4 --num-workers 1 --resume auto"
    done = run_script(f"{SMALL} {how}", tmp_path, check=False, script=copy)
    assert done.returncode == 2
    assert re.fullmatch("error: expected a checkpoint of this script's networks, .* --run-dir: .+\n", done.stderr)
    assert "the run is as it was" in done.stdout
    assert {path: path.read_bytes() for path in tmp_path.glob("runs/*/*.pt")} == before


def test_a_checkpoint_of_other_networks_is_not_played(base_run, tmp_path):
    copy = changed(tmp_path, ("3136, 256)), relu", "3136, 128)), relu, layer(nn.Linear(128, 256)), relu"))
    copy = copy.rename(tmp_path / SCRIPT.name)
    done = run_script(f"--play {last_checkpoint(base_run[1])}", tmp_path, check=False, script=copy)
    assert done.returncode == 2
    assert re.fullmatch("error: expected a checkpoint of this script's networks, .*: .*trunk.+\n", done.stderr)


# --- Workers ---


def assert_worker_reported(run, cause, since):
    """Exit code 1 soon after `since`, nothing left, and a message that names worker, environments and cause."""
    run.wait()
    took = time.perf_counter() - since
    run.ends(1)
    error = run.stderr[run.stderr.index("error: ") :]
    assert "worker 1 " in error and "[1, 3]" in error and cause in error, error
    print(f"death of a worker: {took:.2f} s to the exit")
    assert took < SOON


@pytest.mark.parametrize("busy", [False, True], ids=["stepping", "during-update"])
def test_worker_killed(start, stopped, resume, busy):
    """While the environments step, and while the main process is busy with an update, which ends first. The last whole
    rollout is saved, and continuing gives the run that would have been."""
    stopped(2)
    run = start(f"{QUIET} --total-rollouts 10000", fault=(gates, 1) if busy else ())
    run.until_said("gate 1" if busy else "rollout 4, step")
    os.kill(run.workers()[1], signal.SIGKILL)
    since = time.perf_counter()
    if busy:
        with run.at_gate(1):
            assert run.code is None
    assert_worker_reported(run, "-9", since)
    if busy:
        assert run.saved() == [2]
    else:
        assert run.saved()[0] == 2 and len(run.saved()) == 2
    resume(ignore=UNSAVED)


@pytest.mark.parametrize("rollout", [0, 3], ids=["in-random-play", "in-training"])
def test_emulator_raises(start, resume, rollout):
    """The message has the worker's traceback; with a checkpoint from before, the run goes on from it."""
    run = start(f"{QUICK} --total-rollouts 4 --save-interval 1000", fault=(broken_emulator, 8 * rollout + 3))
    run.until_said("the cartridge is dusty")
    assert_worker_reported(run, "ValueError: the cartridge is dusty", time.perf_counter())
    assert run.saved() == ([0, 2] if rollout else [])
    if rollout:
        resume(4, ignore=UNSAVED)


def test_too_few_files_for_the_workers(start):
    """`ulimit -n 40`: one line within seconds, and no worker stays."""
    run = start(f"{QUICK} --num-envs 32 --num-workers 22", fault=(few_files,))
    run.ends(1, SOON)
    assert "\n" not in run.error() and "--num-workers" in run.error(), run.error()


# --- What is saved ---


def test_numbers_of_numpy_from_a_game_become_plain(start, uninterrupted):
    run = start(f"{QUICK} --total-rollouts 4", fault=(numpy_game,))
    run.ends()
    assert_same_run(run, uninterrupted, 4)


def test_what_cannot_be_loaded_is_refused_at_the_first_save(start):
    """After the random play, not after a hundred rollouts. One line names the key."""
    run = start(QUICK, fault=(odd_game,))
    run.ends(2)
    error = run.error()
    assert "state['ranks'][0]['envs'][0]['game']['clock']: expected plain types" in error and "\n" not in error, error
    assert run.saved() == [] and not run.resumed
    assert_clean(run)


class Pair(NamedTuple):
    one: int
    other: int


UNPLAIN = [
    np.float64(1),
    np.int64(1),
    np.bool_(True),
    np.zeros(2),
    {1},
    Pair(1, 2),
    Counter("a"),
    defaultdict(int),
    ...,
]


def test_what_cannot_be_saved_is_named_briefly():
    with pytest.raises(script.UsageError, match="got <class 'numpy.ndarray'>: array") as caught:
        script.check_plain([np.zeros((84, 84))], "state")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", UNPLAIN, ids=repr)
def test_no_checkpoint_is_written_that_does_not_load(value, tmp_path):
    """Where the value is: in a list in a dict."""
    state = dict(format=script.FORMAT, script="rnd_ppo_atari", nest=OrderedDict(inner=[1, value]))
    with pytest.raises(script.UsageError, match=re.escape("state['nest']['inner'][1]: expected plain types")):
        script.save_checkpoint(state, tmp_path / "checkpoint.pt")
    assert not list(tmp_path.iterdir())


def test_plain_types_are_saved_and_loaded(tmp_path):
    plain = [None, True, -(2**70), 0.1, math.inf, "é", b"\0\xff", (1, [2]), {3: {}, "a": ()}, torch.arange(3)]
    state = dict(format=script.FORMAT, script="rnd_ppo_atari", nest=OrderedDict(inner=plain))
    script.save_checkpoint(state, tmp_path / "checkpoint.pt")
    assert differences(script.load_checkpoint(tmp_path / "checkpoint.pt")[1], state) == []


# --- Disk ---


def test_disk_full(start, uninterrupted):
    """No file may grow beyond a mebibyte, as on a full disk, and later it may again: a warning, the earlier
    checkpoint is intact, no temporary file stays, training goes on and the next save is tried."""
    run = start(f"{QUICK} --keep-checkpoints 1 --total-rollouts 8", fault=(gates, 3, 6))
    with run.at_gate(3):
        before = checkpoint(run.directory, 2).read_bytes()
        run.limit_files(2**20)
    with run.at_gate(6):
        assert "warning: saving failed" in run.said
        assert run.saved() == [2]
        assert checkpoint(run.directory, 2).read_bytes() == before
        assert_clean(run)
        run.limit_files(resource.RLIM_INFINITY)
    run.ends()
    assert run.saved() == [8]
    assert_same_run(run, uninterrupted, 8)


def test_the_last_save_is_tried_again_at_the_end(start, uninterrupted):
    """There is no later one: up to --save-interval rollouts would be lost."""
    run = start(f"{QUICK} --total-rollouts 4 --save-interval 4", fault=(raises, "checkpoint", 2, OSError("no space")))
    run.ends()
    assert "warning: saving failed (no space)" in run.stdout
    assert run.saved() == [0, 4]
    assert run.offered == [run.directory / "checkpoint_000004.pt"]
    assert_same_run(run, uninterrupted, 4, ignore=UNSAVED)


def test_directory_gone_while_saving(start, uninterrupted):
    """As when a network drive disconnects: a warning, training goes on, and saves again when it is back."""
    run = start(f"{QUICK} --total-rollouts 8", fault=(gates, 3, 5))
    with run.at_gate(3):
        there, away = run.directory, run.cwd / "away"
        there.rename(away)
    with run.at_gate(5):
        assert "warning: saving failed" in run.said
        assert not there.exists()
        away.rename(there)
    run.ends()
    assert run.saved() == [2, 6, 8]
    assert_same_run(run, uninterrupted, 8, events=False)  # TensorBoard has lost its file


def test_event_file_unwritable_later(start, resume):
    """No file may grow beyond what the event file has: a warning, and training goes on without TensorBoard. When the
    next save is due, and when the run is resumed, it has TensorBoard again: only the curves between are lost."""
    run = start(f"{QUICK} --total-rollouts 6", fault=(gates, 3, 5))
    with run.at_gate(3):
        [events] = run.directory.glob("events.out.tfevents.*")
        assert events.stat().st_size > run.outputs[1].stat().st_size + 2000  # which has the same limit
        run.limit_files(events.stat().st_size + 100)
    with run.at_gate(5):
        assert "warning: events cannot" in run.said
        run.limit_files(resource.RLIM_INFINITY)
    run.ends()
    run = resume(8, events=False)
    rollouts = [step // 32 for step, _ in curves(run.directory)["losses/policy_loss"]]
    assert rollouts == [1, 2, 5, 6, 7, 8]


# --- Numbers ---


@pytest.mark.parametrize(
    "what, value, name",
    [
        ("loss", math.nan, "losses/predictor_loss"),
        ("gradient", math.nan, "rnd/largest_weight"),
        ("bonus", math.nan, "rnd/int_reward_raw"),
        ("frames", math.nan, "losses/predictor_loss"),
        ("int_returns", math.inf, "rnd/int_return_std"),
    ],
    ids=str,
)
def test_not_finite(start, resume, what, value, name):
    """It stops in that rollout and names the quantity, before any checkpoint holds it; the run can go on from the
    last one."""
    run = start(f"{QUICK} --total-rollouts 4", fault=(not_finite, what, 4, value))
    run.ends(1)
    error = run.error()
    assert name in error and "--resume" in error, error
    assert run.saved() == [0, 2]
    if what == "loss":  # in all cases the checkpoint is the same
        resume(4)


# --- Several processes ---


RANKS = "torchrun --standalone --nproc-per-node 2 --max-restarts"


def rank_process(run, rank):
    """The process of this rank, a child of torchrun."""
    for process in psutil.Process(run.pid).children():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                return process.pid
    return None


@pytest.mark.slow
@pytest.mark.long
def test_rank_killed_and_group_restarted(start):
    """Both ranks in turn; the group goes on from the last checkpoint and ends as one that was never disturbed."""
    run = start(f"{QUICK} --num-workers 1 --keep-checkpoints 99 --total-rollouts 6", command=f"{RANKS} 0")
    run.ends()
    reference = run.set_aside()
    run = start(f"{QUICK} --num-workers 1 --total-rollouts 6", command=f"{RANKS} 2")
    for rank, saved in ((1, 2), (0, 4)):
        run.until(lambda saved=saved: saved in run.saved())
        os.kill(rank_process(run, rank), signal.SIGKILL)
    run.ends()
    assert len(run.resumed) == 2
    assert_clean(run)
    assert_same_run(run, reference, 6)


@pytest.mark.slow
def test_rank_killed_without_restarts(start):
    """The group fails, nothing stays, and the checkpoint is whole."""
    run = start(f"{QUICK} --num-workers 1 --total-rollouts 1000", command=f"{RANKS} 0")
    run.until(run.saved)
    os.kill(rank_process(run, 1), signal.SIGKILL)
    code, took = run.wait()
    assert code == 1
    run.nothing_left(5.0)
    print(f"death of a rank: {took:.2f} s to the exit of torchrun")
    run.load(run.saved()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_signal_to_torchrun(start, number):
    """Of a job scheduler or Ctrl-C. It reaches torchrun, its ranks and all their workers; torchrun repeats it to the
    ranks while they save. The run is saved, and nothing stays."""
    run = start(f"{QUIET} --num-workers 1 --total-rollouts 1000", command=f"{RANKS} 0")
    run.until_rollout(3)
    os.killpg(run.pid, number)
    run.until_saving()
    for rank in (0, 1):
        os.kill(rank_process(run, rank), number)
    run.wait()
    run.nothing_left(5.0)
    assert run.saved()[-1] >= 2
    assert len(run.load(run.saved()[-1])["ranks"]) == 2
