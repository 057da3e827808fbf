"GRPO: advantages, weights, losses by hand and by enumeration; invariances; bad input."
import itertools
import math

import pytest
import torch

from po_book.grpo import (
    aggregate,
    group_advantages,
    grpo_loss,
    grpo_objective,
    leave_one_out,
    process_advantages,
    token_weights,
)
from po_book.ppo import clipped_surrogate

HOWS = [("sample", None), ("token", None), ("constant", 7)]
LENGTHS = [3, 1, 5, 2, 5, 4]


def close(got, want, atol=1e-12):
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def f64(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def lengths_mask(lengths, width=None):
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def batch():
    "Six responses of 1 to 5 tokens, in three groups of two; all ratios are at work."
    mask = lengths_mask(LENGTHS)
    old = -f64(6, 5, seed=1).abs() - 0.1
    return {
        "logp": old + 0.4 * f64(6, 5, seed=2),
        "logp_old": old,
        "logp_ref": old + 0.5 * f64(6, 5, seed=3),
        "advantages": f64(6, seed=4),
        "mask": mask,
    }


def loss_and_gradient(batch, **options):
    batch = dict(batch)
    logp = batch.pop("logp").clone().requires_grad_()
    loss, metrics = grpo_loss(logp, **batch, **options)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


# Advantages


def test_half_of_a_group_right_is_one_deviation_up_and_down():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    close(group_advantages(rewards, eps=0), [[-1, 1, 1, -1]])
    close(group_advantages(rewards, eps=0.5), [[-0.5, 0.5, 0.5, -0.5]])
    close(group_advantages(rewards, "none"), [[-0.5, 0.5, 0.5, -0.5]])


def test_the_deviation_is_that_of_the_population():
    close(group_advantages(torch.tensor([[0.0, 1.0]]), eps=0), [[-1, 1]])


def test_batch_scale_divides_all_groups_by_the_deviation_of_all_rewards():
    rewards = f64(4, 5)
    centred = rewards - rewards.mean(1, keepdim=True)
    want = centred / (rewards.var(correction=0).sqrt() + 1e-6)
    close(group_advantages(rewards, "batch"), want)


def test_advantage_scale_gives_the_advantages_of_a_batch_the_deviation_one():
    rewards = torch.tensor([[0.0, 1.0], [10.0, 11.0]])
    close(group_advantages(rewards, "advantage", eps=0), [[-1, 1], [-1, 1]])
    close(group_advantages(rewards, "advantage", eps=0.5), [[-0.5, 0.5], [-0.5, 0.5]])
    rewards = f64(4, 5) + 3 * f64(4, 1, seed=1)
    centred = rewards - rewards.mean(1, keepdim=True)
    got = group_advantages(rewards, "advantage", eps=0)
    close(got, centred / centred.square().mean().sqrt())
    close(got.var(correction=0), 1.0)


@pytest.mark.parametrize("scale", ["group", "batch", "advantage", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exact_zeros(scale, eps, dtype):
    rewards = torch.tensor([[0.1] * 3, [1e30] * 3, [0.0] * 3], dtype=dtype)
    assert group_advantages(rewards, scale, eps).eq(0).all()
    assert leave_one_out(rewards).eq(0).all()


def test_a_dead_group_stays_dead_beside_a_live_one():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.0, 1.0]])
    for scale in "group", "batch", "advantage", "none":
        advantages = group_advantages(rewards, scale)
        assert advantages[0].eq(0).all() and advantages[1].ne(0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "advantage", "none"])
def test_groups_sum_to_zero_and_keep_the_order_of_the_rewards(scale):
    rewards = f64(7, 6)
    advantages = group_advantages(rewards, scale)
    close(advantages.sum(1), torch.zeros(7))
    assert advantages.argsort(1).equal(rewards.argsort(1))


def test_advantages_do_not_depend_on_unit_or_origin_of_the_reward():
    rewards = f64(3, 6)
    want = group_advantages(rewards, eps=0)
    close(group_advantages(5 * rewards + 3, eps=0), want)
    close(leave_one_out(5 * rewards + 3), 5 * leave_one_out(rewards))


