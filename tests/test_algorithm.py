"""The algorithm: numbers of the specification, toy environments that end where it hurts, counts of what is used."""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn

import fastops
import rnd_ppo_atari as script
from rnd_ppo_atari import (
    METRICS,
    RND,
    Agent,
    Args,
    Rollout,
    VectorEnv,
    act,
    advantages_and_returns,
    collect,
    losses,
    merge_batch,
    minibatch,
    rollout_metrics,
    stack_frames,
    update,
)


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance)


class ScriptedEnvs:
    """What `collect` and `train` need of a VectorEnv, playing back a script: all pixels of a frame are one number.

    `frames` (K, N): frames[0] is the first observation, frames[k] that after step k, which for dones[k - 1] is the
    first of the next episode. Actions and resets are noted. `step` ignores the script.
    """

    def __init__(self, frames, rewards=None, dones=None, num_actions=3, num_groups=1):
        self.script = np.asarray(frames)
        steps, n = len(self.script) - 1, self.script.shape[1]
        self.all_rewards = np.zeros((steps, n), np.float32) if rewards is None else np.asarray(rewards, np.float32)
        self.all_dones = np.zeros((steps, n), bool) if dones is None else np.asarray(dones, bool)
        self.num_actions, self.num_envs, self.workers = num_actions, n, []
        self.groups = [slice(int(g[0]), int(g[-1]) + 1) for g in np.array_split(range(n), num_groups)]
        self.time, self.pending, self.sent = [0] * num_groups, [False] * num_groups, np.full((steps, n), -1)
        self.resets, self.warm_up, self.rooms = 0, [], np.full(n, -1)

    def images(self, values):
        return np.broadcast_to(np.asarray(values, np.uint8)[:, None, None], (len(values), 84, 84)).copy()

    def send(self, group, actions):
        assert not self.pending[group], "sent twice without recv"
        self.sent[self.time[group], self.groups[group]] = actions
        self.pending[group] = True

    def recv(self, group):
        assert self.pending[group], "received without send"
        self.pending[group] = False
        t, here = self.time[group], self.groups[group]
        self.time[group] += 1
        return self.images(self.script[t + 1, here]), self.all_rewards[t, here], self.all_dones[t, here], []

    def reset(self):
        self.resets += 1
        return self.images(self.script[0])

    def step(self, actions):
        self.warm_up.append(actions)
        return self.images(self.script[0]), np.zeros(len(actions)), np.zeros(len(actions), bool), []

    def call(self, command, states=None):
        return [dict(env=i) for i in range(self.num_envs)]

    def close(self):
        pass


class Fixed(nn.Module):
    """An agent that says the same to every observation, and remembers the observations."""

    def __init__(self, logits=(0.0, 0.0, 0.0), value=0.0, int_value=0.0):
        super().__init__()
        self.answer, self.seen = (torch.tensor(logits), value, int_value), []

    def forward(self, obs):
        self.seen.append(obs.clone())
        logits, value, int_value = self.answer
        return logits.expand(len(obs), -1), torch.full((len(obs),), value), torch.full((len(obs),), int_value)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def make_agent(num_actions=18, **options):
    return Agent(num_actions, 448, **options)


def observations(batch):
    """The stacks of four that a minibatch shows to the agent."""
    (obs,) = batch["inputs"]
    return obs


def started(envs, num_steps):
    rollout = Rollout(num_steps, envs.num_envs)
    rollout.start_episodes(envs.reset())
    return rollout


def whitening_by(std):
    """An RND whose normalisation only divides by `std`."""
    rnd = RND()
    rnd.obs_rms = fastops.RunningMeanStd((84, 84), count=1.0)  # mean 0, variance 1
    rnd.obs_rms.var *= std**2
    return rnd


def no_targets(rollout):
    names = ("advantages", "returns", "int_returns")
    return {name: torch.zeros(rollout.num_steps, rollout.num_envs) for name in names}


def seen_stack(obs):
    """Frames of one observation (4, 84, 84) whose pixels are all one number, oldest first."""
    assert (obs == obs[:, :1, :1]).all()
    return obs[:, 0, 0].tolist()


# --- Rollout ---


def test_observations_next_frames_and_ends_are_aligned():
    """Specification D5: frames 10, 20, then an end, 100 and 110. Known mistakes: the last frame of the old episode as
    next frame (30), a row between the episodes, a stack that shows the old episode or repeats the new frame."""
    envs = ScriptedEnvs([[10], [20], [100], [110], [120], [130], [140]], dones=[[0], [1], [0], [0], [0], [0]])
    rollout, agent = started(envs, 3), Fixed()
    collect(agent, envs, rollout)
    stacks = [seen_stack(obs[0]) for obs in agent.seen]
    assert stacks == [[0, 0, 0, 10], [0, 0, 10, 20], [0, 0, 0, 100], [0, 0, 100, 110]]  # the last for the bootstrap
    assert rollout.next_frames[:, 0, 0, 0].tolist() == [20, 100, 110]
    assert rollout.dones[:, 0].tolist() == [0, 1, 0]
    np.testing.assert_array_equal(rollout.actions, envs.sent[:3])

    batch = minibatch(rollout, no_targets(rollout), whitening_by(100.0), torch.tensor([0]), Args(num_envs=1))
    assert [seen_stack(obs) for obs in observations(batch)] == stacks[:3]  # trained on what was seen
    assert sorted(batch["rnd_obs"][:, 0, 0, 0].mul(100).round().tolist()) == [20, 100, 110]

    collect(agent, envs, rollout)  # goes on where the last rollout ended
    stacks = [seen_stack(obs[0]) for obs in agent.seen[4:]]
    assert stacks == [[0, 0, 100, 110], [0, 100, 110, 120], [100, 110, 120, 130], [110, 120, 130, 140]]


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_a_rollout_does_not_depend_on_the_groups(groups):
    """Double buffering must not swap the halves of a rollout, nor shift one of them by a step."""
    rng = np.random.default_rng(0)
    frames, rewards, dones = rng.integers(256, size=(9, 5)), rng.integers(-3, 4, (8, 5)), rng.random((8, 5)) < 0.3

    def value_of(obs):
        newest = obs[:, 3, 0, 0].float()
        return newest[:, None] * torch.tensor([0.01, 0.02, 0.03]), newest, -newest

    rollouts = []
    for g in (1, groups):
        envs = ScriptedEnvs(frames, rewards, dones, num_groups=g)
        torch.manual_seed(3)
        rollout = started(envs, 8)
        collect(Function(value_of), envs, rollout)
        np.testing.assert_array_equal(rollout.actions, envs.sent)
        rollouts.append(rollout)
    for name, array in vars(rollouts[0]).items():
        np.testing.assert_array_equal(array, vars(rollouts[1])[name], err_msg=name)
    np.testing.assert_array_equal(rollouts[1].values, frames)
    np.testing.assert_array_equal(rollouts[1].int_values, -frames)
    np.testing.assert_array_equal(rollouts[1].rewards, np.sign(rewards))
    np.testing.assert_array_equal(rollouts[1].dones, dones)


