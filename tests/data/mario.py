"""Records what gym-super-mario-bros says of lists of actions, for tests/test_mario.py.

In an environment of its own (Python up to 3.12): pip install "numpy<2" gym==0.26.2 gym-super-mario-bros==7.4.0
python tests/data/mario.py runs/SuperMarioBros-1-1-simple__.../best_episode.json      (an episode that reaches the flag)
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
from gym_super_mario_bros.actions import SIMPLE_MOVEMENT
from gym_super_mario_bros.smb_env import SuperMarioBrosEnv
from nes_py.wrappers import JoypadSpace

env = JoypadSpace(SuperMarioBrosEnv(target=(1, 1)), SIMPLE_MOVEMENT)
lists = [json.loads(Path(path).read_text())["actions"] + [0] * 4 for path in sys.argv[1:]]  # the end is a frame later
for seed in range(14):  # random play with preferences, each action for some frames
    rng = np.random.default_rng(seed)
    lists.append(
        rng.choice(7, 1500, p=rng.dirichlet([0.3, 2, 2, 2, 2, 1, 0.7])).repeat(rng.integers(2, 12, 1500)).tolist()
    )
episodes = []
for actions in lists:
    env.reset()
    episode = dict(actions=[], x=[40], clock=[int(env.unwrapped._time)], flag=False)
    for action in actions:
        *_, done, info = env.step(action)
        episode["actions"].append(action)
        episode["x"].append(int(info["x_pos"]))
        episode["clock"].append(int(info["time"]))
        if done:
            episode["flag"] = bool(info["flag_get"])
            break
    episodes.append(episode)
    print(len(episode["actions"]), "frames to", episode["x"][-1], "flag" if episode["flag"] else "")
Path(__file__).with_name("mario.json.gz").write_bytes(gzip.compress(json.dumps(episodes).encode(), mtime=0))
