"PPO for language models: rewards and advantages of tokens, the batch, what is held."
import copy
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from po_book.kl import exact_kl
from po_book.language_model import (
    ValueModel,
    char_tokenizer,
    enumerate_completions,
    pack,
    tiny_lm,
    token_logprobs,
)
from po_book.ppo import ppo_loss
from po_book.reward_models import RewardModel
from po_book.rlhf import kl_rewards, networks_held, rlhf_batch, token_gae
from po_book.sampling import sample

TOKENIZER = char_tokenizer("abq")
MASK = torch.tensor(
    [
        [False, True, True, True, False],
        [False, True, False, False, False],
        [False, False, False, False, False],
        [True, True, True, True, True],
    ]
)


def toy(seed):
    return tiny_lm(TOKENIZER, width=16, layers=1, heads=2, seed=seed)


def noise(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def close(got, want, atol=1e-12):
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# Rewards of tokens


def test_the_reward_comes_last_and_the_penalty_everywhere():
    logp = torch.tensor([[9.0, -1.0, -2.0, -3.0, 9.0], [9.0, -4.0, 9.0, 9.0, 9.0]])
    logp_ref = torch.tensor([[0.0, -2.0, -2.0, -1.0, 0.0], [0.0, -3.5, 0.0, 0.0, 0.0]])
    got = kl_rewards(torch.tensor([1.0, 2.0]), logp, logp_ref, MASK[:2], beta=0.5)
    close(got, [[0, -0.5, 0, 2, 0], [0, 2.25, 0, 0, 0]], 1e-6)


def test_rows_without_tokens_and_entries_outside_the_mask_get_exact_zeros():
    logp = torch.where(MASK, noise(0, 4, 5), torch.nan)
    got = kl_rewards(torch.ones(4), logp, torch.zeros_like(logp), MASK, 0.1)
    assert got[~MASK].eq(0).all() and got[2].eq(0).all()
    assert got.isfinite().all()


def test_a_mask_with_gaps_is_paid_at_its_last_token_only():
    mask = torch.tensor([[True, False, True, False]])
    got = kl_rewards(torch.ones(1), torch.zeros(1, 4), torch.zeros(1, 4), mask, 1.0)
    close(got, [[0, 0, 1, 0]])


def test_without_a_price_the_reference_does_not_matter():
    logp, logp_ref = noise(0, 4, 5), noise(1, 4, 5)
    got = kl_rewards(noise(2, 4), logp, logp_ref, MASK, 0.0)
    assert torch.equal(got.sum(-1)[[0, 1, 3]], noise(2, 4)[[0, 1, 3]])


def test_what_the_tokens_pay_adds_up_to_the_divergence_of_responses():
    completions = enumerate_completions([2, 3], stop=1, max_new_tokens=3)
    rows = pack([[4]] * len(completions), completions, pad_id=0)

    def logps_of(model):
        never = torch.tensor([-torch.inf, 0, 0, 0, -torch.inf])
        model.lm_head.bias = nn.Parameter(never, requires_grad=False)
        real = rows.attention_mask
        return token_logprobs(model, rows.ids, rows.mask, attention_mask=real).detach()

    logp, logp_ref = logps_of(toy(0)), logps_of(toy(1))
    paid = kl_rewards(torch.zeros(len(completions)), logp, logp_ref, rows.mask, 1.0)
    divergence = exact_kl(logp.sum(-1), logp_ref.sum(-1))
    assert divergence > 1e-3
    close(-(logp.sum(-1).exp() @ paid.sum(-1)), divergence, 1e-6)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"rewards": torch.ones(3)}, r"rewards must have shape \(4,\), got \(3,\)"),
        ({"rewards": torch.ones(4, 1)}, r"rewards must have shape \(4,\), got \(4, 1\)"),
        ({"rewards": torch.tensor([1, 2, torch.nan, 0])}, "rewards must be fin.*nan"),
        ({"rewards": torch.tensor([1, torch.inf, 1, 0])}, "rewards must be fin.*inf"),
        ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
        ({"beta": float("nan")}, "beta must be at least 0, got nan"),
        ({"logp": torch.zeros(4, 4)}, r"logp must have mask's shape \(4, 5\)"),
        ({"logp_ref": torch.zeros(4, 4)}, r"logp_ref must have logp's shape \(4, 5\)"),
        ({"logp": torch.zeros(4, 5, requires_grad=True)}, "logp must be detached"),
        ({"logp_ref": torch.zeros(4, 5, requires_grad=True)}, "logp_ref must be det"),
        ({"rewards": torch.ones(4, requires_grad=True)}, "rewards must be detached"),
        ({"logp_ref": torch.full((4, 5), -torch.inf)}, "logp_ref must be finite where"),
        ({"mask": MASK.float()}, "mask must be a bool tensor.*float32"),
        ({"mask": MASK[:, 0]}, r"mask must have shape \(N, L\), got \(4,\)"),
    ],
)
def test_bad_rewards_are_refused(change, match):
    good = {"rewards": torch.ones(4), "logp": torch.zeros(4, 5), "mask": MASK}
    good |= {"logp_ref": torch.zeros(4, 5), "beta": 0.1}
    kl_rewards(**good)
    with pytest.raises(ValueError, match=match):
        kl_rewards(**good | change)


