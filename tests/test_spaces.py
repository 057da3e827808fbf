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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from po_book.policies import Convolutions, MultiCategoricalPolicy
from po_book.rollout import Stepper, act, collect, evaluate
from po_book.spaces import (
    MaskFromInfo,
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
from po_book.train import PPOConfig, train


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


def test_actions_are_counted_in_the_bounds_of_their_space():
    space = Box(np.float32([[10, -2000], [-1, 3]]), np.float32([[12, 2000], [np.inf, 3]]))
    policy = make_policy(env_with(action=space))
    assert policy.middle.tolist() == [11, 0, 0, 0] and policy.half_width.tolist() == [1, 2000, 1, 1]
    bounded = make_deterministic_policy(env_with(action=Box(np.float32([10, -4]), np.float32([12, 0]))))
    assert bounded.middle.tolist() == [11, -2] and bounded.half_width.tolist() == [1, 2]


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


# A mask in `info`


class Told(gym.Env):
    "Says in `info`, by a mask of its own each step, what is possible; notes what it said."

    def __init__(self, action, seen=Box(-1, 1, (2,)), give=np.concatenate):
        self.observation_space, self.action_space, self.give = seen, action, give
        self.sizes, self.start = categories(action)
        self.said = []

    def info(self):
        masks = [self.np_random.integers(2, size=n, dtype=np.int8) for n in self.sizes]
        for mask in masks:
            mask[self.np_random.integers(len(mask))] = 1
        self.masks = masks
        self.said.append(np.concatenate(masks))
        return {"action_mask": self.give(masks), "left": self.left}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 4
        return self.observation_space.sample(), self.info()

    def step(self, action):
        assert self.action_space.contains(action)
        choices = np.ravel(np.asarray(action) - np.reshape(self.start, np.shape(action)))
        assert all(mask[choice] == 1 for mask, choice in zip(self.masks, choices, strict=True))
        self.left -= 1
        return self.observation_space.sample(), 1.0, self.left == 0, False, self.info()


TOLD = {
    "one choice": (Discrete(4, start=2), np.concatenate),
    "a list of truths": (Discrete(3), lambda masks: [bool(x) for x in masks[0]]),
    "one mask after the other": (MultiDiscrete([2, 5, 3], start=[0, 3, -1]), np.concatenate),
    "a tuple of masks": (MultiDiscrete([2, 5, 3]), tuple),
    "as gymnasium has it in two dimensions": (MultiDiscrete([[2, 4], [3, 2]]), lambda m: (tuple(m[:2]), tuple(m[2:]))),
    "bits": (MultiBinary(3), np.concatenate),
    "bits in two dimensions": (MultiBinary((2, 2)), np.stack),
}


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("action, give", TOLD.values(), ids=TOLD)
def test_a_policy_gets_the_mask_that_info_had_and_takes_nothing_impossible(action, give, mode):
    envs = [Told(action, give=give) for _ in range(2)]
    vectors = SyncVectorEnv([lambda env=env: MaskFromInfo(env) for env in envs], autoreset_mode=mode)
    policy = make_policy(vectors, generator=generator())
    size = int(sum(envs[0].sizes))
    assert policy.mask == slice(0, size)
    table = collect(policy, Stepper(vectors, seed=0), 40, generator())
    seen, after = table.obs[..., :size], table.next_obs[..., :size]
    for i, env in enumerate(envs):
        got = [*seen[:, i].int().tolist(), after[-1, i].int().tolist()]
        if mode != AutoresetMode.NEXT_STEP:  # what an end said is no observation to act on
            last = table.done[:, i]
            got = [x for t in range(40) for x in ([got[t], after[t, i].int().tolist()] if last[t] else [got[t]])]
        said = np.stack(env.said).tolist()
        assert got[: len(said)] == said[: len(got)] and len(got) >= 40
    assert not (seen == 1).all() and len(seen.flatten(0, 1).unique(dim=0)) > 3


def test_the_rest_of_an_observation_stands_beside_the_mask():
    seen = Dict(screen=Box(0, 255, (2, 2, 3), np.uint8), action_mask=MultiBinary(3))
    env = MaskFromInfo(Told(Discrete(3), seen))
    assert env.observation_space == Dict(action_mask=MultiBinary(3), obs=seen)
    obs, info = env.reset(seed=3, options={})
    assert env.observation_space.contains(obs) and info["left"] == 4
    assert obs["action_mask"].tolist() == info["action_mask"].tolist() == env.unwrapped.said[-1].tolist()
    obs, reward, terminated, truncated, info = env.step(obs["action_mask"].argmax())
    assert env.observation_space.contains(obs) and info["left"] == 3
    assert (reward, terminated, truncated) == (1.0, False, False)
    assert obs["action_mask"].tolist() == env.unwrapped.said[-1].tolist()
    info["action_mask"][:] = 7  # an environment may write into its mask again
    assert obs["action_mask"].tolist() == env.unwrapped.said[-1].tolist()
    vectors = SyncVectorEnv([lambda: env])
    assert action_mask(vectors) == slice(0, 3)
    action = act(make_policy(vectors, generator=generator()), obs, env, generator())
    assert obs["action_mask"][action] == 1


@pytest.mark.parametrize(
    "bad",
    ["nothing", None, [1, 1], [1, 1, 1, 1], np.ones((2, 3)), ([1, 1, 1], [1]), [1, 0.5, 0], [1, 2, 0],
     [1, -np.inf, 0], [1, np.nan, 0], {"a": 1}, 1, ()],
    ids=str,
)
def test_info_without_a_fitting_mask_is_refused_at_once(bad):
    env = Told(Discrete(3))
    wrapped = MaskFromInfo(env)
    wrapped.reset(seed=0)
    info = {} if isinstance(bad, str) else {"action_mask": bad}
    env.info = lambda: info
    rule = r'^info\["action_mask"\] must be 3 entries 0 or 1, one for every action of Discrete\(3\), got '
    told = "nothing$" if isinstance(bad, str) else ""
    env.masks = [np.ones(3)]
    with pytest.raises(ValueError, match=rule + told):
        wrapped.step(0)
    with pytest.raises(ValueError, match=rule + told):
        wrapped.reset()


def test_only_categories_can_be_masked():
    with pytest.raises(ValueError, match="action space must be Discrete, MultiDiscrete or MultiBinary, got Box"):
        MaskFromInfo(gym.make("Pendulum-v1"))


def test_a_mask_that_allows_nothing_is_refused_by_the_stepper():
    env = Told(Discrete(3), give=lambda masks: np.zeros(3, np.int8))
    with pytest.raises(ValueError, match="action_mask of environment 0 allows nothing"):
        Stepper(SyncVectorEnv([lambda: MaskFromInfo(env)]), seed=0)


def taxi():
    name = max(name for name in gym.registry if name.startswith("Taxi-v"))
    return MaskFromInfo(gym.make(name))


def test_the_masks_of_an_environment_of_gymnasium():
    for kind in SyncVectorEnv, AsyncVectorEnv:
        vectors = kind([taxi] * 2)
        table = collect(make_policy(vectors, generator=generator()), Stepper(vectors, seed=0), 20, generator())
        vectors.close()
        one = taxi().unwrapped
        states = table.obs[..., 6:].argmax(-1)
        want = torch.tensor([[one.action_mask(int(s)).tolist() for s in row] for row in states])
        assert torch.equal(table.obs[..., :6].int(), want.int())
        assert table.obs[..., :6].gather(-1, table.actions[..., None]).eq(1).all()


class Steep(gym.Env):
    "Of the actions that are possible the last pays most; no other can be taken."

    observation_space, action_space = Box(0, 1, (1,)), Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.mask = np.ones(4, np.int8)
        self.mask[self.np_random.choice(4, 2, replace=False)] = 0
        return np.zeros(1, np.float32), {"action_mask": self.mask}

    def step(self, action):
        assert self.mask[action] == 1
        best = action == np.flatnonzero(self.mask)[-1]
        return np.zeros(1, np.float32), float(best), True, False, {"action_mask": self.mask}


def test_ppo_learns_with_masks_from_info():
    def make():
        return MaskFromInfo(Steep())

    config = PPOConfig(total_steps=2048, n_envs=8, n_steps=32, lr=0.01)
    run = train("ppo", make, seed=0, config=config, progress=False)
    assert run.policy.mask == slice(0, 4)
    untrained = make_policy(SyncVectorEnv([make]), generator=generator())
    # Of two possible actions one pays: chance is 0.5, with a standard error of 0.035.
    assert evaluate(untrained, make, 200, seed=1).mean() < 0.65
    assert evaluate(run.policy, make, 200, seed=1).mean() > 0.8
