"""Never lose a run: every fault is done to a real run of the real game, which then has to end as if nothing had been.

A run is a process of its own. Most are forked from a server that has imported torch already (standard library,
`forkserver`), which saves three seconds each; signals and torchrun get the command line that a user types. A run is
found by its working directory, which its workers inherit: nothing of it may stay behind. `fault` names a function of
this file that is called in the run before it starts, to break something inside.
"""

import contextlib
import hashlib
import importlib
import io
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from conftest import SCRIPT
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

import rnd_ppo_atari as script

pytestmark = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")

SERVER = multiprocessing.get_context("forkserver")
IMPORTED = "pytest psutil torch._dynamo torch.utils.tensorboard.summary gymnasium ale_py tyro filelock"
SERVER.set_forkserver_preload(IMPORTED.split())  # torch._dynamo, because the first optimiser made imports it

# Episodes of ten steps end within rollouts of eight; a rollout takes a tenth of a second, every second one is saved.
GAME = "--env-id ALE/MontezumaRevenge-v5 --num-envs 4 --num-steps 8 --obs-norm-rollouts 1 --max-episode-steps 10"
LEARN = "--num-minibatches 2 --update-epochs 1 --int-return-filter forward --device cpu"
OFTEN = "--save-interval 2 --log-interval 1 --num-workers 2"
SMALL = f"{GAME} {LEARN} {OFTEN} --run-dir runs --resume auto"
LENGTH = 12
TIMING = ("time/", "charts/SPS")  # the only tags that may differ between two runs

# Without it restarted ranks meet in the store of torchrun, where the addresses of the dead ones are (pytorch#135712).
AGENT = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

GONE = 2.0  # seconds after which the workers of a killed process are gone
SIGNAL = 5.0  # seconds from SIGINT or SIGTERM to the exit
NOTICE = 1.0  # seconds from the death of a worker to the exit


# --- runs


def fork(cwd, arguments, fault, outputs):
    """Body of a forked run: `python rnd_ppo_atari.py ARGUMENTS` in this process and directory, after `fault`."""
    multiprocessing.set_start_method(None, force=True)  # as a new process has it, not that of the server
    os.setsid()
    os.chdir(cwd)
    for fd, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    sys.argv = [str(SCRIPT), *arguments.split()]
    if fault:
        globals()[fault[0]](*fault[1:])
    sys.exit(script.main())


def unused(names):
    """Those of the files in /dev/shm that no process has in its memory: nobody will remove them."""
    maps = ""
    for pid in filter(str.isdigit, os.listdir("/proc") if names else ()):
        with contextlib.suppress(OSError):
            maps += Path(f"/proc/{pid}/maps").read_text()
    return [name for name in names if name not in maps]


class Run:
    """A run in the directory `cwd`: forked, or with `command` as the real command line."""

    def __init__(self, cwd, arguments, fault=(), command=None, name="run"):
        self.cwd, self.memory = Path(cwd), set(os.listdir("/dev/shm"))
        self.outputs = [self.cwd / f"{name}.stdout", self.cwd / f"{name}.stderr"]
        for path in self.outputs:
            path.write_text("")
        if command:
            environment = dict(os.environ, PYTHONUNBUFFERED="1", CUDA_VISIBLE_DEVICES="", **AGENT)
            command = [sys.executable, *command.split(), *arguments.split()]
            with open(self.outputs[0], "a") as out, open(self.outputs[1], "a") as err:
                options = dict(stdout=out, stderr=err, env=environment, start_new_session=True)
                self.process = subprocess.Popen(command, cwd=cwd, **options)
        else:
            self.process = SERVER.Process(target=fork, args=(cwd, arguments, fault, self.outputs))
            self.process.start()
        self.pid = self.process.pid

    stdout = property(lambda self: self.outputs[0].read_text())
    stderr = property(lambda self: self.outputs[1].read_text())

    @property
    def directory(self):
        """The newest directory that a run made below runs/."""
        return max((self.cwd / "runs").iterdir(), key=lambda path: path.name.rpartition("__")[2])

    def checkpoints(self):
        return sorted(path.name for path in (self.cwd / "runs").glob("*/checkpoint_*.pt"))

    @property
    def code(self):
        """The exit code, minus the signal's number if one killed it; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def until(self, condition, timeout=60.0):
        """Wait until `condition()`; seconds that it took."""
        start = time.perf_counter()
        while not condition():
            assert time.perf_counter() - start < timeout, f"not within {timeout} s:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.005)
        return time.perf_counter() - start

    def until_said(self, text, timeout=60.0):
        def said():
            assert self.code is None or text in self.stdout + self.stderr, self.stdout + self.stderr
            return text in self.stdout + self.stderr

        return self.until(said, timeout)

    def until_rollout(self, number):
        return self.until_said(f"rollout {number}, step")

    @contextlib.contextmanager
    def at_gate(self, number):
        """While the update of this rollout waits; it goes on after the block."""
        self.until_said(f"gate {number}\n")
        yield
        (self.cwd / f"gate{number}").touch()

    def wait(self, timeout=60.0):
        """Wait for the end: exit code, and the seconds that it took."""
        took = self.until(lambda: self.code is not None, timeout)
        return self.code, took

    def processes(self):
        """Of this run and all that it started, zombies not counted."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if Path(os.readlink(f"/proc/{pid}/cwd")).is_relative_to(self.cwd):
                    found.append(int(pid))
        return found

    def workers(self):
        return sorted(pid for pid in self.processes() if pid != self.pid)

    def nothing_left(self, timeout=GONE):
        """Assert that all processes end and no shared memory stays; seconds that it took."""
        took = self.until(lambda: not self.processes(), timeout)
        self.until(lambda: not unused(set(os.listdir("/dev/shm")) - self.memory), timeout)
        return took

    def ends(self, code=0, timeout=60.0):
        """Assert that it ends with this exit code and leaves nothing; seconds that it took to end."""
        found, took = self.wait(timeout)
        assert found == code, f"exit code {found}:\n{self.stdout}\n{self.stderr}"
        self.nothing_left()
        return took

    def error(self):
        """What it said as the reason for its end: one line, not a traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        assert self.stderr.count("error: ") == 1, self.stderr
        return self.stderr[self.stderr.index("error: ") :].strip()

    def kill(self):
        """SIGKILL the main process; its workers have to notice; seconds until all is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait()[0] == -signal.SIGKILL
        return self.nothing_left()


