"One objective: every preset is its chapter's own loss, in value and in gradient."
import math
from dataclasses import fields, replace

import pytest
import torch
from torch.distributions import Categorical

from po_book.advantage import normalize
from po_book.dapo import CLIP_HIGH
from po_book.grpo import group_advantages, grpo_loss, leave_one_out
from po_book.objective import (
    PRESETS,
    Aggregation,
    Clip,
    Critic,
    Group,
    InLoss,
    InReward,
    LeaveOneOut,
    NoReference,
    Objective,
    OneStep,
    Penalty,
    Radius,
    Returns,
    difference,
    objective_loss,
)
from po_book.policy_gradient import reinforce_loss
from po_book.ppo import kl_penalty, ppo_loss, ratio
from po_book.rlhf import kl_rewards, token_gae

N, L, G = 8, 6, 4


def random(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture(params=range(3))
def data(request):
    "Log-probabilities of three policies, advantages, and a mask of ragged rows."
    x = random(request.param, 4, N, L)
    lengths = torch.randint(1, L + 1, (N,), generator=torch.Generator().manual_seed(7))
    return {
        "logp": (x[0] - 2).requires_grad_(),
        "logp_old": x[0] - 2 + 0.3 * x[1],
        "logp_ref": x[0] - 2 + 0.3 * x[2],
        "advantages": x[3],
        "mask": torch.arange(L) < lengths[:, None],
    }


def rows(data):
    return data["logp"], data["logp_old"], data["advantages"], data["mask"]


def check(ours, theirs, logp):
    "Equal losses and equal gradients, and not for want of any."
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    got, want = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert want.abs().max() > 1e-3


def test_reinforce_is_the_loss_of_its_chapter(data):
    full = torch.ones(N, L, dtype=torch.bool)
    ours, _ = objective_loss(PRESETS["reinforce"], *rows(data)[:3], full)
    check(ours, reinforce_loss(data["logp"], data["advantages"]), data["logp"])


def test_a2c_is_minus_the_mean_score_times_the_advantage(data):
    logp, _, advantages, mask = rows(data)
    ours, _ = objective_loss(PRESETS["a2c"], *rows(data))
    check(ours, -(logp * advantages)[mask].mean(), logp)


def test_trpo_is_the_mean_of_the_surrogate(data):
    logp, old, advantages, mask = rows(data)
    ours, _ = objective_loss(PRESETS["trpo"], *rows(data))
    check(ours, -(ratio(logp, old) * advantages)[mask].mean(), logp)


def test_ppo_kl_is_the_mean_of_the_penalised_surrogate(data):
    logp, old, advantages, mask = rows(data)
    ours, _ = objective_loss(PRESETS["ppo-kl"], *rows(data))
    check(ours, -kl_penalty(logp, old, advantages, 1.0)[mask].mean(), logp)


@pytest.mark.parametrize("name", ["ppo", "rlhf-ppo"])
def test_ppo_is_the_policy_part_of_its_chapters_loss(data, name):
    logp, old, advantages, mask = rows(data)
    zeros = torch.zeros_like(advantages)
    theirs = ppo_loss(logp, old, advantages, zeros, zeros, zeros, mask=mask)
    ours, metrics = objective_loss(PRESETS[name], *rows(data))
    check(ours, theirs, logp)
    assert 0 < metrics["clip_fraction"] < 1


def test_rloo_is_reinforce_of_whole_responses(data):
    logp, _, _, mask = rows(data)
    advantages = random(9, N)
    ours, _ = objective_loss(PRESETS["rloo"], logp, data["logp_old"], advantages, mask)
    check(ours, -(advantages * (logp * mask).sum(1)).mean(), logp)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("grpo", dict(beta=0.04)),
        ("dr-grpo", dict(aggregate="constant", max_len=L)),
        ("dapo", dict(clip_high=0.28, aggregate="token")),
        ("magistral", dict(clip_high=0.28, aggregate="token")),
        ("prorl", dict(clip_high=0.4, aggregate="token", beta=0.04)),
    ],
)
def test_the_family_of_grpo_is_grpo_loss_with_its_settings(data, name, settings):
    objective, reference = PRESETS[name].for_length(L), {"logp_ref": data["logp_ref"]}
    theirs, _ = grpo_loss(*rows(data), **reference, **settings)
    ours, metrics = objective_loss(objective, *rows(data), **reference)
    check(ours, theirs, data["logp"])
    assert metrics["kl"] > 0


