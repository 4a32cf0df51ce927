"""What bfloat16 costs: the policy's KL divergence and the bonus's error on one rollout of a trained checkpoint.

    python benchmarks/precision.py runs/RUN/checkpoint_000100.pt --json precision.json

The bonus is a squared difference of two outputs that grow alike, so rounding gives it a floor that can drown small
novelty. Measured on frames that the run has seen (a rollout of its own policy) and on frames it has not (the same ones
upside down): the ratio of the mean bonuses and the largest error of a single frame relative to the mean, against
float64. TF32, which CUDA uses for fp32, is emulated by rounding the factors. The scripts compute the policy in bfloat16
where --precision says so, and the RND networks never: the lines on bf16 bonuses say what that would lose.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastops
import rnd_ppo_atari as rnd_ppo


def tf32(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the 10 bits of mantissa that TF32 keeps of a factor; products and sums stay in fp32, as on a GPU."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@torch.no_grad()
def measure(state: dict, num_envs: int, num_steps: int) -> dict[str, float]:
    """Collect one rollout with the checkpoint's policy in fp32 and compare the precisions on it."""
    args = rnd_ppo.Args(**state["args"])
    torch.manual_seed(0)
    envs = rnd_ppo.VectorEnv(args.env_id, num_envs, seed=12345)
    agent, rnd = rnd_ppo.load_agent(state), rnd_ppo.RNDModel()
    rnd.load_state_dict(state["rnd"])
    obs_rms = fastops.RunningMeanStd((84, 84))
    obs_rms.load_state_dict(state["obs_rms"])
    rollout = rnd_ppo.Rollout(num_steps, num_envs, agent)
    rollout.start(envs.reset())
    rnd_ppo.collect(agent, envs, rollout)
    envs.close()

    results = {}
    inputs = rollout.inputs(slice(0, num_steps))
    full = agent(*inputs)[0].log_softmax(-1)
    half = copy.deepcopy(agent)
    half.bf16 = True
    low = half(*inputs)[0].log_softmax(-1)
    divergence = (full.exp() * (full - low)).sum(-1)
    results["policy KL(fp32 || bf16), mean"] = divergence.mean().item()
    results["policy KL(fp32 || bf16), largest"] = divergence.max().item()

    rounded = copy.deepcopy(rnd)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.copy_(tf32(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: (tf32(inputs[0]),))
    seen = rollout.frames[4:].flatten(0, 1)
    for name, frames in (("seen", seen), ("upside down", seen.flip(1).contiguous())):
        x = rnd_ppo.normalize_frames(frames, obs_rms)
        exact = torch.cat([copy.deepcopy(rnd).double()(part.double()) for part in x.split(256)])
        bonus = torch.cat([rnd(part) for part in x.split(256)])
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [(rnd.predictor(part), rnd.target(part)) for part in x.split(256)]
        low = torch.cat([(p.float() - t.float()).square().mean(-1) for p, t in outputs])
        results[f"bonus {name}, mean"] = exact.mean().item()
        single = torch.cat([rounded(part) for part in x.split(256)])
        for precision, value in (("fp32", bonus), ("TF32 (emulated)", single), ("bf16", low)):
            results[f"bonus {name}, {precision} / fp64, ratio of the means"] = (value.mean() / exact.mean()).item()
            worst = (value - exact).abs().max() / exact.mean()
            results[f"bonus {name}, {precision}, largest error / mean"] = worst.item()
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of rnd_ppo_atari.py, after hundreds of rollouts")
    parser.add_argument("--num-envs", type=int, default=8, help="environments of the rollout")
    parser.add_argument("--num-steps", type=int, default=128, help="steps of the rollout")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    state = rnd_ppo.load_checkpoint(options.checkpoint)
    results = {"rollouts": state["progress"]["iteration"], **measure(state, options.num_envs, options.num_steps)}
    for name, value in results.items():
        print(f"{name:65} {value:.6g}")
    if options.json:
        Path(options.json).write_text(json.dumps(dict(command=sys.argv, torch=torch.__version__, **results), indent=1))
