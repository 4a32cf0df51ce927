"""A run that goes on: from which checkpoint, with which arguments, and with the bits of one that never stopped."""

import io
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import last_checkpoint
from runs import (
    BASE,
    LSTM,
    MARIO,
    QUICK,
    assert_same_run,
    checkpoint,
    die,
    events,
    gates,
    serialized,
    unprivileged,
    write_checkpoint,
)

import rnd_ppo_atari as script

# --- The same bits ---


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


def test_total_rollouts_may_be_raised_and_a_finished_run_resumed(start, uninterrupted):
    """One command line, started again after the end, with more rollouts, and once with nothing left to do."""
    for rollouts, workers in ((3, 1), (6, 3), (6, 2)):
        run = start(f"{QUICK} --num-workers {workers} --total-rollouts {rollouts}")
        run.ends()
    assert run.saved() == [3, 4, 6]
    assert_same_run(run, uninterrupted, 6)
    run = start(f"{QUICK} --total-rollouts 5 --resume {run.directory}")
    run.ends(2)
    assert all(word in run.error() for word in ("--total-rollouts", "6", "5")), run.error()


def test_arguments_that_are_left_out_are_those_of_the_checkpoint(start, stopped, uninterrupted):
    """Given the directory of the run. Curves continue without gaps, and without the points of a rollout that was lost
    and is done again."""
    directory = stopped(8, 10)
    run = start(f"--num-workers 2 --resume {directory}")
    run.ends()
    assert run.resumed == ["checkpoint_000010.pt"]
    assert run.directory == directory
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [(LSTM, "--precision fp32"), (LSTM, "--precision bf16"), (MARIO, "")],
    ids=["lstm", "bf16", "mario"],
)
def test_a_variant_ends_with_the_same_bits(start, name, options):
    """Killed in the fourth rollout, resumed with other workers: the LSTM's state is in the checkpoint, and Mario's
    console, which the environments of a worker share."""
    if name == MARIO and not all(map(find_spec, ("stable_retro", "gym_super_mario_bros"))):
        pytest.skip("needs stable-retro and gym-super-mario-bros")
    how = f"{QUICK} {options} --total-rollouts 4"
    run = start(f"{how} --num-workers 1", name=name)
    run.ends()
    reference = run.set_aside()
    start(how, name=name, fault=(die, "rollout", 4)).dies()
    run = start(f"{how} --num-workers 2", name=name)
    run.ends()
    assert run.resumed == ["checkpoint_000002.pt"]
    assert_same_run(run, reference, 4)


# --- Which checkpoint ---


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


def test_going_back_starts_a_new_run(start, stopped, resume):
    """`--resume PATH` of an older checkpoint: nothing of the run it is from is touched, and the state it starts from is
    saved at once. Killed then, `--resume auto` continues the new run, because its checkpoint is the newest."""
    directory = stopped(2, 4, 6)
    (directory / "best.pt").write_bytes(b"better than what comes")
    before = contents(directory)
    run = start(f"{QUICK} --total-rollouts 6 --resume {checkpoint(directory, 2)}", fault=(die, "rollout", 2))
    run.dies()
    assert run.resumed == ["checkpoint_000002.pt"]
    assert run.saved() == [2, 2, 4, 6] and run.directory != directory
    run = resume(6, "--num-workers 2", since=2)
    assert run.resumed == ["checkpoint_000002.pt"]
    assert run.saved() == [2, 2, 4, 4, 6, 6]
    assert contents(directory) == before


def test_a_copied_checkpoint_starts_a_new_run(start, stopped, uninterrupted, tmp_path):
    """In a folder with another run's events and checkpoints, or under another name in its own: everything there stays
    as it is, and it is said where the run continues."""
    own = stopped(2, 4)
    other = tmp_path / "other"
    shutil.copytree(own, other)
    for number, copy in enumerate([checkpoint(other, 6), own / "copy.pt"]):
        shutil.copy(checkpoint(uninterrupted, 6), copy)
        before = contents(copy.parent)
        run_dir = tmp_path / f"new{number}"
        run = start(f"--total-rollouts 7 --run-dir {run_dir} --resume {copy}")
        run.ends()
        [new] = run_dir.iterdir()
        assert f"run {new}, continued from {copy}" in run.stdout
        assert {"checkpoint_000006.pt", "checkpoint_000007.pt"} <= {path.name for path in new.iterdir()}
        assert contents(copy.parent) == before


