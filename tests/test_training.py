"""The script as its users run it: three rollouts of the real game, resuming, playing, and what they may get wrong."""

import ast
import copy
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, SCRIPT, last_checkpoint, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastops
import rnd_ppo_atari as script
from rnd_ppo_atari import Args, UsageError, load_checkpoint, train

TAGS = {
    "charts": "episodic_return episodic_length episodic_return_mean100 episodic_length_mean100 best_return rooms "
    "rooms_total learning_rate SPS",
    "losses": "policy_loss value_loss int_value_loss predictor_loss entropy approx_kl clipfrac explained_variance "
    "int_explained_variance",
    "rnd": "int_reward_raw int_reward int_return_std obs_mean obs_std",
    "time": "rollout bonus update",
}
TAGS = [f"{group}/{name}" for group, names in TAGS.items() for name in names.split()]


def events(run_dir):
    (run,) = Path(run_dir).iterdir()
    found = EventAccumulator(str(run), size_guidance=dict(scalars=0, tensors=0)).Reload()
    return found, {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def differences(one, other, where=""):
    """Paths at which two nested states are not bit-equal."""
    if isinstance(one, torch.Tensor):
        equal = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if equal else [where]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [where]
        return [path for key in one for path in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if type(one) is not type(other) or len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return [path for i, (a, b) in pairs for path in differences(a, b, f"{where}/{i}")]
    return [] if one == other and type(one) is type(other) else [where]


def without_location(state):
    """A checkpoint's state without what two runs of the same thing may differ in."""
    state = copy.deepcopy(state)
    for name in ("run_dir", "num_workers", "resume", "save_interval"):
        del state["args"][name]
    del state["progress"]["events"]  # sizes of files
    return state


# --- Three rollouts of the real game ---


def test_the_script_leaves_events_with_every_tag(base_run):
    """Finite, at the number of environment steps; every finished episode has its point where it ended."""
    _, scalars = events(base_run[1])
    assert set(TAGS) <= set(scalars), sorted(set(TAGS) - set(scalars))
    assert all(np.isfinite(value) for points in scalars.values() for _, value in points)
    rollouts = [128, 256, 384]
    late = {"charts/episodic_return_mean100", "charts/episodic_length_mean100", "charts/rooms", "charts/best_return"}
    for tag in set(TAGS) - {"charts/episodic_return", "charts/episodic_length"}:
        steps = [step for step, _ in scalars[tag]]
        assert steps == rollouts or (tag in late and steps == rollouts[1:]), tag
    assert scalars["charts/episodic_length"] == [(160, 20)] * 8 + [(320, 20)] * 8
    assert scalars["charts/episodic_return"] == [(160, 0)] * 8 + [(320, 0)] * 8
    assert scalars["charts/episodic_length_mean100"][-1][1] == 20
    assert [value for _, value in scalars["charts/rooms"]] == [1, 1]
    assert scalars["charts/rooms_total"][-1] == (384, 1)
    assert scalars["charts/best_return"][-1] == (384, 0)
    assert [value for _, value in scalars["charts/learning_rate"]] == pytest.approx([1e-4] * 3)
    assert 0 < scalars["losses/entropy"][0][1] <= np.log(18) + 1e-3
    for tag in ("rnd/int_reward_raw", "rnd/int_reward", "rnd/int_return_std", "rnd/obs_std", "charts/SPS"):
        assert min(value for _, value in scalars[tag]) > 0, tag
    raw, scaled, std = (scalars[f"rnd/{name}"] for name in ("int_reward_raw", "int_reward", "int_return_std"))
    for (_, a), (_, b), (_, c) in zip(raw, scaled, std, strict=True):
        assert b == pytest.approx(a / c, rel=1e-4)


def test_the_hyperparameters_are_in_the_events_as_text(base_run):
    found, _ = events(base_run[1])
    (tag,) = [tag for tag in found.Tags()["tensors"] if tag.startswith("hyperparameters")]
    text = found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    for name in vars(Args()):
        assert f"|{name}|" in text
    assert "|num_steps|16|" in text


def test_the_screen_says_what_runs(base_run):
    done, run_dir = base_run
    (run,) = run_dir.iterdir()
    said = done.stdout + done.stderr
    for fact in ("ALE/MontezumaRevenge-v5", "cpu", "fp32", fastops.BACKEND, "MiB", run.name, "8", "128 steps", "3/3"):
        assert fact in said
    assert "Traceback" not in said


def test_the_checkpoint_holds_everything_in_plain_types(base_run):
    """It loads without executing anything (`weights_only`), into fresh networks, and knows what it is."""
    path = last_checkpoint(base_run[1])
    assert path.name == "checkpoint_000003.pt"
    state = torch.load(path, weights_only=True)
    assert state["args"]["num_steps"] == 16
    assert set(state["args"]) == set(vars(Args()))
    assert state["progress"]["iteration"] == 3
    assert state["progress"]["step"] == 384
    agent, rnd = script.Agent(18, 448), script.RNDModel()
    agent.load_state_dict(state["agent"])
    rnd.load_state_dict(state["rnd"])
    rms = fastops.RunningMeanStd((84, 84))
    rms.load_state_dict(state["obs_rms"])
    assert rms.count == pytest.approx(4 * 128)  # 1 rollout of random play, 3 of training
    optimizer_steps = {float(entry["step"]) for entry in state["optimizer"]["state"].values()}
    assert optimizer_steps == {48.0}
    assert len(state["ranks"]) == 1
    assert len(state["ranks"][0]["envs"]) == 8
    assert not differences(load_checkpoint(path), state)
    assert not list(path.parent.glob("*.tmp"))


# --- The same seed, the same run ---


@pytest.fixture(scope="module")
def run_as_function(tmp_path_factory):
    """The base run again, but as a function in this process, with three workers: what `train` returns and leaves."""
    torch.manual_seed(12345)  # what a notebook has done before must not matter
    before = psutil.Process().children()
    options = dict(num_envs=8, num_steps=16, obs_norm_rollouts=1, max_episode_steps=20, device="cpu", total_rollouts=3)
    run_dir = str(tmp_path_factory.mktemp("function"))
    path = train(Args(**options, num_workers=3, int_return_filter="forward", run_dir=run_dir))
    return path, set(psutil.Process().children()) - set(before)


def test_the_same_seed_gives_the_same_run_whatever_the_workers(base_run, run_as_function):
    """Bit for bit: weights, optimiser, statistics, environments, generators. And `train` is a function that can be
    called: it leaves no process behind."""
    path, left_behind = run_as_function
    one, other = load_checkpoint(last_checkpoint(base_run[1])), load_checkpoint(path)
    assert not differences(without_location(one), without_location(other))
    assert not left_behind


def test_another_seed_gives_another_run(base_run, tmp_path):
    """Other weights, other environments, other actions. Backward filter, other options at their defaults."""
    options = dict(num_envs=8, num_steps=16, obs_norm_rollouts=1, max_episode_steps=20, device="cpu", total_rollouts=1)
    one = load_checkpoint(last_checkpoint(base_run[1]))
    other = load_checkpoint(train(Args(**options, seed=2, num_workers=1, run_dir=str(tmp_path))))
    weights = [name for name in one["rnd"] if "target" in name and "weight" in name]  # never trained
    assert len(weights) == 4
    assert not any(torch.equal(one["rnd"][name], other["rnd"][name]) for name in weights)
    for i in range(8):
        for key in ("rng", "game"):
            assert one["ranks"][0]["envs"][i][key] != other["ranks"][0]["envs"][i][key]
    assert not torch.equal(one["ranks"][0]["rng"]["torch"], other["ranks"][0]["rng"]["torch"])


# --- Resume ---


def test_a_resumed_run_ends_with_the_same_bits(base_run, resumed_run):
    """A new process with other workers goes on after the second rollout: nothing of the state is lost or drawn anew."""
    assert "checkpoint_000002.pt" in resumed_run[0].stdout
    one, other = (load_checkpoint(last_checkpoint(run_dir)) for _, run_dir in (base_run, resumed_run))
    assert one["progress"]["iteration"] == 3
    assert not differences(without_location(one), without_location(other))


def test_a_resumed_run_goes_on_with_its_curves(base_run, resumed_run):
    """In the same directory, without gaps, and without the lost rollout's points, which would come twice."""
    _, one = events(base_run[1])
    _, other = events(resumed_run[1])
    assert one.keys() == other.keys()
    for tag in one:
        if not tag.startswith("time/") and tag != "charts/SPS":
            assert one[tag] == other[tag], tag


def test_resuming_a_finished_run_does_nothing(resumed_run, tmp_path):
    (run,) = resumed_run[1].iterdir()
    before = sorted(path.name for path in run.glob("checkpoint_*"))
    path = last_checkpoint(resumed_run[1])
    assert train(Args(**load_checkpoint(path)["args"] | dict(resume=str(path), run_dir=str(tmp_path)))) == path
    assert sorted(path.name for path in run.glob("checkpoint_*")) == before


def test_a_damaged_checkpoint_is_passed_over(base_run, tmp_path, capsys):
    """`--resume auto` takes the one before, and says so."""
    (run,) = base_run[1].iterdir()
    name = run.name
    good = last_checkpoint(base_run[1]).read_bytes()
    (tmp_path / name).mkdir()
    (tmp_path / name / "checkpoint_000003.pt").write_bytes(good)
    (tmp_path / name / "checkpoint_000004.pt").write_bytes(good[:-1000])
    path, state = script.find_checkpoint(Args(run_dir=str(tmp_path), resume="auto"))
    assert path.name == "checkpoint_000003.pt"
    assert state["progress"]["iteration"] == 3
    assert "checkpoint_000004.pt" in capsys.readouterr().err


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    names = []
    for i in range(1, 6):
        path = script.save_checkpoint(dict(progress=dict(iteration=i)), tmp_path, keep=2, best=i == 2)
        names.append(path.name)
        assert path.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", *names[-2:]]
    assert torch.load(tmp_path / "best.pt", weights_only=True)["progress"]["iteration"] == 2


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    """A full disk, here a folder that has gone: a warning, and the next save is tried as usual."""
    assert script.save_checkpoint(dict(progress=dict(iteration=1)), tmp_path / "gone") is None
    said = capsys.readouterr()
    assert "no checkpoint written" in said.out + said.err


# --- Play ---


def test_play_writes_a_report(base_run, tmp_path):
    """With sticky actions and without, unclipped returns; the summary is that of the episodes; arguments that are not
    given are those of the training, here episodes of at most 20 steps."""
    path = last_checkpoint(base_run[1])
    done = run_script(f"--play {path} --episodes 3 --json report.json --device cpu", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["sticky_action_prob"] for row in report["summary"]] == [0.25, 0]
    assert report["env_id"] == "ALE/MontezumaRevenge-v5"
    assert len(report["episodes"]) == 6
    for row in report["summary"]:
        episodes = [e for e in report["episodes"] if e["sticky_action_prob"] == row["sticky_action_prob"]]
        assert len(episodes) == 3
        returns = np.array([e["episodic_return"] for e in episodes])
        assert row["mean"] == returns.mean()
        assert row["best"] == returns.max()
        assert row["median"] == np.median(returns)
        assert row["length"] == np.mean([e["episodic_length"] for e in episodes]) == 20
        assert row["rooms"] == np.mean([e["rooms"] for e in episodes]) == 1
    assert len({tuple(e["seed"]) for e in report["episodes"][:3]}) == 3
    assert "mean" in done.stdout
    assert "length" in done.stdout


def test_play_repeats_itself_and_means_what_it_says(base_run, tmp_path, capsys):
    """The statistics of a game with points, unclipped: an untrained agent loses hundreds of them in Journey Escape."""
    torch.manual_seed(0)
    agent = script.Agent(16, 448)
    args = Args(env_id="ALE/JourneyEscape-v5", max_episode_steps=100, episodes=2, device="cpu")
    state = load_checkpoint(last_checkpoint(base_run[1])) | dict(agent=agent.state_dict(), args=vars(args))
    path = script.save_checkpoint(state, tmp_path)
    args.play = str(path)
    one, other = script.play(args), script.play(args)
    assert one == other
    row = one["summary"][0]
    returns = np.array([e["episodic_return"] for e in one["episodes"][:2]])
    assert returns.std() > 0
    assert abs(returns).min() >= 300
    assert row["mean"] == returns.mean()
    assert row["std"] == pytest.approx(returns.std())
    assert row["standard_error"] == pytest.approx(returns.std(ddof=1) / 2**0.5)
    assert "mean" in capsys.readouterr().out


def test_greedy_play_without_sticky_actions_is_deterministic(base_run):
    state = load_checkpoint(last_checkpoint(base_run[1]))
    agent, episodes = script.load_agent(state), []
    for _ in range(2):
        env = script.Env("ALE/MontezumaRevenge-v5", sticky_action_prob=0.0, max_episode_steps=10)
        torch.seed()
        episodes.append([(a, r, v, i) for a, r, v, i, _, _ in script.play_episode(agent, env, greedy=True)])
    assert len(episodes[0]) == 10
    assert episodes[0] == episodes[1]


# --- Bad input: exit code 2 and one line, before anything is created ---


class Created(Exception):
    pass


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Run main() with arguments that cannot work; the line it ends with. No run, worker or network may come first."""

    def never(*_, **__):
        raise Created

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "VectorEnv", never)
    monkeypatch.setattr(script, "Agent", never)
    monkeypatch.setattr(script, "SummaryWriter", never)

    def run(arguments):
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["rnd_ppo_atari.py", *arguments.split()])
        assert script.main() == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1
        assert set(tmp_path.rglob("*")) == before
        return err.strip()

    return run


COUNTS = "num-envs num-steps total-rollouts max-episode-steps update-epochs num-minibatches save-interval "
COUNTS += "keep-checkpoints log-interval episodes obs-norm-rollouts"
BAD = [(f"--{name} {value}", [f"--{name}", "at least 1", value]) for name in COUNTS.split() for value in ("0", "-3")]
PROBABILITIES = "sticky-action-prob gamma int-gamma gae-lambda"
BAD += [
    (f"--{name} {value}", [f"--{name}", "0 to 1", value])
    for name in PROBABILITIES.split()
    for value in ("1.5", "-0.1", "nan")
]
BAD += [
    ("--num-envs 10", ["--num-envs", "multiple", "--num-minibatches", "4", "10"]),
    ("--num-workers -1", ["--num-workers", "0 or more", "-1"]),
    ("--seed -1", ["--seed", "0", "-1"]),
    ("--seed 4294967296", ["--seed", "4294967295", "4294967296"]),
    ("--learning-rate 0", ["--learning-rate", "above 0", "0.0"]),
    ("--learning-rate nan", ["--learning-rate", "above 0", "nan"]),
    ("--clip-coef -0.1", ["--clip-coef", "above 0", "-0.1"]),
    ("--ent-coef inf", ["--ent-coef", "finite", "inf"]),
    ("--max-grad-norm -1", ["--max-grad-norm", "0 or more", "-1"]),
    ("--predictor-proportion 0", ["--predictor-proportion", "-1", "0"]),
    ("--predictor-proportion 1.5", ["--predictor-proportion", "-1", "1.5"]),
    ("--env-id ALE/MontezumRevenge-v5", ["--env-id", "ALE/MontezumRevenge-v5", "ALE/MontezumaRevenge-v5"]),
    ("--env-id Brakout", ["--env-id", "Brakout", "Breakout"]),
    ("--env-id CartPole-v1", ["--env-id", "ALE", "CartPole-v1"]),
    ("--env-id no/such:thing", ["--env-id", "no/such:thing"]),
    ("--resume missing.pt", ["missing.pt", "expected a checkpoint"]),
    ("--play missing.pt", ["missing.pt", "expected a checkpoint"]),
    ("--play .", ["expected a checkpoint"]),
]


@pytest.mark.parametrize("arguments, said", BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_arguments(fails, arguments, said):
    """The flag, what was expected, what came."""
    line = fails(arguments)
    for words in said:
        assert words in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(fails):
    line = fails("--device cuda")
    assert "--device" in line
    assert "CUDA" in line


def test_a_run_directory_that_cannot_be_written(fails, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    places = ["file", "file/below"] + ["locked", "locked/below"] * (not os.access(tmp_path / "locked", os.W_OK))
    for place in places:
        line = fails(f"--run-dir {place}")
        assert "--run-dir" in line
        assert place.split("/")[0] in line


@pytest.mark.parametrize("flag", ["--resume", "--play"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "text", "empty", "other script", "other format", "code"])
def test_files_that_are_no_checkpoints(base_run, fails, tmp_path, flag, damage):
    """Damage anywhere is noticed, and nothing that is in the file is executed."""
    path, target = last_checkpoint(base_run[1]), tmp_path / "bad.pt"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "one bit":
        data[len(data) // 2] ^= 1
    elif damage == "text":
        data = b"not a checkpoint"
    elif damage == "empty":
        data = b""
    else:
        state = load_checkpoint(path)
        if damage == "other script":
            state["script"] = "rnd_ppo_other"
        elif damage == "other format":
            state["format"] = 999
        else:
            state["progress"] = Malicious(tmp_path / "executed")
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
    target.write_bytes(data)
    line = fails(f"{flag} {target}")
    assert str(target) in line
    assert "expected" in line
    assert damage != "other script" or "rnd_ppo_other" in line
    assert damage != "other format" or "999" in line
    assert not (tmp_path / "executed").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--gamma 0.9", ["--gamma", "0.999", "0.9"]),
        ("--num-envs 16", ["--num-envs", "8", "16"]),
        ("--env-id ALE/Breakout-v5", ["--env-id", "ALE/MontezumaRevenge-v5", "ALE/Breakout-v5"]),
        ("--seed 2", ["--seed", "1", "2"]),
        ("--int-return-filter backward", ["--int-return-filter", "forward", "backward"]),
        ("--total-rollouts 2", ["--total-rollouts", "3", "2"]),
    ],
)
def test_arguments_that_contradict_the_checkpoint(base_run, fails, argument, said):
    """Silently ignoring them, or mixing two runs, would be worse than an error."""
    line = fails(f"--resume {last_checkpoint(base_run[1])} {argument}")
    for words in said:
        assert words in line


def test_a_run_that_is_still_going_on_cannot_be_resumed(base_run, fails):
    """Two processes that write to one directory would destroy each other's checkpoints and curves."""
    path = last_checkpoint(base_run[1])
    with filelock.FileLock(path.parent / "lock"):
        line = fails(f"--resume {path} --total-rollouts 4")
    assert str(path.parent) in line


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--episodes 0", ["--episodes", "at least 1", "0"]),
        ("--sticky-action-prob 2", ["--sticky-action-prob", "0 to 1", "2.0"]),
        ("--max-episode-steps 0", ["--max-episode-steps", "at least 1", "0"]),
        ("--json no/such/folder/report.json", ["--json", "no/such/folder"]),
    ],
)
def test_bad_arguments_of_play(base_run, fails, argument, said):
    """Checked before the episodes are played, not when the report is written."""
    line = fails(f"--play {last_checkpoint(base_run[1])} {argument}")
    for words in said:
        assert words in line


