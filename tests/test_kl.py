"KL divergence: values, expected gradients by enumeration, extremes, bad input."
import math

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.distributions import Categorical, kl_divergence

from po_book.kl import exact_kl, kl_estimate
from po_book.ppo import MAX_LOG_RATIO, approx_kl, ratio

KINDS = ["k1", "k2", "k3"]
POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
REVERSE, FORWARD = 0.6348973, 0.6758058  # policy first, reference first


def random_logits(seed, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def close(got, want, atol=1e-12):
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def expected_gradient(loss, logits, law):
    "Mean over actions, drawn from `law`, of the gradient of their losses."
    return law @ jacobian(lambda z: loss(z.log_softmax(-1)), logits)


# The exact divergence


def test_exact_values_in_both_directions():
    close(exact_kl(POLICY.log(), REFERENCE.log()), REVERSE, 1e-6)
    close(exact_kl(REFERENCE.log(), POLICY.log()), FORWARD, 1e-6)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_values_and_both_gradients_are_those_of_torch(shape):
    def both(divergence):
        p, q = (random_logits(s, *shape, scale=3).requires_grad_() for s in (0, 1))
        value = divergence(p, q)
        return value.detach(), *torch.autograd.grad(value.sum(), (p, q))

    theirs = both(lambda p, q: kl_divergence(Categorical(logits=p), Categorical(logits=q)))
    for ours, wanted in zip(both(exact_kl), theirs):
        close(ours, wanted)


def test_unnormalised_logits_give_the_same():
    p, q = random_logits(0, 6, 4), random_logits(1, 6, 4)
    close(exact_kl(p + 30, q - 30), exact_kl(p, q))


def test_equal_laws_are_at_distance_zero_and_others_are_not():
    p = random_logits(0, 50, 9, scale=4)
    assert exact_kl(p, p).eq(0).all()
    assert exact_kl(p, random_logits(1, 50, 9)).gt(0).all()


def test_an_impossible_action_counts_nothing_and_has_no_gradient():
    p = torch.tensor([0.3, 0.7, 0.0], dtype=torch.float64).log().requires_grad_()
    for q in torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64):
        value = exact_kl(p, q.log())
        close(value.detach(), 0.3 * math.log(0.3 / q[0]) + 0.7 * math.log(0.7 / q[1]))
        (gradient,) = torch.autograd.grad(value, p)
        assert gradient.isfinite().all() and gradient[2] == 0


def test_leaving_the_support_costs_infinity():
    p, q = torch.zeros(2), torch.tensor([0.0, -torch.inf])
    assert exact_kl(p, q) == torch.inf


def test_float32_logits_far_apart_stay_finite():
    p = torch.tensor([0.0, -300.0], requires_grad=True)
    value = exact_kl(p, torch.tensor([-300.0, 0.0]))
    assert value.item() == pytest.approx(300)
    assert torch.autograd.grad(value, p)[0].isfinite().all()


# Values of the estimates


def test_estimates_by_hand():
    logp, logp_ref = torch.tensor([0.4]).log(), torch.tensor([0.2]).log()
    got = [kl_estimate(logp, logp_ref, kind).item() for kind in KINDS]
    two = math.log(2)
    assert got == pytest.approx([two, two**2 / 2, 0.5 - 1 + two], abs=1e-6)


def test_mean_and_deviation_under_the_policy():
    wanted = {"k1": (REVERSE, 0.994), "k2": (0.6952499, 0.342), "k3": (REVERSE, 0.611)}
    for kind, (mean, std) in wanted.items():
        k = kl_estimate(POLICY.log(), REFERENCE.log(), kind)
        close(POLICY @ k, mean, 1e-6)
        close((POLICY @ (k - POLICY @ k) ** 2).sqrt(), std, 1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_k1_and_k3_are_unbiased_for_any_pair(seed):
    p, q = (random_logits(2 * seed + i, 8, scale=2).log_softmax(-1) for i in (0, 1))
    for kind in "k1", "k3":
        close(p.exp() @ kl_estimate(p, q, kind), exact_kl(p, q))


def test_k2_and_k3_are_never_negative_and_all_vanish_at_the_reference():
    p, q = random_logits(0, 1000), random_logits(1, 1000)
    for kind in KINDS:
        assert kl_estimate(p, p, kind).eq(0).all()
        assert kl_estimate(p, q, kind).lt(0).any() == (kind == "k1")


def test_k3_is_the_approx_kl_of_ppo_with_the_sampler_first():
    old, new = random_logits(0, 64), random_logits(1, 64)
    assert kl_estimate(old, new, "k3").equal(approx_kl(new, old))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("kind", KINDS)
def test_shape_and_type_are_kept(kind, shape, dtype):
    logp = torch.zeros(shape, dtype=dtype)
    got = kl_estimate(logp, logp, kind)
    assert got.shape == shape and got.dtype == dtype


# Expected gradients


@pytest.mark.parametrize("seed", range(10))
def test_what_each_estimate_minimises_as_a_loss(seed):
    z, z_ref = (random_logits(2 * seed + i, 6) for i in (0, 1))
    logp_ref, law = z_ref.log_softmax(-1), z.softmax(-1)
    wanted = {
        "k1": torch.zeros(6, dtype=torch.float64),
        "k2": jacobian(lambda x: exact_kl(x, z_ref), z),
        "k3": jacobian(lambda x: exact_kl(z_ref, x), z),
    }
    for kind, gradient in wanted.items():
        got = expected_gradient(lambda x: kl_estimate(x, logp_ref, kind), z, law)
        close(got, gradient)


@pytest.mark.parametrize("seed", range(10))
def test_weighted_losses_have_the_right_gradient_under_old_samples(seed):
    z, z_old, z_ref = (random_logits(3 * seed + i, 6) for i in (0, 1, 2))
    old, logp_ref = z_old.log_softmax(-1), z_ref.log_softmax(-1)
    true = jacobian(lambda x: exact_kl(x, z_ref), z)
    for kind in "k1", "k2", "k3":
        loss = lambda x, kind=kind: kl_estimate(x, logp_ref, kind, old)  # noqa: E731
        close(expected_gradient(loss, z, old.exp()), true)
        want = ratio(z.log_softmax(-1), old) * kl_estimate(z.log_softmax(-1), logp_ref, kind)
        close(loss(z.log_softmax(-1)), want)
    unweighted = expected_gradient(
        lambda x: kl_estimate(x, logp_ref, "k2"), z, old.exp()
    )
    assert (unweighted - true).abs().max() > 1e-3


def test_stale_samples_have_another_mean_unless_it_is_corrected():
    p, old = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.7, 0.2, 0.1], [0.2, 0.3, 0.5]))
    ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    plain = old.exp() @ kl_estimate(p, ref, "k3")
    corrected = old.exp() @ kl_estimate(p, ref, "k3", old)
    assert plain.item() == pytest.approx(0.65506, abs=1e-5)
    assert corrected.item() == pytest.approx(0.29679, abs=1e-5)
    close(corrected, exact_kl(p, ref))
    close(kl_estimate(p, ref, "k3", p), kl_estimate(p, ref, "k3"))


