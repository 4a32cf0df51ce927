"""The same algorithm on a GPU. Skipped where there is none: python -m pytest tests/test_cuda.py"""

import numpy as np
import pytest
import torch

import rnd_ppo_atari as script
from rnd_ppo_atari import METRICS, RND, Agent, Args, Rollout, load_checkpoint, losses, minibatch, train, update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SMALL = dict(num_envs=8, num_steps=16, obs_norm_rollouts=1, max_episode_steps=20, num_workers=2, keep_checkpoints=9)


@pytest.fixture(autouse=True)
def true_fp32():
    """As `start_device` sets it."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def networks(device, bf16=False):
    torch.manual_seed(1)
    agent, rnd = Agent(18, 448, bf16), RND()
    rnd.observe(torch.randint(256, (8, 8, 84, 84), dtype=torch.uint8))
    return agent.to(device), rnd.to(device)


def flat(state):
    """All tensors of a `state_dict` as one vector."""
    return torch.cat([value.flatten().cpu() for value in state.values() if isinstance(value, torch.Tensor)])


def random_rollout(agent):
    """A rollout of 16 steps of 8 environments whose values and log-probabilities are those of the agent."""
    torch.manual_seed(2)
    device = next(agent.parameters()).device
    rollout = Rollout(16, 8, agent)
    rollout.frames.copy_(torch.randint(256, rollout.frames.shape, dtype=torch.uint8))
    rollout.ages.copy_(torch.randint(4, rollout.ages.shape))
    rollout.actions.copy_(torch.randint(18, rollout.actions.shape))
    with torch.no_grad():
        logits, values, int_values = agent(*rollout.sequences(torch.arange(8, device=device)))
        logprobs = logits.log_softmax(-1).gather(-1, rollout.actions.flatten()[:, None])
        rollout.logprobs.copy_(logprobs.view(16, 8))
        rollout.values[:-1].copy_(values.view(16, 8))
        rollout.int_values[:-1].copy_(int_values.view(16, 8))
    rollout.rewards[:] = np.arange(128).reshape(16, 8) % 3 - 1
    return rollout


def first_losses(device, bf16=False, compiled=False):
    """METRICS and the gradients of the first minibatch after a rollout."""
    agent, rnd = networks(device, bf16)
    rollout = random_rollout(agent)
    if compiled:
        agent.compile(mode="reduce-overhead", dynamic=False)
        rnd.compile(mode="reduce-overhead", dynamic=False)
    args = Args(num_envs=8, predictor_proportion=1.0)
    bonus = rnd.bonus(rollout.next_frames)
    targets = script.advantages_and_returns(rollout, bonus, args)
    torch.manual_seed(3)
    batch = minibatch(rollout, targets, rnd, torch.arange(8, device=device), args)
    loss, values = losses(agent, rnd, batch, 0.1, args)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in [*agent.parameters(), *rnd.predictor.parameters()]])
    return bonus, dict(zip(METRICS, values.tolist(), strict=True)), gradients.cpu()


def assert_alike(one, other, tolerance):
    for a, b in zip((one[0], one[2]), (other[0], other[2]), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) < tolerance * np.linalg.norm(np.asarray(b))
    for name, value in one[1].items():
        assert value == pytest.approx(other[1][name], rel=tolerance, abs=tolerance), name


def test_bonus_losses_and_gradients_are_those_of_the_cpu():
    assert_alike(first_losses("cuda"), first_losses("cpu"), 1e-3)


def test_bf16_changes_the_policy_a_little_and_the_bonus_not_at_all():
    fp32, bf16 = first_losses("cuda"), first_losses("cuda", bf16=True)
    assert np.array_equal(bf16[0], fp32[0])
    assert_alike(bf16, fp32, 0.1)


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_networks_say_the_same(bf16):
    """And CUDA graphs overwrite nothing that is still needed."""
    assert_alike(first_losses("cuda", bf16, compiled=True), first_losses("cuda", bf16), 0.02 if bf16 else 1e-3)


@pytest.mark.parametrize("bf16, compiled", [(False, False), (True, False), (True, True)])
def test_the_ratio_is_1_in_the_first_minibatch(bf16, compiled, tmp_path, monkeypatch):
    """Of a whole run: what the policy said while it played, in groups, is what it says when it learns."""
    kls = []

    def watched(*arguments):
        loss, values = losses(*arguments)
        kls.append(float(values[METRICS.index("approx_kl")]))
        return loss, values

    monkeypatch.setattr(script, "losses", watched)
    precision = "bf16" if bf16 else "fp32"
    train(Args(**SMALL, precision=precision, compile=compiled, total_rollouts=2, run_dir=str(tmp_path)))
    assert len(kls) == 2 * 16
    assert kls[0] < (1e-4 if bf16 else 1e-9)
    assert kls[16] < (1e-4 if bf16 else 1e-9)
    assert max(kls) > 2 * kls[0]


def assert_equal_to_rounding(one, other, start):
    """Checkpoints of two runs that began with the weights of `start`: the same states, nearly the same weights."""
    assert [env["game"] for env in one["ranks"][0]["envs"]] == [env["game"] for env in other["ranks"][0]["envs"]]
    for part in ("agent", "rnd"):
        a, b, c = (flat(state[part]) for state in (one, other, start))
        assert (a - b).norm() < 0.05 * (b - c).norm()


@pytest.mark.parametrize("first, second", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_continues_on_the_same_device_or_on_the_other(first, second, tmp_path, monkeypatch):
    """Two rollouts and one more are three, to rounding. Each is trained by a call in this process."""
    devices, gather = set(), script.gather

    def watched(value):  # a tensor on a GPU would go to the GPU of the same number in every process
        if isinstance(value, dict):
            devices.update(tensor.device.type for tensor in value["rollout"].values())
        return gather(value)

    monkeypatch.setattr(script, "gather", watched)
    options = dict(SMALL, precision="fp32")
    whole = train(Args(**options, device=first, total_rollouts=3, run_dir=str(tmp_path / "whole")))
    part = train(Args(**options, device=first, total_rollouts=2, run_dir=str(tmp_path / "part")))
    rest = train(Args(**options, device=second, total_rollouts=3, resume=str(part.parent)))
    assert rest == part.with_name("checkpoint_000003.pt")
    assert devices == {"cpu"}
    start = load_checkpoint(whole.with_name("checkpoint_000000.pt"))[1]
    assert_equal_to_rounding(load_checkpoint(rest)[1], load_checkpoint(whole)[1], start)


def test_the_update_is_that_of_the_cpu():
    """Four epochs of four minibatches move the weights alike."""
    moved = {}
    for device in ("cpu", "cuda"):
        agent, rnd = networks(device)
        before = flat(rnd.predictor.state_dict())
        rollout = random_rollout(agent)
        args = Args(num_envs=8, predictor_proportion=1.0)
        targets = script.advantages_and_returns(rollout, rnd.bonus(rollout.next_frames), args)
        optimizer = torch.optim.Adam([*agent.parameters(), *rnd.predictor.parameters()], lr=1e-4, fused=True)
        torch.manual_seed(4)
        update(agent, rnd, optimizer, rollout, targets, 0.1, args)
        moved[device] = flat(rnd.predictor.state_dict()) - before
    cosine = torch.cosine_similarity(moved["cpu"], moved["cuda"], dim=0)
    assert moved["cpu"].abs().max() > 1e-4 and cosine > 0.95
