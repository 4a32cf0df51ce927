"""The environments: against Gymnasium's preprocessing, against a plain loop, and when a process dies."""

import contextlib
import copy
import io
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT
from gymnasium.wrappers import AtariPreprocessing

import rnd_ppo_atari as script
from rnd_ppo_atari import Env, Game, Rollout, VectorEnv, collect

MONTEZUMA, INVADERS, BREAKOUT = "ALE/MontezumaRevenge-v5", "ALE/SpaceInvaders-v5", "ALE/Breakout-v5"


@pytest.fixture(autouse=True)
def no_test_hangs():
    """The mistakes looked for here are those that make a main process wait forever."""

    def late(*_):
        raise TimeoutError("the test hangs")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def blank():
    return np.zeros((84, 84), np.uint8)


# --- One environment: what the agent sees ---


@pytest.mark.parametrize("game", ["MontezumaRevenge", "Breakout", "SpaceInvaders", "Pong", "AirRaid"])
def test_frames_and_rewards_are_those_of_gymnasiums_preprocessing(game):
    """Frame skip, max over which two frames, gray, resize, reward sum, ends and resets: an off-by-one in any shows.

    SpaceInvaders flickers, which the maximum hides; the screen of AirRaid has 250 rows, of the others 210. Longer than
    an episode of Breakout, so that resets are compared too.
    """
    env = Env(f"ALE/{game}-v5", index=3, seed=7, sticky_action_prob=0.0)
    options = dict(frameskip=1, repeat_action_probability=0.0, full_action_space=False)
    reference = AtariPreprocessing(gym.make(f"ALE/{game}-v5", **options), noop_max=0)
    # The same seed for ALE, and the same number of resets as Env has made after that.
    reference.reset(seed=int(np.random.default_rng([7, 3]).integers(2**31)))
    frame = blank()
    env.reset(frame)
    reference.reset()
    expected, _ = reference.reset()
    np.testing.assert_array_equal(frame, expected)
    assert reference.action_space.n == len(env.game.actions)

    actions = np.random.default_rng(0).integers(len(env.game.actions), size=500)
    ends, scores, seen = 0, 0, set()
    for action in actions:
        reward, done, summary = env.step(int(action), frame)
        expected, expected_reward, terminated, _, _ = reference.step(int(action))
        assert (reward, done, summary is not None) == (expected_reward, terminated, terminated)
        if done:
            env.reset(frame)
            expected, _ = reference.reset()
        np.testing.assert_array_equal(frame, expected)
        ends, scores = ends + done, scores + (reward != 0)
        seen.add(frame.tobytes())
    assert len(seen) > 50
    assert scores > 0 or game == "MontezumaRevenge"
    assert ends > 0 or game != "Breakout"


def test_gray_of_every_color_of_many_games():
    """Where grays are looked up, they are those of ALE's own gray screen. A screen of another height, as in Pacman, may
    have other colors: ALE makes it gray."""
    games = {spec.kwargs["game"]: name for name, spec in gym.registry.items() if "AtariEnv" in str(spec.entry_point)}
    with_palette = 0
    for env_id in sorted(games.values())[::4]:
        game = Game(env_id, 0)
        if game.palette is None:
            continue
        with_palette += 1
        for t, action in enumerate(np.random.default_rng(0).integers(len(game.actions), size=60)):
            game.act(action)
            if t % 10 == 0:
                np.testing.assert_array_equal(game.palette[game.ale.getScreen()], game.ale.getScreenGrayscale())
    assert with_palette > 15
    assert Game("ALE/Pacman-v5", 0).palette is None


