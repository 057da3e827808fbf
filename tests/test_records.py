"Each recorded variant is what its name says, as its settings or its first iterations show."

import re
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import po_book.learner
import po_book.train
import pytest
import quotes
import torch

from conftest import ROOT
from po_book import multi_agent
from po_book.algorithm import new_learner
from po_book.language_model import tiny_lm
from po_book.lm_learner import tiny_config
from po_book.objective import PRESETS
from po_book.pretrained import load_lm
from po_book.reward_models import RewardModel
from po_book.samplers import Request
from po_book.tasks import ChainAddition
from po_book.terms import InReward, NoReference
from po_book.train import ALGORITHMS, PPOConfig, default_config

sys.path.insert(0, str(ROOT / "benchmarks"))
import record_lm
from engine import EightBits, Stale
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


NAMED = {  # what a detail's name says, as settings
    "as it is": {},
    "rate and clip range constant": {"anneal": False},
    "advantages not normalised": {"normalize_advantages": False},
    "gradient not bounded": {"max_grad_norm": 1e9},
    "ratio not clipped": {"clip": None},
    "one epoch": {"epochs": 1},
    "lambda 0": {"lam": 0.0},
    "lambda 1": {"lam": 1.0},
    "observations normalised": {"normalize_obs": True},
    "entropy bonus 0.01": {"entropy_coef": 0.01},
    "one environment": {"n_envs": 1, "n_steps": 1024},
    "epochs end at 0.01 nats": {"target_kl": 0.01},
    "rewards normalised": {"normalize_rewards": True},
}


def test_a_detail_of_ppo_changes_what_its_name_says_and_nothing_else():
    variants = dict(RECORDS["ppo_details"].variants)
    base, general = variants["as it is"], variants.pop("general defaults")
    assert variants == {name: replace(base, **more) for name, more in NAMED.items()}
    for name, more in NAMED.items():
        assert all(getattr(base, key) != value for key, value in more.items()), name
    assert general == PPOConfig(total_steps=base.total_steps, eval_every=base.eval_every)
    pairs = zip(asdict(base).values(), asdict(general).values())
    assert sum(one != other for one, other in pairs) == 7  # as the page says


def detail(name):
    "The log of a short run of a detail, four rollouts."
    config = replace(RECORDS["ppo_details"].variants[name], total_steps=4096, eval_every=0)
    return po_book.train.train("ppo", "CartPole-v1", config=config, progress=False).log


def test_a_run_without_the_clip_clips_nothing():
    def fractions(name):
        return [row["clip_fraction"] for row in detail(name)]

    assert set(fractions("ratio not clipped")) == {0.0}
    assert max(fractions("as it is")) > 0.05


def test_a_run_whose_epochs_end_early_takes_fewer(monkeypatch):
    made, epochs = po_book.learner.minibatches, []
    monkeypatch.setattr(po_book.learner, "minibatches", lambda *x: epochs.append(1) or made(*x))
    taken = {}
    for name in "as it is", "epochs end at 0.01 nats":
        epochs.clear()
        rollouts = len(detail(name))
        taken[name] = len(epochs) / rollouts
    assert taken["as it is"] == 6 > taken["epochs end at 0.01 nats"] >= 1


@pytest.mark.parametrize("name", ["as it is", "rewards normalised", "general defaults"])
def test_a_run_with_normalised_rewards_learns_from_other_numbers(name, monkeypatch):
    made, seen = po_book.train.critic_batch, []
    monkeypatch.setattr(
        po_book.train, "critic_batch", lambda *x: seen.append(x[1].rewards[x[1].valid]) or made(*x)
    )
    detail(name)
    ones = [bool((rewards == 1).all()) for rewards in seen]
    assert len(seen) >= 4 and all(ones) == (name == "as it is")
    if name != "as it is":
        assert max(rewards.max() for rewards in seen[1:]) < 0.5  # returns deviate by more than 2


LM = record_lm.RECORDS
PRESET = {"PPO": "rlhf-ppo", "RLOO": "rloo", "GRPO": "grpo", "Dr. GRPO": "dr-grpo", "DAPO": "dapo"}
UNLIKE = {"RLOO": {"trust"}}  # as the page says


@pytest.mark.parametrize("name", LM["lm_methods"].variants)
def test_a_method_is_the_preset_of_its_name(name):
    variant, preset = LM["lm_methods"].variants[name], PRESETS[PRESET[name]]
    config = LM["lm_methods"].variants["PPO"].config
    assert variant.config == replace(config, steps=51 if name == "DAPO" else 60)
    unlike = {key for key, x in vars(preset).items() if getattr(variant.objective, key) != x}
    assert unlike == UNLIKE.get(name, set())


def test_the_long_run_is_grpo_without_a_divergence():
    (variant,) = LM["grpo_long"].variants.values()
    assert variant.objective == replace(PRESETS["grpo"], kl=NoReference())


def test_methods_are_compared_at_equal_samples():
    drawn = quotes.OF_RECORDS["whole"]("lm_methods", "DAPO", "drawn_groups").mean()
    assert 51 * drawn == pytest.approx(60 * 32, rel=0.02)
    drawn = quotes.OF_RECORDS["whole"]("lm_after_dapo", "DAPO", "drawn_groups").mean()
    assert 30 * drawn == pytest.approx(40 * 16, rel=0.1)


AFTER = {"MaxRL": {"trust"}, "GRPO": {"kl"}, "REINFORCE++": {"kl"}}  # as the page says