def test_a_checkpoint_holds_no_more_than_its_tensors(base_run):
    """A view would bring the whole array along: once all frames of the rollout, two thirds of the file."""
    _, state = script.load_checkpoint(last_checkpoint(base_run[1]))
    tensors, parts = [], [state]
    while parts:
        part = parts.pop()
        if isinstance(part, torch.Tensor):
            tensors.append(part)
        elif isinstance(part, (dict, list, tuple)):
            parts += part.values() if isinstance(part, dict) else part
    assert len(tensors) > 100
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_newest_checkpoints_and_the_best_are_kept(start):
    """--keep-checkpoints 2: the two newest and the best one. In these few episodes the best is the newest."""
    run = start(f"{QUICK} --keep-checkpoints 2 --total-rollouts 8")
    run.ends()
    assert run.saved() == [6, 8]
    best, last = script.load_checkpoint(run.directory / "best.pt")[1]["progress"], run.load(8)["progress"]
    assert best["iteration"] == 8 and 0 < len(best["recent"]) < 100 and best["best_mean"] == last["best_mean"] is None
    run = start(f"{QUICK} --keep-checkpoints 1 --total-rollouts 9")
    run.ends()
    assert run.saved() == [9] and (run.directory / "best.pt").exists()


def test_the_best_is_the_best_mean_of_100_episodes():
    """A mean of fewer says little, because short episodes end first: until there are 100, the newest is the best."""
    progress, best = script.Progress(), []
    assert not progress.is_best()  # there is no return yet
    for value in [5.0] * 50 + [1.0] * 49 + [2.0, 2.0, 9.0, 0.0] + [0.0] * 100:
        stats = dict(episodic_return=value, episodic_length=1)
        progress.add(dict(stats=stats, visits={}))
        progress.update_best()
        best.append(progress.is_best())
    assert best == [True] * 100 + [False, True] + [False] * 101  # means of 100: 3.01, 2.98, 3.02, less


def test_a_million_rollouts_and_the_copies_of_a_user(start, stopped):
    """Numbers of seven digits come after those of six: what is kept and what is resumed are the newest. A user's copies
    in the folder are never taken for checkpoints of the run."""
    directory = stopped(2)
    first = checkpoint(directory, 999_999)
    _, state = script.load_checkpoint(checkpoint(directory, 2))
    state["progress"]["iteration"] = 999_999
    write_checkpoint(first, serialized(state))
    copies = [directory / f"checkpoint_{name}.pt" for name in ("000001-keep", "999999_backup", "2", "0000003")]
    for copy in copies:
        checkpoint(directory, 2).rename(copy) if copy == copies[0] else copy.write_bytes(b"copy")
    for last, resumed in ((1_000_001, "checkpoint_999999.pt"), (1_000_002, "checkpoint_1000001.pt")):
        run = start(f"{QUICK} --save-interval 1 --total-rollouts {last}")
        run.ends()
        assert run.directory == directory and run.resumed == [resumed]
    assert [path.name for path in script.checkpoints(directory)] == [
        "checkpoint_1000000.pt",
        "checkpoint_1000001.pt",
        "checkpoint_1000002.pt",
    ]
    assert all(copy.exists() for copy in copies)
    assert script.load_checkpoint(directory)[1]["progress"]["iteration"] == 1_000_002


def test_only_the_newest_checkpoint_in_its_own_directory_continues_in_place(stopped, uninterrupted, monkeypatch):
    """By any path that leads to it; not an older one, nor the best, even if no other is left."""
    directory = stopped(2, 4)
    _, state = script.load_checkpoint(directory)
    newest, link = checkpoint(directory, 4), directory.with_name("latest")
    link.symlink_to(directory.name)
    assert script.is_newest(newest, state)
    assert script.is_newest(link / newest.name, state)
    monkeypatch.chdir(directory)
    assert script.is_newest(Path(newest.name), state)
    assert not script.is_newest(checkpoint(directory, 2), state)
    best = newest.rename(directory / "best.pt")
    assert not script.is_newest(best, state)
    checkpoint(directory, 2).unlink()
    assert not script.is_newest(best, state)


def test_what_is_on_disk_is_not_saved_again(start, stopped):
    """A run that has enough rollouts stays as it is, and so does the checkpoint that a run continues from."""
    directory = stopped(2, 4)
    before = contents(directory)
    run = start(f"{QUICK} --total-rollouts 3 --resume auto")
    run.ends()
    assert "--total-rollouts 8" in run.stdout  # to continue
    assert {path: data for path, data in contents(directory).items() if path in before} == before
    times = checkpoint(directory, 4).stat().st_mtime_ns
    start(f"{QUICK} --total-rollouts 5 --resume auto").ends()
    assert checkpoint(directory, 4).stat().st_mtime_ns == times