@pytest.mark.parametrize("skip", [1, 2, 4])
def test_a_frame_is_the_maximum_of_at_most_two_screens(monkeypatch, skip):
    """A copy of the script may skip no frames. Then there is one screen, and nothing to take a maximum with: that of
    before the first step is filled with color 0, which is the brightest here."""
    monkeypatch.setattr(Game, "SKIP", skip)
    env, frame, drawn = Env(BREAKOUT), blank(), []
    env.game.palette = np.concatenate([[255], np.random.default_rng(0).permutation(255)]).astype(np.uint8)
    env.game.act, env.game.over = (lambda action: 0.0), (lambda: False)

    def draw(screen):
        drawn.append(len(drawn) + 1)
        screen[:] = drawn[-1]

    env.game.draw = draw
    for _ in range(50):
        env.step(0, frame)
        assert (frame == env.game.palette[drawn[-2 if skip > 1 else -1 :]].max()).all()


def test_a_lost_life_is_not_an_end():
    """Episodes that end with a life would cut Montezuma's Revenge after the first fall. Breakout has five lives."""
    env, frame, lives = Env(BREAKOUT, sticky_action_prob=0.0), blank(), [5]
    for t in range(1000):
        _, done, summary = env.step(t % 2, frame)  # no-op, fire
        lives.append(env.game.ale.lives())
        if done:
            break
    assert sorted(set(lives)) == [0, 1, 2, 3, 4, 5]
    assert lives[-2] > 0
    assert summary["stats"]["episodic_length"] == len(lives) - 1


@pytest.mark.parametrize("game", ["Gravitar", "MontezumaRevenge", "Pitfall", "Venture"])
def test_a_kept_beginning_is_where_every_reset_leads(game):
    """In these games the emulator is reset once. Another emulator, with another seed, that is reset for each episode
    shows the same frames and has the same RAM ever after."""
    env, frame, first = Env(f"ALE/{game}-v5", sticky_action_prob=0.0), blank(), blank()
    env.reset(first)
    assert env.game.start
    other = Game(f"ALE/{game}-v5", 99).ale
    rng, seen = np.random.default_rng(0), set()
    for _ in range(5):
        env.reset(frame)
        other.reset_game()
        np.testing.assert_array_equal(frame, first)
        for action in rng.integers(len(env.game.actions), size=100):
            reward, done, _ = env.step(int(action), frame)
            assert reward == sum(other.act(env.game.actions[action]) for _ in range(4))
            np.testing.assert_array_equal(env.game.ale.getScreen(), other.getScreen())
            np.testing.assert_array_equal(env.game.ale.getRAM(), other.getRAM())
            assert (done, env.game.ale.lives()) == (other.game_over(), other.lives())
            seen.add(other.getScreen().tobytes())
            if done:
                break
    assert len(seen) > 50


def test_a_game_with_a_random_beginning_is_reset_for_every_episode():
    env, rams = Env("ALE/Solaris-v5"), set()
    for _ in range(5):
        env.reset(blank())
        rams.add(env.game.ale.getRAM().tobytes())
    assert len(rams) > 1
    assert not env.game.start


def test_a_montezuma_episode_of_noops_ends_at_exactly_4500_steps():
    """18 000 frames, as in the paper: other ports end at 4499 or 4502. ALE's or Gymnasium's own limit must not act."""
    env, frame = Env(MONTEZUMA), blank()
    results = [env.step(0, frame) for _ in range(4500)]
    assert [done for _, done, _ in results] == [False] * 4499 + [True]
    assert [summary for _, _, summary in results[:-1]] == [None] * 4499
    stats = dict(episodic_return=0.0, episodic_length=4500, rooms=1)
    assert results[-1][2] == dict(env=0, stats=stats, visits={1: 4500}, executed=bytes(18_000))


@pytest.mark.parametrize("game, byte", [("MontezumaRevenge", 3), ("Pitfall", 1)])
def test_rooms_are_counted_by_the_room_byte_of_the_ram(game, byte):
    """`visits` says for how many steps the player was in which room of this episode, and starts anew at a reset."""
    env, frame = Env(f"ALE/{game}-v5", max_episode_steps=5), blank()
    start = int(env.game.ale.getRAM()[byte])
    assert env.room == start
    env.step(0, frame)
    env.step(0, frame)
    env.game.ale.setRAM(byte, 7)
    *_, (_, done, summary) = [env.step(0, frame) for _ in range(3)]
    assert done
    assert env.room == 7
    assert summary["visits"] == {start: 2, 7: 3}
    env.reset(frame)
    assert env.room == start
    *_, (_, _, again) = [env.step(0, frame) for _ in range(5)]
    assert again["visits"] == {start: 5}
    assert summary["visits"] == {start: 2, 7: 3}