def test_stacks_are_those_of_a_plain_loop():
    """Over random ends, several in four steps among them: what is older than the episode is zero, nothing else is."""
    rng = np.random.default_rng(1)
    steps, n = 30, 4
    frames = rng.integers(1, 256, size=(steps + 3, n, 84, 84), dtype=np.uint8)
    first = np.zeros(n, int) - rng.integers(0, 5, size=n)  # step at which the episode began
    ages, expected = np.zeros((steps, n), np.uint8), np.zeros((steps, n, 4, 84, 84), np.uint8)
    for t in range(steps):
        for i in range(n):
            if rng.random() < 0.3:
                first[i] = t
            ages[t, i] = min(3, t - first[i])
            for k in range(4):  # the frame of step t - 3 + k
                if t - 3 + k >= first[i]:
                    expected[t, i, k] = frames[t + k, i]
    stacks = stack_frames(torch.from_numpy(frames), torch.from_numpy(ages))
    assert stacks.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(stacks, expected.reshape(-1, 4, 84, 84))


def test_actions_follow_the_policy_and_carry_its_logprobs():
    """Frequencies within four standard deviations, independent between environments and between steps."""
    p = torch.tensor([0.6, 0.3, 0.1])
    steps, n = 100, 100
    envs = ScriptedEnvs(np.zeros((steps + 1, n)))
    rollout, agent = started(envs, steps), Fixed(p.log().tolist())
    torch.manual_seed(0)
    collect(agent, envs, rollout)
    for action in range(3):
        share = p[action].item()
        deviation = 4 * math.sqrt(share * (1 - share) / (steps * n))
        assert (rollout.actions == action).float().mean().item() == pytest.approx(share, abs=deviation)
    close(rollout.logprobs, p.log()[rollout.actions])
    chance = (p**2).sum().item()  # that two independent actions agree
    for one, other in (rollout.actions[1:], rollout.actions[:-1]), (rollout.actions[:, 1:], rollout.actions[:, :-1]):
        agree = (one == other).float().mean().item()
        assert agree == pytest.approx(chance, abs=0.04)  # 8 standard deviations


def test_greedy_is_the_most_probable_action():
    actions, logprobs = act(torch.tensor([[0.1, 0.3, 0.2]]), torch.zeros(1, 3))
    assert actions.tolist() == [1]
    close(logprobs, torch.tensor([0.1, 0.3, 0.2]).log_softmax(0)[1:2])


# --- Advantages ---


def rollout_of(rewards, dones, values, int_values):
    """A Rollout with these arrays: (T, N), and (T + 1, N) for the values."""
    rollout = Rollout(*np.shape(rewards))
    rollout.rewards[:], rollout.dones[:] = rewards, dones
    rollout.values[:], rollout.int_values[:] = torch.tensor(values), torch.tensor(int_values)
    return rollout


def test_both_streams_advantages_are_those_of_the_specification():
    """Specification D3. Its signatures of mistakes for the first entry, 1.807109: an intrinsic stream that ends with
    the episode, a game's stream that does not, one discount factor for both."""
    rollout = rollout_of(
        np.array([[0, 1, 0, 0, -1], [0, 0, 1, 0, 1]], np.float32).T,
        np.array([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]], np.float32).T,
        np.array([[0.5, 0.4, 0.3, 0.2, 0.1, 0.7], [-0.2, 0, 0.6, 0.9, 1.1, 0.25]], np.float32).T,
        np.array([[1, 0.9, 0.8, 0.7, 0.6, 0.55], [0.3, 0.35, 0.4, 0.45, 0.5, 0.65]], np.float32).T,
    )
    int_rewards = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0, 0.25, 0.6, 0.01]], np.float32).T.copy()
    targets = advantages_and_returns(rollout, int_rewards, Args())
    both = [[1.807109, 2.133325, 0.262685, -0.248716, -0.356900], [5.113527, 4.874102, 3.833492, 0.997357, -0.046500]]
    returns = [[0.983252, 1.014985, 0, -0.280384, -0.300700], [1.827850, 1.925979, 1.997796, 1.003995, 1]]
    int_returns = [[1.840606, 1.803355, 1.662685, 1.412052, 1.0445], [1.357827, 1.372144, 1.437899, 1.239367, 0.6535]]
    close(targets["advantages"].T, both, 1.5e-6)
    close(targets["returns"].T, returns)
    close(targets["int_returns"].T, int_returns)
    only_game = advantages_and_returns(rollout, int_rewards, Args(ext_coef=1.0, int_coef=0.0))
    close(only_game["advantages"].T[0], [0.483252, 0.614985, -0.3, -0.480384, -0.4007])