def test_a_run_that_cannot_be_written_to_continues_in_a_new_directory(start, stopped, tmp_path):
    """The folder of another user: `--resume` leaves it alone, `auto` looks past what it cannot read, and a --run-dir
    that cannot be written to is refused in one line."""
    directory = stopped(2, 4)
    before = contents(directory)
    hidden = tmp_path / "mine" / f"{script.run_prefix(script.Args())}20300101-000000"
    hidden.mkdir(parents=True)
    modes = {hidden: 0o000, directory: 0o555, directory.parent: 0o555}
    for path, mode in modes.items():
        path.chmod(mode)
    try:
        theirs = directory.relative_to(tmp_path)
        run = start(f"{QUICK} --total-rollouts 5 --run-dir mine --resume {theirs}", fault=(unprivileged,))
        run.ends()
        [mine] = [path for path in hidden.parent.iterdir() if path != hidden]
        assert f"run mine/{mine.name}, continued from {theirs}/checkpoint_000004.pt" in run.stdout
        run = start(f"{QUICK} --total-rollouts 6 --run-dir mine", fault=(unprivileged,))
        run.ends()
        assert f"run mine/{mine.name}, continued from mine/{mine.name}/checkpoint_000005.pt" in run.stdout
        run = start(f"{QUICK} --resume {theirs}", fault=(unprivileged,))
        run.ends(2)
        assert "--run-dir: expected a directory that can be written to" in run.error()
    finally:
        for path in modes:
            path.chmod(0o755)
    assert contents(directory) == before


# --- Which run `--resume auto` takes ---


@pytest.fixture
def make_run(tmp_path, base_run):
    """make_run(name, when, rollout, **arguments): the directory of a run whose newest checkpoint, without weights, is
    `when` seconds old."""
    _, state = script.load_checkpoint(last_checkpoint(base_run[1]))
    state = {name: value for name, value in state.items() if name not in ("agent", "rnd")} | dict(optimizer={})

    def make_run(name, when, rollout=3, processes=1, **arguments):
        args = vars(script.Args(run_dir=str(tmp_path), **arguments))
        directory = tmp_path / f"{script.run_prefix(script.Args(**args))}{name}"
        directory.mkdir()
        changed = dict(args=args, progress=dict(iteration=rollout), ranks=[{}] * processes, run=directory.name)
        write_checkpoint(checkpoint(directory, rollout), serialized(state | changed))
        os.utime(checkpoint(directory, rollout), (time.time() - when,) * 2)
        return directory

    return make_run


def auto(tmp_path, **arguments):
    """The run that `--resume auto` continues with these arguments; None for a new one."""
    path, _ = script.find_checkpoint(script.Args(run_dir=str(tmp_path), resume="auto", **arguments))
    return path and path.parent


def test_auto_continues_the_newest_run_that_these_arguments_can_continue(make_run, tmp_path, capsys):
    """The jobs of an array find each their own run. A small trial that is newer is not in the way, nor one for more
    processes. Newest by the checkpoint, not by the start of the run; a finished run may be continued with more."""
    seeds = {seed: make_run("20260102-000000", 500, seed=seed) for seed in (1, 2, 3)}
    restarted = make_run("20260101-000000", 400, seed=2)
    make_run("20260103-000000", 10, num_envs=8)
    make_run("20260104-000000", 9, processes=8)
    make_run("20260105-000000", 8, anneal=True, seed=3)
    assert auto(tmp_path) == seeds[1]
    assert auto(tmp_path, seed=2) == restarted
    assert auto(tmp_path, seed=3, total_rollouts=40_000, device="cpu", num_workers=3, log_interval=1) == seeds[3]
    assert capsys.readouterr().out == ""


def test_auto_starts_anew_and_says_why_the_newest_run_does_not_fit(make_run, tmp_path, capsys):
    """An argument, or the number of processes in torchrun's words."""
    assert auto(tmp_path) is None and capsys.readouterr().out == ""
    made = make_run("20260101-000000", 100)
    make_run("20260102-000000", 200, num_steps=64)
    assert auto(tmp_path, gamma=0.9) is None
    said = capsys.readouterr().out
    reason = f"so a new one starts: --gamma: expected 0.999, as in {made}"
    assert said.startswith(f"no run that these arguments continue, {reason}") and said.count("\n") == 1
    make_run("20260103-000000", 10, processes=8, anneal=True)
    assert auto(tmp_path, anneal=True) is None
    said = capsys.readouterr().out
    assert "expected torchrun with 8 processes" in said and "set --nproc-per-node and --nnodes" in said


