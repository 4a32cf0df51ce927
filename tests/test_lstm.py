"""The recurrent policy: its equations, its state through rollouts and updates, and a task that needs a memory."""

import numpy as np
import pytest
import torch
import torch.nn as nn

import rnd_ppo_atari as cnn
import rnd_ppo_atari_lstm as lstm


def bare(inputs: int, size: int) -> lstm.Agent:
    """An agent that is only its LSTM: features and heads pass their input on."""
    agent = lstm.Agent(3, size)
    agent.lstm = nn.LSTM(inputs, size)
    agent.features = lambda obs: obs
    agent.heads = lambda x: (x,)
    return agent


def loop(agent, x, state, starts):
    """The plain loop over T that the agent's calls of the fused kernel have to equal."""
    w, outputs = agent.lstm, []
    h, c = state
    for t in range(len(x)):
        h, c = (s * (~starts[t]).float()[:, None] for s in (h, c))
        gates = x[t] @ w.weight_ih_l0.T + w.bias_ih_l0 + h @ w.weight_hh_l0.T + w.bias_hh_l0
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), torch.stack([h, c])


def test_numbers_of_the_specification():
    agent = bare(2, 2)
    w_x = [[0.1, 0.2], [0.3, -0.4], [0.5, 0.6], [-0.7, 0.8], [0.2, -0.1], [0.4, 0.3], [-0.6, 0.5], [0.8, -0.7]]
    with torch.no_grad():
        agent.lstm.weight_ih_l0.copy_(torch.tensor(w_x))
        agent.lstm.weight_hh_l0.copy_(torch.tensor([[k / 10, -k / 10] for k in range(1, 9)]))
        agent.lstm.bias_ih_l0.zero_()
        agent.lstm.bias_hh_l0.zero_()
        x, starts = torch.tensor([[1.0, -1], [0.5, 2], [-1, 0]]), torch.tensor([[False], [True], [False]])
        state = torch.tensor([[[0.5, -0.25]], [[0.2, 0.1]]])
        h, last = agent(x, state, starts)
    expected = [[0.135794, 0.318326], [-0.040617, 0.060216], [-0.086585, -0.009065]]
    np.testing.assert_allclose(h.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(last[1, 0].numpy(), [-0.138457, -0.030945], atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_split_kernel_equals_the_plain_loop(seed):
    """Values and gradients alike, for random episode starts in any environment."""
    torch.manual_seed(seed)
    agent, results = bare(5, 7), []
    x, state = torch.randn(23, 4, 5), torch.randn(2, 4, 7)
    starts, weights = torch.rand(23, 4) < (0.0, 0.05, 0.2, 0.6, 1.0)[seed], torch.randn(23, 4, 7)
    for run in (lambda a, s: agent(a.flatten(0, 1), s, starts), lambda a, s: loop(agent, a, s, starts)):
        a, s = x.clone().requires_grad_(), state.clone().requires_grad_()
        y, last = run(a, s)
        agent.zero_grad()
        ((y.view(23, 4, 7) * weights).sum() + last.square().sum()).backward()
        grads = [p.grad.clone() for p in agent.lstm.parameters()]
        results.append([y.detach().view(23, 4, 7), last.detach(), a.grad, s.grad, *grads])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_start_forgets_and_gradient_stops_there():
    torch.manual_seed(0)
    agent, x = bare(3, 4), torch.randn(6, 1, 3)
    start = torch.zeros(6, 1, dtype=torch.bool)
    start[3] = True
    y, _ = agent(x.flatten(0, 1), torch.randn(2, 1, 4), start)
    fresh, _ = agent(x[3:].flatten(0, 1), torch.zeros(2, 1, 4), torch.zeros(3, 1, dtype=torch.bool))
    torch.testing.assert_close(y[3:], fresh)
    for starts, crosses in ((torch.zeros_like(start), True), (start, False)):
        a = x.clone().requires_grad_()
        y, _ = agent(a.flatten(0, 1), torch.zeros(2, 1, 4), starts)
        y[-1].sum().backward()
        assert (a.grad[0].abs().sum() > 0) == crosses


def test_initialisation():
    agent = lstm.Agent(18, 256)
    assert sum(p.numel() for p in agent.parameters()) == 1_544_116
    for name, p in agent.lstm.named_parameters():
        if "bias" in name:
            assert not p.any()
        else:
            torch.testing.assert_close(p.T @ p, torch.eye(256), atol=1e-4, rtol=0)


class CueEnv:
    """N environments of 41 steps: a cue in the first frame decides which of two actions the last frame wants."""

    num_actions, length = 2, 41

    def __init__(self, num_envs: int, seed: int = 0):
        self.rng, self.groups, self.t = np.random.default_rng(seed), [slice(0, num_envs)], 0
        self.frames = np.zeros((num_envs, 84, 84), np.uint8)
        self.wins: list[float] = []

    def show(self) -> np.ndarray:
        self.frames[:] = 0
        if self.t == 0:
            self.cue = self.rng.integers(2, size=len(self.frames))
            self.frames[self.cue == 0, :, :42] = 255
            self.frames[self.cue == 1, :, 42:] = 255
        if self.t == self.length - 1:
            self.frames[:, 30:54] = 128
        return self.frames

    def send(self, group: int, actions: np.ndarray) -> None:
        self.actions = actions.copy()

    def recv(self, group: int):
        end = self.t == self.length - 1
        rewards = np.where(self.actions == self.cue, 1.0, -1.0) * end
        if end:
            self.wins.append(float((rewards > 0).mean()))
        self.t = 0 if end else self.t + 1
        return self.show(), rewards.astype(np.float32), np.full(len(self.frames), end), []


def learn(script, agent, rollouts: int, stop: float) -> float:
    """Train on the cue with the script's own rollout and update code; share of right answers at the end."""
    small = nn.Sequential(nn.Flatten(), nn.Linear(196, 256), nn.ReLU())
    agent.trunk = small if script is lstm else nn.Sequential(*small, nn.Linear(256, 448), nn.ReLU())
    agent.features = lambda obs: agent.trunk(obs[:, :, ::12, ::12].float() / 255)  # the cue is as easily seen in 7 x 7
    args = script.Args(ent_coef=0.01, gamma=0.99, num_minibatches=1, int_coef=0.0, predictor_proportion=0.001)
    envs, rollout = CueEnv(16), script.Rollout(2 * CueEnv.length, 16, agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr=2e-3)
    rnd, no_bonus = script.RND(), np.zeros((2 * CueEnv.length, 16), np.float32)
    rollout.start_episodes(envs.show())
    for i in range(rollouts):
        script.collect(agent, envs, rollout)
        targets = script.advantages_and_returns(rollout, no_bonus, args)
        metrics = script.update(agent, rnd, optimizer, rollout, targets, 0.2, args)
        assert np.isfinite(list(metrics.values())).all()
        if i > 5 and np.mean(envs.wins[-6:]) > stop:
            break
    return float(np.mean(envs.wins[-6:]))


def test_lstm_remembers_a_cue():
    torch.manual_seed(0)
    assert learn(lstm, lstm.Agent(2, 64), 150, 0.95) > 0.9


def test_feed_forward_policy_cannot():
    torch.manual_seed(0)
    assert 0.35 < learn(cnn, cnn.Agent(2, 448), 15, 1.1) < 0.65


def test_first_minibatch_has_ratio_one_and_the_state_goes_on():
    """Over several rollouts with ends of episodes inside; rules out a state zeroed at rollout starts, per-step states
    with shuffled samples, and a bootstrap that advances the state."""
    torch.manual_seed(1)
    agent, rnd, args = lstm.Agent(2, 32), lstm.RND(), lstm.Args(num_minibatches=2, predictor_proportion=0.1)
    agent.trunk = nn.Sequential(nn.AvgPool2d(12), nn.Flatten(), nn.Linear(196, 256), nn.ReLU())
    envs, rollout = CueEnv(4), lstm.Rollout(17, 4, agent)
    optimizer, after = torch.optim.Adam(agent.parameters(), lr=1e-2), None
    rollout.start_episodes(envs.show())
    for _ in range(6):
        lstm.collect(agent, envs, rollout)
        before, last = rollout.states[0].clone(), rollout.states[1].clone()
        assert after is None or torch.equal(before, after)
        after = last
        with torch.no_grad():  # the state after the last step is that of a run over the whole rollout
            _, _, _, again = agent(*rollout.sequences(torch.arange(4)))
        torch.testing.assert_close(again, last, atol=1e-5, rtol=1e-4)
        targets = lstm.advantages_and_returns(rollout, np.zeros((17, 4), np.float32), args)
        whole = lstm.minibatch(rollout, targets, rnd, torch.arange(4), args)
        _, metrics = lstm.losses(agent, rnd, whole, 0.1, args)
        named = dict(zip(lstm.METRICS, metrics.tolist(), strict=True))
        assert named["approx_kl"] < 1e-10 and named["clipfrac"] == 0
        parts = [lstm.minibatch(rollout, targets, rnd, torch.tensor(pair), args) for pair in ([0, 1], [2, 3])]
        halves = torch.stack([lstm.losses(agent, rnd, part, 0.1, args)[1] for part in parts]).mean(0)
        torch.testing.assert_close(halves[:3], metrics[:3], atol=1e-5, rtol=1e-4)
        loss, _ = lstm.losses(agent, rnd, whole, 0.1, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