def test_every_preset_is_compared():
    compared = {"reinforce", "a2c", "trpo", "ppo-kl", "ppo", "rlhf-ppo", "rloo", "grpo",
                "dr-grpo", "dapo", "magistral", "prorl"}
    assert compared == set(PRESETS)


# From rewards to the gradient, every preset written out

REWARDS = torch.tensor([1.0, 0, 0, 0.5, 3, 3, 2, 2.25]).double()  # two groups of four


def gae_by_hand(rewards, values, mask, gamma, lam):
    "One row after another, one token after another."
    out = torch.zeros_like(rewards)
    for i, n in enumerate(mask.sum(1).tolist()):
        carried = 0.0
        for t in reversed(range(n)):
            after = values[i, t + 1] if t + 1 < n else 0.0
            carried = rewards[i, t] + gamma * after - values[i, t] + gamma * lam * carried
            out[i, t] = carried
    return out


def at_the_end(mask):
    "The reward of a response, at its last token."
    rewards = torch.zeros(N, L).double()
    for i, n in enumerate(mask.sum(1).tolist()):
        rewards[i, n - 1] = REWARDS[i]
    return rewards


def critic_by_hand(rewards, values, mask, gamma):
    raw = gae_by_hand(rewards, values, mask, gamma, 0.95)
    return (raw - raw[mask].mean()) / raw[mask].std(correction=0)


def group_by_hand(divide):
    groups = REWARDS.view(2, 4)
    centred = groups - groups.mean(1, keepdim=True)
    std = {"group": groups.std(1, correction=0, keepdim=True),
           "advantage": centred.square().mean().sqrt(), "none": 1}[divide]
    return (centred / std).reshape(N, 1)


def loss_by_hand(name, logp, old, ref, values, mask):
    "Minus the objective, from the formulas of the chapters."
    rho, price = (logp - old).exp(), old - ref
    k3 = (ref - logp).exp() - 1 - (ref - logp)
    lengths, tokens = mask.sum(1, keepdim=True), mask.sum()

    def clipped(A, high):
        return torch.minimum(rho * A, rho.clamp(0.8, 1 + high) * A)

    def critic(gamma, beta=0.0):
        return critic_by_hand(at_the_end(mask) - beta * price, values, mask, gamma)

    paid = REWARDS - 0.05 * (price * mask).sum(1)
    others = torch.stack([(paid.view(2, 4)[:, [j for j in range(4) if j != i]]).mean(1)
                          for i in range(4)], 1).flatten()
    gain, weights = {
        "reinforce": lambda: (logp * REWARDS[:, None], 1 / N),
        "a2c": lambda: (logp * critic(0.99), 1 / tokens),
        "trpo": lambda: (rho * critic(0.99), 1 / tokens),
        "ppo-kl": lambda: (rho * critic(0.99) - (rho - 1 - rho.log()), 1 / tokens),
        "ppo": lambda: (clipped(critic(0.99), 0.2), 1 / tokens),
        "rlhf-ppo": lambda: (clipped(critic(1.0, 0.05), 0.2), 1 / tokens),
        "rloo": lambda: (logp * (paid - others)[:, None], 1 / N),
        "grpo": lambda: (clipped(group_by_hand("group"), 0.2) - 0.04 * k3, 1 / (N * lengths)),
        "dr-grpo": lambda: (clipped(group_by_hand("none"), 0.2), 1 / (N * L)),
        "dapo": lambda: (clipped(group_by_hand("group"), 0.28), 1 / tokens),
        "magistral": lambda: (clipped(group_by_hand("advantage"), 0.28), 1 / tokens),
        "prorl": lambda: (clipped(group_by_hand("group"), 0.4) - 0.04 * k3, 1 / tokens),
    }[name]()
    return -torch.where(mask, gain * weights, 0).sum()


