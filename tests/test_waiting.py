"No iteration makes the host wait for a number: counted on a CPU, forbidden on a GPU."

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from waiting import waits

from po_book.algorithm import new_learner
from po_book.tensor_env import TensorStepper
from po_book.train import ALGORITHMS, train

SHORT = dict(n_envs=8, n_steps=16)
EPOCHS = SHORT | dict(epochs=2, minibatch=32)
MEMORY = SHORT | dict(updates=3, learning_starts=0)
SETTINGS = {
    "a2c": SHORT,
    "ppo": EPOCHS,
    "ppo, everything on": EPOCHS | dict(
        normalize_obs=True, normalize_rewards=True, clip_high=0.3, dual_clip=3.0, clip_value=0.5,
        entropy_coef=0.01, kl_coef=0.1,
    ),
    "dqn": MEMORY,
    "ddpg": MEMORY,
}  # fmt: skip


class Drift(VectorEnv):
    "A point that is pushed about, of tensors; past 3 the episode ends."

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int, device: str):
        self.num_envs, self.device = num_envs, device
        self.single_observation_space = Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = Box(-1, 1, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        self.at = torch.zeros(self.num_envs, 1, device=self.device)
        return self.at.clone(), {}

    def step(self, actions):
        final = self.at + actions
        ended = final.abs()[:, 0] > 3
        self.at = torch.where(ended[:, None], 0, final)
        return self.at.clone(), -final.abs()[:, 0], ended, torch.zeros_like(ended), {"final_obs": final}

    def stepper(self, seed=None):
        return TensorStepper(self, seed)


def warmed_up(name: str, device: str):
    "An iteration that has run once already, ready to be watched."
    algorithm = ALGORITHMS[name.split(",")[0]]
    config = algorithm.config(**SETTINGS.get(name, EPOCHS))
    env = Drift(8, device) if name == "ddpg" else "po_book/CartPole-v1"
    learner = new_learner(env, 0, config, device)
    algorithm.iteration(learner, config, 1.0)
    return algorithm.iteration, learner, config, 0.5


@pytest.mark.parametrize("name", SETTINGS)
def test_an_iteration_waits_for_nothing(name, monkeypatch):
    assert not waits(monkeypatch, *warmed_up(name, "cpu"))


def test_the_counter_sees_what_trpo_looks_at(monkeypatch):
    found = waits(monkeypatch, *warmed_up("trpo", "cpu"))
    assert found["aten::_local_scalar_dense"] > 10


@pytest.mark.parametrize("look", [
    lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.tolist(),
    lambda x: torch.tensor([1.0]), lambda x: x.cpu(), lambda x: x.nonzero(), lambda x: x.masked_select(x > 0),
])  # fmt: skip
def test_the_counter_sees_a_look(look, monkeypatch):
    assert waits(monkeypatch, look, torch.ones(3)).total() >= 1


def test_a_row_of_the_log_costs_one_look_at_the_metrics(monkeypatch):
    "Beyond the iteration: the returns of ended episodes, their number, and the metrics."
    def run(n: int) -> int:
        rows = []

        def note(row):
            rows.append(row)
            return len(rows) < n

        config = ALGORITHMS["ppo"].config(**EPOCHS)
        asked = dict(config=config, report=note, progress=False)
        found = waits(monkeypatch, train, "ppo", "po_book/CartPole-v1", **asked)
        assert len(rows) == n
        return found.total()

    assert run(5) - run(3) == 2 * 3


@pytest.mark.cuda
@pytest.mark.parametrize("name", SETTINGS)
def test_an_iteration_waits_for_nothing_on_a_gpu(name):
    iteration, *rest = warmed_up(name, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        iteration(*rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