def test_a_game_without_known_rooms_has_no_visits():
    env = Env(BREAKOUT, max_episode_steps=1)
    assert env.step(0, blank())[2]["visits"] == {}
    assert env.room is None


def test_numbers_of_numpy_become_plain(monkeypatch):
    """Otherwise an environment of one's own would write checkpoints that cannot be loaded."""

    class NumPyGame(Game):
        def act(self, action):
            return np.float64(super().act(action))

        def over(self):
            return np.bool_(super().over())

        def room(self):
            return np.int64(super().room())

        def statistics(self):
            return dict(lives=np.int32(self.ale.lives()), speed=np.float32(0.5))

    monkeypatch.setattr(script, "Game", NumPyGame)
    env, frame = Env(MONTEZUMA, index=3, max_episode_steps=2), blank()
    reward, _, _ = env.step(0, frame)
    assert type(reward) is float
    state = env.get_state()
    _, _, summary = env.step(0, frame)
    script.check_plain(state, "state")
    script.check_plain(summary, "summary")
    assert state["visits"] == {1: 1}
    stats = dict(lives=6.0, speed=0.5, episodic_return=0.0, episodic_length=2, rooms=1)
    assert summary == dict(env=3, stats=stats, visits={1: 2}, executed=bytes(8))


def test_a_game_without_known_rooms_counts_none():
    """Neither 0 nor 1: neither the log nor --play mentions them."""
    env, frame = Env("ALE/Breakout-v5", max_episode_steps=1), blank()
    _, _, summary = env.step(0, frame)
    assert summary["stats"] == dict(episodic_return=0.0, episodic_length=1) and summary["visits"] == {}
    progress = script.Progress()
    progress.add(summary)
    assert not [tag for tag in progress.scalars() if "room" in tag]


def test_a_game_may_have_255_actions(monkeypatch):
    """Which the state of an episode holds."""
    env, frame = Env(MONTEZUMA), blank()
    monkeypatch.setattr(env.game, "act", lambda action: 0.0)
    monkeypatch.setattr(env, "sticky_action_prob", 0.0)
    env.step(254, frame)
    state, other = env.get_state(), Env(MONTEZUMA, index=1)
    script.check_plain(state, "state")
    other.set_state(state)
    assert other.executed == bytearray([254] * 4)


# --- Continuing from a state ---

GAMES = sorted(name for name, spec in gym.registry.items() if name.startswith("ALE/") and name.endswith("-v5"))
# One of each kind: paddles, a kept start, PAL, a clock in the cartridge, incomplete frames after a reset, random start.
KINDS = ["Breakout", "MontezumaRevenge", "Pacman", "Pitfall2", "Qbert", "Tetris", "Solaris"]
UNSAVED = ["Kaboom", "TicTacToe3D"]  # ALE 0.12.1 does not save whether a frame is complete; mended in a9a043e2


def played(env, actions):
    """Everything that can be seen of each step; a new episode begins where one ends, as in VectorEnv."""
    frame, seen = blank(), []
    for action in actions:
        reward, done, summary = env.step(int(action), frame)
        screen, ram = env.screens[1].tobytes(), env.game.ale.getRAM().tobytes()
        if done:
            env.reset(frame)
        seen.append((frame.tobytes(), screen, ram, reward, done, summary, env.room))
    return seen


def long_unless_of_a_kind(env_id):
    return pytest.param(env_id, marks=[] if env_id[4:-3] in KINDS else pytest.mark.long)


