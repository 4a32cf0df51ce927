"""What bfloat16 costs: the policy's KL divergence and the bonus's error on one rollout of a trained checkpoint.

    python benchmarks/precision.py runs/RUN/checkpoint_000100.pt --json precision.json

The bonus is a squared difference of two outputs that grow alike, so rounding gives it a floor that can drown small
novelty. It is measured on frames that the run has seen (a rollout of its own policy) and on frames that it has not (the
same ones upside down): the ratio of the mean bonuses and the largest error of a single frame relative to the mean,
against float64. TF32, which the scripts never use, is emulated by rounding the factors. The scripts compute the policy
in bfloat16 where --precision says so, and the RND networks never: the lines on bf16 bonuses say what that would lose.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rnd_ppo_atari as rnd_ppo


def collect_rollout(state: dict, num_envs: int, num_steps: int):
    """What is compared: the agent, the inputs of its rollout, the RND networks, and two sets of normalised frames."""
    args = rnd_ppo.Args(**rnd_ppo.saved_args(state))
    torch.manual_seed(0)
    envs = rnd_ppo.VectorEnv(args.env_id, num_envs, seed=12345)
    agent = rnd_ppo.load_agent(state)
    rnd = rnd_ppo.RND()
    rnd.load_state_dict(state["rnd"])

    rollout = rnd_ppo.Rollout(num_steps, num_envs, agent)
    rollout.start_episodes(envs.reset())
    rnd_ppo.collect(agent, envs, rollout)
    envs.close()

    inputs = rollout.sequences(torch.arange(num_envs))
    seen = rollout.next_frames.flatten(0, 1)
    frames = {
        "seen": rnd.normalize(seen),
        "upside down": rnd.normalize(seen.flip(1).contiguous()),
    }
    return agent, inputs, rnd, frames


def divergence(agent: torch.nn.Module, inputs: tuple) -> torch.Tensor:
    """KL(fp32 || bf16) of the policy, in every state."""
    low_agent = copy.deepcopy(agent)
    low_agent.bf16 = True
    full = agent(*inputs)[0].log_softmax(-1)
    low = low_agent(*inputs)[0].log_softmax(-1)
    return (full.exp() * (full - low)).sum(-1)


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the 10 bits of mantissa that TF32 keeps of a factor; products and sums stay in fp32, as on a GPU."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0x1000) & ~0x1FFF
    return rounded.view(torch.float32)


def in_tf32(rnd: torch.nn.Module) -> torch.nn.Module:
    """A copy whose layers round their weights and inputs."""
    rnd = copy.deepcopy(rnd)
    for module in rnd.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.copy_(round_to_tf32(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: (round_to_tf32(inputs[0]),))
    return rnd


def bf16_bonus(rnd: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        prediction = rnd.predictor(x)
        target = rnd.target(x)
    return (prediction.float() - target.float()).square().mean(-1)


def bonuses(rnd: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The bonus of every frame in each precision."""
    exact_rnd = copy.deepcopy(rnd).double()
    tf32_rnd = in_tf32(rnd)
    parts = x.split(256)
    return {
        "fp64": torch.cat([exact_rnd(part.double()) for part in parts]),
        "fp32": torch.cat([rnd(part) for part in parts]),
        "TF32 (emulated)": torch.cat([tf32_rnd(part) for part in parts]),
        "bf16": torch.cat([bf16_bonus(rnd, part) for part in parts]),
    }


@torch.no_grad()
def measure(state: dict, num_envs: int, num_steps: int) -> dict[str, float]:
    """Collect one rollout with the checkpoint's policy in fp32 and compare the precisions on it."""
    agent, inputs, rnd, frames = collect_rollout(state, num_envs, num_steps)
    kl = divergence(agent, inputs)
    results = {
        "policy KL(fp32 || bf16), mean": kl.mean().item(),
        "policy KL(fp32 || bf16), largest": kl.max().item(),
    }
    for name, x in frames.items():
        values = bonuses(rnd, x)
        exact = values.pop("fp64")
        results[f"bonus {name}, mean"] = exact.mean().item()
        for precision, value in values.items():
            ratio = value.mean() / exact.mean()
            worst = (value - exact).abs().max() / exact.mean()
            results[f"bonus {name}, {precision} / fp64, ratio of the means"] = ratio.item()
            results[f"bonus {name}, {precision}, largest error / mean"] = worst.item()
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of rnd_ppo_atari.py, after hundreds of rollouts")
    parser.add_argument("--num-envs", type=int, default=8, help="environments of the rollout")
    parser.add_argument("--num-steps", type=int, default=128, help="steps of the rollout")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    _, state = rnd_ppo.load_checkpoint(options.checkpoint)
    if "rnd" not in state:
        parser.error(f"{options.checkpoint}: expected a checkpoint, got weights exported without the RND networks")
    results = {"rollouts": state["progress"]["iteration"], **measure(state, options.num_envs, options.num_steps)}
    for name, value in results.items():
        print(f"{name:65} {value:.6g}")
    if options.json:
        Path(options.json).write_text(json.dumps(dict(command=sys.argv, torch=torch.__version__, **results), indent=1))