def test_auto_leaves_a_run_that_has_more_rollouts_than_wanted(make_run, tmp_path):
    """It is complete: a loop over seeds, started again, does not train it a second time. --resume PATH asks."""
    made = make_run("20260101-000000", 100)
    assert auto(tmp_path, total_rollouts=2) == made
    with pytest.raises(script.UsageError, match="--total-rollouts: expected at least 3"):
        script.find_checkpoint(script.Args(resume=str(made), total_rollouts=2))


def test_auto_knows_game_and_experiment(make_run, tmp_path):
    """Whatever characters are in the name."""
    names = ["a", "a[1]", "[a]", "a*", "?", "a__1", "__", "é b", "a__1__2"]
    runs = {name: make_run("20260101-000000", 100, exp_name=name) for name in names}
    breakout = make_run("20260102-000000", 10, exp_name="a", env_id="ALE/Breakout-v5")
    assert {name: auto(tmp_path, exp_name=name) for name in names} == runs
    assert auto(tmp_path, exp_name="a", env_id="ALE/Breakout-v5") == breakout
    assert auto(tmp_path, exp_name="b") is None


# --- Damaged checkpoints ---


def damage(path, how):
    """Damage the file; a number flips a bit at that byte, counted from the end if negative, or at that share of it."""
    data = bytearray(path.read_bytes())
    if how == "empty":
        data = b""
    elif how == "text":
        data = b"not a checkpoint"
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


DAMAGES = ["empty", "text", "half", "one byte short", "one byte more", "zeros", 0, 40, 0.1, 0.5, 0.9, -33, -32, -1]


def test_every_damage_is_noticed(stopped, uninterrupted, capsys):
    """Wherever the file of a real run is damaged: `auto` says so and takes the one before."""
    directory = stopped(10)
    damaged = checkpoint(directory, 12)
    _, state = script.load_checkpoint(checkpoint(directory, 10))
    args = script.Args(**script.saved_args(state), run_dir=str(directory.parent), resume="auto")
    for how in DAMAGES:
        shutil.copy(checkpoint(uninterrupted, 12), damaged)
        damage(damaged, how)
        path, state = script.find_checkpoint(args)
        assert path == checkpoint(directory, 10) and state["progress"]["iteration"] == 10
        assert f"warning: {damaged}: expected a checkpoint" in capsys.readouterr().out


def test_damaged_checkpoints_are_passed_over(start, stopped, resume):
    """The newest is empty, the one before has a flipped bit: `auto` says so of both and takes the third, and the run
    ends as if nothing had been, in a new directory. A path given is refused with the reason."""
    directory = stopped(2, 4, 6)
    damaged = [checkpoint(directory, 4), checkpoint(directory, 6)]
    damage(damaged[0], 0.7)
    damage(damaged[1], "empty")
    before = contents(directory)
    for path in damaged:
        run = start(f"{QUICK} --total-rollouts 8 --resume {path}")
        run.ends(2)
        error = run.error()
        assert str(path) in error and re.search("checksum|damaged|empty", error) and "\n" not in error, error
    run = resume(8, "--num-workers 2", since=2)
    assert run.resumed == ["checkpoint_000002.pt"]
    for path in damaged:
        assert run.said.count(str(path.relative_to(run.cwd))) == 1, run.said
    assert contents(directory) == before


# --- Files that are something else ---


@pytest.mark.parametrize("flag", ["--resume", "--play"])
@pytest.mark.parametrize(
    "change", [dict(script="rnd_ppo_other"), dict(format=999), {}], ids=["other-script", "other-format", "damaged"]
)
def test_a_file_that_is_no_checkpoint_of_this_script_is_refused(fails, base_run, tmp_path, flag, change):
    """The line says what is expected and what is in the file."""
    path = tmp_path / "other.pt"
    write_checkpoint(path, serialized(script.load_checkpoint(last_checkpoint(base_run[1]))[1] | change))
    if not change:
        damage(path, 0.5)
    line = fails(f"{flag} {path}")
    assert all(word in line for word in (str(path), "expected", *map(str, change.values()))), line