@pytest.mark.parametrize("name", LM["lm_after_dapo"].variants)
def test_what_came_after_is_a_preset_without_a_divergence_at_equal_samples(name):
    method, *engine = name.removesuffix(", rate / 3").split(", ")
    after = LM["lm_after_dapo"].variants
    variant, preset = after[name], PRESETS[method.lower()]
    config = after["GRPO"].config
    other = {"steps": 30, "eval_every": 15} if name == "DAPO" else {}
    other |= {"lr": config.lr / 3} if name.endswith("rate / 3") else {}
    assert variant.config == replace(config, **other)
    assert variant.objective.kl == NoReference()
    assert variant.engine == (engine[0] if engine else None)
    unlike = {key for key, x in vars(preset).items() if getattr(variant.objective, key) != x}
    assert unlike == AFTER.get(method, set()) | ({"correction"} if engine[1:] else set())


def test_an_engine_of_eight_bits_has_the_learners_weights_rounded(tokenizer):
    model = tiny_lm(tokenizer, width=16, layers=1, heads=2)
    stale, engine = Stale(model, tokenizer), EightBits(model, tokenizer)
    before = [x.clone() for x in model.parameters()]
    with torch.no_grad():
        for x in model.parameters():
            x += 0.1
    for sampler in stale, engine:
        sampler.load(model)
    for old, new, kept, coarse in zip(before, model.parameters(), stale.model.parameters(),
                                      engine.model.parameters()):  # fmt: skip
        torch.testing.assert_close(kept, old, atol=0, rtol=0)
        assert 0 < (coarse - new).abs().max() and coarse.unique().numel() < 256
        torch.testing.assert_close(coarse, new, rtol=2**-4, atol=2**-10)
    asked = Request(group_size=2, max_new_tokens=3, seed=1)
    drawn = engine([tokenizer("1+2=").input_ids] * 2, asked)
    again = engine([tokenizer("1+2=").input_ids] * 2, asked)
    assert len(drawn) == 4 and drawn == again and all(len(x.logps) == len(x.ids) for x in drawn)


def test_a_row_of_the_ablation_has_one_change_more():
    "And keeps those of the rows above."
    said = [
        {f"{part}.{key}": x for part, of in vars(v).items() if of for key, x in vars(of).items()}
        for v in LM["lm_ablation"].variants.values()
    ]
    changed = [{key for key in a if a[key] != b[key]} for a, b in pairwise(said)]
    assert changed == [
        {"config.drop_truncated"}, {"objective.trust"}, {"config.overlong_cache"},
        {"objective.aggregation"}, {"objective.selection"},
    ]  # fmt: skip
    assert {key for key in said[0] if said[0][key] != said[-1][key]} == set().union(*changed)


@pytest.mark.parametrize("record", ["rlhf_beta", "rlhf_learnt"])
def test_a_price_is_that_of_its_name_and_nothing_else_differs(record):
    config = LM["rlhf_beta"].variants["β = 1.0"].config
    for name, variant in LM[record].variants.items():
        price = InReward(float(name.removeprefix("β = ")))
        assert variant.objective == replace(PRESETS["rlhf-ppo"], kl=price)
        assert variant.config == config
    assert bool(LM[record].compared) == (record == "rlhf_learnt")


def test_a_learnt_reward_pays_and_the_rule_looks_on(tmp_path, monkeypatch):
    task = ChainAddition(2, 2)
    config = tiny_config(steps=2, prompts=4, group_size=4, max_new_tokens=4, eval_every=1,
                         eval_prompts=8, warmup=0, minibatches=1)
    variants = {"PPO": record_lm.Variant(PRESETS["rlhf-ppo"], config)}
    small = record_lm.LMRecord(task, 1, variants, taught=task, steps=1, compared=4)
    monkeypatch.setitem(LM, "small", small)
    pairs = ["1+2=", "3+4="], ["3", "7"], ["4", "9"]
    monkeypatch.setattr(record_lm, "compared", lambda *asked: pairs)
    fit = record_lm.fit_reward_model
    monkeypatch.setattr(
        record_lm, "fit_reward_model", lambda *asked, **how: fit(*asked, **how | {"steps": 3})
    )
    assert "2 pairs for the reward model, accuracy" in record_lm.teach(small, tmp_path)
    asked, fitted = [], RewardModel.reward

    def reward(judge, prompts, completions, *more, **columns):
        asked.append(fitted(judge, prompts, completions, *more, **columns))
        return asked[-1]

    monkeypatch.setattr(RewardModel, "reward", reward)
    start, *rows = record_lm.looks("small", tmp_path, "PPO", 0)
    assert start.keys() == {"variant", "seed", "steps", "success"} and start["steps"] == 0
    assert [row["reward"] for row in rows] == pytest.approx([sum(x) / 16 for x in asked])
    assert all(0 <= row["success"] <= 1 for row in rows) and asked[0] != asked[1]
    judge = RewardModel(*load_lm(tmp_path))
    judge.load_state_dict(torch.load(tmp_path / "judge.pt", weights_only=True))
    scores = torch.tensor([fitted(judge, pairs[0], answers) for answers in pairs[1:]])
    assert scores.std().item() == pytest.approx(1, rel=1e-4)


def test_pairs_for_a_reward_model_are_a_right_answer_and_a_wrong_one(monkeypatch):
    texts = [*["3"] * 3, *["5"] * 5, *["7"] * 8, "8", *["9", "0"] * 3, "8"]
    drawn = SimpleNamespace(texts=lambda tokenizer: texts)
    monkeypatch.setattr(record_lm, "sample", lambda *asked, **how: drawn)
    asked = ChainAddition(2, 2), ["1+2=", "3+4=", "4+4="], None
    prompts, right, wrong = record_lm.compared(None, None, *asked)
    assert prompts == ["1+2="] * 3 + ["4+4="] * 2
    assert right == ["3"] * 3 + ["8"] * 2 and wrong == ["5"] * 3 + ["9", "0"]
