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
from gymnasium.spaces.utils import flatten

from po_book.policies import Convolutions, MultiCategoricalPolicy
from po_book.spaces import (
    action_mask,
    categories,
    is_image,
    make_deterministic_policy,
    make_policy,
    make_q_policy,
    observation_shape,
    observation_size,
    space_parts,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def env_with(**spaces):
    "A vector environment that is nothing but its spaces."
    env = gym.vector.VectorEnv()
    env.single_observation_space = spaces.get("obs", Box(-1, 1, (2,)))
    env.single_action_space = spaces.get("action", Discrete(2))
    return env


def test_parts_come_in_order_with_the_keys_that_lead_to_them():
    space = Dict({"b": Discrete(2), "a": Tuple([MultiBinary(3), Dict(c=Box(0, 1, (2,)))])})
    a = space["a"]
    expected = [(("a", 0), a[0]), (("a", 1, "c"), a[1]["c"]), (("b",), space["b"])]
    assert space_parts(space) == expected
    assert space_parts(Discrete(4)) == [((), Discrete(4))]


def test_only_bytes_in_three_dimensions_are_an_image():
    for shape, dtype, image in (
        ((8, 8, 3), "uint8", True),
        ((8, 8), "uint8", False),
        ((8, 8, 3), "float32", False),
        ((8, 8, 3), "int8", False),
    ):
        box = Box(0, 1, shape, dtype)
        assert is_image(box) == image
        shape = box.shape if image else math.prod(box.shape)
        assert observation_shape(env_with(obs=box)) == shape
    assert not is_image(Dict(a=Box(0, 255, (8, 8, 3), "uint8")))


@pytest.mark.parametrize(
    "space, sizes, start",
    [
        (Discrete(3), [3], [0]),
        (Discrete(3, start=-1), [3], [-1]),
        (MultiDiscrete([[2, 4], [3, 1]], start=[[1, 1], [0, 5]]), [2, 4, 3, 1], [1, 1, 0, 5]),
        (MultiBinary((2, 1)), [2, 2], [0, 0]),
    ],
)
def test_categories_are_sizes_and_starts(space, sizes, start):
    found = categories(space)
    assert [x.tolist() for x in found] == [sizes, start]


def test_the_mask_is_found_behind_the_parts_before_it():
    mask = MultiBinary(3)
    parts = {"a": Discrete(4), "action_mask": mask, "b": Box(-1, 1, (2,))}
    assert action_mask(env_with(obs=Dict(parts), action=Discrete(3))) == slice(4, 7)
    assert action_mask(env_with(obs=Dict(inner=Dict(action_mask=mask)), action=Discrete(3))) is None
    assert action_mask(env_with(action=Box(-1, 1))) is None
    columns = Dict(parts), {"a": 2, "action_mask": np.array([0, 1, 1], np.int8), "b": np.zeros(2, "f4")}
    assert flatten(*columns)[4:7].tolist() == [0, 1, 1]
    two = env_with(obs=Dict(action_mask=MultiBinary(5)), action=MultiDiscrete([2, 3]))
    assert action_mask(two) == slice(0, 5)
    assert make_policy(two).mask == slice(0, 5) and make_policy(env_with()).mask is None


@pytest.mark.parametrize(
    "make, action",
    [
        (make_policy, Discrete(2)),
        (make_policy, MultiBinary(2)),
        (make_policy, Box(-1, 1)),
        (make_q_policy, Discrete(2)),
        (make_deterministic_policy, Box(-1, 1)),
    ],
)
def test_one_width_is_no_tuple_of_widths(make, action):
    with pytest.raises(ValueError, match="hidden must be a tuple of widths, such as .64, 64., got 64"):
        make(env_with(action=action), 64)


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


@pytest.mark.parametrize("low, high", [(-1, 1), (-torch.inf, torch.inf)])
def test_bounds_of_one_and_none_keep_every_bit(low, high):
    space = Box(np.full(3, low, np.float32), np.full(3, high, np.float32))
    policy = make_policy(env_with(action=space), generator=generator())
    obs, noise = torch.randn(50, 2), torch.empty(50, 3).normal_(generator=generator())
    assert torch.equal(policy.act(obs, generator()), policy.actor(obs) + noise)
    z = noise - policy.actor(obs)
    expected = -(0.5 * z**2 + 0.5 * math.log(2 * math.pi)).sum(-1)
    assert torch.equal(policy.evaluate(obs, noise)[0], expected)


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