@pytest.mark.parametrize("advantage", [group_advantages, leave_one_out])
def test_groups_and_members_may_stand_in_any_order(advantage):
    rewards = f64(5, 6)
    groups, members = torch.randperm(5), torch.randperm(6)
    close(advantage(rewards[groups][:, members]), advantage(rewards)[groups][:, members])


def test_a_group_does_not_see_the_others():
    rewards = f64(5, 6)
    close(group_advantages(rewards[:1]), group_advantages(rewards)[:1])


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    rewards = f64(4, 3)
    for i, (j, k) in enumerate([(1, 2), (0, 2), (0, 1)]):
        want = rewards[:, i] - (rewards[:, j] + rewards[:, k]) / 2
        close(leave_one_out(rewards)[:, i], want)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_expected_gradient_shrinks_with_the_group_mean_and_not_with_the_others(size):
    policy, values = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, -1.0, 3.0])
    true = policy * (values - policy @ values)
    groups = torch.tensor(list(itertools.product(range(3), repeat=size)))
    chance, scores = policy[groups].prod(1), torch.eye(3)[groups] - policy

    def mean(advantages):
        return chance @ (advantages[..., None] * scores).mean(1)

    close(mean(group_advantages(values[groups], "none")), (1 - 1 / size) * true)
    close(mean(leave_one_out(values[groups])), true)


@pytest.mark.parametrize("size, want", [(4, 0.404), (8, 0.464), (14, 0.481)])
def test_divided_by_the_deviation_the_push_at_one_half_is_below_one_half(size, want):
    groups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)))
    push = (group_advantages(groups, eps=0) * (groups - 0.5)).mean(1).mean()
    close(push, want, 6e-4)


@pytest.mark.parametrize("function", [group_advantages, leave_one_out])
@pytest.mark.parametrize(
    "rewards, match",
    [
        (torch.zeros(4), r"rewards must be \[P, G\] with G at least 2, got shape \(4,\)"),
        (torch.zeros(4, 1), r"rewards must be \[P, G\] .* \(4, 1\)"),
        (torch.zeros(2, 2, 2), r"rewards must be \[P, G\]"),
        (torch.tensor([[0.0, math.nan]]), "rewards must be finite"),
        (torch.tensor([[0.0, math.inf]]), "rewards must be finite"),
        (torch.tensor([[0, 1]]), "rewards must be floats, got torch.int64"),
    ],
)
def test_rewards_that_are_no_groups_of_numbers_are_refused(function, rewards, match):
    with pytest.raises(ValueError, match=match):
        function(rewards)


def test_unknown_scale_and_negative_eps_are_refused():
    with pytest.raises(ValueError, match="scale must be one of group, batch, advantage, mean, none, got"):
        group_advantages(torch.zeros(1, 2), "std")
    for eps in -1e-6, math.nan, math.inf:
        for scale in "group", "batch", "mean", "none":
            with pytest.raises(ValueError, match=rf"eps must be in \[0, inf\), got {eps}"):
                group_advantages(torch.zeros(1, 2), scale, eps=eps)


def test_over_the_mean_by_hand_and_a_group_without_success_is_zero():
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [4, 2, 0, 2]]).double()
    want = torch.tensor([[3.0, -1, -1, -1], [0] * 4, [0] * 4, [1, 0, -1, 0]]).double()
    torch.testing.assert_close(group_advantages(rewards, "mean", eps=0), want)
    with pytest.raises(ValueError, match="rewards must be at least 0, got -1"):
        group_advantages(torch.tensor([[1.0, -1.0]]), "mean")


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_over_the_mean_a_prompt_weighs_the_first_terms_of_a_series(p, size):
    "Enumerated: the weight of its gradient is 1 + (1 - p) + ... with size - 1 terms."
    rewards = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * size)
    chance = torch.where(rewards > 0, p, 1 - p).prod(1)
    estimate = (group_advantages(rewards, "mean", eps=0) * (rewards - p)).mean(1)
    weight = (chance * estimate).sum() / (p * (1 - p))
    assert weight.item() == pytest.approx(sum((1 - p) ** k for k in range(size - 1)), abs=1e-12)