def test_playing_another_game_than_the_checkpoints(base_run, fails):
    line = fails(f"--play {last_checkpoint(base_run[1])} --env-id ALE/Breakout-v5")
    assert "ALE/MontezumaRevenge-v5" in line
    assert "ALE/Breakout-v5" in line


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a display")
def test_a_window_without_display(base_run, fails, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "--render" in fails(f"--play {last_checkpoint(base_run[1])} --render")


def test_the_exit_code_reaches_the_shell(tmp_path):
    done = run_script("--num-envs 10", tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "--num-envs" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_too_many_workers_are_clamped_with_a_notice(tmp_path, capsys):
    options = dict(num_envs=4, num_steps=1, obs_norm_rollouts=1, total_rollouts=1, device="cpu", num_workers=5)
    assert train(Args(**options, run_dir=str(tmp_path))).exists()
    (notice,) = [line for line in capsys.readouterr().out.splitlines() if "--num-workers" in line]
    assert re.search(r"\b5\b.*\b4\b", notice)


def test_train_raises_what_main_prints(tmp_path):
    """In a notebook a wrong argument is an exception, not the end of the process."""
    with pytest.raises(UsageError, match="--num-envs"):
        train(Args(num_envs=10, run_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


# --- The source ---

TREE = ast.parse(SCRIPT.read_text("utf-8"))
(FIELDS,) = [node.body for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
HELP = {
    field.target.id: text.value.value
    for field, text in itertools.pairwise(FIELDS)
    if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
}


@pytest.mark.parametrize("name", vars(Args()))
def test_every_argument_is_read(name):
    """A flag that does nothing, like CleanRL's --capture-video. Being checked or compared is not being read."""
    reads = {
        node.attr
        for part in TREE.body
        if getattr(part, "name", "") not in ("Args", "check_args")
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"
    }
    assert name in reads


def test_every_argument_has_its_own_help(monkeypatch, capsys):
    """Unique, and what --help shows: help texts copied from a neighbour are the commonest rot of such scripts."""
    assert HELP.keys() == vars(Args()).keys()
    texts = [" ".join(text.split()) for text in HELP.values()]
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) > 10
    monkeypatch.setattr(sys, "argv", ["rnd_ppo_atari.py", "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    shown = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    for name, text in zip(HELP, texts, strict=True):
        assert f"--{name.replace('_', '-')}" in shown
        assert "".join(text.split()) in shown, name


def test_every_hyperparameter_names_its_source():
    """In brackets: the paper's section or table, or the code, that the default is from."""
    lines = SCRIPT.read_text("utf-8").splitlines()
    start = lines.index("    # --- environment") + 1
    free = {"env_id", "num_workers"}
    names = [f.target.id for f in FIELDS if isinstance(f, ast.AnnAssign) and f.lineno > start]
    assert {"num_envs", "learning_rate", "predictor_proportion"} <= set(names)
    for name in names:
        assert name in free or re.search(r"\[.*(Burda|Machado).*\]", " ".join(HELP[name].split())), name


def test_the_defaults_are_the_papers():
    """Burda et al. 2018, Tables 2 and 5; OpenAI's command line has others."""
    expected = dict(num_envs=128, num_steps=128, total_rollouts=30_000, max_episode_steps=4500, sticky_action_prob=0.25)
    expected |= dict(learning_rate=1e-4, gamma=0.999, int_gamma=0.99, gae_lambda=0.95, ext_coef=2.0, int_coef=1.0)
    expected |= dict(ent_coef=0.001, vf_coef=0.5, clip_coef=0.1, update_epochs=4, num_minibatches=4)
    expected |= dict(obs_norm_rollouts=50, int_return_filter="backward", predictor_proportion=-1.0)
    expected |= dict(clip_vloss=False, norm_adv=False, max_grad_norm=0.0)
    expected |= dict(env_id="ALE/MontezumaRevenge-v5", device="auto", run_dir="runs")
    assert {name: getattr(Args(), name) for name in expected} == expected


def test_importing_has_no_side_effects(tmp_path):
    """No arguments parsed, no files, output, processes, threads, seeds or signal handlers: a notebook can import it."""
    code = f"""
import random, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["notebook", "--no-such-flag"]
import numpy as np, psutil, torch
import gymnasium, tensorboard, tyro, torch.utils.tensorboard
def world():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    seeds = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return handlers, seeds, threading.active_count(), psutil.Process().children(), torch.get_num_threads()
before = world()
import rnd_ppo_atari
assert world() == before
assert callable(rnd_ppo_atari.train)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