@pytest.mark.parametrize("env_id", [long_unless_of_a_kind(env_id) for env_id in GAMES if env_id[4:-3] not in UNSAVED])
def test_every_game_continues_identically_from_a_state(env_id):
    """In a new Env, and in one in the middle of a game: what an emulator leaves out of its state would show."""
    options = dict(max_episode_steps=150)
    env, busy = Env(env_id, seed=1, **options), Env(env_id, seed=2, **options)
    rng = np.random.default_rng(0)
    actions = rng.integers(len(env.game.actions), size=500)
    moments = [0, 1, 2, 150, 151, *sorted(rng.choice(300, size=6, replace=False).tolist())]
    states, seen = {}, []
    for t, action in enumerate(actions):
        if t in moments:
            states[t] = env.get_state()
        seen += played(env, [action])
    assert len({frame for frame, *_ in seen}) > 5
    for t, state in states.items():
        horizon = 100 if t in (0, moments[-1]) else 10
        new = [Env(env_id, seed=3, **options)] if t in (0, 1, 150, moments[-1]) else []  # takes long: loads the ROM
        for other in (*new, busy):
            other.set_state(state)
            again = played(other, actions[t : t + horizon])
            assert [i for i, step in enumerate(again, t) if step != seen[i]] == [], f"restored before step {t}"
        played(busy, rng.integers(len(env.game.actions), size=rng.integers(1, 9)))


@pytest.mark.parametrize("game, warned", [*((game, True) for game in UNSAVED), ("MontezumaRevenge", False)])
def test_a_game_that_a_state_does_not_hold_is_warned_of(game, warned, capsys):
    Game.check(script.Args(env_id=f"ALE/{game}-v5"))
    assert ("a9a043e2" in capsys.readouterr().out) is warned
    Game.check(script.Args(env_id=f"ALE/{game}-v5", play="runs"))
    assert capsys.readouterr().out == ""


# --- Sticky actions ---


def executed_actions(env):
    """From now on the game stands still, and the action of every frame that would have run is in the list returned."""
    executed = []
    env.game.act = lambda action: executed.append(action) or 0.0
    env.game.over = lambda: False
    env.game.draw = lambda screen: None
    return executed


def test_actions_stick_in_every_frame_and_not_for_whole_steps():
    """Statistics of one change of the action, in the four frames of its step. Sticking for whole steps, as in several
    ports, would give .25, .25 and 1 for the three numbers."""
    env, frame = Env(MONTEZUMA, max_episode_steps=10**9), blank()
    executed = executed_actions(env)
    for t in range(20_000):
        env.step(1 + t % 17, frame)
    frames = np.array(executed).reshape(-1, 4)
    wanted = 1 + np.arange(len(frames)) % 17
    stale = frames != wanted[:, None]
    assert (np.diff(stale.astype(int), axis=1) <= 0).all()  # repeated is the action executed, so stale frames lead
    before = np.concatenate([[0], frames[:-1, 3]])
    assert (frames == np.where(stale, before[:, None], wanted[:, None])).all()
    deviations = 4 / math.sqrt(len(frames))
    assert stale[:, 0].mean() == pytest.approx(0.25, abs=deviations * math.sqrt(0.25 * 0.75))
    assert stale.all(1).mean() == pytest.approx(0.25**4, abs=deviations * math.sqrt(0.25**4))
    assert stale.sum(1).mean() == pytest.approx(0.332031, abs=deviations * stale.sum(1).std())


def test_without_sticky_actions_every_frame_runs_the_chosen_action():
    env, frame = Env(MONTEZUMA, sticky_action_prob=0.0), blank()
    executed = executed_actions(env)
    for t in range(100):
        env.step(t % 18, frame)
    assert executed == [t % 18 for t in range(100) for _ in range(4)]


