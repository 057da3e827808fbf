import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import (
    Box,
    Dict,
    Discrete,
    MultiBinary,
    MultiDiscrete,
    Sequence,
    Text,
    Tuple,
)

from po_book.policies import (
    CategoricalPolicy,
    Convolutions,
    DeterministicPolicy,
    GaussianPolicy,
    MultiCategoricalPolicy,
    Normalizer,
    QPolicy,
    make_deterministic_policy,
    make_policy,
    make_q_policy,
    mlp,
    observation_size,
)


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
    policy.epsilon = 0.3
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
    policy.sigma = 0.2
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


@pytest.mark.parametrize(
    "make, env_id, message",
    [
        (make_q_policy, "Pendulum-v1", "action space must be Discrete, got Box"),
        (make_deterministic_policy, "CartPole-v1", "action space must be a Box, got Discrete"),
    ],
)
def test_a_method_that_does_not_fit_the_actions(make, env_id, message):
    with pytest.raises(ValueError, match=message):
        make(gym.make_vec(env_id, num_envs=1))


def test_a_deterministic_policy_needs_bounds():
    with pytest.raises(ValueError, match="action bounds must be finite"):
        DeterministicPolicy(2, torch.tensor([-1.0]), torch.tensor([torch.inf]))


@pytest.mark.parametrize(
    "field, space, message",
    [
        ("single_observation_space", Text(3), "observation space must be a Box, Discrete"),
        (
            "single_observation_space",
            Dict(a=Discrete(2), b=Tuple([Discrete(2), Sequence(Discrete(3))])),
            r"observation space\['b'\]\[1\] must be .*, got Sequence",
        ),
        ("single_action_space", Text(3), "action space must be Discrete, MultiDiscrete"),
    ],
)
def test_spaces_that_do_not_fit(field, space, message):
    env = gym.make_vec("CartPole-v1", num_envs=1)
    setattr(env.unwrapped, field, space)
    with pytest.raises(ValueError, match=message):
        make_policy(env)


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


def env_with(**spaces):
    "A vector environment that is nothing but its spaces."
    env = gym.vector.VectorEnv()
    env.single_observation_space = spaces.get("obs", Box(-1, 1, (2,)))
    env.single_action_space = spaces.get("action", Discrete(2))
    return env


@pytest.mark.parametrize(
    "space, size",
    [
        (Discrete(5, start=2), 5),
        (MultiDiscrete([[2, 3], [4, 1]]), 10),
        (MultiBinary((2, 3)), 6),
        (Box(0, 1, ()), 1),
        (Box(0, 255, (9, 8, 3), "uint8"), 216),
        (Dict(a=Discrete(3), b=Tuple([Box(0, 1, (2, 2)), MultiBinary(2)])), 9),
    ],
)
def test_the_size_of_an_observation(space, size):
    assert observation_size(env_with(obs=space)) == size


@pytest.mark.parametrize(
    "space, sizes",
    [
        (MultiDiscrete([2, 4, 3]), [2, 4, 3]),
        (MultiDiscrete([[2, 4], [3, 1]], start=[[1, 1], [0, 5]]), [2, 4, 3, 1]),
        (MultiBinary((2, 2)), [2, 2, 2, 2]),
    ],
)
def test_several_choices_are_independent_categoricals(space, sizes):
    policy = make_policy(env_with(action=space), generator=generator())
    assert isinstance(policy, MultiCategoricalPolicy)
    with torch.no_grad():
        policy.actor[-1].weight.mul_(100)
    obs = torch.randn(5, 7, 2)
    parts = [torch.distributions.Categorical(logits=z) for z in policy.actor(obs).split(sizes, -1)]
    actions = torch.stack([part.sample() for part in parts], -1)
    logp, entropy = policy.evaluate(obs, actions)
    expected = sum(part.log_prob(a) for part, a in zip(parts, actions.unbind(-1)))
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))
    dist = policy.distribution(obs)
    torch.testing.assert_close(dist.log_prob(actions), logp)
    torch.testing.assert_close(dist.entropy(), entropy)
    best = torch.stack([part.logits.argmax(-1) for part in parts], -1)
    assert torch.equal(dist.mode, best)
    drawn = policy.act(obs[0, :1].expand(50_000, -1), generator())
    for k, part in enumerate(parts):
        share = drawn[:, k].bincount(minlength=sizes[k]) / 50_000
        torch.testing.assert_close(share, part.probs[0, 0].detach(), atol=0.012, rtol=0)
    grads = torch.autograd.grad((logp + entropy).sum(), policy.actor_parameters())
    assert all(g.isfinite().all() for g in grads)


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


@pytest.mark.parametrize("low, high", [(-1, 1), (-torch.inf, torch.inf)])
def test_bounds_of_one_and_none_keep_every_bit(low, high):
    space = Box(np.full(3, low, np.float32), np.full(3, high, np.float32))
    policy = make_policy(env_with(action=space), generator=generator())
    obs, noise = torch.randn(50, 2), torch.empty(50, 3).normal_(generator=generator())
    assert torch.equal(policy.act(obs, generator()), policy.actor(obs) + noise)
    z = noise - policy.actor(obs)
    expected = -(0.5 * z**2 + 0.5 * math.log(2 * math.pi)).sum(-1)
    assert torch.equal(policy.evaluate(obs, noise)[0], expected)


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


def test_images_get_convolutions_in_actor_and_critic_and_vectors_do_not():
    image = Box(0, 255, (8, 8, 3), "uint8")
    policy = make_policy(env_with(obs=image), normalize_obs=True)
    assert [type(net[1]) for net in (policy.actor, policy.critic)] == [Convolutions] * 2
    assert len(policy.actor_parameters()) == 6 + 6
    assert isinstance(make_q_policy(env_with(obs=image)).q[0], Convolutions)
    for vector in Box(0, 255, (8, 8), "uint8"), Box(0, 1, (8, 8, 3)):
        assert not any(isinstance(m, Convolutions) for m in make_policy(env_with(obs=vector)).modules())
    with pytest.raises(ValueError, match="observation space must be vectors, not images"):
        make_deterministic_policy(env_with(obs=image, action=Box(-1, 1)))
