"The loop, with each of the six methods as the one that it is given."

import re
from dataclasses import dataclass, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_train import SMALL, Bandit, quick, vector

import po_book.learner
from po_book.advantage import normalize
from po_book.checkpoint import load_checkpoint, save_checkpoint
from po_book.policies import make_policy
from po_book.ppo import ppo_loss
from po_book.runner import (
    Algorithm,
    Config,
    Diverged,
    find_device,
    flatten_parameters,
    read_run,
    resume_run,
    start_run,
)
from po_book.train import ALGORITHMS, PPOConfig


@pytest.mark.parametrize("algorithm", SMALL)
def test_an_evaluation_does_not_change_the_run(algorithm):
    "Evaluation has random numbers and environments of its own."
    plain = quick(algorithm)
    graded = quick(algorithm, config=replace(SMALL[algorithm], eval_every=500, eval_episodes=5))
    assert len(graded.curve("mean_return")[0]) >= 2 and not plain.curve("mean_return")[0]
    for x, y in zip(plain.policy.parameters(), graded.policy.parameters()):
        assert torch.equal(x, y)


@pytest.mark.parametrize("algorithm", SMALL)
def test_the_log_counts_transitions_and_time(algorithm):
    run = quick(algorithm)
    steps = [row["steps"] for row in run.log]
    seconds = [row["seconds"] for row in run.log]
    assert steps == sorted(steps) and steps[-2] < 1500 <= steps[-1]
    assert all(np.diff(seconds) > 0)
    assert all(np.isfinite(list(row.values())).all() for row in run.log)


def test_learning_stops_at_the_first_mean_return_that_is_good_enough():
    config = PPOConfig(total_steps=50_000, eval_every=1, eval_episodes=5, solved_at=1.0)
    run = quick("ppo", config=config)
    assert len(run.log) == 1 and run.log[0]["mean_return"] >= 1.0


