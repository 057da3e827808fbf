"""PPO and TRPO on CartPole-v1 beside stable-baselines3, both tuned, on one CPU core.

Run: python benchmarks/cartpole_cpu.py ppo|trpo [seeds] [--record]

Seconds of collecting and learning until sampled actions earn 475 on average over 100
fresh episodes, asked every 1024 transitions; evaluations and imports are not counted. The
candidates take turns, seed by seed, so that a busy moment of the machine hits all. The
peer's settings are those of rl-zoo3. For PPO there are two more: this library with the
peer's settings and with those of CleanRL. Tuned beside tuned says how soon a user is
there; the same settings on both sides say what a gradient step costs, with its share of
collecting. TRPO's gradient steps are the natural one and those of the critic.
"""

import sys
from dataclasses import replace
from functools import partial

from race import Race, ours, run, theirs
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from po_book.train import default_config

RACE = Race("CartPole-v1", bar=475, every=1024, budget=100_000)
CARTPOLE = {name: default_config(name, "CartPole-v1") for name in ("ppo", "trpo")}
OURS = {
    "ppo": {
        "po_book": replace(CARTPOLE["ppo"], **RACE.scored()),
        "po_book, the peer's settings": replace(
            CARTPOLE["ppo"], total_steps=RACE.budget, n_envs=8, n_steps=32, minibatch=256,
            epochs=20, lr=1e-3, gamma=0.98, lam=0.8,
            value_coef=1.0,  # its value loss is the square, ours is half of it
            **RACE.scored(),
        ),
        "po_book, CleanRL's settings": replace(
            CARTPOLE["ppo"], total_steps=500_000, n_envs=4, n_steps=128, minibatch=128,
            epochs=4, lr=2.5e-4, gamma=0.99, lam=0.95, entropy_coef=0.01, **RACE.scored(),
        ),
    },
    "trpo": {"po_book": replace(CARTPOLE["trpo"], **RACE.scored())},
}
PEER = {"ppo": "stable-baselines3, tuned", "trpo": "sb3-contrib, tuned"}


def peer(algorithm: str, seed: int) -> PPO | TRPO:
    "The tuned peer, which collects 256 (PPO) or 1024 (TRPO) transitions an iteration."
    n_envs = {"ppo": 8, "trpo": 2}[algorithm]
    env = make_vec_env("CartPole-v1", n_envs=n_envs, seed=seed)
    shared = dict(seed=seed, device="cpu")
    if algorithm == "trpo":
        return TRPO("MlpPolicy", env, n_steps=512, batch_size=512, cg_damping=1e-3,
                    gae_lambda=0.98, gamma=0.99, learning_rate=1e-3, n_critic_updates=20,
                    **shared)
    return PPO("MlpPolicy", env, n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8,
               gamma=0.98, learning_rate=lambda left: 1e-3 * left,
               clip_range=lambda left: 0.2 * left, ent_coef=0.0, **shared)


def main(algorithm: str, seeds: int, recording: bool) -> None:
    mine = OURS[algorithm].items()
    candidates = {name: partial(ours, RACE, algorithm, config) for name, config in mine}
    candidates[PEER[algorithm]] = partial(theirs, RACE, partial(peer, algorithm))
    name = f"cartpole_cpu_{algorithm}" if recording else None
    run(algorithm.upper(), RACE, candidates, seeds, name)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--record"]
    if len(words) not in (1, 2) or words[0] not in OURS:
        sys.exit(__doc__)
    main(words[0], int(words[1]) if len(words) > 1 else 5, "--record" in sys.argv)