@pytest.fixture
def start(tmp_path):
    """Start a run: start(arguments, fault=(), command=None). What is left of it at the end is killed and removed."""
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The directory of the run that the others have to equal: one worker, never disturbed, all checkpoints kept."""
    run = Run(tmp_path_factory.mktemp("uninterrupted"), f"{SMALL} --num-workers 1 --keep-checkpoints 99 {total()}")
    run.ends()
    yield run.directory
    shutil.rmtree(run.cwd)


def total(rollouts=LENGTH):
    return f"--total-rollouts {rollouts}"


# --- what a run was


def scalars(directory, until=math.inf):
    """{tag: [(step, value), ...]} of all event files in the order they were written, duplicates and all."""
    values = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value") and not value.tag.startswith(TIMING) and event.step <= until:
                    values.setdefault(value.tag, []).append((event.step, value.simple_value))
    return values


def differences(a, b, where=""):
    """Where two nests of plain types and tensors differ in a single bit."""
    if type(a) is not type(b):
        return [f"{where}: {type(a)} and {type(b)}"]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where}: {list(a)} and {list(b)}"]
        return [line for key in a for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} elements"]
        pairs = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in pairs for line in differences(x, y, f"{where}/{i}")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        same = a == b or (a != a and b != b)
    return [] if same else [f"{where}: {str(a)[:50]} and {str(b)[:50]}"]


def assert_same_run(directory, reference, iteration=LENGTH, events=True, ignore=()):
    """Everything that a checkpoint of the two runs holds is the same bit for bit; so is every value in TensorBoard.

    `ignore`: what of the progress may differ besides names and sizes of the event files.
    """
    states = []
    for run in (directory, reference):
        state = script.load_checkpoint(run / f"checkpoint_{iteration:06d}.pt")
        state["args"] = {name: value for name, value in state["args"].items() if name not in script.FREE_ARGS}
        for name in ("events", *ignore):
            state["progress"].pop(name)
        states.append(state)
    assert {"agent", "rnd", "optimizer", "obs_rms", "int_return_rms", "ranks", "progress"} <= set(states[0])
    assert differences(*states) == []
    if events:
        mine, wanted = scalars(directory), scalars(reference, states[0]["progress"]["step"])
        assert set(mine) == set(wanted) and {"losses/policy_loss", "charts/episodic_return"} <= set(mine)
        for tag, values in wanted.items():
            assert mine[tag] == values, tag
        assert len(mine["losses/policy_loss"]) == iteration


def assert_clean(run):
    """No temporary file of a save that was interrupted."""
    left = [path for path in run.cwd.rglob("*") if "tmp" in path.suffix]
    assert not left, left


# --- faults, built into a run


def wrap(target, hook):
    """Replace the function `target`, "module:name", by `hook(function, *args, **kwargs)`."""
    module, _, names = target.partition(":")
    owner = importlib.import_module(module)
    *path, name = names.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: hook(function, *args, **kwargs))


def die(target, call, after=False):
    """SIGKILL to itself at the `call`-th call of `target`, or after it."""
    calls = []

    def hook(function, *args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    wrap(target, hook)


def slow_disk(seconds):
    """Every save spends this long between writing the file and giving it its name."""

    def hook(fsync, fd):
        time.sleep(seconds)
        fsync(fd)

    wrap("os:fsync", hook)


def gates(*rollouts):
    """The update of these rollouts waits for the test: see Run.at_gate."""
    calls = []

    def hook(update, *args, **kwargs):
        calls.append(1)
        if len(calls) in rollouts:
            print(f"gate {len(calls)}")
            while not Path(f"gate{len(calls)}").exists():
                time.sleep(0.01)
        return update(*args, **kwargs)

    wrap("rnd_ppo_atari:update", hook)


def long_call(rollout):
    """The update of this rollout begins with one call into torch of half a minute."""
    calls = []

    def hook(update, *args, **kwargs):
        calls.append(1)
        if len(calls) == rollout:
            matrix = torch.rand(12_000, 12_000)
            print("inside torch")
            torch.mm(matrix, matrix)
            print("torch is back")
        return update(*args, **kwargs)

    wrap("rnd_ppo_atari:update", hook)


def broken_emulator(calls):
    """The emulator of environment 3 raises in this call of `act`."""
    count, real = [], script.Env.__init__

    def init(env, env_id, index=0, **options):
        real(env, env_id, index, **options)
        game = env.game

        def broken(action):
            count.append(1)
            if len(count) == calls:
                raise ValueError("the cartridge is dusty")
            return game.act(action)

        if index == 3:
            env.game = mock.Mock(wraps=game, act=broken)

    script.Env.__init__ = init


def not_finite(what, rollout, value):
    """`what` gets this value in the rollout of this number."""
    calls, minibatches = [], 2

    def loss(function, *args):
        calls.append(1)
        total, metrics = function(*args)
        if len(calls) == (rollout - 1) * minibatches + 1:
            metrics[list(script.METRICS).index("predictor_loss")] = value
        return total, metrics

    def gradient(function, *args):
        calls.append(1)
        total, metrics = function(*args)
        return total * (value if len(calls) == rollout * minibatches else 1), metrics

    def bonus(function, *args):
        calls.append(1)
        raw = function(*args)
        if len(calls) == rollout:
            raw[3, 1] = value
        return raw

    def normaliser(function, rms, batch):
        function(rms, batch)
        if rms.mean.shape == ((84, 84) if what == "frames" else ()):
            calls.append(1)
            if len(calls) == rollout + (what == "frames"):  # the frames' are updated once before the first rollout
                rms.var = np.full(rms.mean.shape, value)

    hooks = dict(loss=("losses", loss), gradient=("losses", gradient), bonus=("intrinsic_reward", bonus))
    name, hook = hooks.get(what, ("merge_batch", normaliser))
    wrap(f"rnd_ppo_atari:{name}", hook)


def limit_files(run, size):
    """From now on no file of the run can grow beyond `size` bytes, as on a full disk."""
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# --- exact resume


@pytest.mark.parametrize("env_id", ["ALE/MontezumaRevenge-v5", "ALE/Breakout-v5"])
def test_a_fresh_emulator_continues_identically_from_a_saved_state(env_id, tmp_path):
    """Through a file, in the middle of an episode, into an emulator that has played something else: the same frames,
    rewards, ends and statistics, with sticky actions, over several episodes."""
    options = dict(max_episode_steps=150, sticky_action_prob=0.25)
    actions = np.random.default_rng(0).integers(4, size=400)
    one, other = script.Env(env_id, 5, seed=3, **options), script.Env(env_id, 0, seed=8, **options)

    def play(env, actions):
        seen = []
        for action in actions:
            frame = np.zeros((84, 84), np.uint8)
            reward, done, info = env.step(int(action), frame)
            seen.append((frame.tobytes(), reward, done, info and dict(info, env=0)))
            if done:
                env.reset(frame)
                seen.append(frame.tobytes())
        return seen

    play(one, actions[:60])
    play(other, actions[:33])
    torch.save(one.get_state(), tmp_path / "state.pt")
    other.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    seen = play(one, actions[60:])
    assert play(other, actions[60:]) == seen and len(seen) > 340


@pytest.mark.slow
def test_killed_at_random_moments(start, uninterrupted):
    """SIGKILL after random times, again and again, and another number of workers each time; every save is slow, so
    that many of the moments lie inside one. In the end: the run that was never disturbed."""
    moments, kills = random.Random(4), []
    for workers in (3, 1, 4, 2, 3, 1, 4, 2):
        run = start(f"{SMALL} --num-workers {workers} {total()}", fault=("slow_disk", 0.1))
        run.until_said(moments.choice(["workers\n", ", step", ", step"]))
        time.sleep(moments.uniform(0, 0.5))
        if run.code is not None:
            break
        kills.append((run.kill(), run.checkpoints()[-1:]))
    print("seconds until the workers were gone, newest checkpoint:", *kills, sep="\n")
    assert kills
    run = start(f"{SMALL} {total()}")
    run.ends()
    assert_clean(run)
    assert_same_run(run.directory, uninterrupted)


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(start, uninterrupted):
    """One run that dies once in each of its phases, right before or after each call that changes something on disk."""
    phases = [
        ("rnd_ppo_atari:collect", 4),
        ("rnd_ppo_atari:intrinsic_reward", 1),
        ("rnd_ppo_atari:merge_batch", 2, True),
        ("rnd_ppo_atari:optimization_step", 2),
        ("rnd_ppo_atari:SummaryWriter.add_scalar", 5),
        ("rnd_ppo_atari:SummaryWriter.flush", 3, True),
        ("rnd_ppo_atari:snapshot", 3),
        ("torch:save", 1, True),
        ("os:fsync", 1, True),
        ("os:replace", 1),
        ("os:replace", 1, True),
        ("pathlib:Path.unlink", 1, True),
        ("os:truncate", 1),
        ("os:truncate", 1, True),
        ("rnd_ppo_atari:restore", 1, True),
    ]
    for number, phase in enumerate(phases):
        run = start(f"{SMALL} --num-workers {number % 3 + 1} {total()}", fault=("die", *phase))
        code, _ = run.wait()
        assert code == -signal.SIGKILL, (phase, code, run.stdout, run.stderr)
        run.nothing_left()
    assert "going on from" in run.stdout
    run = start(f"{SMALL} {total()}")
    run.ends()
    assert_clean(run)
    assert_same_run(run.directory, uninterrupted)


def test_killed_inside_a_save(start, uninterrupted):
    """The half-made file is not taken for a checkpoint, and the next start removes it."""
    run = start(f"{SMALL} {total(2)}")
    run.ends()
    run = start(f"{SMALL} {total(4)}", fault=("slow_disk", 60))
    [temporary] = [run.directory / "save.tmp"]
    run.until(temporary.exists)
    run.kill()
    assert temporary.exists() and run.checkpoints() == ["checkpoint_000002.pt"]
    run = start(f"{SMALL} --num-workers 3 {total(4)}")
    run.until_said("going on from")
    assert_clean(run)
    run.ends()
    assert_same_run(run.directory, uninterrupted, 4)


def test_killed_inside_the_first_save(start, uninterrupted):
    """There is nothing to resume then; the next start begins a new run, and still leaves no temporary file."""
    run = start(f"{SMALL} {total(2)}", fault=("slow_disk", 60))
    run.until(lambda: list(run.cwd.glob("runs/*/save.tmp")))
    run.kill()
    time.sleep(1)  # the directory's name has the second of its start
    run = start(f"{SMALL} {total(2)}")
    run.ends()
    assert "new run" in run.stdout
    assert_clean(run)
    assert_same_run(run.directory, uninterrupted, 2)


def test_killed_while_all_workers_are_at_work(start):
    """Four workers that each hold copies of the main process's pipes see its end at once, again and again."""
    times = []
    for moment in (0.0, 0.05, 0.2):
        run = start(f"{SMALL} --num-workers 4 --num-steps 512 --run-dir runs{moment} {total()}")
        run.until_said("new run")
        assert len(run.workers()) == 4
        time.sleep(moment)
        times.append(round(run.kill(), 3))
    print(f"seconds until the workers were gone: {times}")