# Advantages of steps


def test_worked_example_of_process_supervision():
    rewards = torch.tensor([[0.2, 0.8, math.nan], [0.5, 0.1, 0.9]])
    got = process_advantages(rewards, ~rewards.isnan(), 2, eps=0)
    a = 0.3 / 0.1**0.5
    close(got, [[0, a, 0], [0, 0, 0.4 / 0.1**0.5]])


def test_all_tokens_of_a_step_have_its_advantage_and_those_after_the_last_have_none():
    rewards, ends = torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.bool)
    ends[0, [1, 3]] = ends[1, 4] = True
    rewards[0, 1], rewards[0, 3], rewards[1, 4] = 1.0, 3.0, 2.0
    a = 1.5**0.5  # rewards 1, 3, 2 have the deviation sqrt(2/3)
    want = [[0, 0, a, a, 0, 0], [0, 0, 0, 0, 0, 0]]
    close(process_advantages(rewards, ends, 2, eps=0), want)


def test_with_one_step_a_response_process_supervision_is_outcome_supervision():
    mask = lengths_mask(LENGTHS)
    ends = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    rewards = f64(6)
    got = process_advantages(ends * rewards[:, None], ends, 3)
    want = group_advantages(rewards.view(2, 3)).flatten()
    close(got, mask * want[:, None])


def test_groups_of_steps_are_normalised_apart_and_what_is_no_step_is_not_read():
    rewards, ends = f64(6, 5), lengths_mask(LENGTHS)
    both = process_advantages(rewards, ends, 3)
    close(torch.cat([process_advantages(rewards[i : i + 3], ends[i : i + 3], 3)
                     for i in (0, 3)]), both)
    noisy = torch.where(ends, rewards, math.nan)
    close(process_advantages(noisy, ends, 3), both)


def test_equal_steps_one_step_and_no_step_give_zeros():
    ends = torch.zeros(6, 4, dtype=torch.bool)
    ends[:2, 1:3] = True  # four equal steps; one step; none
    ends[2, 2] = True
    for eps in 0.0, 1e-6:
        got = process_advantages(torch.full((6, 4), 0.1), ends, 2, eps)
        assert got.eq(0).all()


def test_bad_steps_are_refused():
    rewards, ends = torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)
    for size in 1, 3, 0:
        with pytest.raises(ValueError, match="group_size must be at least 2 and divide"):
            process_advantages(rewards, ends, size)
    with pytest.raises(ValueError, match="ends must have rewards's shape"):
        process_advantages(rewards, ends[:, :2], 2)
    with pytest.raises(ValueError, match="ends must be a bool tensor"):
        process_advantages(rewards, ends.long(), 2)
    with pytest.raises(ValueError, match="rewards must be finite, got nan"):
        process_advantages(rewards / 0, ends, 2)
    for eps in -1.0, math.nan, math.inf:
        with pytest.raises(ValueError, match=rf"eps must be in \[0, inf\), got {eps}"):
            process_advantages(rewards, ends, 2, eps=eps)
    with pytest.raises(ValueError, match="group_size must be a whole number, got 2.0"):
        process_advantages(rewards, ends, 2.0)


# Weights of tokens


def test_three_aggregations_of_losses_3_and_1_1_1():
    losses = torch.tensor([[3.0, math.nan, math.inf], [1.0, 1.0, 1.0]])
    mask = lengths_mask([1, 3])
    close(aggregate(losses, mask), 2.0)
    close(aggregate(losses, mask, "token"), 1.5)
    close(aggregate(losses, mask, "constant", 3), 1.0)


def test_long_bad_responses_weigh_more_by_token():
    mask = lengths_mask([2, 8])
    A = torch.tensor([[1.0], [-1.0]]).expand(2, 8)
    close(aggregate(A, mask), 0.0)
    close(aggregate(A, mask, "token"), -0.6)


