"One seed becomes many: for every use another, and none that a neighbour has."

from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch

import po_book.runner
from po_book.algorithm import Config, new_learner
from po_book.rollout import STREAMS, evaluate, make_stepper, spawn_seed
from po_book.spaces import make_policy
from po_book.train import PPOConfig, train

IDS = "Acrobot-v1", "po_book/CartPole-v1", "CartPole-v1"
FEW = Config(n_envs=16)


def starts(env: str, seed: int) -> torch.Tensor:
    return new_learner(env, seed, FEW).stepper.obs


def test_a_seed_and_a_use_decide_and_nothing_else():
    seeds = [spawn_seed(seed, use, *more) for seed, use, more in product(range(50), STREAMS, [(), (0,), (1,)])]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert spawn_seed(3, "actions") == spawn_seed(3, "actions")
    words = np.random.SeedSequence(3, spawn_key=(STREAMS.index("actions"),)).generate_state(1)
    assert spawn_seed(3, "actions") == words[0] >> 1


@pytest.mark.parametrize("seed, use, message", [
    (-1, "starts", "seed must be at least 0, got -1"),
    (0.5, "starts", "seed must be a whole number, got 0.5"),
    (0, "weather", "use must be one of weights, .*got 'weather'"),
])  # fmt: skip
def test_what_is_no_seed_is_refused(seed, use, message):
    with pytest.raises(ValueError, match=message):
        spawn_seed(seed, use)


@pytest.mark.parametrize("env", IDS)
def test_neighbouring_seeds_share_no_start(env):
    "Counted up, seeds 0 and 1 would share fifteen of sixteen."
    rows = torch.cat([starts(env, seed) for seed in range(4)])
    assert len(rows.unique(dim=0)) == len(rows) == 64


def ranks_correlate(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


def clocks(generator: torch.Generator) -> torch.Tensor:
    "As actions are drawn."
    return torch.empty(1000).exponential_(generator=generator)


def places(generator: torch.Generator) -> torch.Tensor:
    "As first states are drawn."
    return torch.empty(1000, dtype=torch.float64).uniform_(generator=generator)


def test_actions_starts_and_minibatches_do_not_correlate():
    "Chance gives a rank correlation of .03."
    learner = new_learner("po_book/CartPole-v1", 0, FEW)
    draws = clocks(learner.generator), places(learner.stepper.env.generator), places(learner.order)
    for i, j in (0, 1), (0, 2), (1, 2):
        assert abs(ranks_correlate(draws[i], draws[j])) < 0.15
    # With one seed for both the test would have seen this.
    same = (draw(torch.Generator().manual_seed(0)) for draw in (clocks, places))
    assert ranks_correlate(*same) > 0.99


def test_weights_of_neighbouring_seeds_do_not_correlate():
    a, b = (new_learner("CartPole-v1", seed, FEW).policy.actor[1].weight.detach().flatten() for seed in (0, 1))
    assert abs(float(np.corrcoef(a, b)[0, 1])) < 0.25


class Remembering(gym.Wrapper):
    "Notes where episodes start."

    seen: list

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        self.seen.append(tuple(obs))
        return obs, info


def noting(seen: list):
    def make():
        env = Remembering(gym.make("CartPole-v1"))
        env.seen = seen
        return env

    return make


@pytest.mark.parametrize("seed", [0, 1])
def test_no_evaluation_starts_where_training_did(seed):
    "Nor do two evaluations share a start, whatever seed the reader asks for."
    trained, played = [], []
    config = PPOConfig(total_steps=600, n_envs=4, eval_every=300, eval_episodes=5)
    asked = dict(seed=seed, config=config, eval_env=noting(played), progress=False)
    run = train("ppo", noting(trained), **asked)
    assert len(trained) > 10 and len(played) >= 10
    for chosen in 0, 1:
        run.evaluate(5, chosen)
    assert not {*trained} & {*played}
    assert len({*played}) == len(played)


def test_what_an_evaluation_is_seeded_with():
    asked, drawn = [], set()

    class Asking(gym.Wrapper):
        def reset(self, *, seed=None, **kwargs):
            asked.append(seed)
            return super().reset(seed=seed, **kwargs)

    policy = make_policy(gym.make_vec("CartPole-v1"))
    plain = policy.act
    policy.act = lambda obs, generator: drawn.add(generator.initial_seed()) or plain(obs, generator)
    evaluate(policy, lambda: Asking(gym.make("CartPole-v1")), 2, seed=7)
    starts, actions = (spawn_seed(7, "evaluation", i) for i in range(2))
    assert [seed for seed in asked if seed is not None] == [starts, starts + 1]
    assert drawn == {actions} and starts != actions


def test_what_each_part_of_a_run_is_seeded_with(monkeypatch):
    seen = {}
    made = po_book.algorithm.make_stepper
    monkeypatch.setattr(po_book.algorithm, "make_stepper", lambda *x: seen.update(starts=x[-1]) or made(*x))
    learner = new_learner("CartPole-v1", 5, FEW)
    assert seen["starts"] == spawn_seed(5, "starts")
    assert learner.generator.initial_seed() == spawn_seed(5, "actions")
    assert learner.order.initial_seed() == spawn_seed(5, "minibatches")
    stepper = make_stepper("CartPole-v1", 2)
    generator = torch.Generator().manual_seed(spawn_seed(5, "weights"))
    wanted = make_policy(stepper.env, generator=generator)
    for a, b in zip(learner.policy.parameters(), wanted.parameters()):
        assert torch.equal(a, b)