@pytest.mark.parametrize("name", PRESETS)
def test_from_rewards_to_the_gradient_a_preset_is_its_formula(data, name):
    logp, old, ref, mask = (data[key] for key in ("logp", "logp_old", "logp_ref", "mask"))
    values, objective = random(5, N, L), PRESETS[name].for_length(L)
    paid = objective.rewards(REWARDS, old, mask, ref)
    advantages, _ = objective.advantage(paid, mask, G, values)
    ours, _ = objective_loss(objective, logp, old, advantages, mask, logp_ref=ref)
    theirs = loss_by_hand(name, logp, old, ref, values, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # eps is 1e-6
    got, want = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert want.abs().max() > 1e-2


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_has_the_gradient_of_another(data, name):
    logp, old, ref, mask = (data[key] for key in ("logp", "logp_old", "logp_ref", "mask"))
    args = logp, old, ref, random(5, N, L), mask
    mine = torch.autograd.grad(loss_by_hand(name, *args), logp, retain_graph=True)[0]
    for other in set(PRESETS) - {name}:
        (theirs,) = torch.autograd.grad(loss_by_hand(other, *args), logp, retain_graph=True)
        assert (mine - theirs).abs().max() > 1e-3


def test_the_upper_bounds_are_those_of_the_table():
    for name, high in CLIP_HIGH.items():
        trust = PRESETS[name].trust
        assert (trust.low, trust.low if trust.high is None else trust.high) == (0.2, high)


def test_without_tokens_loss_and_gradient_are_zero_and_metrics_are_no_numbers(data):
    nothing = torch.zeros_like(data["mask"])
    for name, preset in PRESETS.items():
        loss, metrics = objective_loss(
            preset.for_length(L), *rows(data)[:3], nothing, logp_ref=data["logp_ref"]
        )
        assert loss == 0 and torch.autograd.grad(loss, data["logp"])[0].eq(0).all()
        clips = isinstance(preset.trust, Clip)
        assert set(metrics) == {"approx_kl", "kl"} | ({"clip_fraction"} if clips else set())
        assert all(x.isnan() for x in metrics.values())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_price_in_the_loss_is_corrected_for_stale_samples(data, kind):
    base = replace(PRESETS["grpo"], kl=InLoss(0.3, kind))
    change = replace(base, kl=InLoss(0.3, kind, corrected=True))
    logp, ref = data["logp"], {"logp_ref": data["logp_ref"]}
    plain, before = objective_loss(base, *rows(data), **ref)
    ours, after = objective_loss(change, *rows(data), **ref)
    rho, log_u = (logp - data["logp_old"]).exp(), data["logp_ref"] - logp
    k = {"k1": -log_u, "k2": log_u**2 / 2, "k3": log_u.exp() - 1 - log_u}
    weight = rho.detach() if kind == "k2" else rho
    weights, mask = Aggregation("sample")(data["mask"], torch.float64), data["mask"]
    check(ours, plain + 0.3 * (weights * (weight * k[kind] - k[kind])).sum(), logp)
    torch.testing.assert_close(before["kl"], k["k3"].detach()[mask].mean())
    torch.testing.assert_close(after["kl"], (rho * k["k3"]).detach()[mask].mean())


# Advantages


def test_advantages_are_those_of_the_chapters(data):
    mask, values = data["mask"], random(3, N, L) * data["mask"]
    R = random(4, N)
    paid = kl_rewards(R, data["logp_old"], data["logp_ref"], mask, 0.05)
    groups = R.view(-1, G)
    plain = PRESETS["grpo"].rewards(R, data["logp_old"], mask)
    for scale in "group", "batch", "advantage", "none":
        got, targets = Group(scale)(plain, mask, G)
        want = group_advantages(groups, scale).view(-1, 1) * mask
        torch.testing.assert_close(got, want)
        assert targets is None
    totals = paid.sum(1).view(-1, G)
    objective = PRESETS["rloo"]
    got, _ = objective.advantage(
        objective.rewards(R, data["logp_old"], mask, data["logp_ref"]), mask, G
    )
    want = leave_one_out(totals).view(-1, 1) * mask
    torch.testing.assert_close(got, want)
    got, targets = Critic(lam=0.9)(paid, mask, G, values)
    raw = token_gae(paid, values, mask, 1.0, 0.9)
    torch.testing.assert_close(targets, raw + values)
    torch.testing.assert_close(got, normalize(raw, mask))
    to_come, _ = Returns()(plain, mask)
    torch.testing.assert_close(to_come, R[:, None] * mask)


def test_discount_normalisation_and_padding_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = torch.tensor([[0.0, 1, 4], [2, 0, 0]]).double()
    values = torch.tensor([[1.0, 2, 1], [1, 7, 7]]).double()  # what is padded is not read
    to_come, _ = Returns(0.5)(rewards, mask)
    assert to_come.tolist() == [[1.5, 3, 4], [2, 0, 0]]
    advantages, targets = Critic(0.5, 0.5, normalize=False)(rewards, mask, 1, values)
    # Errors 0 + .5·2 - 1, 1 + .5·1 - 2, 4 - 1 and 2 - 1, summed with weights .25
    assert advantages.tolist() == [[0.0625, 0.25, 3], [1, 0, 0]]
    assert targets.tolist() == [[1.0625, 2.25, 4], [2, 0, 0]]
    scaled, same = Critic(0.5, 0.5)(rewards, mask, 1, values)
    assert same.equal(targets) and scaled[~mask].eq(0).all()
    raw = torch.tensor([0.0625, 0.25, 3, 1]).double()
    torch.testing.assert_close(scaled[mask], (raw - raw.mean()) / raw.std(correction=0))


# Properties


def test_parts_of_a_batch_with_its_weights_add_up_to_the_whole(data):
    for name in "grpo", "dapo", "rloo":
        objective, reference = PRESETS[name], data["logp_ref"]
        whole, _ = objective_loss(objective, *rows(data), logp_ref=reference)
        weights = objective.aggregation(data["mask"], data["logp"].dtype)
        parts = zip(*(x.split(3) for x in (*rows(data), reference, weights)))
        total = sum(
            objective_loss(objective, *x, logp_ref=ref, weights=w)[0]
            for *x, ref, w in parts
        )
        check(total, whole, data["logp"])
    alone = sum(
        objective_loss(PRESETS["dapo"], *x)[0] for x in zip(*(x.split(4) for x in rows(data)))
    )
    assert abs(alone / 2 - objective_loss(PRESETS["dapo"], *rows(data))[0]) > 1e-4


def test_padding_and_the_order_of_rows_change_nothing(data):
    objective = PRESETS["grpo"]
    whole, _ = objective_loss(objective, *rows(data), logp_ref=data["logp_ref"])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    columns = [*rows(data), data["logp_ref"]]
    wide = [torch.nn.functional.pad(x[order], (2, 3)) for x in columns]
    junk = ~wide[3]
    for i in 1, 2, 4:
        wide[i] = wide[i].masked_fill(junk, torch.nan)
    got, metrics = objective_loss(objective, *wide[:4], logp_ref=wide[4])
    check(got, whole, data["logp"])
    assert all(x.isfinite() for x in metrics.values())


def test_every_choice_has_a_loss_of_its_own(data):
    "A choice that is not read would leave the loss as it is."
    base = PRESETS["ppo"]
    for part, choices in {
        "trust": [Clip(0.2), Clip(0.1), Clip(0.2, 0.4), Penalty(1.0), Penalty(2.0),
                  OneStep(), Radius()],
        "kl": [NoReference(), InLoss(0.1), InLoss(0.2), InLoss(0.1, "k2")],
        "aggregation": [Aggregation("token"), Aggregation("sample"),
                        Aggregation("constant", 5), Aggregation("constant", 7)],
    }.items():
        losses = [
            objective_loss(
                replace(base, **{part: choice}), *rows(data), logp_ref=data["logp_ref"]
            )[0].item()
            for choice in choices
        ]
        assert len({round(x, 9) for x in losses}) == len(choices)


def test_the_gradient_at_the_old_policy_is_that_of_every_trust_region():
    "Before the first step all of them are the policy gradient."
    logits = random(5, 3, 4).requires_grad_()
    actions, advantages = torch.tensor([[1], [0], [3]]), random(6, 3, 1)
    mask = torch.ones(3, 1, dtype=torch.bool)
    logp = Categorical(logits=logits[:, None]).log_prob(actions)
    gradients = []
    for trust in Clip(), Penalty(3.0), OneStep(), Radius():
        objective = replace(PRESETS["ppo"], trust=trust)
        loss, _ = objective_loss(objective, logp, logp.detach(), advantages, mask)
        gradients += torch.autograd.grad(loss, logits, retain_graph=True)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_a_difference_is_a_sentence():
    assert difference(PRESETS["grpo"], PRESETS["grpo"]) == "nothing"
    text = difference(PRESETS["grpo"], PRESETS["dr-grpo"])
    assert text == (
        "advantage: reward minus the group's mean over its deviation → reward minus the "
        "group's mean; kl: 0.04 times k3 in the loss → none; aggregation: mean over "
        "responses of token means → sum over tokens over the longest length"
    )
    for a in PRESETS.values():
        for b in PRESETS.values():
            assert (difference(a, b) == "nothing") == (a == b)


def test_bad_input(data):
    with pytest.raises(ValueError, match="logp_ref must be given"):
        objective_loss(PRESETS["grpo"], *rows(data))
    with pytest.raises(ValueError, match="max_len must be positive"):
        objective_loss(PRESETS["dr-grpo"], *rows(data))
    logp, old, advantages, mask = rows(data)
    with pytest.raises(ValueError, match="advantages must be"):
        objective_loss(PRESETS["dapo"], logp, old, advantages[:, :2], mask)
    with pytest.raises(ValueError, match="detached"):
        objective_loss(PRESETS["dapo"], logp, logp, advantages, mask)
    with pytest.raises(ValueError, match="finite"):
        PRESETS["rloo"].rewards(torch.full((N,), torch.nan), old, mask, old)
    with pytest.raises(ValueError, match="G at least 2"):
        Group()(torch.zeros(N, L), mask, 1)


# Words, and what is refused

CHOICES = (Returns, Critic, Group, LeaveOneOut, OneStep, Radius, Penalty, Clip, NoReference,
           InReward, InLoss, Aggregation)
BAD = {
    Returns: {"gamma": (-0.1, 1.1)},
    Critic: {"gamma": (-0.1, 2), "lam": (-0.1, 1.1), "value_coef": (-1, math.inf), "normalize": ("no", 1)},
    Group: {"scale": ("x", None), "informative_only": ("no", None)},
    Radius: {"max_kl": (0, -1, math.inf)},
    Penalty: {"beta": (-1, math.inf)},
    Clip: {"low": (-1, 1), "high": (-0.1,)},
    InReward: {"beta": (-1, math.inf)},
    InLoss: {"beta": (-1, math.inf), "kind": ("k9", None), "corrected": ("no", 1)},
    Aggregation: {"how": ("x", None), "max_len": (0, -3, 2.5, math.inf)},
}
IMPOSSIBLE = [
    (choice, f.name, x)
    for choice in CHOICES
    for f in fields(choice)
    for x in (*BAD[choice][f.name], math.nan)
]


@pytest.mark.parametrize("choice, field, x", IMPOSSIBLE, ids=str)
def test_a_choice_refuses_by_name_a_field_that_makes_no_sense(choice, field, x):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got '?{x}'?$"):
        choice(**{field: x})
    with pytest.raises(ValueError, match=f"^{field} must be"):
        replace(choice(), **{field: x})


@pytest.mark.parametrize(
    "choice",
    [Returns(0), Critic(0, 1, 0), Radius(9.0), Penalty(0), Clip(0, 0), Clip(0.9, math.inf), InReward(0),
     InLoss(0, "k1"), Aggregation("sample", 1)],
    ids=str,
)
def test_a_choice_may_be_at_the_end_of_an_interval(choice):
    assert replace(choice) == choice and "{" not in choice.words


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_made_again(name):
    parts = {f.name: getattr(PRESETS[name], f.name) for f in fields(Objective)}
    again = {key: type(part)(**vars(part)) for key, part in parts.items()}
    assert Objective(**again) == PRESETS[name]


@pytest.mark.parametrize("name", [f.name for f in fields(Objective)])
def test_an_objective_refuses_what_is_no_such_choice(name):
    ppo = PRESETS["ppo"]
    other = ppo.trust if name == "advantage" else ppo.advantage
    for part in other, type(getattr(ppo, name)), name, None:
        with pytest.raises(ValueError, match=f"^{name} must be .*{type(getattr(ppo, name)).__name__}"):
            replace(ppo, **{name: part})


def test_the_words_of_every_choice():
    assert {x.words for x in (Critic(0.5, 0), Radius(0.02), Penalty(3), InReward(0.1), InLoss(2, "k1"))} == {
        "GAE of a critic, γ = 0.5, λ = 0",
        "mean KL from the old policy at most 0.02",
        "3 times the KL from the old policy subtracted",
        "0.1 times the log-ratio off the reward of every token",
        "2 times k1 in the loss",
    }
    assert [Group(scale).words for scale in ("group", "batch", "advantage", "none")] == [
        "reward minus the group's mean over its deviation",
        "reward minus the group's mean over the batch's deviation",
        "reward minus the group's mean, over the deviation of all of these",
        "reward minus the group's mean",
    ]
    assert Group("none", True).words == "reward minus the group's mean, informative groups only"
    assert [x.words for x in (Returns(), LeaveOneOut(), OneStep(), NoReference())] == [
        "the return to come", "reward minus the mean of the others", "none, one step", "none"
    ]
    assert [Aggregation("constant", n).words for n in (None, 1, 7)] == [
        "sum over tokens over the longest length", "sum over tokens", "sum over tokens over 7"
    ]


def test_equal_words_for_different_choices_are_spelled_out():
    changed = replace(PRESETS["ppo"], advantage=Critic(0.99, normalize=False))
    text = difference(PRESETS["ppo"], changed)
    assert "normalize=True" in text and "normalize=False" in text
    changed = replace(PRESETS["grpo"], kl=InLoss(corrected=True))
    assert difference(PRESETS["grpo"], changed) == (
        "kl: InLoss(beta=0.04, kind='k3', corrected=False) → "
        "InLoss(beta=0.04, kind='k3', corrected=True)"
    )
    between = difference(PRESETS["ppo"], PRESETS["rlhf-ppo"])
    assert between.startswith("advantage: GAE of a critic, γ = 0.99, λ = 0.95 → GAE")
    for a in PRESETS.values():
        for b in PRESETS.values():
            for change in difference(a, b).split("; "):
                before, _, after = change.partition(": ")[2].partition(" → ")
                assert before != after or change == "nothing"


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("reinforce", 1 / 2, 0),
        ("rloo", 1 / 2, -1 / 2),
        ("grpo", 1 / 2, -1 / 6),
        ("dapo", 1 / 4, -1 / 4),
        ("dr-grpo", 1 / 12, -1 / 12),
    ],
)
def test_the_weight_of_a_score_is_the_one_computed_by_hand(name, right, wrong):
    "A right response of one token and a wrong one of three, before the first step."
    objective = PRESETS[name].for_length(3)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    logp = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    old = logp.detach()
    paid = objective.rewards(torch.tensor([1.0, 0.0]).double(), old, mask, old)
    advantages, _ = objective.advantage(paid, mask, 2)
    loss, _ = objective_loss(objective, logp, old, advantages, mask, logp_ref=old)
    (slope,) = torch.autograd.grad(loss, logp)
    want = torch.tensor([[right, 0, 0], [wrong] * 3]).double()
    torch.testing.assert_close(-slope, want, rtol=0, atol=1e-5)


