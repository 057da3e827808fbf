import math

import gymnasium as gym
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from po_book.policies import (
    CategoricalPolicy,
    Convolutions,
    DeterministicPolicy,
    GaussianPolicy,
    MultiCategoricalPolicy,
    Normalizer,
    QPolicy,
    draw_categorical,
    mlp,
    network,
)
from po_book.spaces import make_policy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gaussian_gradient_against_torch():
    policy = GaussianPolicy(2, 3, generator=generator())
    obs, actions = torch.randn(4, 2), torch.randn(4, 3)
    ours = torch.autograd.grad(policy.evaluate(obs, actions)[0].sum(), policy.parameters(), allow_unused=True)
    normal = torch.distributions.Normal(policy.actor(obs), policy.log_std.exp())
    theirs = torch.autograd.grad(normal.log_prob(actions).sum(), policy.parameters(), allow_unused=True)
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_gaussian_draws_a_mean_and_a_deviation_times_noise():
    policy, obs = GaussianPolicy(2, 3, generator=generator()), torch.randn(5, 2)
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-1.0, 0.0, 0.5]))
    noise = torch.empty(5, 3).normal_(generator=generator(1))
    expected = policy.actor(obs) + torch.tensor([-1.0, 0.0, 0.5]).exp() * noise
    torch.testing.assert_close(policy.act(obs, generator(1)), expected)


@pytest.mark.parametrize(
    "make, gains",
    [
        (lambda: CategoricalPolicy(5, 3, (8, 8), generator()), {"actor": 0.01, "critic": 1.0}),
        (lambda: GaussianPolicy(5, 3, (8, 8), generator()), {"actor": 0.01, "critic": 1.0}),
        (lambda: DeterministicPolicy(5, -torch.ones(3), torch.ones(3), (8, 8), generator()), {"actor": 0.01, "critic": 1.0}),
        (lambda: QPolicy(5, 3, (8, 8), generator()), {"q": 1.0}),
    ],
)
def test_last_layers_start_with_the_gain_of_their_use(make, gains):
    "An actor is near uniform at the start; what is hidden keeps the size of what it is shown."
    policy = make()
    for name, gain in gains.items():
        *hidden, last = [layer.weight.detach() for layer in getattr(policy, name) if hasattr(layer, "weight")]
        torch.testing.assert_close(last @ last.T, gain**2 * torch.eye(len(last)), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(hidden[1] @ hidden[1].T, 2 * torch.eye(8), atol=1e-5, rtol=1e-4)


def test_a_distribution_says_what_evaluate_says():
    for policy, actions in (
        (CategoricalPolicy(2, 3, generator=generator()), torch.tensor([0, 2, 1, 1])),
        (GaussianPolicy(2, 3, generator=generator()), torch.randn(4, 3)),
    ):
        obs = torch.randn(4, 2)
        logp, entropy = policy.evaluate(obs, actions)
        torch.testing.assert_close(policy.distribution(obs).log_prob(actions), logp)
        torch.testing.assert_close(policy.distribution(obs).entropy(), entropy)


def test_actor_parameters_are_what_the_distribution_depends_on():
    for policy in CategoricalPolicy(2, 3), GaussianPolicy(2, 3):
        actions = policy.act(torch.zeros(5, 2))
        logp, _ = policy.evaluate(torch.ones(5, 2), actions)
        grads = torch.autograd.grad(logp.sum(), list(policy.parameters()), allow_unused=True)
        needed = {p for p, g in zip(policy.parameters(), grads) if g is not None}
        assert set(policy.actor_parameters()) == needed


def test_a_q_policy_explores_in_training_mode_only():
    policy, obs = QPolicy(4, 3, generator=generator()), torch.randn(1, 4).expand(30_000, -1)
    best = policy.q(obs[:1]).argmax().item()
    policy.epsilon.fill_(0.3)
    shares = policy.act(obs, generator()).bincount(minlength=3) / 30_000
    expected = torch.full((3,), 0.1)
    expected[best] = 0.8
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    assert (policy.eval().act(obs, generator()) == best).all()


def test_a_deterministic_policy_stays_within_uneven_bounds():
    low, high = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 2.5])
    policy = DeterministicPolicy(4, low, high, generator=generator())
    with torch.no_grad():
        policy.actor[-1].bias.copy_(torch.tensor([20.0, -20.0]))
    obs = torch.randn(5000, 4)
    torch.testing.assert_close(policy.mean(obs[:1]), torch.tensor([[3.0, 2.0]]))
    policy.sigma.fill_(0.2)
    noisy = policy.act(obs, generator())
    assert (noisy >= low).all() and (noisy <= high).all() and noisy.std(0).min() > 0
    # Half of the noise is cut off at the bound; the rest scales with the width.
    inside = (policy.mean(obs) - noisy).abs().mean(0)
    torch.testing.assert_close(inside[0] / inside[1], torch.tensor(8.0), atol=0.6, rtol=0)
    assert torch.equal(policy.eval().act(obs), policy.mean(obs).detach())