def test_resume_path_takes_exactly_that_checkpoint(start, uninterrupted):
    """Not the newest one: what came after it is done again, and is not in TensorBoard twice."""
    run = start(f"{SMALL} {total(6)}")
    run.ends()
    path = run.directory / "checkpoint_000002.pt"
    run = start(f"{SMALL} --num-workers 3 --resume {path.relative_to(run.cwd)} {total(6)}")
    run.until_said("going on from")
    assert "checkpoint_000002.pt" in run.stdout and "checkpoint_000006.pt" not in run.stdout
    run.ends()
    assert run.checkpoints() == ["checkpoint_000002.pt", "checkpoint_000004.pt", "checkpoint_000006.pt"]
    assert_same_run(run.directory, uninterrupted, 6)


def test_killed_after_going_back_to_an_older_checkpoint(start, uninterrupted):
    """`--resume PATH` of an old one, killed after a save, `--resume auto`: the checkpoints and events of the branch
    that was given up are not mixed with those of the new one, and the new one's are not the first to be deleted."""
    run = start(f"{SMALL} {total(8)}")
    run.ends()
    assert run.checkpoints() == ["checkpoint_000004.pt", "checkpoint_000006.pt", "checkpoint_000008.pt"]
    old = run.directory / "checkpoint_000004.pt"
    run = start(f"{SMALL} --keep-checkpoints 1 --resume {old} {total(8)}", fault=("die", "rnd_ppo_atari:collect", 4))
    assert run.wait()[0] == -signal.SIGKILL
    run = start(f"{SMALL} {total(8)}")
    run.ends()
    assert_same_run(run.directory, uninterrupted, 8)


