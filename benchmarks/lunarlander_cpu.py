"""PPO on LunarLander-v3 beside stable-baselines3, tuned and alike, on one CPU core.

Run: python benchmarks/lunarlander_cpu.py [seeds] [--record]

Seconds of collecting and learning until sampled actions earn 200 on average over 100
fresh episodes, asked every 16,384 transitions; evaluations and imports are not counted.
The candidates take turns, seed by seed. The settings of this library are its preset for
this environment. The peer has them too, all of them: networks, transitions, rates and how
they fall. And it has its own, those of rl-zoo3, which are meant for a million transitions;
it is stopped after 300 seconds. Tuned beside tuned says how soon a user is there; the same
settings on both sides say what a gradient step costs, with its share of collecting.
"""

import sys
from dataclasses import replace
from functools import partial

from race import Race, ours, run, theirs
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from po_book.train import default_config

RACE = Race("LunarLander-v3", bar=200, every=16_384, budget=10_000_000, seconds=300)
OURS = replace(default_config("ppo", RACE.env), **RACE.scored())


def peer(seed: int) -> PPO:
    "The tuned peer, which collects 16,384 transitions an iteration."
    env = make_vec_env(RACE.env, n_envs=16, seed=seed)
    return PPO("MlpPolicy", env, n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999,
               n_epochs=4, ent_coef=0.01, seed=seed, device="cpu")


def alike(seed: int) -> PPO:
    "The peer with the settings of this library; where none is named its default is the same."
    env = make_vec_env(RACE.env, n_envs=OURS.n_envs, seed=seed)
    return PPO("MlpPolicy", env, n_steps=OURS.n_steps, batch_size=OURS.minibatch,
               n_epochs=OURS.epochs, gae_lambda=OURS.lam, gamma=OURS.gamma,
               learning_rate=lambda left: OURS.lr * left,
               clip_range=lambda left: OURS.clip * left,
               vf_coef=OURS.value_coef / 2,  # of squares, which here are halved
               max_grad_norm=OURS.max_grad_norm, seed=seed, device="cpu")


def main(seeds: int, recording: bool) -> None:
    candidates = {
        "po_book": partial(ours, RACE, "ppo", OURS),
        "stable-baselines3, po_book's settings": partial(
            theirs, replace(RACE, budget=OURS.total_steps), alike
        ),
        "stable-baselines3, tuned": partial(theirs, RACE, peer),
    }
    run("PPO", RACE, candidates, seeds, "lunarlander_cpu" if recording else None)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--record"]
    if len(words) > 1 or not all(word.isdigit() for word in words):
        sys.exit(__doc__)
    main(int(words[0]) if words else 5, "--record" in sys.argv)