# Advantages of tokens


def by_hand(rewards, values, mask, gamma, lam):
    out = torch.zeros_like(rewards)
    for i, row in enumerate(mask):
        carried = expected = 0.0
        for t in reversed(row.nonzero().flatten().tolist()):
            delta = rewards[i, t] + gamma * expected - values[i, t]
            carried = out[i, t] = delta + gamma * lam * carried
            expected = values[i, t]
    return out


def test_exact_advantages_of_three_tokens():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.5, 0.6]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    close(token_gae(rewards, values, mask), [[0.8, 0.5, 0.4]], 1e-6)
    close(token_gae(rewards, values, mask, lam=0.0), [[0.3, 0.1, 0.4]], 1e-6)
    close(token_gae(rewards, values, mask, 0.5, 0.5), [[0.025, -0.1, 0.4]], 1e-6)


@pytest.mark.parametrize("gamma, lam", [(1, 1), (1, 0.95), (0.9, 0.5), (0, 1)])
def test_advantages_are_those_of_a_loop_over_rows_and_tokens(gamma, lam):
    start, length = torch.randint(0, 30, (2, 40, 1), generator=torch.manual_seed(0))
    column = torch.arange(60)
    mask = (column >= start) & (column < start + length)
    rewards, values = noise(0, 40, 60), noise(1, 40, 60)
    got = token_gae(rewards, values, mask, gamma, lam)
    close(got, by_hand(rewards, values, mask, gamma, lam))
    assert got[~mask].eq(0).all()


def test_defaults_give_reward_to_go_minus_value():
    rewards, values = noise(0, 4, 5) * MASK, noise(1, 4, 5)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    close(token_gae(rewards, values, MASK), (to_go - values) * MASK)


def test_what_stands_outside_the_mask_reaches_nothing():
    rewards, values = noise(0, 4, 5), noise(1, 4, 5)
    spoiled = [torch.where(MASK, x, torch.nan) for x in (rewards, values)]
    assert torch.equal(token_gae(*spoiled, MASK), token_gae(rewards, values, MASK))


def test_padding_and_the_order_of_rows_change_no_advantage():
    rewards, values, order = noise(0, 4, 5), noise(1, 4, 5), torch.tensor([2, 0, 3, 1])
    pad = lambda x: nn.functional.pad(x[order], (3, 2))
    got = token_gae(pad(rewards), pad(values), pad(MASK), lam=0.9)
    close(got, pad(token_gae(rewards, values, MASK, lam=0.9)))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"values": torch.zeros(4, 4)}, r"values must have mask's shape \(4, 5\)"),
        ({"rewards": torch.zeros(4, 4)}, r"rewards must have mask's shape \(4, 5\)"),
        ({"values": torch.zeros(4, 5, requires_grad=True)}, "values must be detached"),
        ({"rewards": torch.zeros(4, 5, requires_grad=True)}, "rewards must be det"),
        ({"values": torch.full((4, 5), torch.nan)}, "values must be finite"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"lam": -0.1}, r"lam must be in \[0, 1\], got -0.1"),
        ({"mask": MASK.long()}, "mask must be a bool tensor.*int64"),
        ({"mask": MASK[0]}, r"mask must have shape \(N, L\), got \(5,\)"),
        (
            {"mask": MASK ^ torch.tensor([False, False, True, False, False])},
            "mask must be one block of tokens a row",
        ),
    ],
)
def test_bad_advantages_are_refused(change, match):
    good = {"rewards": torch.zeros(4, 5), "values": torch.zeros(4, 5), "mask": MASK}
    token_gae(**good)
    with pytest.raises(ValueError, match=match):
        token_gae(**good | change)


# The batch


