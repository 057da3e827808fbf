"The learner: where its numbers stand, what a step does, what is prepared once."

from dataclasses import fields
from math import inf

import pytest
import torch
from torch import nn

import po_book.learner
from po_book.algorithm import Config, new_learner
from po_book.learner import CompiledLearner, Learner, RecordedLearner, check_backend
from po_book.rollout import make_stepper

CARTPOLE = "po_book/CartPole-v1"
FEW = Config(n_envs=3, hidden=(8,), lr=0.25)


def learner_of(kind: type[Learner] = Learner, policy=None) -> Learner:
    "A learner of any kind, on the CPU."
    made = new_learner(CARTPOLE, 0, FEW, policy=policy)
    return kind(**{f.name: getattr(made, f.name) for f in fields(Learner)})


class Numbers(nn.Linear):
    "A policy with a number of each kind."

    def __init__(self, env):
        super().__init__(4, 2)
        self.register_buffer("epsilon", torch.tensor(1.0))
        self.sigma = 0.5

    def act(self, obs, generator=None):
        return self(obs).argmax(-1)


def test_numbers_are_written_where_they_stand():
    "A recorded step reads a tensor where it was; a plain number is replaced."
    learner = learner_of(policy=Numbers)
    policy, epsilon = learner.policy, learner.policy.epsilon
    learner.set(epsilon=0.25, sigma=0.75)
    assert policy.epsilon is epsilon and epsilon.item() == 0.25 and policy.sigma == 0.75
    rate = learner.optimizer.param_groups[0]["lr"]
    assert rate.item() == 0.25 and rate.dtype == torch.float32
    learner.set_lr(0.125)
    assert learner.optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.125


@pytest.mark.parametrize("kind", [Learner, CompiledLearner])
@pytest.mark.parametrize("bound, wanted", [(inf, 4.0), (2.0, 2.0)])
def test_a_step_follows_its_own_gradient_cut_to_the_norm(kind, bound, wanted, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    learner = learner_of(kind)

    def pull(by):
        return by * learner.weights[0], {"by": by}

    for by in 3.0, 4.0:
        assert float(learner.minimise("pull", pull, bound, by=by)["by"]) == by
    assert learner.weights.grad[0].item() == pytest.approx(wanted, rel=1e-5)
    assert not learner.weights.grad[1:].any()


def test_adam_adds_a_hundred_thousandth_to_the_deviation():
    "So a gradient of that size moves a weight by half of the learning rate."
    learner = learner_of()
    before = learner.weights.detach().clone()
    learner.step(1e-5 * learner.weights[0])
    moved = before - learner.weights.detach()
    assert moved[0].item() == pytest.approx(0.125, rel=1e-4) and not moved[1:].any()


def test_a_function_is_prepared_once_for_all_inputs_of_the_same_shapes():
    learner, seen, prepared = learner_of(RecordedLearner), [], []

    def prepare(function):
        prepared.append(function)
        return function

    def look(x, beta):
        seen.append((len(x), beta.item(), beta.dtype, beta.data_ptr()))

    rows = [(2, 0.5), (2, 0.25), (3, 0.25), (2, 1.0)]
    for n, beta in rows:
        learner.call(prepare, "look", look, x=torch.zeros(n), beta=beta)
    assert len(prepared) == 2 and [row[:2] for row in seen] == rows
    assert {row[2:] for row in seen} == {(torch.float32, learner.numbers["beta"].data_ptr())}
    learner.call(prepare, "another", look, x=torch.zeros(2), beta=1.0)
    assert len(prepared) == 3


def test_steps_of_environments_are_compiled_once(monkeypatch):
    compiled = []

    def compile(function):
        compiled.append(function.__name__)
        return lambda *columns: function(*columns)

    monkeypatch.setattr(torch, "compile", compile)
    learner = learner_of(CompiledLearner)
    first, second = learner.collect(3), learner.collect(3)
    assert compiled == ["_after"]
    assert torch.equal(first.next_obs[-1], second.obs[0]) and not first.done.any()


def test_a_recording_is_told_of_every_generator_that_draws():
    learner = learner_of(RecordedLearner)
    own = [learner.generator, learner.order]
    assert learner.record(len).generators == [*own, learner.stepper.env.generator]
    learner.stepper.env = None  # such as draws nothing
    assert learner.record(len).generators == own


def test_a_recorded_rollout_is_the_eager_one(monkeypatch):
    monkeypatch.setattr(po_book.learner, "Recorded", lambda function, generators: function)
    eager, recorded = learner_of(), learner_of(RecordedLearner)
    for _ in range(3):
        a, b = vars(eager.collect(9)), vars(recorded.collect(9))
        assert a.pop("complete") and b.pop("complete")
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_recorded_rollout_starts_from_its_input(monkeypatch):
    "A replay reads its own copy of the input, which is moved here to be told apart."
    def moving(function, generators):
        return lambda obs: function(obs=obs + 1)

    monkeypatch.setattr(po_book.learner, "Recorded", moving)
    learner = learner_of(RecordedLearner)
    start = learner.stepper.obs
    assert torch.equal(learner.collect(2).obs[0], start + 1)


def test_what_cannot_be_recorded_is_refused():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    arrays, tensors = (make_stepper(env, 1) for env in ("CartPole-v1", CARTPOLE))
    check_backend("recorded", gpu, tensors)
    for device, stepper in (gpu, arrays), (cpu, tensors), (cpu, arrays):
        check_backend("eager", device, stepper)
        with pytest.raises(ValueError, match="recorded needs environments made of tensors on a GPU"):
            check_backend("recorded", device, stepper)