def test_a_reset_makes_the_noop_the_action_that_sticks():
    """Otherwise the first frames of an episode would repeat what the player did when the last one ended."""
    env, frame = Env(MONTEZUMA, max_episode_steps=10**9), blank()
    executed, first = executed_actions(env), []
    for _ in range(100):
        env.step(5, frame)
        env.reset(frame)
        del executed[:]
        env.step(9, frame)
        first.append(executed[0])
    assert set(first) == {0, 9}


def test_no_two_environments_share_their_sticky_coins():
    """Neither within a run nor between seeds: seed + index as the generator's seed would give (1, 1) = (2, 0)."""
    patterns = []
    for seed, index in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (1, 0)):
        env, frame = Env(MONTEZUMA, index, seed=seed), blank()
        executed = executed_actions(env)
        for t in range(100):
            env.step(1 + t % 17, frame)
        patterns.append(tuple(executed))
    assert len(set(patterns)) == 5
    assert patterns[-1] == patterns[0]


# --- Many environments ---

OPTIONS = dict(seed=5, max_episode_steps=60)
STEPS = 130


@pytest.fixture(scope="module")
def plain_loop():
    """5 environments of Space Invaders in a plain loop: actions and, for each step, what VectorEnv.step should give."""
    actions = np.random.default_rng(1).integers(6, size=(STEPS, 5))
    envs = [Env(INVADERS, index, **OPTIONS) for index in range(5)]
    frames, results = np.zeros((5, 84, 84), np.uint8), []
    for env, frame in zip(envs, frames, strict=True):
        env.reset(frame)
    first = frames.copy()
    for row in actions:
        rewards, dones, episodes = [], [], []
        for env, action, frame in zip(envs, row, frames, strict=True):
            reward, done, summary = env.step(int(action), frame)
            if done:  # same-step reset: the frame is the new episode's first
                env.reset(frame)
                episodes.append(summary)
            rewards.append(reward)
            dones.append(done)
        results.append((frames.copy(), np.array(rewards), np.array(dones), episodes))
    return actions, first, results