def test_total_rollouts_may_be_raised_and_a_finished_run_resumed(start, uninterrupted):
    """One command line, started again after the end, with more rollouts, and once with nothing left to do."""
    for rollouts, workers in ((3, 1), (6, 3), (6, 2)):
        run = start(f"{SMALL} --num-workers {workers} {total(rollouts)}")
        run.ends()
    assert_same_run(run.directory, uninterrupted, 6)
    run = start(f"{SMALL} {total(5)}")
    run.ends(2)
    assert all(word in run.error() for word in ("--total-rollouts", "6", "5")), run.error()


def test_contradicting_arguments_are_refused_by_name(start):
    """With both values, in one line, and the run that they contradict stays as it is."""
    run = start(f"{SMALL} --num-workers 1 {total(2)}")
    run.ends()
    path = next(run.directory.glob("checkpoint_*.pt"))
    before = {file: file.read_bytes() for file in run.directory.iterdir()}
    cases = [
        ("--num-steps", 8, 16),
        ("--num-envs", 4, 8),
        ("--seed", 1, 7),
        ("--int-gamma", 0.99, 0.9),
        ("--int-return-filter", "forward", "backward"),
        ("--learning-rate", 0.0001, 0.001),
        ("--env-id", "ALE/MontezumaRevenge-v5", "ALE/Breakout-v5"),
    ]
    for name, old, new in cases:
        run = start(f"{SMALL} --resume {path} {total(4)} {name} {new}")
        run.ends(2)
        error = run.error()
        assert all(str(word) in error for word in (name, old, new)) and "\n" not in error, error
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_auto_knows_game_and_experiment(start):
    """Where there is nothing of this game and name to continue, it starts afresh."""
    run = start(f"{SMALL} {total(1)}")
    run.ends()
    for other in ("--env-id ALE/Breakout-v5", "--exp-name other"):
        run = start(f"{SMALL} {total(1)} {other}")
        run.ends()
        assert "new run" in run.stdout and "going on" not in run.stdout
    assert len(run.checkpoints()) == 3


