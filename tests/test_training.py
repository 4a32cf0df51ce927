"""The script as its users run it: three rollouts of the real game, and playing what they have learned."""

import json
import math
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, SCRIPT, SMALL, last_checkpoint, run_script
from runs import assert_same_state, curves, differences, events, serialized, write_checkpoint
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import fastops
import rnd_ppo_atari as script
from rnd_ppo_atari import Args, load_checkpoint, train

TAGS = {
    "charts": "episodic_return episodic_length episodic_return_mean100 episodic_length_mean100 best_return rooms "
    "rooms_total learning_rate SPS",
    "losses": "policy_loss value_loss int_value_loss predictor_loss entropy approx_kl clipfrac explained_variance "
    "int_explained_variance",
    "rnd": "int_reward_raw int_reward int_return_std obs_mean obs_std",
    "time": "rollout bonus update",
}
TAGS = [f"{group}/{name}" for group, names in TAGS.items() for name in names.split()]


# --- Three rollouts of the real game ---


def test_the_script_leaves_events_with_every_tag(base_run):
    """Finite, at the number of environment steps; every finished episode has its point where it ended."""
    scalars = curves(last_checkpoint(base_run[1]).parent)
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


def test_hparams_hold_the_arguments_that_describe_the_run(base_run):
    """Not those of play, nor what belongs to the machine."""
    found = events(last_checkpoint(base_run[1]).parent)
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert set(hparams) == set(vars(Args())) - script.LOCAL_ARGS
    assert {"play", "episodes", "greedy", "render", "json", "resume", "run_dir", "num_workers"} <= script.LOCAL_ARGS
    assert hparams["num_steps"].number_value == 16
    assert hparams["env_id"].string_value == "ALE/MontezumaRevenge-v5"


@pytest.mark.parametrize("rooms", [True, False])
def test_custom_scalars_show_rooms_where_they_are_known(rooms, tmp_path):
    run = script.Run(Args(run_dir=str(tmp_path)), None, None)
    run.progress.visits |= {1: 5} if rooms else {}
    run.open_writer().close()
    [event] = events(run.dir).Tensors("custom_scalars__config__")
    [layout] = event.tensor_proto.string_val
    titles = [chart.title for category in Layout.FromString(layout).category for chart in category.chart]
    assert titles == ["return", *["rooms"] * rooms, "bonus", "explained variance", "entropy", "SPS"]


def test_the_screen_says_what_runs(base_run):
    done, run_dir = base_run
    (run,) = run_dir.iterdir()
    said = done.stdout + done.stderr
    for fact in ("ALE/MontezumaRevenge-v5", "cpu", "fp32", fastops.BACKEND, "MiB", run.name, "1 x 8 env", "3/3"):
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
    agent, rnd = script.Agent(18, 448), script.RND()
    agent.load_state_dict(state["agent"])
    rnd.load_state_dict(state["rnd"])
    assert rnd.obs_rms.count == pytest.approx(4 * 128)  # 1 rollout of random play, 3 of training
    optimizer_steps = {float(entry["step"]) for entry in state["optimizer"]["state"].values()}
    assert optimizer_steps == {48.0}
    assert len(state["ranks"]) == 1
    assert len(state["ranks"][0]["envs"]) == 8
    assert not differences(load_checkpoint(path), (path, state))
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
    assert_same_state(script, last_checkpoint(base_run[1]), path)
    assert not left_behind


def test_workers_that_are_spawned_do_the_same(base_run, tmp_path):
    """As on systems other than Linux, where `fork` is missing or unsafe: a copy of the script does so here."""
    fork, spawn = '"fork" if sys.platform == "linux" else "spawn"', '"spawn"'
    text = SCRIPT.read_text("utf-8")
    assert text.count(fork) == 1
    copy = tmp_path / SCRIPT.name
    copy.write_text(text.replace(fork, spawn), "utf-8")
    how = "--total-rollouts 3 --num-workers 2 --int-return-filter forward"
    run_script(f"{SMALL} {how}", tmp_path, script=copy)
    assert_same_state(script, last_checkpoint(base_run[1]), last_checkpoint(tmp_path / "runs"))


def test_another_seed_gives_another_run(base_run, tmp_path):
    """Other weights, other environments, other actions. Backward filter, other options at their defaults."""
    options = dict(num_envs=8, num_steps=16, obs_norm_rollouts=1, max_episode_steps=20, device="cpu", total_rollouts=1)
    _, one = load_checkpoint(last_checkpoint(base_run[1]))
    _, other = load_checkpoint(train(Args(**options, seed=2, num_workers=1, run_dir=str(tmp_path))))
    weights = [name for name in one["rnd"] if "target" in name and "weight" in name]  # never trained
    assert len(weights) == 4
    assert not any(torch.equal(one["rnd"][name], other["rnd"][name]) for name in weights)
    for i in range(8):
        for key in ("rng", "game"):
            assert one["ranks"][0]["envs"][i][key] != other["ranks"][0]["envs"][i][key]
    assert not torch.equal(one["ranks"][0]["rng"], other["ranks"][0]["rng"])


def test_resuming_a_finished_run_changes_nothing(base_run, run_as_function, tmp_path):
    """Nor makes anything below another --run-dir."""
    path, _ = run_as_function
    files = set(path.parent.iterdir())
    options = load_checkpoint(path)[1]["args"] | dict(resume=str(path.parent), run_dir=str(tmp_path))
    assert train(Args(**options)) == path
    assert set(path.parent.iterdir()) == files
    assert_same_state(script, last_checkpoint(base_run[1]), path)
    assert not list(tmp_path.iterdir())


# --- Play ---


