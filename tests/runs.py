"""Runs of a script as processes of their own: start them, break them, compare what they leave behind.

Most runs are forked from a server that has already imported torch (standard library, `forkserver`), which saves three
seconds each; signals and torchrun get the command line that a user types. A run is found by its working directory,
which its workers inherit: nothing of it may stay behind.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib
import io
import itertools
import math
import multiprocessing
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
BASE, LSTM, MARIO = "rnd_ppo_atari", "rnd_ppo_atari_lstm", "rnd_ppo_mario"

SERVER = multiprocessing.get_context("forkserver")
IMPORTED = "pytest torch._dynamo torch.utils.tensorboard.summary tensorboard.backend.event_processing.event_accumulator"
IMPORTED += " gymnasium ale_py tyro filelock"
SERVER.set_forkserver_preload(IMPORTED.split())  # torch._dynamo, because the first optimiser made imports it

# Episodes of ten steps end within rollouts of eight; a rollout takes a tenth of a second, every second one is saved.
GAME = "--num-envs 4 --num-steps 8 --obs-norm-rollouts 1 --max-episode-steps 10"
LEARN = "--num-minibatches 2 --update-epochs 1 --int-return-filter forward --device cpu"
OFTEN = "--save-interval 2 --log-interval 1 --num-workers 2 --keep-checkpoints 3"
LENGTH = 12
QUICK = f"{GAME} {LEARN} {OFTEN} --total-rollouts {LENGTH} --run-dir runs --resume auto"

# What a checkpoint has to hold.
PARTS = {"agent", "rnd", "optimizer", "ranks", "progress", "args", "run"}
# The noise generator of the NES is heard, not seen; it depends on which environments share a console. Its emulator
# does not clear the working memory of a cartridge, of which Super Mario Bros. has none.
UNSEEN = rb"NREG\x02\0\0\0..|WRAM\0 \0\0.{8192}"
TIMING = ("time/", "charts/SPS")  # the only tags that may differ between two runs

GONE = 2.0  # seconds after which the workers of a killed process are gone


# --- Runs ---


def fork(cwd, name, arguments, fault, outputs):
    """Body of a forked run: `python NAME.py ARGUMENTS` in this process and directory, after `fault`."""
    multiprocessing.set_start_method(None, force=True)  # as in a new process, not as in the server
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    os.chdir(cwd)
    for fd, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), fd)  # opened for reading too, a terminal controls the session
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    script = importlib.import_module(name)
    sys.argv = [f"{name}.py", *arguments.split()]
    if fault:
        function, *options = fault
        function(script, *options)
    sys.exit(script.main())


def spawn(cwd, name, arguments, command, outputs):
    """The process of `command`, "python" or "torchrun ...", with the script and its arguments."""
    program, *options = command.split()
    modules = dict(python=[], torchrun=["-m", "torch.distributed.run"])
    line = [sys.executable, *modules[program], *options, str(ROOT / f"{name}.py"), *arguments.split()]
    environment = dict(os.environ, PYTHONUNBUFFERED="1", CUDA_VISIBLE_DEVICES="")
    # Restarted ranks would meet in the store of torchrun, which still has the addresses of the dead (pytorch#135712).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with open(outputs[0], "a") as out, open(outputs[1], "a") as err:
        return subprocess.Popen(line, cwd=cwd, stdout=out, stderr=err, env=environment, start_new_session=True)


def unused(names):
    """Those of this user's files in /dev/shm that no process has mapped: nobody will remove them."""
    maps = ""
    for pid in filter(str.isdigit, os.listdir("/proc") if names else ()):
        with contextlib.suppress(OSError):
            maps += Path(f"/proc/{pid}/maps").read_text()
    mine = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if Path("/dev/shm", name).stat().st_uid == os.getuid():
                mine.append(name)
    return [name for name in mine if name not in maps]