def test_the_critic_sees_actions_in_half_widths():
    wide = DeterministicPolicy(4, torch.tensor([-20.0]), torch.tensor([20.0]), generator=generator())
    unit = DeterministicPolicy(4, torch.tensor([-1.0]), torch.tensor([1.0]), generator=generator())
    obs, actions = torch.randn(6, 4), torch.rand(6, 1)
    torch.testing.assert_close(wide.q(obs, 20 * actions), unit.q(obs, actions))


def test_a_deterministic_policy_needs_bounds():
    with pytest.raises(ValueError, match="action bounds must be finite"):
        DeterministicPolicy(2, torch.tensor([-1.0]), torch.tensor([torch.inf]))


def test_mlp_is_orthogonal_and_seeded():
    a, b = mlp([5, 8, 3], 0.5, generator()), mlp([5, 8, 3], 0.5, generator())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    weight = a[-1].weight.detach()
    torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(3))
    assert all((layer.bias == 0).all() for layer in a if hasattr(layer, "bias"))


@pytest.mark.parametrize("cuts", [[50], [1, 2, 3], [10, 10, 90], []])
def test_the_normalizer_has_the_moments_of_all_it_saw(cuts):
    obs = torch.randn(100, 3, generator=generator()) * torch.tensor([1.0, 1e-3, 1e4]) + 5
    normalizer = Normalizer(3)
    for part in obs.tensor_split(cuts):
        normalizer.update(part)
    torch.testing.assert_close(normalizer.mean, obs.double().mean(0))
    torch.testing.assert_close(normalizer.variance, obs.double().var(0, correction=0))
    out = normalizer(obs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0)[[0, 2]], torch.ones(2), atol=1e-3, rtol=0)


def test_a_new_normalizer_changes_outliers_only_and_an_empty_batch_nothing():
    normalizer, obs = Normalizer(2), torch.tensor([[3.0, -1e6]])
    normalizer.update(torch.empty(0, 2))
    torch.testing.assert_close(normalizer(obs), torch.tensor([[3.0, -10.0]]))


def test_a_normalizer_is_part_of_actor_and_critic_and_no_parameter():
    env = gym.make_vec("CartPole-v1")
    plain, scaled = (make_policy(env, generator=generator(), normalize_obs=on) for on in (False, True))
    scaled.normalizer.update(torch.randn(50, 4, generator=generator()) + 3)
    obs = torch.randn(7, 4, generator=generator())
    torch.testing.assert_close(scaled.actor(obs), plain.actor(scaled.normalizer(obs)))
    torch.testing.assert_close(scaled.value(obs), plain.value(scaled.normalizer(obs)))
    assert len(list(scaled.parameters())) == len(list(plain.parameters()))
    assert len(scaled.actor_parameters()) == 6


@pytest.mark.parametrize("blocked", [0, 2])
def test_a_logit_of_minus_infinity_leaves_entropy_and_gradients_finite(blocked):
    policy, obs = CategoricalPolicy(2, 3, generator=generator()), torch.randn(6, 2)
    with torch.no_grad():
        policy.actor[-1].weight[blocked] = 0
        policy.actor[-1].bias[blocked] = -torch.inf
    logp, entropy = policy.evaluate(obs, torch.ones(6, dtype=torch.long))
    left = [a for a in range(3) if a != blocked]
    two = torch.distributions.Categorical(logits=policy.actor(obs)[:, left])
    torch.testing.assert_close(entropy, two.entropy())
    torch.testing.assert_close(logp, two.log_prob(torch.full((6,), left.index(1))))
    old = torch.distributions.Categorical(logits=policy.logits(obs).detach() * 0.5)
    kl = torch.distributions.kl_divergence(old, policy.distribution(obs)).mean()
    parameters = policy.actor_parameters()
    for loss in entropy.mean(), logp.mean(), kl:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert all(g.isfinite().all() for g in grads)
        assert all((g[blocked] == 0).all() for g in grads[-2:])
    assert kl.isfinite() and (policy.act(obs.expand(500, 6, 2), generator()) != blocked).all()


