"Natural gradients: Fisher-vector products, conjugate gradients, search, TRPO, bad input."
import math
from copy import deepcopy

import pytest
import torch
from torch.distributions import Categorical, Normal
from torch.distributions import kl_divergence as kl_of

from po_book.mdp import random_mdp
from po_book.natural_gradient import (
    conjugate_gradient,
    fisher_vector_product,
    line_search,
    trpo_step,
)

NOTHING = {"gain": 0.0, "kl": 0.0, "fraction": 0.0}

pytestmark = pytest.mark.usefixtures("double")


def close(a, b, atol=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64),
        rtol=0, atol=atol,
    )


def flat(tensors):
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def problem(mdp, log_policy):
    "Exact surrogate and mean divergence around the present policy."
    logp_old = log_policy().detach()
    pi_old = logp_old.exp()
    weight = mdp.occupancy(pi_old)[:, None] * pi_old
    A = mdp.advantages(pi_old)
    return (lambda: (weight * (log_policy() - logp_old).exp() * A).sum(),
            lambda: (weight * (logp_old - log_policy())).sum())


def table(mdp, scale=1.0):
    "Logits of a random softmax table and its log-probabilities."
    logits = (scale * torch.randn(mdp.R.shape)).requires_grad_()
    return logits, lambda: logits.log_softmax(-1)


def network(inputs=3, outputs=3, width=8):
    return torch.nn.Sequential(torch.nn.Linear(inputs, width), torch.nn.Tanh(),
                               torch.nn.Linear(width, outputs))


def spd(n, low=0.5):
    root = torch.randn(n, n)
    return root @ root.T + low * torch.eye(n)


# Fisher-vector products

def score_outer_products(logp, params, weight):
    "Weighted mean of score score^T, one backward pass for each log-probability."
    rows = [flat(torch.autograd.grad(x, params, retain_graph=True))
            for x in logp.flatten()]
    return torch.einsum("n,ni,nj->ij", weight.flatten(), *[torch.stack(rows)] * 2)


@pytest.mark.parametrize("kind", ["table", "network"])
def test_products_are_those_of_the_dense_matrix(kind):
    mdp = random_mdp(4, 3, 0.9, seed=1)
    net, X = network(), torch.randn(4, 3)
    logits, of_table = table(mdp)
    params, log_policy = {
        "table": ([logits], of_table),
        "network": (list(net.parameters()), lambda: net(X).log_softmax(-1)),
    }[kind]
    pi = log_policy().detach().exp()
    F = score_outer_products(log_policy(), params, mdp.occupancy(pi)[:, None] * pi)
    for damping in 0.0, 0.3:
        product = fisher_vector_product(problem(mdp, log_policy)[1](), params, damping)
        columns = torch.stack([product(v) for v in torch.eye(len(F))], 1)
        close(columns, F + damping * torch.eye(len(F)))
        assert not columns.requires_grad


def test_gaussian_policy_with_a_learned_standard_deviation():
    net, X, log_std = torch.nn.Linear(2, 3), torch.randn(5, 2), torch.randn(3)
    params = [*net.parameters(), log_std.requires_grad_()]
    old = Normal(net(X).detach(), log_std.detach().exp())
    kl = kl_of(old, Normal(net(X), log_std.exp())).sum(-1).mean()
    product = fisher_vector_product(kl, params)
    got = torch.stack([product(v) for v in torch.eye(12)], 1)

    precision = (-2 * log_std.detach()).exp()
    inputs = torch.cat([X, torch.ones(5, 1)], 1)
    second = inputs.T @ inputs / 5  # of the features, a constant one included
    wanted = torch.zeros(12, 12)
    weight, bias = torch.arange(6).view(3, 2), torch.arange(6, 9)
    for j in range(3):
        at = torch.cat([weight[j], bias[j : j + 1]])
        wanted[at[:, None], at] = precision[j] * second
    wanted[9:, 9:] = 2 * torch.eye(3)
    close(got, wanted)


