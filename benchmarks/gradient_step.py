"""What one gradient step of PPO costs on CartPole, from plain PyTorch down to numpy.

Run: python benchmarks/gradient_step.py [--record]

A minibatch of 256 transitions, two networks of 64 and 64, one CPU thread. Each row
changes one thing of the row above; the last is the same step without PyTorch, its
gradient derived by hand. The candidates take turns, so that a busy moment of the
machine hits all of them, and all start from the same weights: the first step of each
must lead to the same place.
"""

import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import gymnasium as gym
import numpy as np
import torch
from provenance import record
from torch import nn

from po_book.advantage import normalize
from po_book.ppo import ppo_loss
from po_book.learner import flatten_parameters
from po_book.spaces import make_policy

ROWS, LR, BOUND, CLIP, VALUE = 256, 3e-3, 0.5, 0.2, 0.5


def batch() -> dict[str, torch.Tensor]:
    "Random transitions, some of them outside the clip range."
    draw = torch.Generator().manual_seed(0)
    obs, noise = torch.randn(ROWS, 4, generator=draw), torch.randn(3, ROWS, generator=draw)
    actions = torch.randint(2, (ROWS,), generator=draw)
    logp = -0.7 + 0.2 * noise[0]
    return dict(obs=obs, actions=actions, logp=logp, advantages=noise[1], returns=noise[2])


def new_policy() -> nn.Module:
    return make_policy(gym.make_vec("CartPole-v1"), generator=torch.Generator().manual_seed(0))


def distribution(policy: nn.Module, part: dict) -> tuple[torch.Tensor, torch.Tensor]:
    "Log-probability and entropy as torch.distributions computes them, with its checks."
    categorical = torch.distributions.Categorical(logits=policy.actor(part["obs"]))
    return categorical.log_prob(part["actions"]), categorical.entropy()


def formula(policy: nn.Module, part: dict) -> tuple[torch.Tensor, torch.Tensor]:
    "The same from the chapter's formula."
    return policy.evaluate(part["obs"], part["actions"])


def torch_step(density: Callable, flat: bool, **adam) -> tuple[Callable, Callable]:
    "A gradient step, and the parameters it leaves behind."
    policy, part = new_policy(), batch()
    parameters = [flatten_parameters(policy)] if flat else list(policy.parameters())
    optimizer = torch.optim.Adam(parameters, LR, eps=1e-5, **adam)

    def step() -> None:
        logp, entropy = density(policy, part)
        values = policy.value(part["obs"])
        advantages = normalize(part["advantages"])
        loss = ppo_loss(logp, part["logp"], advantages, entropy, values, part["returns"],
                           clip_low=CLIP, value_coef=VALUE)
        optimizer.zero_grad(set_to_none=not flat)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, BOUND)
        optimizer.step()

    return step, lambda: nn.utils.parameters_to_vector(policy.parameters()).detach().numpy()