def test_advantages_say_what_they_miss(data):
    mask, old = data["mask"], data["logp_old"]
    for choice in Group(), LeaveOneOut():
        with pytest.raises(ValueError, match="a divisor of the 8 rows, got 3"):
            choice(torch.zeros(N, L), mask, 3)
        with pytest.raises(ValueError, match="group_size must be positive, got 0"):
            choice(torch.zeros(N, L), mask, 0)
        with pytest.raises(ValueError, match="group_size must be a whole number, got 4.0"):
            choice(torch.zeros(N, L), mask, 4.0)
    with pytest.raises(ValueError, match="values must be given with a critic, got None"):
        Critic()(torch.zeros(N, L), mask, G, None)
    with pytest.raises(ValueError, match="logp_ref must be given for InReward"):
        PRESETS["rloo"].rewards(torch.ones(N), old, mask)


def test_a_length_is_filled_in_where_an_objective_divides_by_one():
    for name, objective in PRESETS.items():
        filled = objective.for_length(7)
        if name == "dr-grpo":
            assert filled.aggregation == Aggregation("constant", 7)
            assert filled.for_length(9) == filled
        else:
            assert filled == objective


def test_the_clip_fraction_is_that_of_the_bounds_that_were_chosen(data):
    narrow = replace(PRESETS["ppo"], trust=Clip(0.1, 0.5))
    rho = (data["logp"] - data["logp_old"]).detach().exp()[data["mask"]]
    _, metrics = objective_loss(narrow, *rows(data))
    outside = ((rho < 0.9) | (rho > 1.5)).double().mean()
    torch.testing.assert_close(metrics["clip_fraction"], outside)
    assert ((rho > 1.1) & (rho < 1.5)).any()


def test_the_price_in_the_reward_is_the_one_that_was_chosen(data):
    old, ref, mask = data["logp_old"], data["logp_ref"], data["mask"]
    dear = replace(PRESETS["rloo"], kl=InReward(0.3))
    want = REWARDS - 0.3 * ((old - ref) * mask).sum(1)
    torch.testing.assert_close(dear.rewards(REWARDS, old, mask, ref).sum(1), want)


def test_a_price_of_nothing_needs_no_reference(data):
    free = replace(PRESETS["rloo"], kl=InReward(0.0))
    paid = free.rewards(torch.ones(N), data["logp_old"], data["mask"])
    torch.testing.assert_close(paid.sum(1), torch.ones(N).to(paid))