def test_product_does_not_touch_its_vector_and_can_be_repeated():
    mdp = random_mdp(3, 3, 0.9, seed=0)
    logits, log_policy = table(mdp)
    product = fisher_vector_product(problem(mdp, log_policy)[1](), [logits], 0.1)
    v = torch.randn(9)
    kept, first = v.clone(), product(v)
    assert v.equal(kept) and product(v).equal(first)


def test_params_may_be_a_generator():
    net, X = network(), torch.randn(4, 3)
    old = net(X).log_softmax(-1).detach()
    kl = (old.exp() * (old - net(X).log_softmax(-1))).sum(-1).mean()
    size = sum(p.numel() for p in net.parameters())
    assert fisher_vector_product(kl, net.parameters())(torch.ones(size)).shape == (size,)


def test_noncontiguous_parameters():
    weight = torch.randn(3, 2).T.requires_grad_()
    X = torch.randn(5, 2)
    old = (X @ weight.detach()).log_softmax(-1)
    closures = (lambda: ((X @ weight).log_softmax(-1) - old)[:, 0].exp().mean(),
                lambda: (old.exp() * (old - (X @ weight).log_softmax(-1))).sum(-1).mean())
    before = weight.detach().clone()
    report = trpo_step([weight], *closures)
    assert report["fraction"] > 0 and not weight.detach().equal(before)


# Conjugate gradients

@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_solves_as_many_equations_as_iterations(n):
    M, b = spd(n, low=n), torch.randn(n)
    x = conjugate_gradient(lambda v: M @ v, b, iterations=n, tol=0)
    close(x, torch.linalg.solve(M, b))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_each_iterate_is_the_best_of_its_krylov_space(k):
    M, b = spd(12), torch.randn(12)
    x = conjugate_gradient(lambda v: M @ v, b, iterations=k, tol=0)
    basis = torch.stack([torch.linalg.matrix_power(M, i) @ b for i in range(k)], 1)
    basis, _ = torch.linalg.qr(basis)
    close(x, basis @ torch.linalg.solve(basis.T @ M @ basis, basis.T @ b), 1e-8)
    close(x @ (b - M @ x), torch.tensor(0.0), 1e-10)


def test_singular_matrix_with_the_right_side_in_its_range():
    mdp = random_mdp(4, 3, 0.9, seed=2)
    logits, log_policy = table(mdp)
    surrogate, divergence = problem(mdp, log_policy)
    product = fisher_vector_product(divergence(), [logits])
    F = torch.stack([product(v) for v in torch.eye(12)], 1)
    (g,) = torch.autograd.grad(surrogate(), logits)
    x = conjugate_gradient(product, g.flatten(), iterations=8, tol=0)
    close(x, torch.linalg.pinv(F, hermitian=True, rtol=1e-10) @ g.flatten(), 1e-6)
    # The softmax identity: advantages, up to a constant for each state.
    A = mdp.advantages(logits.detach().softmax(-1))
    close(x.view(4, 3), A - A.mean(-1, keepdim=True), 1e-6)


def test_zero_right_side_needs_no_product():
    def never(v):
        raise AssertionError("a product was made")

    assert conjugate_gradient(never, torch.zeros(3)).equal(torch.zeros(3))


def test_iterations_bound_the_products_and_tol_ends_early():
    M, b, calls = spd(20), torch.randn(20), []

    def product(v):
        calls.append(1)
        return M @ v

    conjugate_gradient(product, b, iterations=5, tol=0)
    assert len(calls) == 5
    calls.clear()
    x = conjugate_gradient(product, b, iterations=100, tol=1e-4)
    assert len(calls) < 100
    assert (M @ x - b).square().sum() <= 1e-4 * b.square().sum()


def test_arguments_are_not_changed():
    M, b = spd(4), torch.randn(4)
    kept = b.clone()
    conjugate_gradient(lambda v: M @ v, b)
    assert b.equal(kept)


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_solution_scales_with_the_right_side(factor):
    M, b = spd(6), torch.randn(6)
    x = conjugate_gradient(lambda v: M @ v, b, 4)
    close(conjugate_gradient(lambda v: M @ v, factor * b, 4) / factor, x)