@pytest.mark.parametrize("how, max_len", HOWS)
def test_weights_follow_the_formula_and_are_zero_outside(how, max_len):
    mask = lengths_mask(LENGTHS)
    length = torch.tensor(LENGTHS, dtype=torch.float64)[:, None]
    want = {"sample": 1 / (6 * length), "token": 1 / 20, "constant": 1 / 42}[how]
    close(token_weights(mask, how, max_len), mask * want)


def test_sample_and_token_weights_sum_to_one():
    mask = lengths_mask(LENGTHS)
    for how in "sample", "token":
        close(token_weights(mask, how).sum(), 1.0)


@pytest.mark.parametrize("how, max_len", HOWS)
def test_nothing_under_the_mask_gives_zero_weights(how, max_len):
    assert token_weights(torch.zeros(3, 4, dtype=torch.bool), how, max_len).eq(0).all()


def test_an_empty_row_counts_as_a_row():
    close(token_weights(lengths_mask([2, 0])), [[0.25, 0.25], [0, 0]])
    close(token_weights(lengths_mask([2, 0]), "constant", 4), [[0.125, 0.125], [0, 0]])
    close(token_weights(lengths_mask([2, 0]), "token"), [[0.5, 0.5], [0, 0]])


@pytest.mark.parametrize("how, max_len", HOWS)
def test_masked_entries_reach_neither_the_sum_nor_its_gradient(how, max_len):
    mask = lengths_mask(LENGTHS)
    x = torch.where(mask, f64(6, 5), math.nan).requires_grad_()
    total = aggregate(x, mask, how, max_len)
    (gradient,) = torch.autograd.grad(total, x)
    assert total.isfinite()
    close(gradient, token_weights(mask, how, max_len))


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda m: token_weights(m, "mean"), "how to aggregate must be one of sample, token"),
        (lambda m: token_weights(m, "constant"), "max_len must be positive .* got None"),
        (lambda m: token_weights(m, "constant", 0), "max_len must be positive .* got 0"),
        (lambda m: token_weights(m, "constant", math.nan), "max_len must be positive .* got nan"),
        (lambda m: token_weights(m, "constant", 2.5), "max_len must be a whole number, got 2.5"),
        (lambda m: token_weights(m, "constant", math.inf), "max_len must be a whole number, got inf"),
        (lambda m: token_weights(m.long()), "mask must be a bool tensor, got torch.int64"),
        (lambda m: token_weights(m[0]), r"mask must have shape \(N, L\), got \(3,\)"),
        (lambda m: aggregate(torch.zeros(2, 4), m), "mask must have x's shape"),
    ],
)
def test_bad_weights_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(lengths_mask([1, 3]))


# Objective and loss


def test_objective_by_hand():
    old = torch.full((2, 2), 0.4).log()
    rho = torch.tensor([[1.5, 1.0], [0.5, 1.0]])
    logp, A = old + rho.log(), torch.tensor([1.0, -1.0])
    close(grpo_objective(logp, old, A), [[1.2, 1.0], [-0.8, -1.0]])
    k3 = 1 / rho - 1 + rho.log()
    got = grpo_objective(logp, old, A, logp_ref=old, beta=0.1)
    close(got, torch.tensor([[1.2, 1.0], [-0.8, -1.0]]) - 0.1 * k3)
    close(grpo_objective(logp, old, A, clip_high=0.4), [[1.4, 1.0], [-0.8, -1.0]])


def test_one_advantage_a_response_is_that_of_all_its_tokens(batch):
    spread = dict(batch, advantages=batch["advantages"][:, None].expand(6, 5))
    for one, other in zip(loss_and_gradient(batch)[:2], loss_and_gradient(spread)[:2]):
        close(one, other)