# Extremes


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_half_precision_estimates_are_finite(dtype, kind):
    for log_u in 0.0, 0.1, 5.0, 6.0, 12.0, 40.0, 100.0, 3e4:
        for sign in 1, -1:
            logp = torch.tensor([-0.5 * sign * log_u], dtype=dtype, requires_grad=True)
            k = kl_estimate(logp, -logp.detach(), kind)
            slope = torch.autograd.grad(k.sum(), logp)[0]
            assert k.dtype == dtype and k.isfinite().all() and slope.isfinite().all()


def test_k3_is_finite_beyond_the_cut_and_exact_below_it():
    for log_u in -100.0, -MAX_LOG_RATIO - 1, MAX_LOG_RATIO + 1, 100.0:
        logp = torch.tensor([-log_u], requires_grad=True)
        k3 = kl_estimate(logp, torch.zeros(1), "k3")
        cut = math.copysign(MAX_LOG_RATIO, log_u)
        assert k3.item() == pytest.approx(math.expm1(cut) - cut, rel=1e-6)
        assert torch.autograd.grad(k3.sum(), logp)[0].item() == 0
    below = kl_estimate(torch.tensor([-19.0]), torch.zeros(1), "k3").item()
    assert below == pytest.approx(math.expm1(19) - 19, rel=1e-6)


@pytest.mark.parametrize("log_u", [-100.0, 100.0])
def test_k2_pulls_back_from_any_distance(log_u):
    logp = torch.tensor([-log_u], requires_grad=True)
    k2 = kl_estimate(logp, torch.zeros(1), "k2")
    assert k2.item() == pytest.approx(5000)
    assert torch.autograd.grad(k2.sum(), logp)[0].item() == -log_u


@pytest.mark.parametrize("log_u", [1e-3, -1e-3, 1e-4, -1e-4])
def test_k3_keeps_its_digits_near_the_reference_in_float32(log_u):
    got = kl_estimate(torch.tensor([-log_u]), torch.zeros(1), "k3").item()
    assert got == pytest.approx(math.expm1(log_u) - log_u, rel=1e-3)


# Bad input


def test_exact_kl_refuses_another_vocabulary():
    with pytest.raises(ValueError, match=r"logits_q must have logits_p's shape \(2, 5\)"):
        exact_kl(torch.zeros(2, 5), torch.zeros(2, 6))


def test_estimate_refuses_another_shape():
    with pytest.raises(ValueError, match=r"logp_ref must have logp's shape \(3,\), got"):
        kl_estimate(torch.zeros(3), torch.zeros(1), "k3")


def test_estimate_refuses_an_old_policy_that_is_not_data():
    with pytest.raises(ValueError, match="logp_old must be detached"):
        kl_estimate(torch.zeros(3), torch.zeros(3), "k3", torch.zeros(3, requires_grad=True))
    with pytest.raises(ValueError, match=r"logp_old must have logp's shape \(3,\), got"):
        kl_estimate(torch.zeros(3), torch.zeros(3), "k3", torch.zeros(1))


def test_estimate_refuses_a_reference_with_a_gradient():
    with pytest.raises(ValueError, match="logp_ref must be detached"):
        kl_estimate(torch.zeros(3), torch.zeros(3, requires_grad=True), "k3")


@pytest.mark.parametrize("kind", ["k4", "K3", "", None])
def test_estimate_refuses_an_unknown_kind(kind):
    with pytest.raises(ValueError, match=f"kind must be one of k1, k2, k3, got {kind!r}"):
        kl_estimate(torch.zeros(3), torch.zeros(3), kind)