def test_float32_stays_float32_and_is_accurate():
    M, b = spd(10, low=2.0), torch.randn(10)
    x = conjugate_gradient(lambda v: M.float() @ v, b.float(), iterations=20)
    assert x.dtype == torch.float32
    close(x.double(), torch.linalg.solve(M, b), 1e-4)


# The line search

def parabola(theta):
    return lambda: -((theta - 1) ** 2).sum(), lambda: (theta**2).sum()


def test_takes_the_longest_share_that_passes():
    theta = torch.zeros(1)
    report = line_search([theta], torch.tensor([4.0]), *parabola(theta), 3.0, shrink=0.5)
    assert report == {"gain": 1.0, "kl": 1.0, "fraction": 0.25} and theta.item() == 1


def test_the_surrogate_must_rise_and_not_merely_stay():
    theta = torch.zeros(1)
    report = line_search([theta], torch.ones(1), lambda: torch.zeros(()),
                         lambda: torch.zeros(()), 1.0)
    assert report == NOTHING and theta.item() == 0


def test_the_radius_itself_is_inside():
    theta = torch.zeros(1)
    report = line_search([theta], torch.ones(1), lambda: theta.sum(),
                         lambda: theta.sum() / 4, 0.25)
    assert report["fraction"] == 1.0 and report["kl"] == 0.25


@pytest.mark.parametrize("surrogate, kl", [
    (math.nan, 0.0), (-math.inf, 0.0), (-1.0, 0.0),
    (1.0, math.nan), (1.0, math.inf), (1.0, 0.5), (math.nan, math.nan),
])
def test_failure_restores_the_parameters_bit_for_bit(surrogate, kl):
    "Values that subtraction would not restore: tiny, huge, minus zero, float16."
    params = [torch.tensor([1e-300, 1e300, -0.0]).requires_grad_(), torch.randn(2, 3),
              torch.randn(4).half()]
    before = [p.detach().clone() for p in params]
    calls = []

    def measured():
        calls.append(1)
        return torch.tensor(0.0 if len(calls) == 1 else surrogate)

    step = torch.randn(13)
    report = line_search(params, step, measured, lambda: torch.tensor(kl), 0.1, tries=4)
    assert report == NOTHING and len(calls) == 5
    for p, was in zip(params, before):
        assert p.detach().view(torch.uint8).equal(was.view(torch.uint8))
        assert p.dtype == was.dtype


def test_a_closure_that_raises_leaves_the_parameters():
    "torch.distributions refuses NaN by an error, in the middle of the search."
    theta = torch.zeros(2)

    def surrogate():
        if theta.any():
            raise ValueError("NaN in logits")
        return torch.zeros(())

    with pytest.raises(ValueError, match="NaN in logits"):
        line_search([theta], torch.ones(2), surrogate, lambda: torch.zeros(()), 1.0)
    assert theta.equal(torch.zeros(2))


def test_nan_at_the_start_is_not_improved_upon():
    theta = torch.zeros(1)
    report = line_search([theta], torch.ones(1), lambda: torch.tensor(math.nan),
                         lambda: torch.tensor(0.0), 1.0)
    assert report == NOTHING


def test_parameters_stay_leaves_with_their_storage():
    theta = torch.zeros(2, requires_grad=True)
    address = theta.data_ptr()
    line_search([theta], torch.ones(2), lambda: theta.sum(), lambda: theta.sum() * 0, 1.0)
    assert theta.is_leaf and theta.requires_grad and theta.data_ptr() == address
    close(theta.detach(), torch.ones(2))


def test_search_runs_without_a_graph():
    theta, seen = torch.zeros(1, requires_grad=True), []

    def surrogate():
        seen.append(torch.is_grad_enabled())
        return theta.sum()

    line_search([theta], torch.ones(1), surrogate, lambda: theta.sum() * 0, 1.0)
    assert seen == [False, False] and torch.is_grad_enabled()


# The step