def test_the_games_stream_ends_with_the_episode_and_the_intrinsic_one_does_not():
    """Three steps, an end after the first and after the last, a reward in each stream at the last, large values in the
    next episode: the first step's game advantage must not see them, its intrinsic one must see all of it."""
    envs = ScriptedEnvs([[1], [2], [3], [4]], rewards=[[0], [0], [5]], dones=[[1], [0], [1]])
    rollout = started(envs, 3)
    collect(Fixed(), envs, rollout)
    rollout.values[1:], rollout.int_values[3] = 100.0, 10.0  # of the second episode; the bootstrap
    int_rewards = np.array([[0], [0], [1]], np.float32)
    game = advantages_and_returns(rollout, int_rewards, Args(ext_coef=1, int_coef=0))["advantages"][:, 0]
    intrinsic = advantages_and_returns(rollout, int_rewards, Args(ext_coef=0, int_coef=1))["advantages"][:, 0]
    close([game[0], game[2]], [0, 1 - 100])
    last = 1 + 0.99 * 10
    close(intrinsic, [(0.99 * 0.95) ** 2 * last, 0.99 * 0.95 * last, last], 1e-5)


def test_death_costs_future_bonus_only_on_demand():
    """--int-episodic: the intrinsic stream ends with the episode, too. Off by default, as in the paper."""
    rollout = rollout_of(np.zeros((2, 1)), [[1], [0]], np.zeros((3, 1)), [[0.0], [0.0], [10.0]])
    int_rewards = np.array([[0], [1]], np.float32)
    for int_episodic, first in ((False, 0.99 * 0.95 * (1 + 0.99 * 10)), (True, 0)):
        args = Args(ext_coef=0, int_episodic=int_episodic)
        advantages = advantages_and_returns(rollout, int_rewards, args)["advantages"][:, 0]
        close(advantages, [first, 1 + 0.99 * 10], 1e-5)
    assert Args().int_episodic is False


# --- The bonus and its scale ---

R1 = np.array([[1, 2, 0.5], [0.2, 0, 4]], np.float32).T.copy()
R2 = np.array([[3, 0.1, 0.1], [1, 1, 1]], np.float32).T.copy()


def pooled_std(sums):
    """Standard deviation of all numbers in the arrays `sums`, and of 1e-4 numbers with mean 0 and variance 1."""
    values = np.concatenate([np.ravel(s) for s in sums])
    count = len(values) + 1e-4
    return math.sqrt((np.sum(values**2) + 1e-4) / count - (np.sum(values) / count) ** 2)


def discounted(rewards, gamma=0.99):
    """Of each environment, backward: f[t] = r[t] + gamma f[t + 1]."""
    sums = rewards.astype(np.float64)
    for t in reversed(range(len(sums) - 1)):
        sums[t] += gamma * sums[t + 1]
    return sums


def test_forward_scale_is_that_of_the_specification():
    """D2: a filter along time that is never reset, and a variance cumulative over the run."""
    rnd = RND(int_return_filter="forward")
    one = rnd.scale(R1)
    close(rnd.int_return_rms.std, 1.603206232, 1e-8)
    close(rnd.carry, [3.4601, 4.19602], 1e-6)
    close(one.T, [[0.623750, 1.247500, 0.311875], [0.124750, 0, 2.495000]])
    two = rnd.scale(R2)
    close(rnd.int_return_rms.std, 2.452470982, 1e-8)
    close(two.T, [[1.223256, 0.040775, 0.040775], [0.407752, 0.407752, 0.407752]])
    assert one.dtype == two.dtype == np.float32


def test_backward_scale_is_that_of_its_definition():
    """Backward in time from zero at the end of each rollout; the variance is cumulative over the run (D2: 1.281547 and
    1.468771). The mean is not subtracted: bonuses stay positive."""
    rnd = RND()
    rnd.carry = np.full(2, 123.0)
    for rollouts, published in (([R1], 1.281547), ([R1, R2], 1.468771)):
        scaled = rnd.scale(rollouts[-1])
        expected = pooled_std([discounted(rewards) for rewards in rollouts])
        close(rnd.int_return_rms.std, expected, 1e-9)
        close(rnd.int_return_rms.std, published)
        close(scaled, rollouts[-1] / expected)


def test_a_filter_that_is_none_is_refused():
    """In the class, too, which may be copied without the command line."""
    with pytest.raises(ValueError, match="int_return_filter: expected 'backward' or 'forward', got 'foward'"):
        RND(int_return_filter="foward")


@pytest.mark.parametrize("int_return_filter", ["backward", "forward"])
def test_an_environment_without_bonus_stays_at_zero(int_return_filter):
    """The filter runs along time. Run over the environments, as CleanRL did, the silent one takes over its neighbour's
    sums."""
    rnd = RND(int_return_filter=int_return_filter)
    bonus = np.random.default_rng(0).random((6, 3), np.float32)
    bonus[:, 1] = 0
    sums, seen = np.zeros(3), []
    for _ in range(3):
        scaled = rnd.scale(bonus)
        assert (scaled[:, 1] == 0).all()
        assert (scaled[:, [0, 2]] > 0).all()
        if int_return_filter == "backward":
            seen.append(discounted(bonus))
        else:
            for row in bonus:
                sums = 0.99 * sums + row
                seen.append(sums)
        assert rnd.carry[1] == 0
        assert rnd.carry[0] > 0
        close(rnd.int_return_rms.std, pooled_std(seen), 1e-6)


def test_the_bonus_is_the_mean_square_of_the_difference():
    """D4: 1.5 where two ports have 3, the sum over two."""
    rnd = RND()
    rnd.target = Function(lambda x: torch.tensor([[1.0, -1, 0, 2]]).expand(len(x), -1))
    rnd.predictor = Function(lambda x: torch.tensor([[0.0, -1, 1, 0]]).expand(len(x), -1))
    assert rnd(torch.zeros(3, 1, 84, 84)).tolist() == [1.5] * 3