def assert_equal_steps(one, other):
    for got, expected in zip(one, other, strict=True):
        for a, b in zip(got[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        assert got[3] == expected[3]


@pytest.mark.parametrize("workers, groups", [(1, 1), (2, 2), (3, 2), (2, 3), (3, 3), (5, 3), (9, 9)])
def test_results_depend_on_neither_workers_nor_groups(plain_loop, workers, groups):
    """5 environments are divided unevenly by 2 and 3; more groups than environments, or more workers than a group has,
    must do as well."""
    actions, first, expected = plain_loop
    envs = VectorEnv(INVADERS, 5, num_workers=workers, num_groups=groups, **OPTIONS)
    try:
        assert len(envs.workers) == min(workers, max(group.stop - group.start for group in envs.groups))
        shares = np.array([[len(share) for share in part] for _, _, part in envs.workers])
        assert np.ptp(shares, axis=0).max() <= 1  # each group keeps all workers busy
        assert [i for group in envs.groups for i in range(5)[group]] == list(range(5))
        assert envs.num_actions == 6
        np.testing.assert_array_equal(envs.reset(), first)
        results = [envs.step(row) for row in actions[: STEPS // 2]]
        # The other half in the order of the training loop: one group steps while others are waited for.
        received = []
        for t, row in enumerate(actions[STEPS // 2 :]):
            for g, members in enumerate(envs.groups):
                if t > 0:
                    received.append(copy.deepcopy(envs.recv(g)))
                envs.send(g, row[members])
        received += [copy.deepcopy(envs.recv(g)) for g in range(len(envs.groups))]
        for t in range(STEPS - STEPS // 2):
            parts = received[t * len(envs.groups) : (t + 1) * len(envs.groups)]
            frames, rewards, dones, ended = zip(*parts, strict=True)
            results.append(
                (*map(np.concatenate, (frames, rewards, dones)), [episode for part in ended for episode in part])
            )
        assert_equal_steps(results, expected)
    finally:
        envs.close()
    assert any((rewards > 1).any() for _, rewards, _, _ in results)  # unclipped
    assert sum(len(episodes) for *_, episodes in results) == 5 * (STEPS // 60)


def test_the_environments_of_a_second_process_are_others():
    """first_index is rank * num_envs under torchrun: with the same seeds every process would explore the same."""
    actions = np.random.default_rng(2).integers(18, size=(20, 4))
    frames = {}
    for first, count in ((0, 4), (2, 2)):
        envs = VectorEnv(MONTEZUMA, count, first_index=first, num_workers=1, seed=3, max_episode_steps=9)
        try:
            results = [envs.step(row[first : first + count]) for row in actions]
        finally:
            envs.close()
        frames[first] = np.stack([frame for frame, *_ in results])
        assert {episode["env"] for *_, episodes in results for episode in episodes} == set(range(first, first + count))
    np.testing.assert_array_equal(frames[2], frames[0][:, 2:])
    assert (frames[0][:, 0] != frames[0][:, 2]).any()


def test_rollouts_hold_signs_and_episodes_hold_the_score():
    """A score made of clipped rewards cannot be compared with anything; unclipped rewards would not train."""
    envs = VectorEnv(INVADERS, 4, num_workers=1, max_episode_steps=60)
    raw, recv = np.zeros((180, 4), np.float32), envs.recv

    def noted(group):
        received = recv(group)
        t = noted.steps[group]
        raw[t, envs.groups[group]] = received[1]
        noted.steps[group] += 1
        return received

    noted.steps = [0] * len(envs.groups)
    envs.recv = noted

    class Uniform(torch.nn.Module):
        def forward(self, obs):
            return torch.zeros(len(obs), 6), torch.zeros(len(obs)), torch.zeros(len(obs))

    try:
        rollout = Rollout(180, 4)
        rollout.start_episodes(envs.reset())
        torch.manual_seed(0)
        episodes = collect(Uniform(), envs, rollout)
    finally:
        envs.close()
    np.testing.assert_array_equal(rollout.rewards, np.sign(raw))
    assert raw.max() > 1
    expected = [(60 * k + 59, i, raw[60 * k : 60 * k + 60, i].sum()) for k in range(3) for i in range(4)]
    found = [(episode["t"], episode["env"], episode["stats"]["episodic_return"]) for episode in episodes]
    assert sorted(found) == expected
    assert [(t, i) for t, i in zip(*np.nonzero(rollout.dones), strict=True)] == [(t, i) for t, i, _ in expected]


def test_a_saved_state_goes_on_identically_in_other_processes():
    """In the middle of episodes, with other workers, other groups and another seed: nothing is left out of the state.

    It is made of what a checkpoint may hold, which is loaded without executing anything.
    """
    actions = np.random.default_rng(3).integers(6, size=(130, 5))
    options = dict(max_episode_steps=60)
    envs = VectorEnv(INVADERS, 5, num_workers=1, seed=4, **options)
    try:
        for row in actions[:50]:
            envs.step(row)
        states = envs.call("get_state")
        expected = [envs.step(row) for row in actions[50:]]
    finally:
        envs.close()
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    others = VectorEnv(INVADERS, 5, num_workers=3, num_groups=1, seed=99, **options)
    try:
        for row in actions[:3]:
            others.step(row)
        others.call("set_state", states)
        assert_equal_steps([others.step(row) for row in actions[50:]], expected)
    finally:
        others.close()
    episodes = [episode for *_, ended in expected for episode in ended]
    assert len(episodes) == 10
    later = sum(rewards for _, rewards, _, _ in expected[:10])
    # Some points are from before.
    assert any(episode["stats"]["episodic_return"] > later[episode["env"]] for episode in episodes[:5])


def test_the_state_knows_the_action_that_sticks_and_the_rooms():
    env, other, frame = Env(MONTEZUMA, sticky_action_prob=1.0), Env(MONTEZUMA, sticky_action_prob=1.0), blank()
    env.last_action = 5
    env.game.ale.setRAM(3, 7)
    env.step(9, frame)
    state = env.get_state()
    env.step(9, frame)
    other.set_state(state)
    assert other.visits == {7: 1}
    assert other.room == 7
    executed = executed_actions(other)
    other.step(9, frame)
    assert executed == [5] * 4
    assert env.visits == other.visits == {7: 2}
    assert state["visits"] == {7: 1}


# --- Processes that end ---


def children():
    return psutil.Process().children(recursive=True)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_reported_soon(victim):
    """Its pipe closes; without that (an end inherited by another worker) the run would hang for ever."""
    before = children()
    envs = VectorEnv(MONTEZUMA, 4, num_workers=2)
    process = envs.workers[victim][0]
    owned = sorted(i for share in envs.workers[victim][2] for i in share)
    try:
        envs.reset()
        os.kill(process.pid, signal.SIGSTOP)  # so that the main process waits when the kill comes
        start = time.perf_counter()
        threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL)).start()
        with pytest.raises(ChildProcessError) as caught:
            envs.step(np.zeros(4, np.int64))
        assert 0.3 <= time.perf_counter() - start < 5
        message = str(caught.value)
        assert f"worker {victim}" in message
        assert ", ".join(map(str, owned)) in message
        assert str(-signal.SIGKILL) in message
    finally:
        envs.close()
    assert children() == before


def test_a_game_that_cannot_start_is_reported_with_its_traceback(monkeypatch):
    """Not as too many workers."""

    def broken(*_, **__):
        raise LookupError("no such cartridge")

    monkeypatch.setattr(script.Game, "__init__", broken)
    with pytest.raises(ChildProcessError, match=r"(?s)^worker 0 .*no such cartridge") as caught:
        VectorEnv(MONTEZUMA, 2, num_workers=1)
    assert "fewer" not in str(caught.value)


def test_no_more_workers_than_a_group_has_environments():
    """The others would have nothing to do: one group steps at a time."""
    for num_envs, num_workers, expected in ((8, 8, 4), (5, 4, 3), (4, 1, 1)):
        with contextlib.closing(VectorEnv(MONTEZUMA, num_envs, num_workers=num_workers)) as envs:
            assert len(envs.workers) == expected


def test_a_worker_that_raises_is_reported_with_its_traceback():
    envs = VectorEnv(MONTEZUMA, 2, num_workers=2)
    try:
        with pytest.raises(ChildProcessError, match=r"(?s)worker \d.*IndexError"):
            envs.step(np.array([0, 99]))
    finally:
        envs.close()


def test_close_leaves_no_process_even_in_the_middle_of_a_step():
    before = children()
    envs = VectorEnv(MONTEZUMA, 4, num_workers=2)
    assert len(children()) >= len(before) + 2
    envs.send(0, np.zeros(2, np.int64))
    envs.close()
    assert children() == before
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


def test_workers_end_with_a_main_process_that_is_killed():
    """Otherwise every crashed run would leave a core busy or a gigabyte occupied until somebody looks."""
    code = """
import numpy as np, rnd_ppo_atari as script
envs = script.VectorEnv("ALE/MontezumaRevenge-v5", 4, num_workers=2)
print(*(process.pid for process, _, _ in envs.workers), flush=True)
while True:
    envs.step(np.zeros(4, np.int64))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as main:
        workers = [psutil.Process(int(pid)) for pid in main.stdout.readline().split()]
        assert len(workers) == 2
        main.kill()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(not hasattr(psutil.Process, "io_counters"), reason="this system does not count a process's bytes")
def test_no_frame_goes_through_a_pipe():
    """Frames are in shared memory: what the main process reads in a step is far less than a frame."""
    envs = VectorEnv(MONTEZUMA, 4, num_workers=1)
    try:
        envs.reset()
        before = psutil.Process().io_counters().read_chars
        for _ in range(10):
            envs.step(np.zeros(4, np.int64))
        assert psutil.Process().io_counters().read_chars - before < 10 * 84 * 84
    finally:
        envs.close()