@pytest.mark.parametrize("seed", range(10))
def test_never_lowers_the_objective_of_a_table_and_closes_the_gap(seed):
    mdp = random_mdp(5, 3, 0.9, seed)
    logits = torch.zeros(5, 3, requires_grad=True)
    log_policy = lambda: logits.log_softmax(-1)
    objective = lambda: mdp.objective(logits.detach().softmax(-1))
    J = [objective()]
    for _ in range(60):
        report = trpo_step([logits], *problem(mdp, log_policy), max_kl=0.05)
        assert report["kl"] <= 0.05
        J.append(objective())
    J, best = torch.stack(J), mdp.objective(mdp.optimal_policy())
    assert (J.diff() >= -1e-12).all()
    assert (J[-1] - J[0]) / (best - J[0]) >= 0.99


def test_small_step_is_the_natural_step():
    mdp = random_mdp(4, 3, 0.9, seed=3)
    logits, log_policy = table(mdp)
    pi, start = logits.detach().softmax(-1), logits.detach().clone()
    d, A = mdp.occupancy(pi), mdp.advantages(pi)
    trpo_step([logits], *problem(mdp, log_policy), max_kl=1e-8, damping=0.0,
              cg_iterations=8)
    step = logits.detach() - start
    x = A - A.mean(-1, keepdim=True)
    variance = (d[:, None] * pi * A**2).sum()  # x'Fx, the mean variance of A
    for fraction in 1.0, 0.8:
        if torch.allclose(step, fraction * (2e-8 / variance).sqrt() * x, atol=1e-9):
            return
    raise AssertionError("the step is not along the advantages")


def test_gain_is_that_of_the_surrogate_and_kl_is_measured():
    mdp = random_mdp(4, 3, 0.9, seed=4)
    logits, log_policy = table(mdp)
    surrogate, divergence = problem(mdp, log_policy)
    report = trpo_step([logits], surrogate, divergence, max_kl=0.02)
    assert report["gain"] == pytest.approx(surrogate().item(), abs=1e-12)
    assert report["kl"] == pytest.approx(divergence().item(), abs=1e-12)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_the_unit_of_the_rewards_does_not_matter(factor):
    mdp = random_mdp(4, 3, 0.9, seed=5)
    ends = []
    for scale in 1.0, factor:
        torch.manual_seed(0)
        net, X = network(), torch.randn(4, 3)
        log_policy = lambda: net(X).log_softmax(-1)
        for _ in range(5):
            surrogate, divergence = problem(mdp, log_policy)
            trpo_step(net.parameters(), lambda: scale * surrogate(), divergence)
        ends.append(flat(net.parameters()))
    close(*ends, 1e-7)


def test_linear_coordinates_do_not_matter():
    mdp, B = random_mdp(4, 3, 0.9, seed=6), torch.eye(12) + 0.3 * torch.randn(12, 12)
    start, policies = torch.randn(12), []
    for matrix in torch.eye(12), B:
        phi = torch.linalg.solve(matrix, start).requires_grad_()
        log_policy = lambda: (matrix @ phi).view(4, 3).log_softmax(-1)
        for _ in range(3):
            trpo_step([phi], *problem(mdp, log_policy), max_kl=0.02, damping=0.0,
                      cg_iterations=30)
        policies.append(log_policy().detach())
    close(*policies, 1e-5)


def test_length_of_the_step_needs_no_further_product():
    "x'Fx = x'g after any number of iterations, in float32 as well."
    net, X = network(width=32).float(), torch.randn(64, 3).float()
    params = list(net.parameters())
    old = net(X).log_softmax(-1).detach()
    kl = (old.exp() * (old - net(X).log_softmax(-1))).sum(-1).mean()
    product, g = fisher_vector_product(kl, params, 0.001), torch.randn(227).float()
    for k in 1, 5, 10, 20:
        x = conjugate_gradient(product, g, k)
        assert (x @ product(x)).item() == pytest.approx((x @ g).item(), rel=1e-3)