def test_every_next_frame_gets_its_own_bonus():
    """More frames than go through the networks at once, in the order (T, N)."""
    frames = torch.randint(256, (60, 20, 1, 1), dtype=torch.uint8).expand(-1, -1, 84, 84).contiguous()
    rnd = whitening_by(100.0)
    rnd.predictor, rnd.target = Function(lambda x: x.mean((1, 2, 3))[:, None].sqrt()), Function(lambda x: 0.0)
    bonus = rnd.bonus(frames)
    assert bonus.dtype == np.float32
    close(bonus, frames[:, :, 0, 0].numpy() / 100, 1e-5)


def test_warm_up_statistics_are_those_of_all_frames_at_once():
    """In float64 and whatever the batches. In float32 the pixel that moves by one in a thousand would be lost."""
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(5, 16, 8, 84, 84), dtype=np.uint8)
    frames[..., 0, 0], frames[..., 0, 1] = 200, 200
    frames[2, 3, 4, 0, 1] = 201
    rms = fastops.RunningMeanStd((84, 84))
    for batch in frames:
        merge_batch(rms, batch)
    flat = frames.reshape(-1, 84, 84).astype(np.float64)
    assert rms.count == pytest.approx(len(flat))
    count = len(flat) + 1e-4  # the statistics start with the weight of 1e-4 samples of mean 0 and variance 1
    mean = flat.sum(0) / count
    close(rms.mean, mean, 1e-9)
    np.testing.assert_allclose(rms.var, (flat.var(0) + (flat.mean(0) - mean) ** 2), rtol=2e-3, atol=1e-2)
    exact = (((flat - mean) ** 2).sum(0) + 1e-4 * (1 + mean**2)) / count
    np.testing.assert_allclose(rms.var, exact, rtol=1e-9)


def test_frames_are_normalised_as_on_other_devices():
    """The CPU's compiled path against the formula of the other one: no epsilon, clipped at 5."""
    rng, rnd = np.random.default_rng(0), RND()
    rnd.obs_rms.update(rng.integers(100, 140, size=(50, 84, 84), dtype=np.uint8))
    frames = torch.from_numpy(rng.integers(256, size=(20, 84, 84), dtype=np.uint8))
    mean, std = torch.from_numpy(rnd.obs_rms.mean), torch.from_numpy(rnd.obs_rms.var).sqrt()
    expected = ((frames - mean) / std).clamp(-5, 5).float()
    actual = rnd.normalize(frames)
    assert actual.shape == (20, 1, 84, 84)
    assert actual.dtype == torch.float32
    close(actual[:, 0], expected, 1e-6)
    assert actual.min() == -5
    assert actual.max() == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_frames_are_normalised_alike_on_the_cpu_and_on_cuda():
    rng, rnd = np.random.default_rng(0), RND()
    rnd.obs_rms.update(rng.integers(100, 140, size=(50, 84, 84), dtype=np.uint8))
    frames = torch.from_numpy(rng.integers(256, size=(20, 84, 84), dtype=np.uint8))
    close(rnd.normalize(frames.cuda()).cpu(), rnd.normalize(frames), 1e-6)


# --- Losses ---


def with_entropy(p, entropy, others=2):
    """Log-probabilities of `others` + 1 actions: the first has probability p; the distribution has this entropy."""
    low, high = 0.0, (1 - p) / 2
    for _ in range(200):
        middle = (low + high) / 2
        q = np.array([p, middle, 1 - p - middle])
        low, high = (middle, high) if -(q * np.log(q)).sum() < entropy else (low, middle)
    return np.log(q)


ENTROPY = 0.832396  # of softmax([0, 1, 2])


def batch_of_the_specification():
    """D4 as a batch of four samples, and an agent and RND that answer it with the specification's numbers.

    All four samples have the entropy of the logits 0, 1, 2; the two samples of each value head come twice.
    """
    logits = torch.tensor(np.array([with_entropy(p, ENTROPY) for p in (0.3, 0.4, 0.1, 0.26)]))
    values, int_values = torch.tensor([0.5, 1.5] * 2), torch.tensor([0.2, 0.4] * 2)
    batch = dict(
        inputs=(torch.zeros(4, 4, 84, 84, dtype=torch.uint8),),
        actions=torch.zeros(4, dtype=torch.int64),
        logprobs=torch.tensor([0.25, 0.5, 0.1, 0.2]).log(),
        advantages=torch.tensor([1.0, -2.0, 0.5, -1.0]),
        returns=torch.ones(4),
        int_returns=torch.tensor([0.0, 1.0] * 2),
        values=torch.tensor([0.8, 0.9] * 2),
        int_values=torch.tensor([0.0, 0.45] * 2),
        rnd_obs=torch.zeros(2, 1, 84, 84),  # the predictor's share: errors .4 and .2 of [.4, .8, .2, 1]
    )
    agent = Function(lambda obs: (logits.float() + 7, values, int_values))  # + 7: logits are not log-probabilities
    return agent, Function(lambda x: torch.tensor([0.4, 0.2])), batch


def test_losses_are_those_of_the_specification():
    """D4, every number and their sum, with the defaults: among them a value loss that is half the mean square for each
    head, no normalised advantages, no clipped values, an entropy that is rewarded."""
    loss, metrics = losses(*batch_of_the_specification(), 0.1, Args())
    expected = dict(policy_loss=0.375, value_loss=0.125, int_value_loss=0.1, predictor_loss=0.3)
    expected |= dict(entropy=0.832396, approx_kl=0.018984, clipfrac=0.75)
    assert dict(zip(METRICS, metrics.tolist(), strict=True)) == pytest.approx(expected, abs=2e-6)
    assert loss.item() == pytest.approx(0.899168, abs=2e-6)


