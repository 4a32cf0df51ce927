"""The arguments: how bad ones are refused (exit code 2 and one line, before anything is created), and their help."""

import ast
import inspect
import itertools
import os
import re
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import SCRIPT, last_checkpoint, run_script

import rnd_ppo_atari as script
from rnd_ppo_atari import Args, UsageError, train

# --- Bad input ---

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
    ("--env-id MontezumaRevenge-v5", ["'MontezumaRevenge-v5'; try ALE/MontezumaRevenge-v5, "]),
    ("--exp-name a/b", ["--exp-name", "without slashes", "a/b"]),
    ("--num-envs 1 --num-steps 1 --num-minibatches 1", ["--num-steps", "2 or more"]),
    ("--norm-adv --num-envs 4 --num-steps 1", ["--norm-adv", "two samples or more"]),
    ("--resume missing.pt", ["missing.pt", "expected a checkpoint"]),
    ("--play missing.pt", ["missing.pt", "expected a checkpoint"]),
    ("--resume .", ["expected a run with checkpoint_*.pt"]),
    ("--play .", ["expected a run with checkpoint_*.pt"]),
]
BAD += [
    (f"{flag} --num-envs 4", [flag.split()[0], "--play"])
    for flag in ("--json x", "--greedy", "--render", "--episodes 3")
]
LONG = "n" * 300
BAD += [(f"{flag} {LONG}", ["name too long"]) for flag in ("--run-dir", "--resume", "--play", "--run-dir . --exp-name")]
BAD += [(f"--run-dir {LONG} --resume auto", ["--run-dir", "name too long"])]


@pytest.mark.parametrize("arguments, said", BAD, ids=[arguments.replace(LONG, "LONG") for arguments, _ in BAD])
def test_bad_arguments(fails, arguments, said):
    """The flag, what was expected, what came."""
    line = fails(arguments)
    for words in said:
        assert words in line


ELSEWHERE = [(flag, here) for here, flags in script.FLAGS_ELSEWHERE.items() for flag in sorted(flags)]


@pytest.mark.parametrize("flag, here", ELSEWHERE, ids=[flag for flag, _ in ELSEWHERE])
def test_flags_of_other_projects_get_a_hint(fails, flag, here):
    """Whether they are written with - or _, with the value behind a space or a =."""
    for given in (f"--{flag} 3", f"--{flag.replace('-', '_')}=3"):
        line = fails(given)
        assert f"--{flag}" in line and f"use {here}" in line
    named = re.findall(r"--([a-z-]+)", here)
    known = {name.replace("_", "-") for name in vars(Args())} | {"video"}  # of tools/watch.py
    assert named and set(named) <= known


@pytest.mark.parametrize("environment", [dict(WORLD_SIZE="4"), dict(RANK="1")], ids=str)
def test_several_processes_without_torchrun(fails, monkeypatch, environment):
    """As a job scheduler may leave the variables behind."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(script, "PROCESSES", int(environment.get("WORLD_SIZE", 1)))
    monkeypatch.setattr(script, "RANK", int(environment.get("RANK", 0)))
    line = fails("--num-envs 4")
    assert "torchrun" in line
    assert all(f"{name} {value}" in line for name, value in environment.items())


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_track_without_wandb(fails):
    assert "pip install" in fails("--track")


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


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--episodes 0", ["--episodes", "at least 1", "0"]),
        ("--sticky-action-prob 2", ["--sticky-action-prob", "0 to 1", "2.0"]),
        ("--max-episode-steps 0", ["--max-episode-steps", "at least 1", "0"]),
        ("--json no/such/folder/report.json", ["--json", "no/such/folder"]),
        ("--json .", ["--json", "a file that can be written", "'.'"]),
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


def test_the_exit_code_reaches_the_shell(tmp_path, monkeypatch):
    """And the line a terminal that knows ASCII only."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run_script("--num-envs 12 --exp-name é/", tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --exp-name: expected a name without slashes, got '?/'\n"
    assert list(tmp_path.iterdir()) == []


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
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args")
    }
    assert name in reads


def test_every_argument_has_its_own_help(monkeypatch, capsys):
    """Unique, and what --help shows: help texts copied from a neighbour are the commonest rot of such scripts."""
    assert HELP.keys() == vars(Args()).keys()
    texts = [" ".join(text.split()) for text in HELP.values()]
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) > 10
    shown = re.sub(r"\s+", "", help_text(monkeypatch, capsys))
    for name, text in zip(HELP, texts, strict=True):
        assert f"--{name.replace('_', '-')}" in shown
        assert "".join(text.split()) in shown, name


def help_text(monkeypatch, capsys):
    """What --help prints on a terminal of 80 columns."""
    monkeypatch.setattr(sys, "argv", ["rnd_ppo_atari.py", "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert not ended.value.code
    return capsys.readouterr().out


def test_help_begins_with_a_description_and_has_the_groups_of_the_source(monkeypatch, capsys):
    """An example, who Burda and Machado are, and every argument below the heading that it has in the source."""
    shown = help_text(monkeypatch, capsys)
    assert max(map(len, shown.splitlines())) <= 80
    description = " ".join(shown[: shown.index("--exp-name")].split())
    assert "PPO with Random Network Distillation" in description
    assert "python rnd_ppo_atari.py --num-envs 128 --resume auto" in description
    assert '"Burda" is Burda et al. 2018' in description
    assert '"Machado" is Machado et al. 2018' in description
    source = inspect.getsource(Args)
    headings = re.findall(r"# --- (.*)", source)
    assert len(headings) == 5
    found = re.findall(rf"^({'|'.join(map(re.escape, headings))})$|^  --([a-z-]+)", shown, re.M)
    expected = re.findall(r"# --- (.*)|^    (\w+):", source, re.M)
    assert found == [(heading, name.replace("_", "-")) for heading, name in expected]


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