def test_finite_logits_keep_every_bit():
    policy, obs = CategoricalPolicy(2, 3, generator=generator()), torch.randn(50, 2)
    logp = policy.actor(obs).log_softmax(-1)
    assert torch.equal(policy.evaluate(obs, obs[:, 0].long() * 0)[0], logp[:, 0])
    assert torch.equal(policy.evaluate(obs, obs[:, 0].long() * 0)[1], -(logp.exp() * logp).sum(-1))


def test_a_gaussian_counts_in_units_of_its_bounds():
    low = torch.tensor([10.0, -2000.0, -1.0, -torch.inf, 3.0])
    high = torch.tensor([12.0, 2000.0, 1.0, 5.0, 3.0])
    policy = GaussianPolicy(2, 5, generator=generator(), bounds=torch.stack([low, high]))
    plain = GaussianPolicy(2, 5, generator=generator())
    half = torch.tensor([1.0, 2000.0, 1.0, 1.0, 1.0])
    middle = torch.tensor([11.0, 0.0, 0.0, 0.0, 0.0])
    obs = torch.randn(6, 2)
    unit = plain.act(obs, generator())
    actions = policy.act(obs, generator())
    torch.testing.assert_close(actions, middle + half * unit)
    logp, entropy = policy.evaluate(obs, actions)
    dist = policy.distribution(obs)
    torch.testing.assert_close(logp, dist.log_prob(actions), atol=1e-3, rtol=0)
    torch.testing.assert_close(entropy, dist.entropy())
    # A change of units moves every log-density by the same constant.
    torch.testing.assert_close(
        logp, plain.evaluate(obs, unit)[0] - half.log().sum(), atol=1e-3, rtol=0
    )
    assert policy.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("shape", [(84, 84, 4), (4, 84, 84), (36, 40, 1), (5, 6, 3), (1, 3, 3)])
def test_convolutions_keep_leading_axes_and_scale_by_255(shape):
    eye = Convolutions(shape, generator())
    obs = torch.randint(256, (2, 3, math.prod(shape)), dtype=torch.uint8)
    features = eye(obs)
    assert features.shape == (2, 3, eye.features)
    last = shape[-1] <= shape[0]
    image = obs[1, 2].reshape(shape)
    image = image.movedim(-1, 0) if last else image
    expected = eye.layers(image[None].float() / 255).flatten()
    torch.testing.assert_close(features[1, 2], expected, atol=1e-5, rtol=1e-4)
    assert eye.layers[0].in_channels == shape[-1 if last else 0]
    assert len(eye.layers) == 6 and features.max() < 10


LIVE = {
    "epsilon": lambda: QPolicy(4, 3, generator=generator()),
    "sigma": lambda: DeterministicPolicy(4, -torch.ones(2), torch.ones(2), generator=generator()),
}


@pytest.mark.parametrize("name, start", [("epsilon", 1.0), ("sigma", 0.2)])
def test_a_live_number_is_a_tensor_that_is_written_in_place(name, start):
    policy = LIVE[name]()
    number = getattr(policy, name)
    assert number.dtype == torch.float32 and number.shape == () and not number.requires_grad
    assert number.item() == pytest.approx(start)
    assert name in dict(policy.named_buffers()) and name not in policy.state_dict()
    place = number.data_ptr()
    number.fill_(0.5)
    assert getattr(policy, name) is number and number.data_ptr() == place and number == 0.5
    with pytest.raises(TypeError, match="cannot assign"):
        setattr(policy, name, 0.1)
    assert getattr(policy.to("meta"), name).device.type == "meta"


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_a_live_number_stays_float32(default):
    torch.set_default_dtype(default)
    try:
        assert all(getattr(make(), name).dtype == torch.float32 for name, make in LIVE.items())
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_a_q_policy_draws_with_the_probabilities_of_epsilon_greedy(epsilon):
    policy, n = QPolicy(2, 4, generator=generator()), 100_000
    obs = torch.tensor([[0.3, -2.0], [1.0, 0.5]])
    policy.epsilon.fill_(epsilon)
    rows = policy.act(obs.repeat_interleave(n, 0), generator(1)).reshape(2, n)
    for row, best in zip(rows, policy.q(obs).argmax(-1)):
        exact = torch.full((4,), epsilon / 4)
        exact[best] += 1 - epsilon
        deviation = (exact * (1 - exact) / n).sqrt()
        assert ((row.bincount(minlength=4) / n - exact).abs() <= 5 * deviation).all()