def test_weights_of_the_losses():
    """Each coefficient multiplies its own loss: CleanRL's help texts had two of them swapped."""
    agent, rnd, batch = batch_of_the_specification()
    loss, metrics = losses(agent, rnd, batch, 0.1, Args(ent_coef=0.1, vf_coef=2.0))
    assert metrics[1:3].tolist() == pytest.approx([0.5, 0.4], abs=2e-6)
    assert loss.item() == pytest.approx(0.375 - 0.1 * ENTROPY + 0.5 + 0.4 + 0.3, abs=2e-6)
    # Ratios 1.2, .8, 1 and 1.3: one is clipped, to where it costs less.
    _, metrics = losses(agent, rnd, batch, 0.25, Args())
    assert metrics[METRICS.index("policy_loss")].item() == pytest.approx((-1.2 + 1.6 - 0.5 + 1.3) / 4, abs=2e-6)
    assert metrics[METRICS.index("clipfrac")].item() == 0.25


def test_advantages_are_normalised_on_demand_only():
    agent, rnd, batch = batch_of_the_specification()
    advantages = batch["advantages"].double().numpy()
    advantages = (advantages - advantages.mean()) / advantages.std(ddof=1)
    ratios = np.array([1.2, 0.8, 1.0, 1.3])
    expected = np.maximum(-advantages * ratios, -advantages * ratios.clip(0.9, 1.1)).mean()
    _, metrics = losses(agent, rnd, batch, 0.1, Args(norm_adv=True))
    assert metrics[0].item() == pytest.approx(expected, abs=2e-6)
    assert abs(expected - 0.375) > 0.1
    assert Args().norm_adv is False


def test_value_losses_are_clipped_on_demand_only():
    """Both heads, around the rollout's value, and the larger of the two errors counts."""
    agent, rnd, batch = batch_of_the_specification()
    _, metrics = losses(agent, rnd, batch, 0.1, Args(clip_vloss=True))
    # .5 from .8 is clipped to .7 (error .3 < .5); 1.5 from .9 to 1 (error 0 < .5). .2 from 0 to .1; .4 from .45 stays.
    assert metrics[1].item() == pytest.approx(0.5 * (0.25 + 0.25) / 2, abs=2e-6)
    assert metrics[2].item() == pytest.approx(0.5 * (0.04 + 0.36) / 2, abs=2e-6)
    batch["values"], batch["int_values"] = torch.tensor([0.0, 1.8] * 2), torch.tensor([0.6, 0.1] * 2)
    _, metrics = losses(agent, rnd, batch, 0.1, Args(clip_vloss=True))
    # .5 from 0 to .1 (error .9 > .5); 1.5 from 1.8 to 1.7 (error .7 > .5). .2 from .6 to .5; .4 from .1 to .2.
    assert metrics[1].item() == pytest.approx(0.5 * (0.81 + 0.49) / 2, abs=2e-6)
    assert metrics[2].item() == pytest.approx(0.5 * (0.25 + 0.64) / 2, abs=2e-6)
    _, metrics = losses(agent, rnd, batch, 0.1, Args())
    assert metrics[1:3].tolist() == pytest.approx([0.125, 0.1], abs=2e-6)


@pytest.mark.parametrize("max_grad_norm, factor", [(0.0, 1.0), (1.0, 0.2), (10.0, 1.0)])
@pytest.mark.parametrize("apart", [False, True])
def test_gradients_are_clipped_on_demand_only_and_together(monkeypatch, max_grad_norm, factor, apart):
    """One norm over policy and predictor, here 5; 0, the default, never clips. A copy may give the predictor a group of
    its own, for another learning rate: it is averaged over the processes and clipped all the same."""
    agent, rnd = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    params = [agent.weight, rnd.weight]
    before = [p.item() for p in params]

    def slopes(agent, rnd, *_):
        return 3 * agent.weight.sum() + 4 * rnd.weight.sum(), torch.zeros(len(METRICS))

    monkeypatch.setattr(script, "minibatch", lambda *_: {})
    monkeypatch.setattr(script, "losses", slopes)
    groups = [dict(params=[agent.weight]), dict(params=[rnd.weight])] if apart else params
    optimizer = torch.optim.SGD(groups, lr=1.0)
    args = Args(max_grad_norm=max_grad_norm, update_epochs=1, num_minibatches=1)
    averaged = []
    monkeypatch.setattr(script, "average_gradients", averaged.extend)
    update(agent, rnd, optimizer, Rollout(1, 1), {}, 0.1, args)
    assert [id(p) for p in averaged] == [id(p) for p in params]
    steps = [b - p.item() for b, p in zip(before, params, strict=True)]
    close(steps, [3 * factor, 4 * factor], 1e-5)
    assert Args().max_grad_norm == 0


def test_explained_variance():
    """D4; and 1 of a perfect prediction, 0 of a constant one. The value of the bootstrap does not count."""
    returns = torch.tensor([[1.5], [1.5], [3.5], [5.0]])
    rollout = Rollout(4, 1)
    rollout.values[:] = torch.tensor([[1.0], [2], [3], [4], [77]])
    rollout.int_values[:] = 1.0
    _, rnd, optimizer = real_parts()

    def metrics(**targets):
        return rollout_metrics(rollout, targets, np.zeros((4, 1)), np.zeros((4, 1)), rnd, optimizer)

    found = metrics(returns=returns, int_returns=returns)
    assert found["losses/explained_variance"] == pytest.approx(0.863309, abs=2e-6)
    assert found["losses/int_explained_variance"] == pytest.approx(0, abs=1e-6)
    found = metrics(returns=rollout.values[:-1], int_returns=returns)
    assert found["losses/explained_variance"] == pytest.approx(1)


# --- Networks ---