def test_flat_parameters_are_the_parameters():
    "Two steps of the flat Adam are two steps of the ordinary one, gradient bound included."
    policies = [make_policy(vector("CartPole-v1"), (8,), torch.Generator().manual_seed(0)) for _ in range(2)]
    weights = flatten_parameters(policies[0])
    optimizers = [torch.optim.Adam(p) for p in ([weights], policies[1].parameters())]
    obs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for policy, optimizer in zip(policies, optimizers):
            optimizer.zero_grad(set_to_none=False)
            (policy.value(obs).sum() + policy.actor(obs).square().sum()).backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
            optimizer.step()
    for a, b in zip(*(policy.parameters() for policy in policies)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert len(weights) == sum(p.numel() for p in policies[0].parameters())


def test_a_function_that_makes_an_environment():
    config = PPOConfig(total_steps=20_000, n_envs=8, eval_every=1_000, eval_episodes=20, solved_at=9.0)
    assert quick("ppo", env=Bandit, config=config).log[-1]["mean_return"] >= 9.0


def test_a_vector_environment_is_used_as_it_is_and_left_open():
    vector_env = gym.make_vec("CartPole-v1", num_envs=3)
    run = quick("ppo", env=vector_env)
    assert run.config.n_envs == 3 and run.env is vector_env and not vector_env.closed
    by_id = quick("ppo", config=replace(SMALL["ppo"], n_envs=3))
    assert all(map(torch.equal, run.policy.parameters(), by_id.policy.parameters()))
    assert run.evaluate(7).shape == (7,)
    with pytest.raises(ValueError, match="an evaluation needs fresh environments"):
        quick("ppo", env=vector_env, config=replace(SMALL["ppo"], eval_every=100))


@pytest.mark.parametrize("algorithm", ["a2c", "ppo", "trpo"])
def test_observations_are_normalised_where_asked(algorithm):
    "A scale of a thousand makes no difference then, once two rollouts are seen."
    config = replace(SMALL[algorithm], normalize_obs=True, total_steps=4000)
    run = quick(algorithm, env=lambda: Bandit(scale=1000.0), config=config)
    normalizer = run.policy.normalizer
    assert normalizer.count == run.steps
    assert normalizer.variance[0].sqrt() == pytest.approx(1000, rel=0.2)
    seen = normalizer(torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]]))[:, 0]
    assert seen.tolist() == pytest.approx([1.0, -1.0], abs=0.3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"observation": np.nan}, "observation of environment [0-3] is not finite: .*nan"),
        ({"observation": np.inf}, "observation of environment [0-3] is not finite: .*inf"),
        ({"reward": np.nan}, "reward of environment [0-3] is not finite: nan"),
    ],
)
def test_numbers_that_are_not_finite_name_the_environment(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        quick("ppo", env=lambda: Bandit(**settings), config=SMALL["ppo"])
    assert caught.value.__notes__ == ["ppo stopped after 0 transitions"]


def test_an_environment_that_raises_says_when():
    with pytest.raises(ConnectionError, match="gone") as caught:
        quick("ppo", env=lambda: Bandit(raises_at=100), config=SMALL["ppo"])
    # Environment 0 counts its own steps, and every eleventh row of a rollout is a restart.
    assert 300 < int(re.fullmatch(r"ppo stopped after (\d+) transitions", *caught.value.__notes__)[1]) < 400


def test_a_run_that_diverges_stops():
    config = replace(SMALL["ppo"], lr=1e38, max_grad_norm=1e38)
    with pytest.raises((Diverged, ValueError)) as caught:
        quick("ppo", config=config)
    assert "ppo stopped after" in caught.value.__notes__[0]


@pytest.mark.parametrize("device", ["cuda:99", "warp", "meta2"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"device {device} is not there, use cpu or auto"):
        quick("ppo", device=device)


def test_auto_finds_a_device():
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("env", [Bandit(), None, 3])
def test_what_is_no_environment(env):
    with pytest.raises(ValueError, match="env must be an id, a function .* or a VectorEnv, got"):
        quick("ppo", env=env)


def test_spaces_that_are_not_supported():
    with pytest.raises(ValueError, match="observation space must be a Box.*FlattenObservation"):
        quick("ppo", env="FrozenLake-v1")
    flat = lambda: gym.wrappers.FlattenObservation(gym.make("FrozenLake-v1"))  # noqa: E731
    assert quick("ppo", env=flat, config=replace(SMALL["ppo"], total_steps=200)).steps >= 200


@pytest.mark.parametrize(
    "backend, message",
    [
        ("fast", "backend must be one of .*recorded.*, got 'fast'"),
        ("recorded", "backend recorded needs environments made of tensors on a GPU"),
    ],
)
def test_a_backend_that_is_not_there(backend, message):
    with pytest.raises(ValueError, match=message):
        quick("ppo", env="po_book/CartPole-v1", backend=backend)


def test_a_backend_gets_the_same_function_and_numbers_as_tensors(monkeypatch):
    "A stand-in that only counts: one preparation a shape, and the eager run's weights."
    prepared = []

    def counting(function, generators):
        prepared.append(function.__name__)
        def run(**inputs):
            assert all(torch.is_tensor(x) for x in inputs.values())
            return {name: x.clone() for name, x in function(**inputs).items()}
        return run

    monkeypatch.setitem(po_book.learner.BACKENDS, "counting", counting)
    env = "po_book/CartPole-v1"  # never loses a row, so all minibatches are of one shape
    runs = [quick("ppo", env=env, backend=backend) for backend in ("eager", "counting")]
    assert prepared == ["improve"]
    for a, b in zip(*(run.policy.parameters() for run in runs)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_gradient_step_reads_nothing_where_it_would_have_to_wait():
    "Tensors without data, which refuse to be read, stand for those of a GPU."
    policy = make_policy(vector("CartPole-v1")).to("meta")
    obs, row = torch.empty(8, 4, device="meta"), torch.empty(8, device="meta")
    logp, entropy = policy.evaluate(obs, torch.zeros(8, dtype=torch.long, device="meta"))
    clip = torch.tensor(0.2, device="meta")
    loss, _ = ppo_loss(logp, row, normalize(row), entropy, policy.value(obs), row, clip_low=clip)
    loss.backward()
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["recorded", "compiled"])
def test_backends_learn_the_same_on_a_gpu(backend):
    config = PPOConfig(total_steps=8_000, n_envs=64, n_steps=32)
    kwargs = {"env": "po_book/CartPole-v1", "device": "cuda", "config": config}
    eager, other = (quick("ppo", backend=name, **kwargs) for name in ("eager", backend))
    assert [row["return"] for row in eager.log[:2]] == [row["return"] for row in other.log[:2]]
    for a, b in zip(eager.policy.parameters(), other.policy.parameters()):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@dataclass(frozen=True)
class CountConfig(Config):
    "Settings of a method that learns nothing and remembers how often it was asked."

    n_envs: int = 2

    def prepare(self, policy):
        return {"asked": torch.zeros(()), "draws": []}


def count(learner, config, remaining):
    learner.extra["asked"] += 1
    learner.extra["draws"].append(float(torch.rand((), generator=learner.generator)))
    return learner.collect(16), {"asked": learner.extra["asked"].clone(), "draw": learner.extra["draws"][-1]}


METHODS = {"count": Algorithm(CountConfig, count)}


def test_the_loop_knows_no_method_and_keeps_what_a_method_keeps(tmp_path):
    config = CountConfig(total_steps=300, checkpoint_every=100)
    asked = "count", METHODS["count"], "CartPole-v1", config

    def stop(row):
        if row["steps"] >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_run(*asked, out=tmp_path, progress=False, report=stop)
    kept = read_run(tmp_path, METHODS)
    assert 100 <= kept.steps < 300
    runs = resume_run(tmp_path, METHODS, progress=False), start_run(*asked, progress=False)
    a, b = ([(row["asked"], row["draw"]) for row in run.log] for run in runs)
    assert a == b and [n for n, _ in a] == list(range(1, len(a) + 1))


def test_a_subclass_of_a_configuration_brings_its_own_policy():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.actor, self.critic = torch.nn.Linear(4, 2), torch.nn.Linear(4, 1)

        def act(self, obs, generator=None):
            return torch.multinomial(self.actor(obs).softmax(-1), 1, generator=generator)[:, 0]

        def evaluate(self, obs, actions):
            logp = self.actor(obs).log_softmax(-1)
            return logp.gather(-1, actions[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

        def value(self, obs):
            return self.critic(obs)[..., 0]

    class PlainConfig(PPOConfig):
        def make_policy(self, env, generator):
            return Plain()

    run = quick("ppo", config=PlainConfig(total_steps=300, n_envs=4))
    assert isinstance(run.policy, Plain) and run.steps >= 300


def test_a_policy_that_cannot_act_is_refused():
    class NoConfig(PPOConfig):
        def make_policy(self, env, generator):
            return torch.nn.Linear(4, 2)

    with pytest.raises(ValueError, match="policy must be a module with act.obs, generator., got Linear"):
        quick("ppo", config=NoConfig())


def test_a_checkpoint_without_what_methods_keep_is_refused(tmp_path):
    quick("ppo", out=tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    del state["learner"]["extra"]
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match="another version of po_book"):
        resume_run(tmp_path, ALGORITHMS, progress=False)
