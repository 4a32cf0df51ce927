"""A run that goes on: from which checkpoint, with which arguments, and with the bits of one that never stopped."""

import io
import pickle
import re
import shutil
import signal
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import last_checkpoint
from runs import BASE, LSTM, MARIO, QUICK, assert_same_run, checkpoint, die, gates, serialized, write_checkpoint

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
    run = start(f"--num-workers 3 --resume {directory}")
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
    run = start(f"{how} --num-workers 3", name=name)
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
    before = contents(directory)
    run = start(f"{QUICK} --total-rollouts 6 --resume {checkpoint(directory, 2)}", fault=(die, "rollout", 2))
    run.dies()
    assert run.resumed == ["checkpoint_000002.pt"]
    assert run.saved() == [2, 2, 4, 6] and run.directory != directory
    run = resume(6, "--num-workers 3", since=2)
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


def test_newest_checkpoints_and_the_best_are_kept(start):
    """--keep-checkpoints 2: the two newest and the best one. It is of rollout 2: the first with a mean return, and no
    later one is better in these few steps; it outlives its numbered twin."""
    run = start(f"{QUICK} --keep-checkpoints 2 --total-rollouts 8")
    run.ends()
    assert run.saved() == [6, 8]
    best, last = script.load_checkpoint(run.directory / "best.pt")[1]["progress"], run.load(8)["progress"]
    assert best["iteration"] == 2 and best["recent"] and best["best_mean"] == last["best_mean"]
    run = start(f"{QUICK} --keep-checkpoints 1 --total-rollouts 9")
    run.ends()
    assert run.saved() == [9] and (run.directory / "best.pt").exists()


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
    run = resume(8, "--num-workers 3", since=2)
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


def test_stale_lock_is_not_in_the_way(start, resume):
    """That of a run killed a moment ago, or of a machine that lost its power, whatever is in the file."""
    run = start(f"{QUICK} --num-workers 4 --total-rollouts 4", fault=(die, "rollout", 4))
    assert run.wait()[0] == -signal.SIGKILL
    (run.directory / "lock").write_text(f"{run.pid}\n")
    resume(4)
