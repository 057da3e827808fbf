"""Results have the dtype of their inputs, and their value, whatever torch's default dtype is.

Every public function that is annotated to take floating point tensors is called with float32
and float64 under both defaults. A new one must be added to a table here, or this test fails.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import SMALL

import po_book
from po_book import (
    advantage,
    batch,
    checks,
    credit,
    dapo,
    distributed,
    grpo,
    kl,
    language_model,
    learner,
    lm_batch,
    lm_step,
    mdp,
    mismatch,
    multi_agent,
    natural_gradient,
    objective,
    off_policy,
    open_questions,
    policies,
    policy_gradient,
    ppo,
    processes,
    reward_models,
    rlhf,
    rollout,
    surrogates,
    tasks,
    tensor_env,
    terms,
    trust_region,
    value_based,
)
from po_book import tokens as tokens_kinds
from po_book.sampling import Samples

DTYPES = torch.float32, torch.float64


class Given:
    "Numbers of one dtype, alike under every default dtype and up to rounding in both."

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, *shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(self.dtype)

    def chances(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return self(*shape, seed=seed).softmax(-1)

    def flags(self, *shape: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel()).view(shape) % 3 == 1

    def module(self, make, *args, **options) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(0)
        return make(*args, generator=generator, **options).to(self.dtype).eval()


# What they are called with


def steps(x):
    "Rewards, values, next values, ends."
    done = x.flags(6, 2)
    return x(6, 2), x(6, 2, seed=1), x(6, 2, seed=2), done & x.flags(2, 6).view(6, 2), done


def tokens(x):
    "Log-probabilities, new and old, and advantages."
    return x(4, 3), x(4, 3, seed=1), x(4, 3, seed=2)


def blocks():
    "Rows of three, one, two and no tokens."
    return torch.arange(3) < torch.tensor([[3], [1], [2], [0]])


def rows(x):
    return *tokens(x), blocks()


def one_each(x):
    "Rows whose advantages are those of their response."
    logp, logp_old, advantages, mask = rows(x)
    return logp, logp_old, advantages[:, :1].expand(4, 3), mask


def likely(x):
    "As `tokens`, of tokens that have a probability."
    logp, logp_old, advantages = tokens(x)
    return -logp.abs(), -logp_old.abs(), advantages


def ppo_columns(x):
    return [x(4, 3, seed=i) for i in range(6)]


def reference(x):
    return {"logp_ref": x(4, 3, seed=3)}


def process():
    return mdp.random_mdp(3, 2, 0.9, seed=0)


def two(x):
    "A policy of three states and two actions, and another one."
    return x.chances(3, 2), x.chances(3, 2, seed=1)


def chain(x):
    return x.chances(3, 3)


def paths(x):
    "Trajectories whose numbers have the dtype asked for."
    found = mdp.enumerate_trajectories(process(), x.chances(3, 2), 1)
    return mdp.Trajectories(
        found.states, found.actions, found.rewards.to(x.dtype), found.weights.to(x.dtype)
    )


def sampled(x):
    found = mdp.sample_trajectories(
        process(), x.chances(3, 2), 8, 2, torch.Generator().manual_seed(0)
    )
    return found.rewards, found.weights, found.states


def branches(x):
    "Two tokens, the first of two symbols, the second of three."
    return x.chances(2), x.chances(2, 3)


def matrix(x):
    return x(4, 4) @ x(4, 4).T + torch.eye(4, dtype=x.dtype)


def fisher(x):
    p = x(4).requires_grad_()
    divergence = (p @ matrix(x).detach() @ p) / 2
    return natural_gradient.fisher_vector_product(divergence, [p], 0.1)(x(4, seed=1))


def search(x, step):
    "A climb towards zero, and where it ends."
    p = x(4).requires_grad_()
    start = p.detach().clone()
    closures = (lambda: -p.square().sum()), (lambda: (p - start).square().sum())
    return step([p], *closures), p.detach()


def policy(x, kind, *args):
    made = x.module(kind, 3, *args)
    return made, x(5, 3)


def acts(x, kind, *args):
    made, obs = policy(x, kind, *args)
    return made.train().act(obs, torch.Generator().manual_seed(0))


def laws(x, kind, *args):
    made, obs = policy(x, kind, *args)
    law = made.distribution(obs)
    law = getattr(law, "base_dist", law)
    return law.logits if hasattr(law, "logits") else (law.mean, law.stddev)


def one_of(*sizes):
    return torch.zeros(5, *sizes, dtype=torch.int64)


def deterministic(x):
    low = torch.full((2,), -2.0, dtype=x.dtype)
    return x.module(policies.DeterministicPolicy, 3, low, -low), x(5, 3), x(5, 2, seed=1)


def own(x, share):
    def make(n):
        return policies.mlp([n, 2], 1.0, generator=torch.Generator().manual_seed(0))

    return multi_agent.OwnNetworks(slice(0, 4), 2, share, make).to(x.dtype)(x(5, 4))


def joint(x):
    def make(n):
        return policies.mlp([n, 2], 1.0, generator=torch.Generator().manual_seed(0))

    return multi_agent.JointNetwork(slice(0, 4), 2, make).to(x.dtype)(x(5, 4))


def scaled(x):
    scale = batch.RewardScale(2, 0.9)
    return scale(x(6, 2), x.flags(6, 2), torch.ones(6, 2, dtype=torch.bool))


def episodes(x):
    done = x.flags(6, 2)
    data = rollout.Rollout(
        x(6, 2, 1), one_of(), x(6, 2), x(6, 2, 1), done, done & False, done | True
    )
    return rollout.episode_returns(data, torch.zeros(2, dtype=torch.float64))


ALONE = SimpleNamespace(
    rank=0, size=1, num_processes=1, everyone=lambda columns: columns, call=lambda *args: None
)


def filled(x):
    def draw(n):
        return list(range(n)), x(n, 4)

    return dapo.fill_groups(draw, 3).rewards


def minimised(x):
    p = torch.nn.Parameter(x(4))
    losses = tasks.minimise(lambda rows: p.square().sum(), [p], 4, 3, 2, 0.1)
    return losses, p.detach()


@pytest.fixture(scope="module", autouse=True)
def small_lm():
    "Made once: the numbers that torch draws depend on its default dtype."
    tokenizer = language_model.char_tokenizer()
    lm = language_model.tiny_lm(tokenizer, **SMALL)
    torch.nn.init.normal_(lm.get_output_embeddings().weight)
    Given.lm = lm
    yield
    del Given.lm


def lm_rows(x):
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]])
    mask = torch.tensor([[False, False, True, True]] * 2)
    return x.lm.to(x.dtype), ids, mask, torch.ones_like(mask)


def token_logps(x):
    lm, ids, mask, real = lm_rows(x)
    width = lm.config.hidden_size
    states = x(2, 4, width)
    return language_model.token_logprobs(lm, ids, mask, attention_mask=real, states=states)


def row_numbers(x, function, *settings):
    "Of a model's rows, from states that are known."
    lm, ids, mask, real = lm_rows(x)
    rows = {"ids": ids, "mask": mask, "attention_mask": real}
    return function(lm, rows, *settings, states=x(2, 4, 32))


def rlhf(x):
    lm, ids, mask, real = lm_rows(x)
    samples = Samples(ids, real, mask, x(2, 4) * mask, torch.ones(2, dtype=torch.bool))
    critic = lambda ids, real: x(2, 4, seed=4)  # noqa: E731
    return po_book.rlhf.rlhf_batch(samples, x(2), critic, lm, 0.1)


def batch_of(x, objective=None):
    "All that a loss may know of tokens; one advantage a response where that is wanted."
    whole = objective is None or objective.advantage.whole
    logp, logp_old, advantages, mask = one_each(x) if whole else rows(x)
    others = x(4, 3, seed=3), x(4, 3, seed=4), x(4, 3, seed=5).abs()
    return tokens_kinds.Tokens(logp, logp_old, advantages, mask, *others)


def paid(x, name):
    preset, mask = objective.PRESETS[name], blocks()
    return preset.rewards(x(4), x(4, 3, seed=1), mask, x(4, 3, seed=2))


def advantages(x, name):
    preset, mask = objective.PRESETS[name], blocks()
    values = x(4, 3, seed=3) if preset.advantage.critic else None
    rewards = x(4, 3).abs() * mask  # "mean" wants none below zero
    return preset.advantage(credit.Paid(rewards, mask, 2, values))


def bonus(name):
    "A preset with an entropy bonus."
    return replace(objective.PRESETS[name], entropy_coef=0.1).for_length(7)


def every(function, *settings):
    "The results with all settings of a kind."
    return lambda x: [function(x, *setting) for setting in settings]


KINDS = [(kind,) for kind in ("k1", "k2", "k3")]
HOWS = [("sample", None), ("token", None), ("constant", 7)]
CALLS = {
    "advantage.td_target": lambda x: advantage.td_target(*steps(x)[0:3:2], steps(x)[3]),
    "advantage.td_error": lambda x: advantage.td_error(*steps(x)[:4]),
    "advantage.n_step_advantage": lambda x: advantage.n_step_advantage(*steps(x), n=3),
    "advantage.gae": lambda x: advantage.gae(*steps(x)),
    "advantage.lambda_return": lambda x: advantage.lambda_return(x(6, 2), *steps(x)[2:]),
    "advantage.normalize": lambda x: (
        advantage.normalize(x(6, 2)), advantage.normalize(x(6, 2), x.flags(6, 2))
    ),
    "batch.RewardScale.forward": scaled,
    "checks.distribution": lambda x: checks.distribution("p", x.chances(3, 2)),
    "dapo.fill_groups": filled,
    "dapo.informative": lambda x: dapo.informative(x(3, 4)),
    "dapo.upweight": lambda x: dapo.upweight(x(3, 4), x(3, 4).clamp(min=0)),
    "distributed.Group.average": lambda x: distributed.Group.average(ALONE, x(3), 7),
    "distributed.Group.normalize": lambda x: distributed.Group.normalize(ALONE, x(6, 2)),
    "grpo.leave_one_out": lambda x: grpo.leave_one_out(x(3, 4)),
    "grpo.group_advantages": every(
        lambda x, scale: grpo.group_advantages(x(3, 4), scale),
        *((scale,) for scale in ("group", "batch", "none")),
    ),
    "grpo.per_token": lambda x: grpo.per_token(x(4), x(4, 3)),
    "grpo.grpo_objective": lambda x: grpo.grpo_objective(*tokens(x), beta=0.1, **reference(x)),
    "grpo.aggregate": every(lambda x, *how: grpo.aggregate(x(4, 3), blocks(), *how), *HOWS),
    "grpo.grpo_loss": every(
        lambda x, how, size: grpo.grpo_loss(
            *rows(x), beta=0.1, aggregate=how, max_len=size, **reference(x)
        ),
        *HOWS,
    ),
    "grpo.process_advantages": lambda x: grpo.process_advantages(x(4, 3), x.flags(4, 3), 2),
    "kl.exact_kl": lambda x: kl.exact_kl(x(3, 4), x(3, 4, seed=1)),
    "kl.kl_estimate": every(lambda x, kind: kl.kl_estimate(x(4), x(4, seed=1), kind), *KINDS),
    "language_model.log_distribution": every(
        lambda x, *how: language_model.log_distribution(x(3, 8), *how),
        (0.7,), (1, 3), (1, None, 0.6),
    ),
    "language_model.next_logits": lambda x: language_model.next_logits(lm_rows(x)[0], x(3, 32)),
    "language_model.states_before": lambda x: language_model.states_before(x(2, 3, 4)),
    "language_model.token_logprobs": token_logps,
    "learner.Alone.average": lambda x: learner.Alone().average(x(3), 7),
    "learner.Alone.normalize": lambda x: learner.Alone().normalize(x(6, 2), x.flags(6, 2)),
    "lm_step.row_logps": lambda x: row_numbers(x, lm_step.row_logps, {}, 1),
    "lm_step.row_entropies": lambda x: row_numbers(x, lm_step.row_entropies),
    "lm_step.in_parts": lambda x: lm_step.in_parts(
        lambda rows, size: rows["x"], {"x": x(4, 3), "ids": x(4, 3), "attention_mask": blocks()},
        lm_batch.BatchConfig(prompts=2, group_size=2, micro_batch=1),
    ),
    "lm_batch.everywhere": lambda x: lm_batch.everywhere(ALONE, lambda y: (2 * y, None), x(4, 3)),
    "mdp.draw": lambda x: mdp.draw(x.chances(9, 4), torch.Generator().manual_seed(0)),
    "mdp.policy_chain": lambda x: mdp.policy_chain(x.chances(3, 2, 3), x(3, 2), two(x)[0]),
    "mdp.chain_values": lambda x: mdp.chain_values(chain(x), x(3), 0.9),
    "mdp.action_values": lambda x: mdp.action_values(x.chances(3, 2, 3), x(3, 2), 0.9, x(3)),
    "mdp.policy_iteration": lambda x: mdp.policy_iteration(x.chances(3, 2, 3), x(3, 2), 0.9),
    "mdp.chain_occupancy": lambda x: mdp.chain_occupancy(chain(x), x.chances(3), 0.9),
    "mdp.chain_visits": lambda x: mdp.chain_visits(chain(x), x.chances(3), x.flags(3)),
    "mdp.chain_stationary": lambda x: mdp.chain_stationary(chain(x)),
    **{
        f"mdp.TabularMDP.{name}": lambda x, name=name: getattr(process(), name)(two(x)[0])
        for name in ("under", "values", "q_values", "advantages", "occupancy", "objective")
    },
    "mdp.enumerate_trajectories": lambda x: vars(
        mdp.enumerate_trajectories(process(), x.chances(3, 2), 2)
    ),
    "mdp.sample_trajectories": sampled,
    **{
        f"mismatch.{f.__name__}": every(
            lambda x, whole, f=f: f(*tokens(x)[:2], blocks(), whole=whole), (False,), (True,)
        )
        for f in (mismatch.truncated_weights, mismatch.band_weights)
    },
    "mismatch.mismatch_metrics": lambda x: mismatch.mismatch_metrics(*tokens(x)[:2], blocks()),
    "multi_agent.joint_policy": lambda x: multi_agent.joint_policy(two(x)),
    "multi_agent.agent_advantages": lambda x: multi_agent.agent_advantages(
        x(3, 2, 2), two(x), (1, 0)
    ),
    "multi_agent.OwnNetworks.forward": every(own, (True,), (False,)),
    "multi_agent.JointNetwork.forward": joint,
    "natural_gradient.fisher_vector_product": fisher,
    "natural_gradient.conjugate_gradient": lambda x: natural_gradient.conjugate_gradient(
        lambda v: matrix(x) @ v, x(4), 3
    ),
    "natural_gradient.line_search": lambda x: search(
        x, lambda p, *f: natural_gradient.line_search(p, -x(4), *f, max_kl=0.1)
    ),
    "natural_gradient.trpo_step": lambda x: search(x, natural_gradient.trpo_step),
    **{
        f"credit.{kind}.__call__": lambda x, names=names: [advantages(x, n) for n in names]
        for kind, names in dict(
            Returns=("reinforce", "reinforce++"), Critic=("ppo",),
            Group=("grpo", "dr-grpo", "magistral", "maxrl", "reinforce++-baseline"),
            LeaveOneOut=("rloo",),
        ).items()
    },
    **{
        f"tokens.{kind.__name__}.{name}": lambda x, kind=kind, name=name: getattr(
            kind(), name
        )(batch_of(x))
        for kind in (
            tokens_kinds.OneStep, tokens_kinds.Radius, tokens_kinds.Penalty,
            tokens_kinds.Clip, tokens_kinds.SequenceClip, tokens_kinds.ClippedWeight,
            tokens_kinds.SoftGate, tokens_kinds.GeometricClip,
            tokens_kinds.ProbabilityMask,
        )
        for name in ("__call__", "metrics")
        if name in vars(kind)
    },
    **{
        f"terms.{kind.__name__}.__call__": lambda x, kind=kind: [
            kind(whole=whole)(batch_of(x)) for whole in (False, True)
        ]
        for kind in (terms.Truncated, terms.Banded)
    },
    "terms.Reference.rewards": lambda x: terms.NoReference().rewards(x(4), x(4, 3), blocks()),
    "terms.Reference.divergence": lambda x: terms.NoReference().divergence(batch_of(x)),
    "terms.InReward.rewards": lambda x: paid(x, "rloo"),
    "terms.InLoss.price": lambda x: terms.InLoss().price(batch_of(x)),
    "terms.InLoss.divergence": lambda x: terms.InLoss(corrected=True).divergence(batch_of(x)),
    "objective.Objective.rewards": every(paid, *((name,) for name in objective.PRESETS)),
    **{
        f"objective.Objective.{method}": every(
            lambda x, name, method=method: getattr(bonus(name), method)(
                batch_of(x, objective.PRESETS[name])
            ),
            *((name,) for name in objective.PRESETS),
        )
        for method in ("__call__", "metrics")
    },
    "objective.objective_loss": every(
        lambda x, name: objective.objective_loss(
            bonus(name), batch_of(x, objective.PRESETS[name])
        ),
        *((name,) for name in objective.PRESETS),
    ),
    "off_policy.importance_ratios": lambda x: off_policy.importance_ratios(
        *two(x), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    ),
    **{
        f"off_policy.{f.__name__}": lambda x, f=f: f(x(4, 3).exp(), x(4, 3, seed=1), 0.9)
        for f in (
            off_policy.ordinary_importance_sampling,
            off_policy.per_decision_importance_sampling,
            off_policy.weighted_importance_sampling,
        )
    },
    "off_policy.weight_second_moment": lambda x: off_policy.weight_second_moment(
        process(), *two(x), 3
    ),
    "off_policy.effective_sample_size": lambda x: off_policy.effective_sample_size(x(5).exp()),
    "off_policy.excursion_objective": lambda x: off_policy.excursion_objective(process(), *two(x)),
    "off_policy.off_policy_gradient": lambda x: off_policy.off_policy_gradient(process(), *two(x)),
    "off_policy.explore": every(
        lambda x, sigma: off_policy.explore(
            x(5, 2), sigma, -1, 1, torch.Generator().manual_seed(0)
        ),
        (0.2,), (torch.tensor(0.2, dtype=torch.float32),),
    ),
    "off_policy.deterministic_policy_loss": lambda x: off_policy.deterministic_policy_loss(
        lambda obs, actions: (obs * actions).sum(-1), torch.sin, x(5, 2)
    ),
    "policies.ActorCritic.value": lambda x: policy(x, policies.CategoricalPolicy, 2)[0].value(
        x(5, 3)
    ),
    "policies.draw_categorical": lambda x: policies.draw_categorical(
        x(9, 4), torch.Generator().manual_seed(0)
    ),
    **{
        f"policies.CategoricalPolicy.{name}": lambda x, name=name: getattr(
            policy(x, policies.CategoricalPolicy, 2)[0], name
        )(x(5, 3))
        for name in ("scores", "logits")
    },
    "policies.CategoricalPolicy.distribution": lambda x: laws(x, policies.CategoricalPolicy, 2),
    "policies.CategoricalPolicy.act": lambda x: acts(x, policies.CategoricalPolicy, 2),
    "policies.CategoricalPolicy.evaluate": lambda x: policy(x, policies.CategoricalPolicy, 2)[
        0
    ].evaluate(x(5, 3), one_of()),
    "policies.MultiCategoricalPolicy.scores": lambda x: policy(
        x, policies.MultiCategoricalPolicy, [2, 3]
    )[0].scores(x(5, 3)),
    "policies.MultiCategoricalPolicy.distribution": lambda x: laws(
        x, policies.MultiCategoricalPolicy, [2, 3]
    ),
    "policies.MultiCategoricalPolicy.evaluate": lambda x: policy(
        x, policies.MultiCategoricalPolicy, [2, 3]
    )[0].evaluate(x(5, 3), one_of(2)),
    "policies.GaussianPolicy.distribution": lambda x: laws(x, policies.GaussianPolicy, 2),
    "policies.GaussianPolicy.act": lambda x: acts(x, policies.GaussianPolicy, 2),
    "policies.GaussianPolicy.evaluate": lambda x: policy(x, policies.GaussianPolicy, 2)[
        0
    ].evaluate(x(5, 3), x(5, 2, seed=1)),
    "policies.QPolicy.act": lambda x: acts(x, policies.QPolicy, 2),
    "policies.DeterministicPolicy.mean": lambda x: deterministic(x)[0].mean(x(5, 3)),
    "policies.DeterministicPolicy.q": lambda x: deterministic(x)[0].q(*deterministic(x)[1:]),
    "policies.DeterministicPolicy.act": lambda x: deterministic(x)[0].train().act(
        x(5, 3), torch.Generator().manual_seed(0)
    ),
    "open_questions.group_moments": lambda x: vars(
        open_questions.group_moments(x.chances(3), 4, grpo.leave_one_out)
    ),
    "open_questions.shrunk_advantages": lambda x: open_questions.shrunk_advantages(x(3, 4), 2.0),
    "open_questions.prior_strength": lambda x: open_questions.prior_strength(x(3, 4)),
    "open_questions.prefix_values": lambda x: open_questions.prefix_values(branches(x), x(2, 3)),
    "open_questions.token_moments": lambda x: open_questions.token_moments(
        branches(x), [x(2, 3), x(2, 3, seed=1)]
    ),
    "policy_gradient.score": lambda x: policy_gradient.score(
        two(x)[0], torch.arange(3), torch.zeros(3, dtype=torch.int64)
    ),
    "policy_gradient.gradient_samples": lambda x: policy_gradient.gradient_samples(
        two(x)[0], paths(x), paths(x).rewards
    ),
    "policy_gradient.mean_and_variance": lambda x: policy_gradient.mean_and_variance(
        x(5, 2, 2), x.chances(5)
    ),
    "policy_gradient.reinforce_loss": lambda x: (
        policy_gradient.reinforce_loss(x(4, 3), x(4, 3, seed=1)),
        policy_gradient.reinforce_loss(x(4, 3), x(4, 3, seed=1), x.chances(4)),
    ),
    "policy_gradient.backward_sum": every(
        lambda x, n: policy_gradient.backward_sum(x(n, 2), x.flags(n, 2), 0.9), (6,), (40,)
    ),
    "policy_gradient.discounted_returns": lambda x: policy_gradient.discounted_returns(
        x(6, 2), x.flags(6, 2), 0.9, x(6, 2, seed=1)
    ),
    "policy_gradient.policy_gradient": lambda x: policy_gradient.policy_gradient(
        process(), two(x)[0]
    ),
    "policy_gradient.optimal_baseline": lambda x: policy_gradient.optimal_baseline(
        two(x)[0], x(3, 2)
    ),
    "policy_gradient.reinforce": lambda x: policy_gradient.reinforce(
        process(), lambda found: found.rewards,
        iterations=2, episodes=4, horizon=2, learning_rate=0.1, seed=0,
    ),
    "ppo.ratio": lambda x: ppo.ratio(x(4), x(4, seed=1)),
    "ppo.clipped_surrogate": every(
        lambda x, dual: ppo.clipped_surrogate(*tokens(x), dual_clip=dual), (None,), (3.0,)
    ),
    "ppo.value_loss": every(
        lambda x, clip: ppo.value_loss(x(4), x(4, seed=1), x(4, seed=2), clip), (None,), (0.2,)
    ),
    "ppo.entropy": lambda x: ppo.entropy(x(3, 4)),
    "ppo.approx_kl": lambda x: ppo.approx_kl(x(4), x(4, seed=1)),
    "ppo.outside_band": lambda x: ppo.outside_band(x(4), x(4, seed=1)),
    "ppo.masked_mean": every(lambda x, *mask: ppo.masked_mean(x(4, 3), *mask), (), (blocks(),)),
    "ppo.explained_variance": lambda x: ppo.explained_variance(
        x(4, 3), x(4, 3, seed=1), x.flags(4, 3)
    ),
    "ppo.ppo_loss": lambda x: ppo.ppo_loss(
        *ppo_columns(x), entropy_coef=0.01, value_clip=0.2, values_old=x(4, 3, seed=6),
        mask=x.flags(4, 3),
    ),
    "ppo.ppo_metrics": lambda x: ppo.ppo_metrics(*ppo_columns(x)[:5], mask=x.flags(4, 3)),
    "ppo.kl_penalty": lambda x: ppo.kl_penalty(*tokens(x), 0.5),
    "processes.central_step": lambda x: processes.central_step(x(4), torch.sin, 0.1, ALONE),
    "processes.ring_sum": lambda x: processes.ring_sum(x(4), ALONE),
    "processes.ring_step": lambda x: processes.ring_step(x(4), torch.sin, 0.1, ALONE),
    "reward_models.bradley_terry_loss": lambda x: reward_models.bradley_terry_loss(x(4), x(4, seed=1)),
    "reward_models.pair_accuracy": lambda x: reward_models.pair_accuracy(x(4), x(4, seed=1)),
    "reward_models.best_of_n": lambda x: reward_models.best_of_n(x(3, 4), x(3, 4, seed=1), 2),
    "reward_models.potential_rewards": lambda x: reward_models.potential_rewards(x(4), 0.3),
    "rlhf.terminal_rewards": lambda x: po_book.rlhf.terminal_rewards(x(4), blocks()),
    "rlhf.kl_rewards": lambda x: po_book.rlhf.kl_rewards(
        x(4), x(4, 3, seed=1), x(4, 3, seed=2), blocks(), 0.1
    ),
    "rlhf.token_gae": lambda x: po_book.rlhf.token_gae(
        x(4, 3), x(4, 3, seed=1), blocks(), 0.9, 0.9
    ),
    "rlhf.rlhf_batch": rlhf,
    "rollout.episode_returns": episodes,
    "surrogates.sequence_ratio": lambda x: surrogates.sequence_ratio(
        x(4, 3), x(4, 3, seed=1), blocks()
    ),
    **{
        f"surrogates.{f.__name__}": lambda x, f=f: f(*one_each(x), 0.2, 0.3)
        for f in (surrogates.gspo_surrogate, surrogates.gmpo_surrogate)
    },
    "surrogates.cispo_surrogate": every(
        lambda x, *low: surrogates.cispo_surrogate(*tokens(x), 0.3, *low), (), (0.2,)
    ),
    "surrogates.sapo_surrogate": lambda x: surrogates.sapo_surrogate(*tokens(x)),
    "surrogates.dppo_surrogate": every(
        lambda x, kind: surrogates.dppo_surrogate(*likely(x), divergence=kind), ("tv",), ("kl",)
    ),
    "tasks.minimise": minimised,
    "tensor_env.cartpole_motion": lambda x: tensor_env.cartpole_motion(
        x(5, 4), torch.arange(5) % 2
    ),
    **{
        f"trust_region.{f.__name__}": lambda x, f=f: f(process(), *two(x))
        for f in (
            trust_region.policy_advantage,
            trust_region.performance_difference,
            trust_region.surrogate,
            trust_region.trpo_bound,
        )
    },
    "trust_region.conservative_step": lambda x: trust_region.conservative_step(
        process(), two(x)[0]
    ),
    "trust_region.kl_divergence": lambda x: trust_region.kl_divergence(*two(x)),
    "trust_region.total_variation": lambda x: trust_region.total_variation(*two(x)),
    "value_based.epsilon_greedy": every(
        lambda x, epsilon: value_based.epsilon_greedy(x(3, 4), epsilon),
        (0.1,), (torch.tensor(0.1, dtype=torch.float32),),
    ),
    "value_based.next_values": every(
        lambda x, rule: value_based.next_values(
            rule, x(3, 4), x.chances(3, 4), torch.zeros(3, dtype=torch.int64)
        ),
        ("sarsa",), ("expected_sarsa",), ("q_learning",),
    ),
    "value_based.bellman_backup": lambda x: value_based.bellman_backup(
        process(), x(3, 2), two(x)[0]
    ),
    "value_based.q_loss": lambda x: value_based.q_loss(
        x(3, 4), torch.zeros(3, dtype=torch.int64), x(3, seed=1)
    ),
}
ORACLE = "a table is solved in float64, whatever it came in"
FLOAT64 = {
    name: ORACLE
    for name in CALLS
    if name.startswith("mdp.")
    or name.startswith("trust_region.")
    or name
    in {
        "checks.distribution",
        "multi_agent.agent_advantages",
        "multi_agent.joint_policy",
        "off_policy.excursion_objective",
        "off_policy.importance_ratios",
        "off_policy.off_policy_gradient",
        "off_policy.weight_second_moment",
        "policy_gradient.policy_gradient",
        "policy_gradient.reinforce",
        "value_based.bellman_backup",
    }
} | {"rollout.episode_returns": "sums of many rewards are kept in float64"}
NOT_CALLED = {
    "asynchronous.SharedWeights.pull": "fills what it is given, gives a count",
    "asynchronous.SharedWeights.push": "changes shared weights, gives a count",
    "credit.Advantage.__call__": "a base",
    "credit.AllGroups.__call__": "gives flags",
    "credit.Informative.__call__": "gives flags",
    "credit.Selection.__call__": "a base",
    "terms.Correction.__call__": "a base",
    "terms.Reference.price": "gives nothing",
    "tokens.TrustRegion.__call__": "a base",
    "tokens.TrustRegion.metrics": "gives nothing",
    "language_model.ValueModel.forward": "its head has float32, and so have its values",
    "policies.Normalizer.forward": "gives float32, which networks have, of wider observations",
    "policies.Policy.act": "a protocol",
}


def functions(module) -> Iterator[tuple[str, object]]:
    "Public functions of a module, and public methods of its classes."
    for name in getattr(module, "__all__", []):
        x = getattr(module, name)
        if inspect.isfunction(x):
            yield name, x
        elif inspect.isclass(x):
            for method, f in vars(x).items():
                if inspect.isfunction(f) and (method == "__call__" or method[0] != "_"):
                    yield f"{name}.{method}", f


def takes_floats(f) -> bool:
    "Whether something comes back, and an argument is, or holds, floating point tensors."
    annotations = dict(inspect.unwrap(f).__annotations__)
    if "return" not in annotations or annotations.pop("return") is None:
        return False
    kinds = "Float", "tokens.Tokens", "credit.Paid"
    return any(kind in str(x) for x in annotations.values() for kind in kinds)


def every_function() -> set[str]:
    names = [found.name for found in pkgutil.iter_modules(po_book.__path__)]
    modules = {name: importlib.import_module(f"po_book.{name}") for name in names}
    return {
        f"{name}.{function}"
        for name, module in modules.items()
        for function, f in functions(module)
        if takes_floats(f)
    }


def flat(x) -> list:
    "Tensors and numbers of a result, in order."
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [y for part in x for y in flat(part)]
    return [] if x is None else [x]


@pytest.fixture
def under():
    "Call under a default dtype."

    def call(default: torch.dtype, name: str, dtype: torch.dtype) -> list:
        torch.set_default_dtype(default)
        try:
            torch.manual_seed(0)
            return flat(CALLS[name](Given(dtype)))
        finally:
            torch.set_default_dtype(torch.float32)

    return call


def test_no_function_is_forgotten():
    assert set(CALLS) | set(NOT_CALLED) == every_function()
    assert not set(CALLS) & set(NOT_CALLED) and set(FLOAT64) <= set(CALLS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_dtype_is_that_of_the_inputs(name, dtype, under):
    want = torch.float64 if name in FLOAT64 else dtype
    found = [under(default, name, dtype) for default in DTYPES]
    for results in found:
        tensors = [x for x in results if torch.is_tensor(x) and x.is_floating_point()]
        assert {x.dtype for x in tensors} <= {want}
    assert found[0]
    atol = 1e-14 if dtype == torch.float64 else 0.0
    for x, y in zip(*found, strict=True):
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=atol, equal_nan=False)