def test_zero_gradient_makes_no_step():
    theta = torch.randn(3, requires_grad=True)
    before = theta.detach().clone()
    old = theta.detach().softmax(-1)
    kl = lambda: (old * (old.log() - theta.log_softmax(-1))).sum()
    assert trpo_step([theta], lambda: 0 * theta.sum(), kl) == NOTHING
    assert theta.detach().equal(before)


@pytest.mark.parametrize("where", ["surrogate", "divergence"])
def test_nan_away_from_the_old_policy_moves_nothing(where):
    mdp = random_mdp(3, 3, 0.9, seed=0)
    logits, log_policy = table(mdp)
    before, closures = logits.detach().clone(), dict(
        zip(("surrogate", "divergence"), problem(mdp, log_policy)))
    good = closures[where]
    closures[where] = lambda: good() if torch.is_grad_enabled() else good() * math.nan
    assert trpo_step([logits], **closures) == NOTHING
    assert logits.detach().equal(before)


def test_gradients_stored_by_the_caller_are_left_alone():
    mdp = random_mdp(3, 3, 0.9, seed=0)
    logits, log_policy = table(mdp)
    logits.grad = torch.ones(3, 3)
    trpo_step([logits], *problem(mdp, log_policy))
    assert logits.grad.equal(torch.ones(3, 3))


def test_sampled_gaussian_policy_in_float32():
    "A one-step task: the mean must come to the target and the radius be kept."
    torch.set_default_dtype(torch.float32)
    net, log_std = network(2, 1), torch.zeros(1, requires_grad=True)
    params = [*net.parameters(), log_std]
    X = torch.rand(256, 2)
    policy = lambda: Normal(net(X).squeeze(-1), log_std.exp())
    error = lambda: (net(X).squeeze(-1) - X.sum(-1)).detach().square().mean().item()
    first = error()
    for _ in range(40):
        with torch.no_grad():
            old, a = policy(), policy().sample()
            reward = -((a - X.sum(-1)) ** 2)
            A, logp_old = reward - reward.mean(), old.log_prob(a)
        report = trpo_step(
            params, lambda: ((policy().log_prob(a) - logp_old).exp() * A).mean(),
            lambda: kl_of(old, policy()).mean(), max_kl=0.02, damping=0.01,
        )
        assert report["kl"] <= 0.02
    assert error() < first / 5


def test_works_with_torch_distributions():
    net, X = network(), torch.randn(32, 3)
    old = Categorical(logits=net(X).detach())
    a, A = old.sample(), torch.randn(32)
    report = trpo_step(
        net.parameters(),
        lambda: ((Categorical(logits=net(X)).log_prob(a) - old.log_prob(a)).exp()
                 * A).mean(),
        lambda: kl_of(old, Categorical(logits=net(X))).mean(),
    )
    assert report["gain"] > 0 and 0 < report["kl"] <= 0.01


# Bad input of the step

@pytest.mark.parametrize("name, options", [
    ("max_kl", {"max_kl": 0.0}),
    ("max_kl", {"max_kl": -0.1}),
    ("max_kl", {"max_kl": math.nan}),
    ("max_kl", {"max_kl": math.inf}),
    ("damping", {"damping": -0.1}),
    ("damping", {"damping": math.nan}),
    ("iterations", {"cg_iterations": 0}),
    ("tries", {"tries": 0}),
    ("shrink", {"shrink": 0.0}),
    ("shrink", {"shrink": 1.0}),
    ("shrink", {"shrink": math.nan}),
])
def test_the_step_refuses_options_and_moves_nothing(name, options):
    mdp = random_mdp(3, 3, 0.9, seed=0)
    logits, log_policy = table(mdp)
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        trpo_step([logits], *problem(mdp, log_policy), **options)
    assert logits.detach().equal(before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_step_refuses_a_gradient_that_is_not_finite(bad):
    mdp = random_mdp(3, 3, 0.9, seed=0)
    logits, log_policy = table(mdp)
    surrogate, divergence = problem(mdp, log_policy)
    before = logits.detach().clone()
    with pytest.raises(ValueError, match="^surrogate must be of finite gradient"):
        trpo_step([logits], lambda: bad * surrogate(), divergence)
    assert logits.detach().equal(before)


def test_a_divergence_with_the_wrong_sign_is_refused():
    mdp = random_mdp(3, 3, 0.9, seed=0)
    logits, log_policy = table(mdp)
    surrogate, divergence = problem(mdp, log_policy)
    with pytest.raises(ValueError, match="^product must be positive definite"):
        trpo_step([logits], surrogate, lambda: -divergence(), damping=0.0)


@pytest.mark.parametrize("M", [
    -torch.eye(2, dtype=torch.float64),
    torch.zeros(2, 2, dtype=torch.float64),
    torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)),
    torch.full((2, 2), math.nan, dtype=torch.float64),
])
def test_conjugate_gradients_refuse_curvature_that_is_not_positive(M):
    with pytest.raises(ValueError, match="^product must be positive definite"):
        conjugate_gradient(lambda v: M @ v, torch.ones(2))


