"Each recorded variant is what its name says, as the first iterations of a run show it."

import re
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch

from conftest import ROOT
from po_book import multi_agent
from po_book.algorithm import new_learner
from po_book.train import ALGORITHMS, default_config

sys.path.insert(0, str(ROOT / "benchmarks"))
from record import RECORDS


def flat(policy):
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach()


def run(record, variant, iterations=1, **less):
    "A learner, and the rollouts of its first iterations; `less` work than recorded."
    config = replace(RECORDS[record].variants[variant], **less)
    (method,) = [x for x in ALGORITHMS.values() if x.config is type(config)]
    learner = new_learner(RECORDS[record].place, 0, config)
    return learner, [method.iteration(learner, config, 1.0)[0] for _ in range(iterations)]


SWITCHES = {  # whether it has a replay memory, and a target network
    "replay and target network": (True, True),
    "without target network": (True, False),
    "without replay": (False, True),
    "with neither": (False, False),
}


def test_the_switches_of_dqn_are_all_there_and_change_nothing_else():
    variants = RECORDS["dqn_cartpole"].variants
    assert list(variants) == list(SWITCHES)
    switched = "memory", "learning_starts", "tau"
    base = variants["replay and target network"]
    for config in variants.values():
        assert replace(config, **{name: getattr(base, name) for name in switched}) == base


@pytest.mark.parametrize("variant", SWITCHES)
def test_a_switch_of_dqn_is_off_where_its_name_says(variant):
    replays, follows = SWITCHES[variant]
    learner, rollouts = run("dqn_cartpole", variant, 6, updates=1)
    target, replay = learner.extra["target"], learner.extra["replay"]
    assert torch.equal(flat(target), flat(learner.policy)) == (not follows)
    seen = torch.cat([rollout.transitions("obs") for rollout in rollouts])
    steps = rollouts[0].rewards.numel()  # of one iteration
    newest = seen if replays else seen[-steps:]
    assert len(newest) == len(replay) and len(seen) > 5 * steps / 2
    kept = replay.columns["obs"][: len(replay)]
    assert sorted(kept.tolist()) == sorted(newest.tolist())
    config = RECORDS["dqn_cartpole"].variants[variant]
    assert (config.memory >= config.total_steps) == replays


@pytest.mark.parametrize("variant", RECORDS["ddpg_pendulum"].variants)
def test_the_noise_of_ddpg_is_that_of_its_name(variant):
    less = dict(updates=1, learning_starts=8, n_steps=250)
    learner, _ = run("ddpg_pendulum", variant, **less)
    config = replace(RECORDS["ddpg_pendulum"].variants[variant], **less)
    acted = deepcopy(learner.policy)
    rollout, _ = ALGORITHMS["ddpg"].iteration(learner, config, 0.5)
    noise = (rollout.actions - acted.mean(rollout.obs)) / 2  # in half-widths of the bounds
    inside = noise[rollout.actions.abs() < 2]
    assert len(inside) > 1900
    assert inside.std().item() == pytest.approx(float(variant.split()[-1]), rel=0.05)
    first, second = RECORDS["ddpg_pendulum"].variants.values()
    assert replace(second, sigma=first.sigma) == first


@pytest.mark.parametrize("variant", RECORDS["trpo_pendulum"].variants)
def test_a_rollout_of_trpo_is_as_long_as_its_name_says(variant):
    _, (rollout,) = run("trpo_pendulum", variant, epochs=1, n_envs=2)
    assert len(rollout.rewards) == int(re.search(r"\d+", variant)[0])
    first, second = RECORDS["trpo_pendulum"].variants.values()
    assert replace(second, n_steps=first.n_steps) == first


TEAMS = [("team_meeting", name) for name in RECORDS["team_meeting"].variants]
TEAMS += [("team_spread", name) for name in RECORDS["team_spread"].variants]


@cache
def team(record, variant):
    "A fresh learner of a team."
    if record == "team_spread":
        pytest.importorskip("mpe2")
    return new_learner(RECORDS[record].place, 0, RECORDS[record].variants[variant])


def moved_by(x, inputs):
    "Which entries of the inputs the sum of x depends on."
    slopes = torch.autograd.grad(x.sum(), inputs, retain_graph=True, allow_unused=True)
    zeros = map(torch.zeros_like, inputs)
    return torch.cat([(z if s is None else s).flatten() for s, z in zip(slopes, zeros)]) != 0


@pytest.mark.parametrize("record, variant", TEAMS)
def test_a_critic_of_a_team_sees_what_its_name_says(record, variant):
    learner = team(record, variant)
    obs = learner.stepper.obs.clone().requires_grad_()
    values = learner.policy.value(obs)
    first, second = (moved_by(values[:, i], [obs]) for i in range(2))
    assert first.any() and second.any()
    if variant.startswith("IPPO"):  # each sees what is its own
        assert not (first & second).any()
    else:
        assert torch.equal(first, second)


@pytest.mark.parametrize("record, variant", TEAMS)
def test_a_team_has_one_network_or_one_each_as_its_name_says(record, variant):
    learner = team(record, variant)
    logits = learner.policy.distribution(learner.stepper.obs).logits
    weights = list(learner.policy.actor.parameters())
    first, second = (moved_by(logits[:, i, 0], weights) for i in range(2))
    assert first.any() and second.any()
    shared = "shared" in variant or variant in ("IPPO", "MAPPO")
    assert (first & second).any().item() == shared


@pytest.mark.parametrize("record, variant", TEAMS)
def test_a_team_learns_in_turn_where_its_name_says(record, variant, monkeypatch):
    team(record, variant)
    turns, whole = [], multi_agent.turn

    def turn(*how, **more):
        turns.append(how)
        return whole(*how, **more)

    monkeypatch.setattr(multi_agent, "turn", turn)
    learner, _ = run(record, variant, epochs=1, n_steps=33, n_envs=2)
    agents = learner.policy.value(learner.stepper.obs).shape[1]
    assert len(turns) == (agents if variant.startswith("HAPPO") else 0)


@pytest.mark.parametrize("record", ["team_meeting", "team_spread"])
def test_teams_differ_in_nothing_that_no_name_says(record):
    variants = RECORDS[record].variants
    asked = {name: vars(config) | {"share": None} for name, config in variants.items()}
    assert all(config == next(iter(asked.values())) for config in asked.values())


def test_the_records_of_presets_are_of_the_presets():
    for name in "ppo_acrobot", "ppo_pendulum", "ppo_lunarlander":
        record = RECORDS[name]
        config = replace(default_config("ppo", record.place), eval_every=0)
        (recorded,) = record.variants.values()
        assert replace(recorded, eval_every=0) == config
    for name, config in RECORDS["cartpole_methods"].variants.items():
        method = ALGORITHMS[name.lower()]
        assert type(config) is method.config
        asked = dict(total_steps=config.total_steps, eval_every=config.eval_every)
        assert config == replace(default_config(name.lower(), "CartPole-v1"), **asked)
    budgets = {x.total_steps for x in RECORDS["cartpole_methods"].variants.values()}
    assert budgets == {100_000}