def gains(module):
    """Gain of each layer of `module` in order: g where the weight is g times an orthogonal matrix; biases are zero."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.detach().double().flatten(1)
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            gain = gram.diagonal().mean().sqrt()
            close(gram, gain**2 * torch.eye(len(gram)), 1e-5)
            assert (layer.bias == 0).all()
            found[name] = gain.item()
    return found


def test_sizes_and_initial_weights_of_the_networks():
    """D7. Known mistakes: branches at gain sqrt 2, a branch for each value, torch's own initial weights."""

    def size(module):
        return sum(p.numel() for p in module.parameters())

    agent, rnd = make_agent(), RND()
    assert (size(agent), size(rnd.target), size(rnd.predictor)) == (1_407_476, 1_677_984, 2_203_296)
    assert [p.requires_grad for p in rnd.target.parameters()] == [False] * 8
    assert all(p.requires_grad for p in [*rnd.predictor.parameters(), *agent.parameters()])
    special = dict(policy_branch=0.1, value_branch=0.1, policy_head=0.01, value_head=0.01, int_value_head=0.01)
    found = gains(agent)
    assert len(found) == 10
    assert found == pytest.approx({name: special.get(name, math.sqrt(2)) for name in found}, abs=1e-5)
    found = gains(rnd)
    assert len(found) == 10
    assert found == pytest.approx(dict.fromkeys(found, math.sqrt(2)), abs=1e-5)


def plain_trunk(layers, slope, x):
    """The three convolutions and what follows, written out: `layers` are all but the last, which has no activation."""
    for i, layer in enumerate(layers):
        stride = {0: 4, 1: 2}.get(i, 1)
        x = x.flatten(1) if i == 3 else x
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.conv2d(x, layer.weight, layer.bias, stride)
        else:
            x = x @ layer.weight.T + layer.bias
        slope_here = slope if i < 3 else 0.0
        x = torch.where(x > 0, x, slope_here * x)
    return x


def test_the_networks_compute_what_the_paper_draws():
    """Residual branches x + relu(fc(x)), both values from one of them; input / 255; slope .2 in the RND networks, and
    no activation at their end."""
    torch.manual_seed(0)
    agent, rnd = make_agent(5), RND()
    for p in [*agent.parameters(), *rnd.parameters()]:
        p.data += 0.01 * torch.randn_like(p)  # biases count
    obs = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    layers = [m for m in agent.trunk if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        x = plain_trunk(layers, 0.0, obs / 255)
        p, v = x + agent.policy_branch(x).clamp(min=0), x + agent.value_branch(x).clamp(min=0)
        expected = agent.policy_head(p), agent.value_head(v)[:, 0], agent.int_value_head(v)[:, 0]
        for actual, wanted in zip(agent(obs), expected, strict=True):
            close(actual, wanted, 1e-5)
        frames = torch.randn(3, 1, 84, 84)
        outputs = []
        for net in (rnd.predictor, rnd.target):
            *inner, last = [m for m in net if isinstance(m, nn.Conv2d | nn.Linear)]
            x = plain_trunk(inner, 0.2, frames)
            outputs.append(x.flatten(1) @ last.weight.T + last.bias)
        close(rnd(frames), (outputs[0] - outputs[1]).square().mean(1), 1e-4)


def test_bfloat16_changes_the_policy_a_little_and_its_outputs_type_not_at_all():
    """Weights and heads stay in fp32: a logarithm of a bfloat16 probability would be wrong in the third digit."""
    torch.manual_seed(0)
    one, other = make_agent(5), make_agent(5, bf16=True)
    other.load_state_dict(one.state_dict())
    obs = torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8)
    for actual, expected in zip(other(obs), one(obs), strict=True):
        assert actual.dtype == torch.float32
        close(actual.detach(), expected.detach(), 0.05 * expected.abs().max().item())
        assert not torch.equal(actual, expected)
    assert {p.dtype for p in other.parameters()} == {torch.float32}


# --- Update ---


def real_parts(num_actions=18, sharp=30.0):
    """Agent, RND and optimiser; the heads `sharp` times as large as at the start, so that actions and values
    depend on what is seen and a misplaced one shows."""
    torch.manual_seed(0)
    agent, rnd = make_agent(num_actions), RND()
    with torch.no_grad():
        for head in (agent.policy_head, agent.value_head, agent.int_value_head):
            head.weight *= sharp
    params = [*agent.parameters(), *rnd.predictor.parameters()]
    return agent, rnd, torch.optim.Adam(params, lr=1e-4, eps=1e-8, fused=True)


def test_the_first_minibatch_has_ratio_one(monkeypatch):
    """Over several rollouts of the real game with ends inside: what is trained on is exactly what was acted on. Stale
    or misaligned observations, actions, values or weights move the ratio away from 1."""
    agent, rnd, optimizer = real_parts()
    envs, args = VectorEnv("ALE/MontezumaRevenge-v5", 8, num_workers=1, max_episode_steps=7), Args(num_envs=8)
    rollout, seen = Rollout(16, 8), []

    def noting(agent, rnd, batch, *rest):
        with torch.no_grad():
            logits, values, int_values = agent(*batch["inputs"])
        logprobs = logits.log_softmax(-1).gather(-1, batch["actions"][:, None])[:, 0]
        differences = logprobs - batch["logprobs"], values - batch["values"], int_values - batch["int_values"]
        loss, metrics = losses(agent, rnd, batch, *rest)
        kl = metrics[METRICS.index("approx_kl")].item()
        seen.append((max(d.abs().max().item() for d in differences), kl))
        return loss, metrics

    monkeypatch.setattr(script, "losses", noting)
    with contextlib.closing(envs):
        rollout.start_episodes(envs.reset())
        previous = None
        for iteration in range(3):
            collect(agent, envs, rollout)
            assert rollout.dones.sum() >= 8
            if iteration == 1:  # nothing was trained between: the bootstrap was of the observation that comes next
                close(rollout.values[0], previous[0], 1e-5)
                close(rollout.int_values[0], previous[1], 1e-5)
            previous = rollout.values[-1].clone(), rollout.int_values[-1].clone()
            rnd.observe(rollout.next_frames)
            int_rewards = np.random.default_rng(iteration).random((16, 8), np.float32)
            targets = advantages_and_returns(rollout, int_rewards, args)
            assert rollout.logprobs.std() > 1e-3, "a policy that is the same everywhere would hide a mistake"
            if iteration > 0:
                seen.clear()
                update(agent, rnd, optimizer, rollout, targets, 0.1, args)
                assert seen[0][0] < 1e-5
                assert seen[0][1] < 1e-10
                assert seen[-1][1] > 1e-8  # later ones have moved