class Malicious:
    """Unpickled, it creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def malicious_files(canary):
    """Contents that would create `canary`, by name: as torch writes them, in its old format, a bare pickle, one that
    hides in a state that is otherwise whole, and a TorchScript archive, which torch.load hands to another loader."""
    evil = Malicious(canary)
    hidden = dict(format=script.FORMAT, script=BASE, args={}, progress=dict(iteration=1, evil=evil))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/constants.pkl", pickle.dumps(evil, 2))
        file.writestr("archive/data.pkl", pickle.dumps(evil, 2))
        file.writestr("archive/version", "3\n")
    return dict(
        new=serialized(evil),
        old=serialized(evil, _use_new_zipfile_serialization=False),
        bare=pickle.dumps(evil),
        hidden=serialized(hidden),
        script=archive.getvalue(),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says what is odd about the files
def test_malicious_checkpoints_are_refused(start, stopped, tmp_path):
    """Nothing in the file is executed, whether it is resumed, found by `auto` or played."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Malicious(canary))).close()
    assert canary.exists(), "the attack works"
    canary.unlink()
    for name, data in malicious_files(canary).items():
        write_checkpoint(tmp_path / f"{name}.pt", data)
        with pytest.raises(script.UsageError, match=f"{name}.pt: expected a checkpoint"):
            script.load_checkpoint(tmp_path / f"{name}.pt")
        assert not canary.exists()
    for flag in ("--resume", "--play"):
        run = start(f"--run-dir runs {flag} {tmp_path / 'hidden.pt'}")
        run.ends(2)
        assert "hidden.pt" in run.error() and "\n" not in run.error()
    directory = stopped(2)
    shutil.copy(tmp_path / "hidden.pt", checkpoint(directory, 3))
    run = start(f"{QUICK} --total-rollouts 4")
    run.ends()
    assert run.resumed == ["checkpoint_000002.pt"]
    assert "checkpoint_000003.pt" in run.stdout and not canary.exists()


# --- Arguments that contradict the checkpoint ---


@pytest.mark.parametrize(
    "argument, saved",
    [
        ("--env-id ALE/Breakout-v5", "ALE/MontezumaRevenge-v5"),
        ("--num-envs 16", "8"),
        ("--num-steps 32", "16"),
        ("--seed 7", "1"),
        ("--gamma 0.9", "0.999"),
        ("--int-gamma 0.9", "0.99"),
        ("--learning-rate 0.001", "0.0001"),
        ("--int-return-filter backward", "forward"),
        ("--total-rollouts 2", "3"),
    ],
)
def test_arguments_that_contradict_the_checkpoint_are_refused_by_name(fails, base_run, argument, saved):
    """Silently ignoring them, or mixing two runs, would be worse than an error. The run stays as it is."""
    path = last_checkpoint(base_run[1])
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    line = fails(f"--resume {path} {argument}")
    assert all(word in line for word in (*argument.split(), saved)), line
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def write_changed(path, state, **arguments):
    """A checkpoint like `state`, with these arguments changed, or removed where None is given."""
    args = {name: value for name, value in (state["args"] | arguments).items() if value is not None}
    write_checkpoint(path, serialized(state | dict(args=args)))
    return path


def test_a_changed_number_of_processes_is_refused_in_the_words_of_torchrun(fails, base_run, monkeypatch):
    monkeypatch.setattr(script, "PROCESSES", 4)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    line = fails(f"--resume {last_checkpoint(base_run[1])}")
    assert "expected torchrun with 1 processes" in line and "got 4" in line and "--nproc-per-node" in line


def test_an_argument_more_or_less_than_the_script_has(fails, base_run, tmp_path, monkeypatch):
    """Of a checkpoint from a copy of the script: one that the script does not know is named; one that is new in the
    script has its default."""
    _, state = script.load_checkpoint(last_checkpoint(base_run[1]))
    more = write_changed(tmp_path / "more.pt", state, curiosity=0.5)
    for flag in ("--resume", "--play"):
        line = fails(f"{flag} {more}")
        assert "curiosity" in line and "arguments of this script" in line
    less = write_changed(tmp_path / "less.pt", state, anneal=None, norm_adv=None)
    for flag in ("--resume", "--play"):
        monkeypatch.setattr(sys, "argv", ["rnd_ppo_atari.py", flag, str(less)])
        args = script.parse_args()
        assert args.num_steps == 16 and not args.anneal
    script.check_resumable(args, *script.load_checkpoint(less))