class Terminal:
    """A terminal of so many columns. It becomes the controlling terminal of the run that is started in it."""

    def __init__(self, columns):
        self.master, self.slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.path = os.ttyname(self.slave)
        self.text = ""
        self.resize(columns)

    def resize(self, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def shown(self):
        """All that was written to it. To be called often: what is written waits when nobody reads."""
        with contextlib.suppress(OSError):  # there is no more, or it is gone
            while data := os.read(self.master, 2**16):
                self.text += data.decode()
        return self.text

    def hang_up(self):
        os.close(self.slave)
        os.close(self.master)


class Run:
    """A run of the script `name` in the directory `cwd`: forked, or started by `command`.

    `fault`: one of the functions below and its arguments; called in a forked run before it starts, to break something
    inside. `log`: the name of the files that take the output; or `terminal`, which takes all of it.
    """

    def __init__(self, cwd, arguments, *, name=BASE, fault=(), command="", log="run", terminal=None):
        self.cwd, self.memory = Path(cwd), set(os.listdir("/dev/shm"))
        self.script = importlib.import_module(name)
        self.outputs = [self.cwd / f"{log}.stdout", self.cwd / f"{log}.stderr"]
        for path in self.outputs:
            path.write_text("")
        self.terminal = terminal
        outputs = [terminal.path, terminal.path] if terminal else self.outputs
        if command:
            self.process = spawn(cwd, name, arguments, command, self.outputs)
        else:
            self.process = SERVER.Process(target=fork, args=(cwd, name, arguments, fault, outputs))
            self.process.start()
        self.pid = self.process.pid

    # What it says

    stdout = property(lambda self: self.terminal.shown() if self.terminal else self.outputs[0].read_text())
    stderr = property(lambda self: self.outputs[1].read_text())
    said = property(lambda self: f"{self.stdout}\n{self.stderr}")

    @property
    def resumed(self):
        """The checkpoints that it says it continues from: one for each start under torchrun, none in a new run."""
        return [Path(path).name for path in re.findall(r"^run .*, continued from (.*)$", self.stdout, re.M)]

    @property
    def offered(self):
        """The checkpoints that it says it has saved, at its end."""
        return [self.cwd / path for path in re.findall(r"^saved (.*)$", self.stdout, re.M)]

    def error(self):
        """The reason that it gives for its end: one line, not a traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        assert self.stderr.count("error: ") == 1, self.stderr
        return self.stderr[self.stderr.index("error: ") :].strip()

    # What it saves

    @property
    def directory(self):
        """The newest directory below runs/."""
        return max((self.cwd / "runs").iterdir(), key=lambda path: path.name.rpartition("__")[2])

    def saved(self):
        """The rollouts that have a checkpoint below runs/."""
        return sorted(int(path.stem[-6:]) for path in (self.cwd / "runs").glob("*/checkpoint_*.pt"))

    def load(self, rollout):
        return self.script.load_checkpoint(checkpoint(self.directory, rollout))[1]

    def set_aside(self):
        """Move runs/ away, so that the next run finds nothing; the directory of the run in it."""
        name = self.directory.name
        return (self.cwd / "runs").rename(self.cwd / "aside") / name

    # Its processes

    @property
    def code(self):
        """The exit code, minus the signal's number if one killed it; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

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

    # Waiting

    def until(self, condition, timeout=60.0):
        """Wait until `condition()`; seconds that it took."""
        start = time.perf_counter()
        while not condition():
            assert time.perf_counter() - start < timeout, f"not within {timeout} s:\n{self.said}"
            time.sleep(0.005)
        return time.perf_counter() - start

    def until_said(self, text):
        def said():
            assert self.code is None or text in self.said, self.said
            return text in self.said

        return self.until(said)

    def until_rollout(self, number):
        return self.until_said(f"rollout {number}, step")

    def until_saving(self, rollout=None):
        """Wait until the temporary file of a save, or of the save after this rollout, exists; its path."""
        number = "*" if rollout is None else f"{rollout:06d}"
        self.until(lambda: list(self.cwd.glob(f"runs/*/checkpoint_{number}.pt.tmp")))
        [path] = self.cwd.glob(f"runs/*/checkpoint_{number}.pt.tmp")
        return path

    @contextlib.contextmanager
    def at_gate(self, number):
        """While the update of this rollout waits; it goes on after the block. See `gates`."""
        self.until_said(f"gate {number}\n")
        yield
        (self.cwd / f"gate{number}").touch()

    # Its end

    def wait(self, timeout=60.0):
        """Wait for the end: exit code, and the seconds that it took."""
        took = self.until(lambda: self.code is not None, timeout)
        return self.code, took

    def nothing_left(self, timeout=GONE):
        """Assert that all processes end and no shared memory stays; seconds that it took."""
        took = self.until(lambda: not self.processes(), timeout)
        self.until(lambda: not unused(set(os.listdir("/dev/shm")) - self.memory), timeout)
        return took

    def ends(self, code=0, timeout=60.0):
        """Assert that it ends with this exit code and leaves nothing; seconds that it took to end."""
        found, took = self.wait(timeout)
        assert found == code, f"exit code {found}:\n{self.said}"
        self.nothing_left()
        return took

    def dies(self):
        """Assert that SIGKILL ends it and its workers notice; seconds until all is gone."""
        found, _ = self.wait()
        assert found == -signal.SIGKILL, f"exit code {found}:\n{self.said}"
        return self.nothing_left()

    def kill(self):
        """SIGKILL the main process; seconds until all is gone."""
        os.kill(self.pid, signal.SIGKILL)
        return self.dies()

    def limit_files(self, size):
        """From now on none of its files can grow beyond `size` bytes, as on a full disk."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# --- What a run leaves behind ---


def checkpoint(directory, rollout):
    return directory / f"checkpoint_{rollout:06d}.pt"


def serialized(state, **options):
    """The bytes of torch.save."""
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def write_checkpoint(path, data):
    """Write the bytes `data` with the checksum that a checkpoint ends with."""
    path.write_bytes(data + hashlib.sha256(data).digest())


def events(directory):
    """All events of a run as TensorBoard reads them: without those that a resumed run purges (purge_step)."""
    return EventAccumulator(str(directory), dict(scalars=0, tensors=0), purge_orphaned_data=True).Reload()


def curves(directory, after=0, until=math.inf):
    """{tag: [(step, value), ...]} of the steps after `after` up to `until`, with duplicates if there are any."""
    found = events(directory)
    points = {
        tag: [(event.step, event.value) for event in found.Scalars(tag) if after < event.step <= until]
        for tag in found.Tags()["scalars"]
    }
    return {tag: values for tag, values in points.items() if values}


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


def comparable(script, path, ignore=()):
    """What two checkpoints of the same run have in common; `ignore`: names in its progress that they do not."""
    _, state = script.load_checkpoint(path)
    assert set(state) >= PARTS
    state["args"] = {name: value for name, value in state["args"].items() if name not in script.FREE_ARGS}
    del state["run"]
    for name in ignore:
        del state["progress"][name]
    for env in [env for rank in state["ranks"] for env in rank["envs"]]:
        env["game"] = re.sub(UNSEEN, b"", env["game"], flags=re.DOTALL)
    return state


def assert_same_state(script, one, other, ignore=()):
    """The checkpoints at two paths hold the same, bit for bit."""
    assert differences(comparable(script, one, ignore), comparable(script, other, ignore)) == []


def assert_same_run(run, reference, rollouts=LENGTH, *, since=0, events=True, ignore=()):
    """After so many rollouts `run` has the state of the run in the directory `reference`, and the same curves; those
    of a new run that starts from an older checkpoint begin after the rollout `since`."""
    path = checkpoint(run.directory, rollouts)
    assert_same_state(run.script, path, checkpoint(reference, rollouts), ignore)
    if events:
        found = curves(run.directory)
        steps = run.load(rollouts)["progress"]["step"] // rollouts
        expected = curves(reference, since * steps, rollouts * steps)
        assert set(found) == set(expected) and {"losses/policy_loss", "charts/episodic_return"} <= set(found)
        for tag, values in expected.items():
            assert found[tag] == values or tag.startswith(TIMING), tag
        assert len(found["losses/policy_loss"]) == rollouts - since


def assert_clean(run):
    """No temporary file of an interrupted save is left."""
    left = [path for path in run.cwd.rglob("*") if "tmp" in path.suffix]
    assert not left, left


# --- Faults, built into a run ---

# The only places where the tests reach into a script or into what it calls.
SEAMS = {
    "rollout": "collect",
    "bonus": "RND.bonus",
    "error": "RND.forward",
    "statistics": "merge_batch",
    "update": "update",
    "random play": "random_play",
    "minibatch": "minibatch",
    "loss": "losses",
    "workers": "VectorEnv.__init__",
    "emulator": "Env.step",
    "reward": "Game.act",
    "room": "Game.room",
    "game state": "Game.get_state",
    "curves": "torch.utils.tensorboard:SummaryWriter.add_scalar",
    "curves flushed": "torch.utils.tensorboard:SummaryWriter.flush",
    "snapshot": "Session.snapshot",
    "restore": "Session.restore",
    "checkpoint": "torch:save",
    "checkpoint on disk": "os:fsync",
    "checkpoint renamed": "os:replace",
    "old checkpoint removed": "pathlib:Path.unlink",
}


def wrap(script, seam, hook):
    """Call `hook(number, function, *args)` in place of `function(*args)`, with the number of the call from 1 on."""
    module, _, name = SEAMS[seam].rpartition(":")
    *path, name = name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module) if module else script)
    function, numbers = getattr(owner, name), itertools.count(1)
    setattr(owner, name, lambda *args, **kwargs: hook(next(numbers), function, *args, **kwargs))


def die(script, seam, call, after=False):
    """SIGKILL to itself at this call of the function at `seam`, or after it."""

    def hook(number, function, *args, **kwargs):
        if number == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if number == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    wrap(script, seam, hook)


def raises(script, seam, call, error):
    """This call of the function at `seam` raises the error."""

    def hook(number, function, *args, **kwargs):
        if number == call:
            raise error
        return function(*args, **kwargs)

    wrap(script, seam, hook)


def signal_while_events_are_locked(script, call):
    """SIGTERM when Python has taken the lock of the event writer's queue, but has not begun the block that frees it."""

    def hook(number, function, writer, *args):
        if number == call:
            writer.file_writer.event_writer._async_writer._byte_queue.mutex.acquire()
            os.kill(os.getpid(), signal.SIGTERM)
        return function(writer, *args)

    wrap(script, "curves", hook)


def numpy_game(script):
    """The game gives NumPy's numbers, as one's own environment may."""
    wrap(script, "reward", lambda _, function, *args: np.float64(function(*args)))
    wrap(script, "room", lambda _, function, *args: np.int64(function(*args)))


def odd_game(script):
    """The state of the game has a number of NumPy, which does not load without executing what is in the file."""
    wrap(script, "game state", lambda _, function, *args: dict(ram=b"", clock=np.float64(1.5)))


def few_files(script):
    """As after `ulimit -n 40`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))


def reader_leaves(script, seam, *streams):
    """As with `| head`: from the first call of the function at `seam` on nobody reads these streams any more. And as
    with `nohup`, SIGHUP is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    reader, writer = os.pipe()
    for stream in streams:
        os.dup2(writer, stream)
        setattr(sys, {1: "stdout", 2: "stderr"}[stream], os.fdopen(stream, "w", buffering=1, closefd=False))
    os.close(writer)

    def hook(number, function, *args, **kwargs):
        if number == 1:
            os.close(reader)
            os.kill(os.getpid(), signal.SIGHUP)
        return function(*args, **kwargs)

    wrap(script, seam, hook)


def tracking(script, mode, first=""):
    """Weights & Biases in this mode, where nobody has logged in; before, a run with the arguments `first`."""
    os.environ.pop("WANDB_API_KEY", None)
    os.environ.update(WANDB_MODE=mode, WANDB_SILENT="true", HOME=os.getcwd())
    if first:
        arguments, sys.argv = sys.argv, [sys.argv[0], *first.split()]
        assert script.main() == 0
        sys.argv = arguments


def unprivileged(script):
    """Without the right of root to read and write every file."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    libc.capget(header, sets)
    for i in range(3):  # of the effective, permitted and inheritable capabilities
        sets[i] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


def slow_disk(script, seconds, first=1):
    """From this save on, each spends so long between writing the file and giving it its name."""

    def hook(number, fsync, fd):
        if number >= first:
            time.sleep(seconds)
        fsync(fd)

    wrap(script, "checkpoint on disk", hook)


def gates(script, *rollouts):
    """In a new run the updates of these rollouts wait for the test: see Run.at_gate."""

    def hook(number, update, *args, **kwargs):
        if number in rollouts:
            print(f"gate {number}")
            while not Path(f"gate{number}").exists():
                time.sleep(0.01)
        return update(*args, **kwargs)

    wrap(script, "update", hook)


def long_call(script, rollout):
    """The update of this rollout of a new run begins with one call into torch that takes a second or more."""

    def hook(number, update, *args, **kwargs):
        if number == rollout:
            matrix = torch.rand(4_000, 4_000)
            print("inside torch")
            torch.mm(matrix, matrix)
            print("torch is back")
        return update(*args, **kwargs)

    wrap(script, "update", hook)


def broken_emulator(script, call):
    """The emulator of environment 3 raises in this step."""
    numbers = itertools.count(1)

    def hook(_, step, env, *args):
        if env.index == 3 and next(numbers) == call:
            raise ValueError("the cartridge is dusty")
        return step(env, *args)

    wrap(script, "emulator", hook)


def not_finite(script, what, rollout, value):
    """`what` gets this value in this rollout of a new run that has two minibatches."""

    def loss(number, losses, *args):
        total, metrics = losses(*args)
        if number == 2 * rollout - 1:
            metrics[script.METRICS.index("predictor_loss")] = value
        return total, metrics

    def gradient(number, losses, *args):
        total, metrics = losses(*args)
        return total * (value if number == 2 * rollout else 1), metrics

    def bonus(number, function, *args):
        error = function(*args)
        if number == 3 * rollout - 2:  # a rollout computes the error for the bonus, then for two minibatches
            error[13] = value
        return error

    # Merged into the statistics: the frames of the random play, then the frames and the returns of each rollout.
    merge = 2 * rollout + (what == "int_returns")

    def statistics(number, function, rms, batch):
        function(rms, batch)
        if number == merge:
            rms.var = np.full(rms.mean.shape, value)

    hooks = dict(loss=loss, gradient=gradient, bonus=bonus, frames=statistics, int_returns=statistics)
    seams = dict(loss="loss", gradient="loss", bonus="error", frames="statistics", int_returns="statistics")
    wrap(script, seams[what], hooks[what])