def test_an_action_follows_the_live_number_and_the_mode():
    policy, obs = QPolicy(4, 3, generator=generator()), torch.randn(2000, 4)
    greedy = policy.q(obs).argmax(-1)
    assert not torch.equal(policy.act(obs, generator()), greedy)
    policy.epsilon.fill_(0.0)
    assert torch.equal(policy.act(obs, generator()), greedy)
    policy.epsilon.fill_(1.0)
    assert torch.equal(policy.eval().act(obs, generator()), greedy)


def test_the_noise_follows_the_live_number():
    policy, obs = LIVE["sigma"](), torch.zeros(2000, 4)
    noise = torch.empty(2000, 2).normal_(generator=generator())
    for sigma in 0.1, 0.4, 0.0:
        policy.sigma.fill_(sigma)
        expected = (policy.mean(obs) + sigma * noise).clamp(-1, 1)
        torch.testing.assert_close(policy.act(obs, generator()), expected.detach())


@pytest.mark.parametrize("impossible", [0, 1])
def test_a_clock_that_reads_zero_rings_for_no_impossible_action(impossible, monkeypatch):
    "Some devices draw an exact zero once in 2**24 times."
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, generator=None: x.zero_())
    logits = torch.zeros(1, 2)
    logits[0, impossible] = -torch.inf
    for dtype in torch.float32, torch.float64, torch.bfloat16:
        assert draw_categorical(logits.to(dtype)).item() == 1 - impossible


class Waits(TorchDispatchMode):
    "Refuses what looks at the values of a tensor, which on a GPU is to wait."

    NAMES = {"_local_scalar_dense", "nonzero", "masked_select", "multinomial", "equal", "unique"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        chosen = [x for x in indices if x is not None and x.dtype in (torch.bool, torch.uint8)]
        assert name not in self.NAMES and not chosen, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.multinomial(x, 1),
        lambda x: torch.full_like(x, x[0]),
    ],
)
def test_a_look_is_noticed(look):
    with pytest.raises(AssertionError), Waits():
        look(torch.ones(3))


def every_policy():
    "Policies of every kind, with and without mask and normaliser."
    box = torch.tensor([[0.0, -5.0], [1.0, torch.inf]])
    yield from (make() for make in LIVE.values())
    for scaled in False, True:
        yield GaussianPolicy(4, 2, (8,), normalize_obs=scaled, bounds=box)
        for mask in None, slice(0, 3):
            for policy in (
                CategoricalPolicy(4, 3, (8,), normalize_obs=scaled),
                MultiCategoricalPolicy(4, [2, 1], (8,), normalize_obs=scaled),
            ):
                policy.mask = mask
                yield policy


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("policy", list(every_policy()), ids=lambda p: type(p).__name__)
def test_a_policy_never_looks_at_what_a_tensor_holds(policy, mode):
    policy.train(mode)
    obs, rng = torch.tensor([[1.0, 1.0, 0.0, 0.3], [1.0, 1.0, 1.0, -0.2]]), generator()
    with Waits():
        actions = policy.act(obs, rng)
        if isinstance(policy, QPolicy):
            policy.q(obs)
        elif isinstance(policy, DeterministicPolicy):
            policy.q(obs, policy.mean(obs))
        else:
            policy.observe(obs)
            policy.value(obs).sum().backward()
            torch.cat(policy.evaluate(obs, actions)).sum().backward()
            distribution = policy.distribution(obs)
            distribution.log_prob(actions), distribution.entropy(), distribution.mode


@pytest.mark.parametrize("hidden", [64, 64.0, None, "64"])
def test_one_width_is_no_tuple_of_widths(hidden):
    bounds = -torch.ones(1), torch.ones(1)
    for make in (
        lambda: network(3, hidden, 2, 1.0),
        lambda: network((8, 8, 3), hidden, 2, 1.0),
        lambda: CategoricalPolicy(3, 2, hidden),
        lambda: MultiCategoricalPolicy(3, [2, 2], hidden),
        lambda: GaussianPolicy(3, 2, hidden),
        lambda: QPolicy(3, 2, hidden),
        lambda: DeterministicPolicy(3, *bounds, hidden),
    ):
        message = f"hidden must be a tuple of widths, such as .64, 64., got {hidden}"
        with pytest.raises(ValueError, match=message):
            make()
    assert network(3, [5], 2, 1.0)[0].out_features == 5