class NumpyStep:
    "The same step with the gradient derived by hand."

    def __init__(self):
        policy, part = new_policy(), batch()
        vector = nn.utils.parameters_to_vector(policy.parameters())
        self.weights = vector.detach().numpy().copy()
        self.grad, self.m, self.v = (np.zeros_like(self.weights) for _ in range(3))
        self.t = 0
        sizes = [p.shape for p in policy.parameters()]
        ends = np.cumsum([p.numel() for p in policy.parameters()])[:-1]
        parts = np.split(self.weights, ends), np.split(self.grad, ends)
        views = [[x.reshape(size) for x, size in zip(xs, sizes)] for xs in parts]
        self.networks = [(views[0][i:i + 6], views[1][i:i + 6]) for i in (0, 6)]
        self.part = {name: x.numpy() for name, x in part.items()}

    @staticmethod
    def forward(x, weights):
        W1, b1, W2, b2, W3, b3 = weights
        h1 = np.tanh(x @ W1.T + b1)
        h2 = np.tanh(h1 @ W2.T + b2)
        return h1, h2, h2 @ W3.T + b3

    @staticmethod
    def backward(x, h1, h2, d, weights, grads):
        "Write the gradient that d, that of the outputs, means for every weight."
        for layer, (inputs, through) in zip((4, 2, 0), ((h2, 2), (h1, 1), (x, 0))):
            np.matmul(d.T, inputs, out=grads[layer])
            d.sum(0, out=grads[layer + 1])
            if through:
                d = (d @ weights[layer]) * (1 - inputs**2)

    def __call__(self) -> None:
        part, rows = self.part, np.arange(ROWS)
        obs, actions, advantages = part["obs"], part["actions"], part["advantages"]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        actor, critic = self.networks
        h1, h2, logits = self.forward(obs, actor[0])
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        probs = shifted / shifted.sum(1, keepdims=True)
        rho = np.exp(np.log(probs[rows, actions]) - part["logp"])
        clipped = np.where(advantages > 0, rho > 1 + CLIP, rho < 1 - CLIP)
        slope = np.where(clipped, 0, -rho * advantages / ROWS).astype(np.float32)
        d = -probs * slope[:, None]
        d[rows, actions] += slope
        self.backward(obs, h1, h2, d, *actor)
        h1, h2, values = self.forward(obs, critic[0])
        d = VALUE * (values - part["returns"][:, None]) / ROWS
        self.backward(obs, h1, h2, d, *critic)
        self.adam()

    def adam(self) -> None:
        "Bound the gradient's length, and take Adam's step."
        grad = self.grad * min(1.0, BOUND / (np.sqrt(self.grad @ self.grad) + 1e-6))
        self.t += 1
        self.m += 0.1 * (grad - self.m)
        self.v += 0.001 * (grad * grad - self.v)
        scale = np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-5
        self.weights -= LR / (1 - 0.9**self.t) * self.m / scale


def networks_alone() -> tuple[Callable, None]:
    "Forward and backward through the networks; no loss, no optimiser."
    policy, obs = new_policy(), batch()["obs"]
    flatten_parameters(policy)
    return lambda: (policy.actor(obs).sum() + policy.value(obs).sum()).backward(), None


def measure(steps: dict[str, Callable], turns: int = 60, calls: int = 20) -> dict[str, list]:
    "Milliseconds a call, one number a turn."
    times = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            start = perf_counter()
            for _ in range(calls):
                step()
            times[name].append(1e3 * (perf_counter() - start) / calls)
    return times


def main(recording: bool) -> None:
    torch.set_num_threads(1)
    numpy_step = NumpyStep()
    candidates = {
        "torch.distributions, Adam tensor by tensor": torch_step(distribution, False, foreach=False),
        "log-probability and entropy from the formula": torch_step(formula, False, foreach=False),
        "fused Adam": torch_step(formula, False, fused=True),
        "parameters in one vector (po_book)": torch_step(formula, True, fused=True),
        "of it, the networks alone": networks_alone(),
        "numpy, gradient by hand": (numpy_step, lambda: numpy_step.weights),
    }
    for step, _ in candidates.values():
        step()
    ends = [weights() for _, weights in candidates.values() if weights]
    error = max(np.abs(end - ends[0]).max() for end in ends)
    assert error < 1e-5, f"the candidates do not take the same step: {error}"
    times = measure({name: step for name, (step, _) in candidates.items()})
    ours = median(times["parameters in one vector (po_book)"])
    rows = [[name, f"{min(ms):.3f}", f"{median(ms):.3f}", f"{median(ms) / ours:.2f}"]
            for name, ms in times.items()]
    columns = ["step", "ms, min", "ms, median", "over po_book's"]
    print(f"{columns[0]:46}{columns[1]:>9}{columns[2]:>12}{columns[3]:>16}")
    for name, *numbers in rows:
        print(f"{name:46}{numbers[0]:>9}{numbers[1]:>12}{numbers[2]:>16}")
    if recording:
        record("gradient_step", columns, rows)


if __name__ == "__main__":
    main("--record" in sys.argv[1:])