def test_what_belongs_to_another_machine_is_not_taken_from_a_checkpoint(base_run, tmp_path, monkeypatch):
    _, state = script.load_checkpoint(last_checkpoint(base_run[1]))
    theirs = dict(run_dir="/no/such/disk", track=True, device="cuda", num_workers=500, resume="auto", json="/no/report")
    path = write_changed(tmp_path / "theirs.pt", state, **theirs)
    for flag in ("--resume", "--play"):
        monkeypatch.setattr(sys, "argv", ["rnd_ppo_atari.py", flag, str(path)])
        args = script.parse_args()
        expected = {name: getattr(script.Args(), name) for name in theirs} | {flag.strip("-"): str(path)}
        assert {name: getattr(args, name) for name in expected} == expected
        assert args.num_envs == 8
        script.check_args(args)


@pytest.mark.parametrize("how", ["exported", "format 1"])
def test_weights_without_the_rest_cannot_be_resumed(fails, base_run, tmp_path, how):
    _, state = script.load_checkpoint(last_checkpoint(base_run[1]))
    if how == "exported":
        del state["optimizer"], state["ranks"]
    else:
        state["format"] = 1
    write_checkpoint(tmp_path / "policy.pt", serialized(state))
    line = fails(f"--resume {tmp_path / 'policy.pt'}")
    assert "policy.pt: expected a checkpoint of a run, got exported or old weights; use --play with them" in line


def test_another_horizon_of_the_annealing_is_announced(base_run, tmp_path, capsys):
    _, state = script.load_checkpoint(last_checkpoint(base_run[1]))
    for total, anneal, warned in ((3, True, False), (4, True, True), (4, False, False)):
        path = write_changed(tmp_path / "checkpoint.pt", state, anneal=anneal)
        _, changed = script.load_checkpoint(path)
        args = script.Args(**script.saved_args(changed) | dict(total_rollouts=total))
        script.check_resumable(args, path, changed)
        script.Run(args, path, changed).describe()
        assert ("warning: --anneal ends at another --total-rollouts" in capsys.readouterr().out) == warned


# --- Two runs ---


def test_second_run_on_a_directory_is_refused(start, uninterrupted):
    """One line, exit code 2, and the first goes on undisturbed."""
    first = start(f"{QUICK} --total-rollouts 4", fault=(gates, 3))
    with first.at_gate(3):
        second = start(f"{QUICK} --total-rollouts 4", log="second")
        code, took = second.wait()
        assert code == 2 and first.code is None, second.said
        assert first.directory.name in second.error() and "\n" not in second.error()
        print(f"refused after {took:.2f} s")
    first.ends()
    assert_same_run(first, uninterrupted, 4)


def test_what_was_saved_while_the_lock_was_waited_for_is_not_overwritten(stopped, uninterrupted):
    """As when a run is told to stop and started again at once: it has found rollout 2, and the old process saves 4."""
    directory = stopped(2)
    path, state = script.load_checkpoint(directory)
    run = script.Run(script.Args(**script.saved_args(state)), path, state)
    shutil.copy(checkpoint(uninterrupted, 4), directory)
    for _ in range(2):  # and the lock is free again
        with pytest.raises(script.UsageError, match="saved meanwhile; start again"), run:
            pass
    path, state = script.load_checkpoint(directory)
    with script.Run(run.args, path, state) as run:
        assert run.dir == directory


def test_a_run_that_stops_in_its_first_rollout_has_all_tabs_later(start):
    """TensorBoard's custom scalars and HParams are written with the first curves, which may be in a resumed process."""
    run = start(f"{QUICK} --total-rollouts 2", fault=(gates, 1))
    run.until_said("gate 1\n")
    os.kill(run.pid, signal.SIGTERM)
    run.ends(128 + signal.SIGTERM)
    assert run.saved() == [0] and not list(run.directory.glob("*tfevents*"))
    for rollouts in (2, 4):
        run = start(f"{QUICK} --total-rollouts {rollouts}")
        run.ends()
        assert run.resumed == [f"checkpoint_{rollouts - 2:06d}.pt"]
        found = events(run.directory)
        assert all(len(found.PluginTagToContent(plugin)) > 0 for plugin in ("hparams", "custom_scalars"))


def test_stale_lock_is_not_in_the_way(start, resume):
    """That of a run killed a moment ago, or of a machine that lost its power, whatever is in the file."""
    run = start(f"{QUICK} --num-workers 2 --total-rollouts 4", fault=(die, "rollout", 4))
    assert run.wait()[0] == -signal.SIGKILL
    (run.directory / "lock").write_text(f"{run.pid}\n")
    resume(4)
