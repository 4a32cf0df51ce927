"""Weights & Biases (--track): each run is one of its own, with its arguments, and closed on every way out."""

import json
import os
import signal
import struct

import pytest
from runs import QUICK, tracking

pytest.importorskip("wandb")


def records(path):
    """What W&B has written offline: records of protocol buffers in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:  # the rest of a block without room for a header is empty
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # complete
            yield Record.FromString(record)
            record = b""


def read(path):
    """Id, arguments, logged environment steps and whether it was closed, of an offline run."""
    found = [(record.WhichOneof("record_type"), record) for record in records(path)]
    [run] = [record.run for kind, record in found if kind == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update if not item.key.startswith("_")}
    history = [record.history.item for kind, record in found if kind == "history"]
    items = [{item.key or item.nested_key[0]: item.value_json for item in line} for line in history]
    steps = [int(line["global_step"]) for line in items if "losses/policy_loss" in line]
    return run.run_id, config, steps, "exit" in [kind for kind, _ in found]


def test_each_run_is_one_of_its_own(start):
    """Two runs in one process: the first, whose name has characters that W&B refuses, ends by itself, the second by a
    signal. Both are closed, with the last rollout and the arguments that describe the run."""
    how = f"{QUICK} --track"
    run = start(f"{how} --seed 7", fault=(tracking, "offline", f"{how} --exp-name a:b#?*é --total-rollouts 3"))
    run.until(lambda: run.stdout.count("rollout 3, step") == 2)
    os.kill(run.pid, signal.SIGTERM)
    run.wait()
    run.nothing_left(20)
    assert run.code == 128 + signal.SIGTERM, run.said
    first, second = sorted(run.cwd.glob("wandb/offline-run-*/*.wandb"))
    name, config, steps, closed = read(first)
    assert "__a-b---é__1__" in name and closed
    assert steps == [32, 64, 96]
    assert config == run.script.reported_args(run.script.Args(**config))
    assert config["exp_name"] == "a:b#?*é" and config["num_steps"] == 8
    name, config, steps, closed = read(second)
    assert name == run.directory.name and closed and config["seed"] == 7
    _, path = run.offered
    saved = run.script.load_checkpoint(path)[1]["progress"]["step"]
    assert steps == list(range(32, steps[-1] + 1, 32)) and steps[-1] in (saved, saved + 32)


def test_weights_and_biases_out_of_reach_is_one_line(start):
    """Nobody is logged in."""
    run = start(f"{QUICK} --track", fault=(tracking, "online"))
    run.wait()
    run.nothing_left(20)
    assert run.code == 2
    assert "--track: expected Weights & Biases, got: " in run.error() and "WANDB_MODE=offline" in run.error()
    assert "\n" not in run.error()
