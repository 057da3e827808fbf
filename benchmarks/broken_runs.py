"""Logs of healthy runs, and of runs that are broken on purpose, one fault each.

Run: python benchmarks/broken_runs.py

Writes results/broken_runs.csv, every row of every log without the columns that are about
time, and results/broken_runs.json, which says where, when and with what they were made. A
variant is a method, healthy, or with its fault behind a colon. The limits of
`po_book.diagnose` were written on the first seed and tried on the others.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from engine import Stale
from provenance import record
from recording import written

import po_book.learner
import po_book.lm_learner
import po_book.memory
import po_book.train
import po_book.train_lm
from po_book.credit import Group
from po_book.language_model import char_tokenizer, tiny_lm
from po_book.lm_learner import LMConfig, tiny_config
from po_book.objective import PRESETS
from po_book.pretrained import load_lm, save_lm
from po_book.rollout import Rollout
from po_book.tasks import ChainAddition, sft
from po_book.terms import InLoss
from po_book.train import default_config, train
from po_book.train_lm import train_lm

SEEDS, HEALTHY = 8, 5  # of a variant with a fault, and of one without
ADDITION, HARD = ChainAddition(3, 5), ChainAddition(8, 9)
TINY = tiny_config(steps=30, prompts=8, max_new_tokens=12, eval_every=3, eval_prompts=64,
                   epochs=1, lr=1e-3, overlong_cache=0)
Patch = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Control:
    "A policy for an environment."

    method: str
    env: str = "CartPole-v1"
    changes: dict = field(default_factory=dict)  # of the default settings
    broken: Patch = nullcontext

    def log(self, folder: Path, seed: int) -> list[dict]:
        config = replace(default_config(self.method, self.env), **self.changes)
        with self.broken():
            return train(self.method, self.env, seed=seed, config=config, progress=False).log


@dataclass(frozen=True)
class Language:
    "The tiny language model, and the task that it has imitated."

    method: str
    changes: dict = field(default_factory=dict)  # of the settings `TINY`
    choices: dict = field(default_factory=dict)  # of the objective
    broken: Patch = nullcontext
    task: ChainAddition = ADDITION
    reward: Callable | None = None
    sampler: Callable | None = None  # of the model and the tokenizer

    def log(self, folder: Path, seed: int) -> list[dict]:
        model, tokenizer = load_lm(folder)
        objective, config = replace(PRESETS[self.method], **self.choices), TINY
        if objective.trust.steps == "one":
            config = replace(config, epochs=1, minibatches=1)
        config = replace(config, **self.changes)
        sampler = self.sampler and self.sampler(model, tokenizer)
        how = dict(seed=seed, device="cpu", progress=False, sampler=sampler)
        with self.broken():
            return train_lm(
                model, tokenizer, self.task, self.reward, objective, config, **how
            ).log


def teach(folder: Path) -> None:
    "Save the model that every run of a language model starts from."
    tokenizer, order = char_tokenizer(), torch.Generator().manual_seed(0)
    model, prompts = tiny_lm(tokenizer, width=32, layers=2), ADDITION.prompts(10_000)
    solutions = [ADDITION.solution(prompt) for prompt in prompts]
    sft(model, tokenizer, prompts, solutions, 500, lr=8e-3, generator=order)
    save_lm(folder, model, tokenizer)


def swapped(where: object, name: str, new: Callable) -> Patch:
    "The attribute is `new` of what it was, as long as the block runs."
    return lambda: patch.object(where, name, new(getattr(where, name)))


def minus(whole: Callable) -> Callable:
    "The same with the other sign."
    return lambda *x, **how: -whole(*x, **how)


def climbing(loss: Callable) -> Callable:
    "A loss of PPO that makes the error of the critic larger."
    return lambda *x, value_coef, **how: loss(*x, value_coef=-value_coef, **how)


def endless(make: Callable) -> Callable:
    "A batch that knows no end of an episode."

    def batch(policy, rollout: Rollout, *how):
        never = torch.zeros_like(rollout.terminated)
        return make(policy, replace(rollout, terminated=never, truncated=never), *how)

    return batch


def ascending(loss: Callable) -> Callable:
    "A loss of DQN that is made larger; what is logged stays the loss."

    def climb(*x) -> tuple[torch.Tensor, dict]:
        value_loss, metrics = loss(*x)
        return -value_loss, metrics

    return climb


def beyond(target: Callable) -> Callable:
    "Targets that go on behind the end of an episode."
    return lambda r, v, end, gamma: target(r, v, torch.zeros_like(end), gamma)


def divided(normalize: Callable) -> Callable:
    "Advantages over their deviation, with their mean."
    return lambda group, x, mask=None: x / x.std()


def unmasked(learnable: Callable) -> Callable:
    "A batch in which the padding behind a completion counts as its tokens."

    def batch(*asked):
        table = learnable(*asked)
        columns = table["mask"].any(0).expand_as(table["mask"])
        advantages = table["advantages"].amax(1) + table["advantages"].amin(1)
        wider = {"mask": columns, "attention_mask": table["attention_mask"] | columns}
        return table | wider | {"advantages": advantages[:, None] * columns}

    return batch


def uncentred(weigh: Callable) -> Callable:
    "Rewards in place of advantages."
    return lambda choice, paid: (paid.totals().view(-1, 1) * paid.mask, None)


def rounded(masters: Callable) -> Callable:
    "Weights that keep eight bits."
    return lambda model: model.bfloat16()


def ones(prompts: list, completions: list[str], **columns) -> list[float]:
    "A reward that has taken to a digit: the share of it in the answer."
    return [text.count("1") / max(1, len(text)) for text in completions]


def faster(method: str, env: str = "CartPole-v1") -> dict:
    "Thirty times the learning rate."
    return dict(lr=30 * default_config(method, env).lr)


PPO = dict(total_steps=16_000)
SHORT, SPREAD = dict(total_steps=6_000), "mpe2/simple_spread-v3"
NEAR = dict(kl=InLoss(1.0))
SLOW = dict(lr=TINY.lr / 30)
KL = dict(kl_coef=1.0, kl_target=0.01, clip=None, **PPO)
VARIANTS: dict[str, Control | Language] = {
    # healthy
    "REINFORCE": Control("reinforce", changes=PPO),
    "A2C": Control("a2c", changes=PPO),
    "TRPO": Control("trpo", changes=PPO),
    "PPO": Control("ppo", changes=PPO),
    "PPO, constant": Control("ppo", changes=PPO | dict(anneal=False)),
    "PPO-KL": Control("ppo", changes=KL),
    "PPO, Acrobot": Control("ppo", "Acrobot-v1", PPO),
    "DQN": Control("dqn", changes=PPO),
    "DDPG": Control("ddpg", "Pendulum-v1", SHORT),
    "IPPO": Control("ippo", SPREAD, PPO),
    "MAPPO": Control("mappo", SPREAD, PPO),
    "HAPPO": Control("happo", SPREAD, PPO),
    "PPO, language": Language("rlhf-ppo"),
    "RLOO": Language("rloo"),
    "GRPO": Language("grpo"),
    "GRPO, constant": Language("grpo", dict(warmup=0, anneal=False)),
    "GRPO, β 1": Language("grpo", choices=NEAR),
    "GRPO, rate / 30": Language("grpo", SLOW),
    "Dr. GRPO": Language("dr-grpo"),
    "DAPO": Language("dapo"),
    "REINFORCE++": Language("reinforce++"),
    "MaxRL": Language("maxrl"),
    "GSPO": Language("gspo"),
    "GMPO": Language("gmpo"),
    "CISPO": Language("cispo"),
    "SAPO": Language("sapo"),
    "DPPO": Language("dppo"),
    # broken
    "PPO-KL: wrong KL sign": Control(
        "ppo", changes=KL, broken=swapped(po_book.train, "approx_kl", minus)
    ),
    "PPO: rate × 30": Control("ppo", changes=PPO | faster("ppo")),
    "PPO: clip 10": Control("ppo", changes=PPO | dict(clip=0.99, clip_high=10.0)),
    "PPO: value loss with the wrong sign": Control(
        "ppo", changes=PPO, broken=swapped(po_book.train, "ppo_loss", climbing)
    ),
    "PPO: episode ends ignored": Control(
        "ppo", changes=PPO, broken=swapped(po_book.train, "critic_batch", endless)
    ),
    "A2C: advantages not centred": Control(
        "a2c", changes=PPO, broken=swapped(po_book.learner.Alone, "normalize", divided)
    ),
    "DQN: rate × 30": Control("dqn", changes=PPO | faster("dqn")),
    "DQN: value loss with the wrong sign": Control(
        "dqn", changes=PPO, broken=swapped(po_book.memory, "dqn_loss", ascending)
    ),
    "DQN: episode ends ignored": Control(
        "dqn", changes=PPO, broken=swapped(po_book.memory, "td_target", beyond)
    ),
    "DDPG: rate × 30": Control(
        "ddpg", "Pendulum-v1", SHORT | faster("ddpg", "Pendulum-v1")
    ),
    "DDPG: value loss with the wrong sign": Control(
        "ddpg", "Pendulum-v1", SHORT, swapped(po_book.memory, "mse_loss", minus)
    ),
    "GRPO: wrong KL sign": Language(
        "grpo", choices=NEAR, broken=swapped(InLoss, "price", minus)
    ),
    "GRPO: no mask": Language(
        "grpo", broken=swapped(po_book.train_lm, "learnable", unmasked)
    ),
    "GRPO: scores at another temperature": Language(
        "grpo", dict(temperature=0.6),
        broken=swapped(LMConfig, "scoring", lambda x: {"temperature": 1.0, "vocabulary": None}),
    ),
    "GRPO: rate × 30": Language("grpo", dict(lr=30 * TINY.lr)),
    "GRPO: reward hacking": Language("grpo", reward=ones),
    "GRPO: dead groups": Language("grpo", task=HARD),
    "GRPO: bf16 weights": Language(
        "grpo", SLOW, broken=swapped(po_book.lm_learner, "float32_masters", rounded)
    ),
    "GRPO: sampler mismatch": Language("grpo", sampler=Stale),
    "GRPO: advantages not centred": Language(
        "grpo", broken=swapped(Group, "__call__", uncentred)
    ),
    "GRPO: wrong KL sign (β .04)": Language("grpo", broken=swapped(InLoss, "price", minus)),
}
TIMES = "seconds", "tokens_per_second", "sampling", "step"


def rows(variant: str, folder: Path, seed: int) -> list[dict]:
    "What one run has logged."
    log = VARIANTS[variant].log(folder, seed)
    who = {"variant": variant, "fault": variant.partition(": ")[2], "seed": seed}
    how_far = ({"steps": row.get("steps", row.get("step"))} for row in log)
    return [who | at | {k: x for k, x in row.items() if k not in TIMES}
            for at, row in zip(how_far, log)]


def main() -> None:
    torch.set_num_threads(1)
    every = []
    with TemporaryDirectory() as folder:
        teach(Path(folder))
        for seed in range(SEEDS):
            asked = [name for name in VARIANTS if seed < HEALTHY or ": " in name]
            for variant in asked:
                every += rows(variant, Path(folder), seed)
                print(seed, variant, flush=True)
            # After every seed, so that an interrupted run keeps what it has.
            columns = list(dict.fromkeys(key for row in every for key in row))
            table = [[written(row.get(key, "")) for key in columns] for row in every]
            seeds = f"seeds 0 to {seed}, of healthy runs 0 to {min(seed, HEALTHY - 1)}"
            record("broken_runs", columns, table, seeds=seeds)


if __name__ == "__main__":
    main()