def test_play_writes_a_report(base_run, tmp_path):
    """Of a run's newest checkpoint, with sticky actions and without: unclipped returns, and the summary is that of the
    episodes. Arguments that are not given are those of the training, here episodes of at most 20 steps."""
    path = last_checkpoint(base_run[1])
    done = run_script(f"--play {path.parent} --episodes 3 --json report.json --device cpu", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["sticky_action_prob"] for row in report["summary"]] == [0.25, 0]
    assert report["checkpoint"] == str(path)
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
    assert "mean" in done.stdout
    assert "length" in done.stdout


def test_play_repeats_itself_and_means_what_it_says(base_run, tmp_path, capsys):
    """The statistics of a game with points, unclipped: an untrained agent loses hundreds of them in Journey Escape."""
    torch.manual_seed(0)
    agent = script.Agent(16, 448)
    args = Args(env_id="ALE/JourneyEscape-v5", max_episode_steps=100, episodes=2, device="cpu")
    state = load_checkpoint(last_checkpoint(base_run[1]))[1] | dict(agent=agent.state_dict(), args=vars(args))
    args.play = str(tmp_path / "agent.pt")
    write_checkpoint(tmp_path / "agent.pt", serialized(state))
    one, other = script.play(args), script.play(args)
    assert one == other
    row = one["summary"][0]
    returns = np.array([e["episodic_return"] for e in one["episodes"][:2]])
    assert returns.std() > 0
    assert abs(returns).min() >= 300
    assert row["mean"] == returns.mean()
    assert row["std"] == pytest.approx(returns.std(ddof=1))
    assert row["standard_error"] == pytest.approx(returns.std(ddof=1) / 2**0.5)
    assert (one["step"], one["seed"], one["max_episode_steps"], one["greedy"]) == (384, 1, 100, False)
    assert "mean" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_the_published_weights_take_key_door_and_jewel(tmp_path):
    """In all 60 episodes of docs/results.md; with other rounding an episode may differ, so one of six may miss."""
    weights = ROOT / "models" / "montezuma.pt"
    done = run_script(["--play", str(weights), "--episodes", "3", "--json", "report.json", "--device", "cpu"], tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert sum(episode["episodic_return"] >= 1400 for episode in report["episodes"]) >= 5


def test_greedy_play_without_sticky_actions_is_deterministic(base_run):
    _, state = load_checkpoint(last_checkpoint(base_run[1]))
    agent, episodes = script.load_agent(state), []
    for _ in range(2):
        env = script.Env("ALE/MontezumaRevenge-v5", sticky_action_prob=0.0, max_episode_steps=10)
        torch.seed()
        episodes.append([(a, r, v, i) for a, r, v, i, _, _ in script.play_episode(agent, env, greedy=True)])
    assert len(episodes[0]) == 10
    assert episodes[0] == episodes[1]


def test_play_has_the_precision_that_is_asked_for(base_run, tmp_path, monkeypatch):
    """That of the checkpoint, or of --precision."""
    made, make = [], script.Agent
    monkeypatch.setattr(script, "Agent", lambda *args: made.append(args) or make(*args))
    path = str(last_checkpoint(base_run[1]))
    for precision in ("bf16", "fp32"):
        script.play(Args(play=path, episodes=1, max_episode_steps=3, precision=precision))
    assert [args[2] for args in made] == [True, False]


def test_statistics_that_a_copy_renames_do_not_end_a_resumed_run():
    """Older episodes of the last 100 have the old name, newer ones the new one."""
    progress = script.Progress()
    common = dict(episodic_return=1.0, episodic_length=10)
    for stats in (dict(keys=1.0), dict(keys=3.0), dict(doors=5.0)):
        progress.add(dict(stats=common | stats, visits={}))
    scalars = progress.scalars()
    assert (scalars["charts/keys"], scalars["charts/doors"], scalars["charts/episodic_return_mean100"]) == (2, 5, 1)


def test_the_log_has_the_means_over_all_processes(tmp_path, monkeypatch):
    """Of what each of them measures, and the episodes of all."""
    run = script.Run(Args(num_envs=2, num_steps=4, run_dir=str(tmp_path)), None, None)
    run.times, logged = dict(rollout=2.0), []
    monkeypatch.setattr(run, "write_events", lambda events: logged.extend(events))
    monkeypatch.setattr(run, "show", lambda scalars: None)
    parts = []
    for entropy, score in ((1.0, 7.0), (2.0, 9.0)):
        stats = dict(episodic_return=score, episodic_length=3)
        parts.append(({"losses/entropy": entropy}, [dict(t=2, stats=stats, visits={}, executed=b"")], [-1, -1]))
    with run:
        run.log(parts)
    values = {tag: value for tag, value, _ in logged}
    assert values["losses/entropy"] == 1.5 and values["charts/episodic_return_mean100"] == 8
    with pytest.raises(FloatingPointError, match="losses/entropy is nan"), run:
        run.log([parts[0], ({"losses/entropy": math.nan}, [], [])])


@pytest.mark.parametrize("capability, precision, bf16", [(7, "auto", False), (8, "auto", True), (7, "bf16", True)])
def test_auto_is_fp32_on_a_gpu_without_bf16(capability, precision, bf16, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 5))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        device, found = script.start_device(Args(device="cuda", precision=precision))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert (device.type, found) == ("cuda", bf16)
    assert ("does not compute in bf16" in capsys.readouterr().out) == (not bf16)


def test_importing_has_no_side_effects(tmp_path):
    """No arguments parsed, no files, output, processes, threads, seeds or signal handlers: a notebook can import it."""
    code = f"""
import random, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["notebook", "--no-such-flag"]
import numpy as np, psutil, torch
import gymnasium, tensorboard, tyro, torch.utils.tensorboard
def world():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
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