def numbered_rollout(num_steps, n):
    """A rollout in which sample (t, i) has the number t * n + i, in every array, and its next frame too."""
    rollout = Rollout(num_steps, n)
    number = torch.arange(num_steps * n).view(num_steps, n)
    rollout.frames[:] = 255
    rollout.frames[4:] = number[:, :, None, None].to(torch.uint8)
    rollout.ages[:] = 0
    rollout.actions[:] = number % 3
    rollout.logprobs[:] = -number / 100
    rollout.values[:-1], rollout.int_values[:-1] = number + 0.25, number + 0.5
    names = ("advantages", "returns", "int_returns")
    targets = {name: (number * 10 + k).float() for k, name in enumerate(names)}
    return rollout, targets, whitening_by(1000.0)


@pytest.mark.parametrize("num_steps, n, proportion", [(8, 8, 0.25), (5, 12, 0.38), (7, 4, 1.0), (8, 8, 0.01)])
def test_every_sample_is_used_once_in_every_pass(monkeypatch, num_steps, n, proportion):
    """Whole environments, in another order each time, all arrays of a sample together; 16 optimiser steps in all. The
    predictor's share: exactly round(p * count) next frames of the minibatch, none twice, drawn anew every time."""
    torch.manual_seed(1)
    rollout, targets, rnd = numbered_rollout(num_steps, n)
    batches = []
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def noting(agent, rnd, batch, clip, args):
        batches.append(batch)
        assert clip == 0.1
        return weight.sum(), torch.full((len(METRICS),), float(len(batches)))

    monkeypatch.setattr(script, "losses", noting)
    metrics = update(None, rnd, optimizer, rollout, targets, 0.1, Args(predictor_proportion=proportion))
    assert len(batches) == 16
    assert weight.item() == pytest.approx(-1.6)  # 16 steps
    assert metrics == pytest.approx({f"losses/{name}": 8.5 for name in METRICS})  # the mean over them
    orders = []
    for batch in batches:
        numbers = (batch["advantages"] / 10).round().long()
        count = num_steps * n // 4
        assert len(set(numbers.tolist())) == len(numbers) == count
        assert torch.bincount(numbers % n).tolist().count(num_steps) == n // 4  # all steps of n / 4 environments
        close(batch["returns"], numbers * 10 + 1)
        close(batch["int_returns"], numbers * 10 + 2)
        close(batch["actions"], numbers % 3)
        close(batch["logprobs"], -numbers / 100)
        close(batch["values"], numbers + 0.25)
        close(batch["int_values"], numbers + 0.5)
        newest = torch.where(numbers < n, 255, numbers - n)  # the next frame of the step before
        close(observations(batch)[:, 3, 0, 0], newest)
        share = (batch["rnd_obs"][:, 0, 0, 0] * 1000).round().long().tolist()
        assert len(set(share)) == len(share) == max(1, round(proportion * count))
        assert set(share) <= set(numbers.tolist())
        orders.append(numbers.tolist())
    passes = [[tuple(order) for order in orders[k : k + 4]] for k in (0, 4, 8, 12)]
    for one in passes:
        assert sorted(number for block in one for number in block) == list(range(num_steps * n))
    assert passes[0] != passes[1] != passes[2] != passes[3]


def test_shares_of_the_same_minibatch_are_fresh_and_even():
    """A share drawn once for all, or always the first samples, would train the predictor on the same frames for ever.
    Within four standard deviations every sample has the same chance."""
    torch.manual_seed(0)
    rollout, targets, rnd = numbered_rollout(16, 4)
    counts, draws = torch.zeros(64), 400
    for _ in range(draws):
        batch = minibatch(rollout, targets, rnd, torch.arange(4), Args(predictor_proportion=0.25))
        counts[(batch["rnd_obs"][:, 0, 0, 0] * 1000).round().long()] += 1
    assert counts.sum() == draws * 16
    deviation = math.sqrt(draws * 0.25 * 0.75)
    assert ((counts - draws / 4).abs() < 4 * deviation).all()


@pytest.mark.parametrize("proportion", [0.25, 1.0])
def test_only_the_share_goes_through_the_rnd_networks_and_only_the_predictor_learns(proportion):
    """Computing all errors and masking them would cost four times as much at 128 environments. The target network
    never moves, everything else does."""
    agent, rnd, optimizer = real_parts()
    rollout, targets, _ = numbered_rollout(8, 8)
    counts = []
    for net in (rnd.target, rnd.predictor):
        net.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    names = dict(agent.named_parameters(prefix="agent")) | dict(rnd.named_parameters(prefix="rnd"))
    before = {name: p.detach().clone() for name, p in names.items()}
    rollout.logprobs[:] = -math.log(18)
    targets = {name: array % 7 for name, array in targets.items()}
    update(agent, rnd, optimizer, rollout, targets, 0.1, Args(predictor_proportion=proportion))
    assert counts == [round(proportion * 16)] * 32
    moved = {name for name, p in names.items() if not torch.equal(p, before[name])}
    assert moved == {name for name in names if "target" not in name}