@pytest.mark.parametrize("options, name", [
    ({"b": torch.tensor([math.nan, 0.0])}, "b"),
    ({"b": torch.tensor([math.inf, 0.0])}, "b"),
    ({"iterations": 0}, "iterations"),
    ({"tol": -1.0}, "tol"),
    ({"tol": math.nan}, "tol"),
])
def test_conjugate_gradients_refuse(options, name):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        conjugate_gradient(**({"product": lambda v: v, "b": torch.ones(2)} | options))


@pytest.mark.parametrize("step", [torch.ones(1), torch.ones(3), torch.ones(1, 2)])
def test_the_search_refuses_a_step_of_another_size(step):
    theta = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^step must have shape \(2,\)"):
        line_search([theta], step, lambda: theta.sum(), lambda: theta.sum(), 1.0)


# The peer


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the peer's empty log
def test_the_policy_update_of_sb3_contrib():
    "Its divergence has the arguments exchanged, and its advantages the unbiased deviation."
    import sb3_contrib

    torch.set_default_dtype(torch.float32)
    model = sb3_contrib.TRPO(
        "MlpPolicy", "CartPole-v1", n_steps=512, seed=0, cg_max_steps=60, n_critic_updates=0, device="cpu"
    )
    model.learn(1)  # collects; the update moves the actor once
    copy = deepcopy(model.policy)
    data = next(model.rollout_buffer.get(batch_size=None))
    actions = data.actions.long().flatten()
    buffer = model.rollout_buffer  # that update moved the policy: its data are old
    with torch.no_grad():
        rows = torch.as_tensor(buffer.observations), torch.as_tensor(buffer.actions[:, 0])
        buffer.log_probs[:] = copy.evaluate_actions(*rows)[1].numpy().reshape(-1, 1)
        _, logp_old, _ = copy.evaluate_actions(data.observations, actions)
    model.train()

    old = copy.get_distribution(data.observations).distribution.probs.detach().log()
    std, mean = torch.std_mean(data.advantages)
    advantages = (data.advantages - mean) / (std + 1e-8)

    def surrogate():
        _, logp, _ = copy.evaluate_actions(data.observations, actions)
        return ((logp - logp_old).exp() * advantages).mean()

    def divergence():
        p = copy.get_distribution(data.observations).distribution.probs
        return (p * (p.log() - old)).sum(-1).mean()

    groups = copy.mlp_extractor.policy_net, copy.action_net
    actor = [p for group in groups for p in group.parameters()]
    start = [p.detach().clone() for p in actor]
    taken = trpo_step(actor, surrogate, divergence, damping=0.1, cg_iterations=60)
    groups = model.policy.mlp_extractor.policy_net, model.policy.action_net
    theirs = [p for group in groups for p in group.parameters()]
    assert taken["fraction"] > 0
    for ours, their, before in zip(actor, theirs, start):
        torch.testing.assert_close(ours.detach(), their.detach(), atol=2e-6, rtol=0)
        assert (ours - before).abs().max() > 1e-3 or len(before) == 1