@pytest.mark.parametrize("how, max_len", HOWS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_is_minus_the_weighted_objective_written_out(batch, how, max_len, beta):
    loss, _, metrics = loss_and_gradient(
        batch, beta=beta, clip_low=0.1, clip_high=0.3, aggregate=how, max_len=max_len
    )
    total = surrogate = kl = 0.0
    for i, length in enumerate(LENGTHS):
        weight = {"sample": 6 * length, "token": 20, "constant": 42}[how]
        for t in range(length):
            x = batch["logp"][i, t].item()
            rho = math.exp(x - batch["logp_old"][i, t])
            A = batch["advantages"][i].item()
            clipped = min(rho * A, min(max(rho, 0.9), 1.3) * A)
            u = math.exp(batch["logp_ref"][i, t] - x)
            surrogate -= clipped / weight
            total -= (clipped - beta * (u - 1 - math.log(u))) / weight
            kl += (u - 1 - math.log(u)) / 20
    close(loss, total)
    close(metrics["policy_loss"], surrogate)
    close(metrics["kl"], kl)


def test_gradient_is_that_of_finite_differences(batch):
    fixed = {k: x for k, x in batch.items() if k != "logp"}
    logp = batch["logp"].clone().requires_grad_()
    for how, max_len in HOWS:
        assert torch.autograd.gradcheck(
            lambda x: grpo_loss(x, **fixed, beta=0.2, aggregate=how, max_len=max_len)[0],
            logp,
        )


def test_on_policy_the_loss_is_zero_and_the_gradient_is_reinforce(batch):
    batch = dict(batch, logp_old=batch["logp"])
    batch["advantages"] = group_advantages(f64(3, 2)).flatten()
    loss, gradient, metrics = loss_and_gradient(batch)
    close(loss, 0.0)
    want = -batch["advantages"][:, None] * token_weights(batch["mask"])
    close(gradient, want)
    assert metrics["approx_kl"] == metrics["clip_fraction"] == 0


def test_metrics_are_detached_and_kl_needs_a_reference(batch):
    *_, metrics = loss_and_gradient(batch)
    assert set(metrics) == {"policy_loss", "approx_kl", "clip_fraction", "kl"}
    assert not any(x.requires_grad for x in metrics.values())
    batch.pop("logp_ref")
    *_, metrics = loss_and_gradient(batch)
    assert set(metrics) == {"policy_loss", "approx_kl", "clip_fraction"}


def test_the_divergence_is_corrected_for_stale_samples_in_loss_and_log(batch):
    plain = loss_and_gradient(batch, beta=0.3)
    corrected = loss_and_gradient(batch, beta=0.3, corrected=True)
    ref, mask = batch.pop("logp_ref"), batch["mask"]
    logp = batch["logp"].clone().requires_grad_()
    rho = (logp - batch["logp_old"]).exp()
    k3 = (ref - logp).exp() - 1 - (ref - logp)
    price = 0.3 * aggregate(rho * k3 - k3, mask)
    close(corrected[0], plain[0] + price.detach())
    close(corrected[1], plain[1] + torch.autograd.grad(price, logp)[0])
    close(plain[2]["kl"], k3.detach()[mask].mean())
    close(corrected[2]["kl"], (rho * k3).detach()[mask].mean())
    for name in "policy_loss", "approx_kl", "clip_fraction":
        close(corrected[2][name], plain[2][name])


def test_clip_fraction_and_approx_kl_are_means_over_tokens(batch):
    *_, metrics = loss_and_gradient(batch)
    log_ratio = (batch["logp"] - batch["logp_old"])[batch["mask"]]
    rho = log_ratio.exp()
    assert 0 < metrics["clip_fraction"] < 1
    close(metrics["clip_fraction"], ((rho < 0.8) | (rho > 1.2)).double().mean())
    close(metrics["approx_kl"], (rho - 1 - log_ratio).mean())
    *_, metrics = loss_and_gradient(batch, clip_low=0.1, clip_high=0.5)
    close(metrics["clip_fraction"], ((rho < 0.9) | (rho > 1.5)).double().mean())
    assert ((rho > 1.2) & (rho < 1.5)).any() and ((rho > 0.8) & (rho < 0.9)).any()


def test_a_reference_without_beta_is_watched_and_pulls_nothing(batch):
    with_ref = loss_and_gradient(batch)
    batch.pop("logp_ref")
    for one, other in zip(with_ref[:2], loss_and_gradient(batch)[:2]):
        close(one, other)


@pytest.mark.parametrize("how, max_len", HOWS)
def test_what_is_masked_reaches_neither_loss_nor_gradient_nor_metrics(
    batch, how, max_len
):
    options = dict(beta=0.2, aggregate=how, max_len=max_len)
    want = loss_and_gradient(batch, **options)
    for bad in math.nan, math.inf, -math.inf:
        spoilt = dict(batch)
        for name in "logp", "logp_old", "logp_ref":
            spoilt[name] = torch.where(batch["mask"], batch[name], bad)
        A = batch["advantages"][:, None].expand(6, 5)
        spoilt["advantages"] = torch.where(batch["mask"], A, bad)
        loss, gradient, metrics = loss_and_gradient(spoilt, **options)
        close(loss, want[0])
        close(gradient, want[1])
        assert metrics == want[2]


@pytest.mark.parametrize("how, max_len", HOWS)
def test_padding_and_the_order_of_rows_do_not_matter(batch, how, max_len):
    options = dict(beta=0.2, aggregate=how, max_len=max_len)
    loss, gradient, _ = loss_and_gradient(batch, **options)
    order = torch.randperm(6)
    close(loss_and_gradient({k: x[order] for k, x in batch.items()}, **options)[0], loss)
    padded = {
        k: torch.nn.functional.pad(x, (2, 3)) if x.ndim == 2 else x
        for k, x in batch.items()
    }
    wide, wide_gradient, _ = loss_and_gradient(padded, **options)
    close(wide, loss)
    close(wide_gradient[:, 2:7], gradient)


@pytest.mark.parametrize("how, max_len", HOWS)
def test_micro_batches_with_the_weights_of_the_whole_add_up(batch, how, max_len):
    loss, gradient, _ = loss_and_gradient(batch, beta=0.2, aggregate=how, max_len=max_len)
    weights = token_weights(batch.pop("mask"), how, max_len)
    logp = batch["logp"].clone().requires_grad_()
    total = 0.0
    for rows in slice(0, 1), slice(1, 4), slice(4, 6):
        part = {k: x[rows] for k, x in batch.items()} | {"logp": logp[rows]}
        part = -(weights[rows] * grpo_objective(**part, beta=0.2)).sum()
        part.backward()
        total += part.detach()
    close(total, loss)
    close(logp.grad, gradient)


def test_empty_rows_and_an_empty_mask_are_finite(batch):
    batch["mask"] = batch["mask"].clone()
    batch["mask"][2] = False
    batch["advantages"] = batch["advantages"].clone()
    batch["advantages"][2] = math.nan  # a truncated response may have no reward
    loss, gradient, _ = loss_and_gradient(batch, beta=0.1)
    assert loss.isfinite() and gradient.isfinite().all() and gradient[2].eq(0).all()
    batch["mask"] = torch.zeros(6, 5, dtype=torch.bool)
    loss, gradient, metrics = loss_and_gradient(batch, beta=0.1)
    assert loss == 0 and gradient.eq(0).all() and metrics.pop("policy_loss") == 0
    assert set(metrics) == {"approx_kl", "clip_fraction", "kl"}
    assert all(x.isnan() for x in metrics.values())


@pytest.mark.parametrize("how, max_len", HOWS)
def test_float64_stays_float64_whatever_the_default(batch, how, max_len):
    mask, options = batch["mask"], {"aggregate": how, "max_len": max_len, "beta": 0.2}

    def everything():
        loss, gradient, metrics = loss_and_gradient(batch, **options)
        groups, ends = batch["advantages"].view(2, 3), mask & ~mask.roll(-1, 1)
        return [
            loss, gradient, *metrics.values(),
            aggregate(batch["logp"], mask, how, max_len),
            token_weights(mask, how, max_len, torch.float64),
            group_advantages(groups), group_advantages(groups, "batch"),
            group_advantages(groups, "none"), leave_one_out(groups),
            process_advantages(batch["logp"], ends, 3),
        ]

    want = everything()
    torch.set_default_dtype(torch.float32)
    for got, exact in zip(everything(), want, strict=True):
        assert got.dtype == torch.float64
        close(got, exact)
    single = {k: x.float() if x.is_floating_point() else x for k, x in batch.items()}
    torch.set_default_dtype(torch.float64)
    loss, gradient, metrics = loss_and_gradient(single, **options)
    total = aggregate(single["logp"], mask, how, max_len)
    assert {x.dtype for x in (loss, gradient, total, *metrics.values())} == {torch.float32}
    close(loss, want[0], 1e-6)


def test_ratios_that_would_overflow_stay_finite(batch):
    for shift in -2000.0, 2000.0:
        far = dict(batch, logp=batch["logp"] + shift)
        loss, gradient, _ = loss_and_gradient(far, beta=0.1)
        assert loss.isfinite() and gradient.isfinite().all()


def test_the_surrogate_is_that_of_ppo(batch):
    A = batch["advantages"][:, None].expand(6, 5)
    got = grpo_objective(batch["logp"], batch["logp_old"], batch["advantages"])
    assert got.equal(clipped_surrogate(batch["logp"], batch["logp_old"], A))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
        ({"beta": math.nan}, "beta must be at least 0, got nan"),
        ({"beta": 0.1, "logp_ref": None}, "logp_ref must be given with beta 0.1"),
        ({"advantages": torch.zeros(5)}, r"advantages must be \[N\] or \[N, L\]"),
        ({"advantages": torch.zeros(6, 1)}, r"advantages must be \[N\] or \[N, L\]"),
        ({"logp_old": torch.zeros(6, 4)}, "logp_old must have logp's shape"),
        ({"logp_ref": torch.zeros(6, 4)}, "logp_ref must have logp's shape"),
        ({"mask": torch.ones(6, 4) > 0}, "mask must have logp's shape"),
        ({"mask": torch.ones(6, 5)}, "mask must be a bool tensor"),
        ({"clip_low": 1.0}, "clip_low must be in"),
        ({"clip_high": -0.1}, "clip_high must be at least 0"),
        ({"aggregate": "mean"}, "how to aggregate must be .* got 'mean'"),
        ({"aggregate": "constant"}, "max_len must be positive"),
        ({"logp_old": torch.zeros(6, 5, requires_grad=True)}, "logp_old must be detached"),
        (
            {"logp_ref": torch.zeros(6, 5, requires_grad=True), "beta": 1.0},
            "logp_ref must be detached",
        ),
        ({"advantages": torch.zeros(6, requires_grad=True)}, "advantages must be detached"),
    ],
)
def test_bad_arguments_are_refused(batch, change, match):
    with pytest.raises(ValueError, match=match):
        grpo_loss(**{**batch, **change})


# Length bias, by enumeration


def test_averaged_scores_are_the_gradient_of_the_inverse_length():
    cap, stop = 10, torch.tensor(-1.0, requires_grad=True)
    logp = torch.nn.functional.logsigmoid
    tokens = [[logp(-stop)] * n + [logp(stop)] for n in range(cap)]
    tokens += [[logp(-stop)] * cap]
    lengths = [len(row) for row in tokens]
    law = torch.stack([torch.stack(row).sum().exp() for row in tokens])
    (inverse,) = torch.autograd.grad(law @ (1 / torch.tensor(lengths)), stop,
                                     retain_graph=True)
    rows = torch.stack([torch.stack([*row, *[stop * 0] * (cap - len(row))])
                        for row in tokens])
    mask, chance = lengths_mask(lengths), law.detach()
    for how, max_len, want in (("sample", None, inverse), ("constant", cap, 0.0)):
        weights = token_weights(mask, how, max_len)
        (got,) = torch.autograd.grad(chance @ (weights * rows).sum(1) * len(rows), stop,
                                     retain_graph=True)
        close(got, want)
    close(inverse, 0.2109, 5e-5)