def test_newest_checkpoints_and_the_best_are_kept(start):
    """--keep-checkpoints 2: the two newest and the best one. It is of rollout 2: the first with a mean return, and no
    later one is better in these few steps; it outlives its numbered twin."""
    run = start(f"{SMALL} --keep-checkpoints 2 {total(8)}")
    run.ends()
    assert run.checkpoints() == ["checkpoint_000006.pt", "checkpoint_000008.pt"]
    best = script.load_checkpoint(run.directory / "best.pt")["progress"]
    last = script.load_checkpoint(run.directory / "checkpoint_000008.pt")["progress"]
    assert best["iteration"] == 2 and best["recent"] and best["best_mean"] == last["best_mean"]
    run = start(f"{SMALL} --keep-checkpoints 1 {total(9)}")
    run.ends()
    assert run.checkpoints() == ["checkpoint_000009.pt"] and (run.directory / "best.pt").exists()


# --- signals


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True], ids=["main", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_exits(start, uninterrupted, number, everywhere):
    """Ctrl-C reaches the whole process group, and so does the SIGTERM of Slurm, systemd and torchrun; `kill` and
    Kubernetes send it to the main process only. The real command line and its exit code."""
    quiet = SMALL.replace("--save-interval 2", "--save-interval 1000")
    run = start(f"{quiet} {total()}", command=str(SCRIPT))
    run.until_rollout(3)
    (os.killpg if everywhere else os.kill)(run.pid, number)
    took = run.ends(128 + number, SIGNAL)
    print(f"{number.name}: {took:.2f} s to the exit, {run.checkpoints()}")
    [path] = re.findall(rf"^{number.name}.*--resume (\S+)$", run.stdout, re.M)
    assert script.load_checkpoint(run.cwd / path)["progress"]["iteration"] >= 2  # 3 may have been in progress still
    assert "Traceback" not in run.stderr
    run = start(f"{quiet} --num-workers 3 --resume {path if everywhere else 'auto'} {total()}")
    run.ends()
    assert_clean(run)
    # The best mean is looked at with every save of the interval, which is another one here.
    assert_same_run(run.directory, uninterrupted, ignore=["best_mean"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_inside_a_long_call_into_torch(start, uninterrupted, number):
    """However long a rollout takes: what is saved is the state before it."""
    run = start(f"{SMALL} {total(4)}", fault=("long_call", 4))
    run.until_said("inside torch")
    assert run.checkpoints() == ["checkpoint_000002.pt"]
    time.sleep(0.5)
    os.kill(run.pid, number)
    took = run.ends(128 + number, SIGNAL)
    print(f"{number.name} inside torch: {took:.2f} s to the exit")
    assert "torch is back" not in run.stdout
    assert run.checkpoints() == ["checkpoint_000002.pt", "checkpoint_000003.pt"]
    run = start(f"{SMALL} {total(4)}")
    run.ends()
    assert_same_run(run.directory, uninterrupted, 4)


def test_signal_inside_a_save(start, uninterrupted):
    """The save that is going on ends first, and the file is whole."""
    run = start(f"{SMALL} {total(4)}", fault=("slow_disk", 1))
    run.until(lambda: list(run.cwd.glob("runs/*/save.tmp")))
    os.kill(run.pid, signal.SIGTERM)
    run.ends(128 + signal.SIGTERM, SIGNAL)
    assert run.checkpoints() == ["checkpoint_000002.pt"]
    run = start(f"{SMALL} {total(4)}")
    run.ends()
    assert_same_run(run.directory, uninterrupted, 4)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_at_once(start, second):
    """While the first one's save hangs on a slow disk; the checkpoint before it stays."""
    run = start(f"{SMALL} {total(2)}")
    run.ends()
    run = start(f"{SMALL} --save-interval 1000 {total(100)}", fault=("slow_disk", 60))
    run.until_rollout(3)
    os.kill(run.pid, signal.SIGINT)
    run.until((run.directory / "save.tmp").exists)
    assert run.code is None
    os.kill(run.pid, second)
    took = run.ends(128 + second, 1.0)
    print(f"second signal: {took:.2f} s to the exit")
    assert run.checkpoints() == ["checkpoint_000002.pt"]
    script.load_checkpoint(run.directory / run.checkpoints()[0])


def test_signal_with_a_full_disk(start):
    """Nothing can be saved: the line says so, or how to resume from the checkpoint that there is, not from None."""
    run = start(f"{SMALL} {total(1000)}")
    run.until(run.checkpoints)
    limit_files(run, 2**20)
    os.kill(run.pid, signal.SIGTERM)
    run.ends(128 + signal.SIGTERM, SIGNAL)
    assert "warning: no checkpoint written" in run.stdout + run.stderr
    assert "None" not in run.stdout
    for path in re.findall(r"--resume (\S+)", run.stdout):
        script.load_checkpoint(run.cwd / path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_first_rollout(start, number):
    """There is nothing to save during the random play: it just ends, with the same exit code for the shell."""
    run = start(f"{SMALL} --obs-norm-rollouts 100000 {total()}", command=str(SCRIPT))
    run.until_said("random play")
    os.killpg(run.pid, number)
    code, took = run.wait(SIGNAL)
    assert code in (128 + number, -number) and took < SIGNAL
    run.nothing_left()
    assert "Traceback" not in run.stderr


# --- workers


def assert_worker_reported(run, worker, envs, cause, since):
    """Exit code 1 within a second of `since`, nothing left, and a message with all that one wants to know."""
    assert run.wait()[0] == 1, run.stdout + run.stderr
    took = time.perf_counter() - since
    run.nothing_left()
    error = run.stderr[run.stderr.index("error: ") :]
    assert f"worker {worker} " in error and f"{envs}" in error and cause in error, error
    print(f"death of a worker: {took:.2f} s to the exit")
    assert took < NOTICE


@pytest.mark.parametrize("busy", [False, True], ids=["stepping", "during-update"])
def test_worker_killed(start, uninterrupted, busy):
    """While the environments step, and while the main process is busy with an update for a long time. The checkpoint
    from before is not touched, and continuing gives the run that would have been."""
    run = start(f"{SMALL} {total(2)}")
    run.ends()
    saved = next(run.directory.glob("checkpoint_*.pt"))
    before = saved.read_bytes()
    run = start(f"{SMALL} --save-interval 10000 {total(10000)}", fault=("gates", 1) if busy else ())
    run.until_said("gate 1" if busy else "rollout 3, step")
    os.kill(run.workers()[1], signal.SIGKILL)
    assert_worker_reported(run, 1, [1, 3], "-9", time.perf_counter())
    assert run.checkpoints() == [saved.name] and saved.read_bytes() == before
    run = start(f"{SMALL} {total(4)}")
    run.ends()
    assert_same_run(run.directory, uninterrupted, 4)


@pytest.mark.parametrize("rollout", [0, 3], ids=["in-random-play", "in-training"])
def test_emulator_raises(start, uninterrupted, rollout):
    """The message has the worker's traceback; with a checkpoint from before, the run goes on from it."""
    calls = 10 + (rollout and 8 * 4 * rollout)  # 8 steps of 4 frames: a rollout, after that of random play
    run = start(f"{SMALL} {total(4)}", fault=("broken_emulator", calls))
    run.until_said("the cartridge is dusty")
    assert_worker_reported(run, 1, [1, 3], "ValueError: the cartridge is dusty", time.perf_counter())
    if rollout:
        assert run.checkpoints() == ["checkpoint_000002.pt"]
        run = start(f"{SMALL} {total(4)}")
        run.ends()
        assert_same_run(run.directory, uninterrupted, 4)


# --- disk


def test_disk_full(start, uninterrupted):
    """No file may grow beyond a mebibyte, as on a full disk, and later it may again: a warning, the earlier
    checkpoint is intact, no temporary file stays, training goes on and the next save is tried."""
    run = start(f"{SMALL} --keep-checkpoints 1 {total(8)}", fault=("gates", 3, 6))
    with run.at_gate(3):
        before = (run.directory / "checkpoint_000002.pt").read_bytes()
        limit_files(run, 2**20)
    with run.at_gate(6):
        assert "warning: no checkpoint written" in run.stdout + run.stderr
        assert run.checkpoints() == ["checkpoint_000002.pt"]
        assert (run.directory / "checkpoint_000002.pt").read_bytes() == before
        assert_clean(run)
        limit_files(run, resource.RLIM_INFINITY)
    run.ends()
    assert run.checkpoints() == ["checkpoint_000008.pt"]
    assert_same_run(run.directory, uninterrupted, 8)


def test_directory_gone_while_saving(start, uninterrupted):
    """As when a network drive disconnects: a warning, training goes on, and saves again when it is back."""
    run = start(f"{SMALL} {total(8)}", fault=("gates", 3, 6))
    with run.at_gate(3):
        there, away = run.directory, run.cwd / "away"
        there.rename(away)
    with run.at_gate(6):
        assert "warning: no checkpoint written" in run.stdout + run.stderr
        assert not there.exists()
        away.rename(there)
    run.ends()
    assert run.checkpoints() == ["checkpoint_000002.pt", "checkpoint_000006.pt", "checkpoint_000008.pt"]
    assert_same_run(run.directory, uninterrupted, 8, events=False)  # TensorBoard has lost its file


def test_event_file_unwritable_later(start, uninterrupted):
    """No file may grow beyond what the event file has: a warning, training goes on without TensorBoard and ends well.
    Resumed, the run has TensorBoard again."""
    run = start(f"{SMALL} --save-interval 1000 {total(6)}", fault=("gates", 3, 5))
    with run.at_gate(3):
        [events] = run.directory.glob("events.out.tfevents.*")
        assert events.stat().st_size > run.outputs[1].stat().st_size + 2000  # which has the same limit
        limit_files(run, events.stat().st_size + 100)
    with run.at_gate(5):
        assert "warning: events cannot" in run.stdout + run.stderr
        limit_files(run, resource.RLIM_INFINITY)
    run.ends()
    run = start(f"{SMALL} {total(8)}")
    run.ends()
    assert_same_run(run.directory, uninterrupted, 8, events=False, ignore=["best_mean"])
    assert [step // 32 for step, _ in scalars(run.directory)["losses/policy_loss"]][-2:] == [7, 8]


# --- damaged checkpoints


def damage(path, how):
    """Damage the file; a number flips that bit, counted from the end if negative."""
    data = bytearray(path.read_bytes())
    if how == "empty":
        data = b""
    elif how == "half":
        data = data[: len(data) // 2]
    elif how == "one byte short":
        data = data[:-1]
    elif how == "one byte more":
        data += b"\0"
    elif how == "zeros":
        data = bytes(len(data))
    else:
        data[int(how * len(data)) if isinstance(how, float) else how] ^= 4
    path.write_bytes(data)


DAMAGES = ["empty", "half", "one byte short", "one byte more", "zeros", 0, 40, 0.1, 0.5, 0.9, -33, -32, -1]


def test_damaged_checkpoints_are_passed_over(start, uninterrupted):
    """The newest is empty, the one before has a flipped bit: `auto` says so of both and takes the third, and the run
    ends as if nothing had been. A path given is refused with the reason."""
    run = start(f"{SMALL} {total(6)}")
    run.ends()
    two, four, six = (run.directory / name for name in run.checkpoints())
    damage(six, "empty")
    damage(four, 0.7)
    for path in (four, six):
        run = start(f"{SMALL} --resume {path} {total(8)}")
        run.ends(2)
        error = run.error()
        assert str(path) in error and re.search("checksum|damaged|empty", error) and "\n" not in error, error
    run = start(f"{SMALL} --num-workers 3 {total(8)}")
    run.ends()
    assert f"going on from {two.relative_to(run.cwd)}" in run.stdout
    said = run.stdout + run.stderr
    assert said.count(str(six.relative_to(run.cwd))) == said.count(str(four.relative_to(run.cwd))) == 1, said
    assert_same_run(run.directory, uninterrupted, 8)


def test_a_damaged_checkpoint_is_not_the_one_that_is_kept(start, uninterrupted):
    """With --keep-checkpoints 1, fallen back behind a damaged checkpoint and killed before its number is reached
    again: what is kept is the newest one that is whole."""
    run = start(f"{SMALL} {total(6)}")
    run.ends()
    damage(run.directory / "checkpoint_000006.pt", "half")
    how = f"{SMALL} --save-interval 1 --keep-checkpoints 1 {total(6)}"
    run = start(how, fault=("die", "rnd_ppo_atari:collect", 2))
    assert run.wait()[0] == -signal.SIGKILL
    run = start(how)
    run.ends()
    assert "going on from" in run.stdout and "checkpoint_000005.pt" in run.stdout
    assert_same_run(run.directory, uninterrupted, 6, ignore=["best_mean"])


@pytest.mark.parametrize("how", DAMAGES, ids=str)
def test_every_damage_is_noticed(how, uninterrupted, tmp_path):
    """Wherever the file of a real run is damaged: the one before is taken, an explicit path is refused."""
    run = tmp_path / "runs" / uninterrupted.name
    run.mkdir(parents=True)
    names = ["checkpoint_000010.pt", "checkpoint_000012.pt"]
    os.link(uninterrupted / names[0], run / names[0])
    shutil.copy(uninterrupted / names[1], run / names[1])
    damage(run / names[1], how)
    path, state = script.find_checkpoint(script.Args(run_dir=str(tmp_path / "runs"), resume="auto"))
    assert path == run / names[0] and state["progress"]["iteration"] == 10
    with pytest.raises(script.UsageError, match=r"000012\.pt: expected a checkpoint"):
        script.load_checkpoint(run / names[1])
    shutil.rmtree(run)


class Malicious:
    """Unpickled, it creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def malicious_files(directory, canary):
    """Checkpoints with right checksums that would create `canary`: as torch writes them, in its old format, a bare
    pickle, and one that hides in a state that is otherwise whole."""
    whole = dict(format=script.FORMAT, script=SCRIPT.stem, args={}, progress=dict(iteration=1, evil=Malicious(canary)))
    for name, state in (("new", Malicious(canary)), ("hidden", whole)):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        yield directory / f"{name}.pt", buffer.getvalue()
    buffer = io.BytesIO()
    torch.save(Malicious(canary), buffer, _use_new_zipfile_serialization=False)
    yield directory / "old.pt", buffer.getvalue()
    yield directory / "bare.pt", pickle.dumps(Malicious(canary))
    buffer = io.BytesIO()  # a TorchScript archive: torch.load hands it to another loader
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(Malicious(canary), 2))
        archive.writestr("archive/data.pkl", pickle.dumps(Malicious(canary), 2))
        archive.writestr("archive/version", "3\n")
    yield directory / "script.pt", buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says what is odd about the files
def test_malicious_checkpoints_are_refused(start, tmp_path):
    """Nothing in the file is executed, whether it is resumed, found by `auto` or played."""
    canary = tmp_path / "canary"
    for path, data in malicious_files(tmp_path, canary):
        pickle.loads(pickle.dumps(Malicious(canary))).close()
        assert canary.exists(), "the attack works"
        canary.unlink()
        path.write_bytes(data + hashlib.sha256(data).digest())
        with pytest.raises(script.UsageError, match=f"{path.name}: expected a checkpoint"):
            script.load_checkpoint(path)
        assert not canary.exists()
    run = start(f"{SMALL} {total(2)}")
    run.ends()
    shutil.copy(tmp_path / "hidden.pt", run.directory / "checkpoint_000003.pt")
    for how in ("--resume", "--play"):
        run = start(f"{GAME} --run-dir runs {how} {tmp_path / 'hidden.pt'}")
        run.ends(2)
        assert "hidden.pt" in run.error() and "\n" not in run.error()
    run = start(f"{SMALL} {total(4)}")
    run.ends()
    assert "going on from" in run.stdout and "checkpoint_000002.pt" in run.stdout
    assert "checkpoint_000003.pt" in run.stderr and not canary.exists()


# --- numbers


@pytest.mark.parametrize(
    "what, value, name",
    [
        ("loss", math.nan, "losses/predictor_loss"),
        ("loss", math.inf, "losses/predictor_loss"),
        ("gradient", math.nan, "rnd/largest_weight"),
        ("bonus", math.nan, "rnd/int_reward_raw"),
        ("bonus", math.inf, "rnd/int_reward_raw"),
        ("frames", math.nan, "rnd/obs_std"),
        ("int_returns", math.inf, "rnd/int_return_std"),
    ],
    ids=str,
)
def test_not_finite(start, uninterrupted, what, value, name):
    """It stops in that rollout and names where it began, before any checkpoint holds it; the run can go on from the
    last one."""
    run = start(f"{SMALL} {total(4)}", fault=("not_finite", what, 4, value))
    run.ends(1)
    error = run.error()
    assert "rollout 4" in error and name in error, error
    assert run.checkpoints() == ["checkpoint_000002.pt"]
    run = start(f"{SMALL} {total(4)}")
    run.ends()
    assert_same_run(run.directory, uninterrupted, 4)


# --- two runs


def test_second_run_on_a_directory_is_refused(start, uninterrupted):
    """One line, exit code 2, and the first goes on undisturbed."""
    first = start(f"{SMALL} {total(4)}", fault=("gates", 3))
    with first.at_gate(3):
        second = start(f"{SMALL} {total(4)}", name="second")
        code, took = second.wait()
        assert code == 2 and first.code is None, (second.stdout, second.stderr)
        assert first.directory.name in second.error() and "\n" not in second.error()
        print(f"refused after {took:.2f} s")
    first.ends()
    assert_same_run(first.directory, uninterrupted, 4)


def test_stale_lock_is_not_in_the_way(start, uninterrupted):
    """That of a run killed a moment ago, or of a machine that lost its power, whatever is in the file."""
    run = start(f"{SMALL} --num-workers 4 {total(4)}", fault=("die", "rnd_ppo_atari:collect", 4))
    assert run.wait()[0] == -signal.SIGKILL
    (run.directory / "lock").write_text(f"{run.pid}\n")
    run = start(f"{SMALL} {total(4)}")
    run.ends()
    assert_same_run(run.directory, uninterrupted, 4)


# --- torchrun


TORCHRUN = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts {{}} {SCRIPT}"


def rank_process(run, rank):
    """The process of this rank, a child of torchrun."""
    for process in psutil.Process(run.pid).children():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                return process.pid
    return None


@pytest.mark.slow
def test_rank_killed_and_group_restarted(start):
    """Both ranks in turn; the group goes on from the last checkpoint and ends as one that was never disturbed."""
    run = start(f"{SMALL} --num-workers 1 --keep-checkpoints 99 {total(6)}", command=TORCHRUN.format(0))
    run.ends()
    reference = (run.cwd / "runs").rename(run.cwd / "reference")
    run = start(f"{SMALL} --num-workers 1 {total(6)}", command=TORCHRUN.format(2))
    for rank, saved in ((1, "checkpoint_000002.pt"), (0, "checkpoint_000004.pt")):
        run.until(lambda saved=saved: saved in run.checkpoints())
        os.kill(rank_process(run, rank), signal.SIGKILL)
    run.ends()
    assert run.stdout.count("going on from") == 2
    assert_clean(run)
    assert_same_run(run.directory, next(reference.iterdir()), 6)


@pytest.mark.slow
def test_rank_killed_without_restarts(start):
    """The group fails, nothing stays, and the checkpoint is whole."""
    run = start(f"{SMALL} --num-workers 1 {total(1000)}", command=TORCHRUN.format(0))
    run.until(run.checkpoints)
    os.kill(rank_process(run, 1), signal.SIGKILL)
    code, took = run.wait()
    assert code == 1
    run.nothing_left(5.0)
    print(f"death of a rank: {took:.2f} s to the exit of torchrun")
    script.load_checkpoint(run.directory / run.checkpoints()[-1])


@pytest.mark.slow
def test_sigterm_to_torchrun(start):
    """A pre-empted node: torchrun passes the signal on to every process of its ranks; the run is saved."""
    quiet = SMALL.replace("--save-interval 2", "--save-interval 1000")
    run = start(f"{quiet} --num-workers 1 {total(1000)}", command=TORCHRUN.format(0))
    run.until_rollout(3)
    os.kill(run.pid, signal.SIGTERM)
    run.until(run.checkpoints, SIGNAL)
    run.wait()
    run.nothing_left(5.0)
    state = script.load_checkpoint(run.directory / run.checkpoints()[-1])
    assert state["progress"]["iteration"] >= 2 and len(state["ranks"]) == 2