# --- The training loop on scripted environments ---


def train_on_script(monkeypatch, tmp_path, *, num_envs, **options):
    """`train` with all its parts real but the game; what it did to the environments and with the optimiser."""
    envs = ScriptedEnvs(np.random.default_rng(0).integers(256, size=(40, num_envs)), num_actions=4)
    steps, rates, rms_counts = [], [], []
    monkeypatch.setattr(script, "VectorEnv", lambda *_, **__: envs)

    class Watched(RND):
        def bonus(self, frames):
            rms_counts.append(("bonus", round(self.obs_rms.count)))
            return super().bonus(frames)

    def noting(agent, rnd, batch, clip, args):
        rms_counts.append(("training", round(rnd.obs_rms.count)))
        steps.append((clip, len(batch["rnd_obs"]), len(batch["actions"])))
        return losses(agent, rnd, batch, clip, args)

    def note_rate(agent, rnd, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(agent, rnd, optimizer, *rest)

    monkeypatch.setattr(script, "RND", Watched)
    monkeypatch.setattr(script, "losses", noting)
    monkeypatch.setattr(script, "update", note_rate)
    path = script.train(Args(num_envs=num_envs, device="cpu", run_dir=str(tmp_path), **options))
    return envs, steps, rates, rms_counts, path


@pytest.mark.parametrize("anneal", [False, True])
def test_learning_rate_and_clip_range_fall_on_demand_only(monkeypatch, tmp_path, anneal):
    options = dict(num_steps=1, total_rollouts=4, obs_norm_rollouts=1, update_epochs=1, anneal=anneal)
    _, steps, rates, *_ = train_on_script(monkeypatch, tmp_path, num_envs=4, **options)
    left = [1, 0.75, 0.5, 0.25] if anneal else [1] * 4
    assert rates == pytest.approx([1e-4 * x for x in left])
    assert [clip for clip, *_ in steps] == pytest.approx([0.1 * x for x in left for _ in range(4)])
    assert Args().anneal is False


@pytest.mark.parametrize("num_envs, proportion", [(8, 1.0), (32, 1.0), (128, 0.25), (256, 0.125)])
def test_the_predictor_learns_from_32_environments_worth(monkeypatch, tmp_path, num_envs, proportion):
    """D7: without it the predictor would learn faster with more environments and the bonus would be gone too soon."""
    options = dict(num_steps=1, total_rollouts=1, obs_norm_rollouts=1, update_epochs=1)
    _, steps, *_ = train_on_script(monkeypatch, tmp_path, num_envs=num_envs, **options)
    assert [(share, count) for *_, share, count in steps] == [(num_envs // 4 * proportion, num_envs // 4)] * 4


def test_the_predictors_share_follows_the_environments_of_all_processes(monkeypatch):
    """Two processes of 32 environments are 64: half of each minibatch."""
    rollout = Rollout(4, 32)
    for processes, size in ((1, 4 * 32), (2, 4 * 16), (4, 4 * 8)):
        monkeypatch.setattr(script, "PROCESSES", processes)
        batch = minibatch(rollout, no_targets(rollout), whitening_by(100.0), torch.arange(32), Args(num_envs=32))
        assert len(batch["rnd_obs"]) == size


def test_the_advantages_are_made_from_the_scaled_bonus_and_one_optimiser_has_all_parameters(monkeypatch, tmp_path):
    """What `train` passes from one part to the next. The epsilon of Adam is the paper's code's, not CleanRL's 1e-5."""
    sessions, used, logged = [], [], []
    make, estimate, measure = script.Session, script.advantages_and_returns, script.rollout_metrics

    def note_session(*args):
        sessions.append(make(*args))
        return sessions[-1]

    def note_rewards(rollout, int_rewards, args):
        used.append(int_rewards.copy())
        return estimate(rollout, int_rewards, args)

    def note_bonus(rollout, targets, raw, int_rewards, rnd, optimizer):
        logged.append(raw / rnd.int_return_rms.std)
        return measure(rollout, targets, raw, int_rewards, rnd, optimizer)

    monkeypatch.setattr(script, "Session", note_session)
    monkeypatch.setattr(script, "advantages_and_returns", note_rewards)
    monkeypatch.setattr(script, "rollout_metrics", note_bonus)
    train_on_script(monkeypatch, tmp_path, num_envs=4, num_steps=6, total_rollouts=2, obs_norm_rollouts=1)
    np.testing.assert_allclose(used, logged, rtol=1e-5)
    [session] = sessions
    [group] = session.optimizer.param_groups
    assert (type(session.optimizer), group["eps"], group["betas"]) == (torch.optim.Adam, 1e-8, (0.9, 0.999))
    trained = [*session.agent.parameters(), *session.rnd.predictor.parameters()]
    assert {id(p) for p in group["params"]} == {id(p) for p in trained} and len(group["params"]) == len(trained)


def test_warm_up_and_the_order_of_statistics(monkeypatch, tmp_path):
    """Random actions for --obs-norm-rollouts rollouts, then a reset. The bonus sees the statistics from before its
    rollout, the predictor trains with those from after it [specification, 9]."""
    options = dict(num_steps=6, total_rollouts=2, obs_norm_rollouts=5)
    envs, _, _, counts, path = train_on_script(monkeypatch, tmp_path, num_envs=8, **options)
    assert len(envs.warm_up) == 5 * 6
    shares = np.bincount(np.ravel(envs.warm_up), minlength=4) / (5 * 6 * 8)
    assert shares == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 240))
    assert envs.resets == 2
    warm, rollout = 5 * 6 * 8, 6 * 8
    expected = [("bonus", warm)] + [("training", warm + rollout)] * 16
    assert counts == expected + [(what, count + rollout) for what, count in expected]
    _, state = script.load_checkpoint(path)
    assert state["progress"]["step"] == 2 * rollout