def drawn(n=8, temperature=1.0):
    generator = torch.Generator().manual_seed(0)
    draw = {"temperature": temperature, "generator": generator}
    return sample(toy(0), TOKENIZER, ["q", "qab"], n // 2, 4, **draw)


def critic_of(model):
    critic = ValueModel(model)
    nn.init.constant_(critic.head.weight, 0.1)
    return critic


def test_a_batch_is_made_of_the_parts():
    samples, critic, rewards = drawn(), critic_of(toy(2)), torch.arange(8.0)
    ids, mask, real = samples.ids, samples.mask, samples.attention_mask
    got = rlhf_batch(samples, rewards, critic, toy(1), 0.3, gamma=0.9, lam=0.8)
    logp_ref = token_logprobs(toy(1), ids, mask, attention_mask=real).detach()
    values = critic(ids, real).detach() * mask
    paid = kl_rewards(rewards, samples.logps, logp_ref, mask, 0.3)
    want = token_gae(paid, values, mask, 0.9, 0.8)
    assert torch.equal(got["logp_old"], samples.logps)
    close(got["advantages"], want, 1e-6)
    close(got["values"], values, 1e-6)
    close(got["returns"], want + values, 1e-6)
    close(got["log_ratio"], samples.logps - logp_ref, 1e-6)
    for x in got.values():
        assert not x.requires_grad and x[~mask].eq(0).all()


def test_the_reference_as_actor_pays_nothing_at_the_temperature_of_its_samples():
    samples = drawn(temperature=0.5)
    settings = torch.ones(8), critic_of(toy(2)), toy(0), 1.0
    right = rlhf_batch(samples, *settings, temperature=0.5)["log_ratio"]
    close(right, torch.zeros_like(right), 1e-5)
    assert rlhf_batch(samples, *settings)["log_ratio"].abs().max() > 0.01


def test_rows_of_a_batch_do_not_depend_on_each_other():
    samples, settings = drawn(), (critic_of(toy(2)), toy(1), 0.3)
    whole = rlhf_batch(samples, torch.arange(8.0), *settings)
    cut = {x.name: getattr(samples, x.name)[5:7] for x in fields(samples)}
    part = rlhf_batch(replace(samples, **cut), torch.arange(5.0, 7.0), *settings)
    for name, x in part.items():
        close(x, whole[name][5:7], 1e-6)


def test_the_first_gradient_of_the_loss_is_the_policy_gradient():
    actor, samples = toy(0), drawn()
    critic = critic_of(toy(2))
    batch = rlhf_batch(samples, torch.arange(8.0), critic, toy(1), 0.3)
    ids, mask, real = samples.ids, samples.mask, samples.attention_mask
    logp = token_logprobs(actor, ids, mask, attention_mask=real)
    columns = batch["logp_old"], batch["advantages"], -logp.detach()
    loss = ppo_loss(logp, *columns, batch["values"], batch["returns"], mask=mask)
    plain = -(batch["advantages"] * logp).sum() / mask.sum()
    weights = list(actor.parameters())
    got = torch.autograd.grad(loss, weights, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(plain, weights)):
        close(a, b, 1e-5)


def test_a_wrong_number_of_rewards_is_refused():
    with pytest.raises(ValueError, match=r"rewards must have shape \(8,\), got \(3,\)"):
        rlhf_batch(drawn(), torch.ones(3), critic_of(toy(2)), toy(1), 0.1)


# What is held


def test_networks_of_their_own_are_counted_one_by_one():
    actor = toy(0)
    size = actor.num_parameters()
    frozen = copy.deepcopy(actor).requires_grad_(False)
    graded = RewardModel(copy.deepcopy(actor), TOKENIZER).requires_grad_(False)
    own = {"critic": ValueModel(actor), "reference": frozen, "reward_model": graded}
    rows = networks_held(actor=actor, **own)
    assert [row["name"] for row in rows] == ["actor", *own]
    assert [row["parameters"] for row in rows] == [size, size + 17, size, size + 16]
    assert [row["trainable"] for row in rows] == [size, size + 17, 0, 0]
    assert [row["held_by"] for row in rows] == [[], [], [], []]


def test_a_shared_trunk_is_counted_once():
    actor = toy(0)
    rows = networks_held(actor=actor, critic=ValueModel(actor, share_trunk=True))
    assert rows[1] == {
        "name": "critic",
        "parameters": 17,
        "trainable": 17,
        "held_by": ["actor"],
    }


def test_a_network_held_twice_is_counted_once_and_names_every_owner():
    first, second = nn.Linear(2, 3), nn.Linear(3, 2)
    both = nn.Sequential(first, second)
    rows = networks_held(first=first, second=second, both=both, again=both)
    assert [row["parameters"] for row in rows] == [9, 8, 0, 0]
    assert [row["held_by"] for row in rows] == [[], [], *[["first", "second"]] * 2]


def parameters(**modules):
    return [row["parameters"] for row in networks_held(**modules)]


def test_weights_are_counted_by_where_they_lie():
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    second.weight = nn.Parameter(first.weight.data)
    assert parameters(first=first, second=second) == [9, 3]
    flat = torch.zeros(18)
    for layer, part in zip((first, second), flat.split(9)):
        layer.weight.data, layer.bias.data = part[:6].view(3, 2), part[6:]
    assert parameters(first=first, second=second) == [9, 9]


def test_weights_on_the_meta_device_are_counted_too():
    with torch.device("meta"):
        one, two = nn.Linear(2, 3), nn.Linear(2, 3)
    assert parameters(one=one, two=two) == [9, 9]


def test_a_rule_is_refused_as_a_network():
    with pytest.raises(ValueError, match="reward must be a module.*leave it out"):
        networks_held(actor=nn.Linear(1, 1), reward=lambda prompts, completions: [1.0])
