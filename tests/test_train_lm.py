"The trainer of language models: invariances of its step, resuming, and bad input."
import errno
import json
import math
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from po_book import lm_batch, lm_step
from po_book import train_lm as module
from po_book.checkpoint import lock_folder
from po_book.credit import AllGroups, Paid
from po_book.dapo import NoSignal
from po_book.data import Problems
from po_book.language_model import char_tokenizer, tiny_lm
from po_book.lm_learner import (
    LMConfig, default_lm_config, fit_objective, new_lm_learner, tiny_config,
)
from po_book.lm_step import gradient_step
from po_book.objective import PRESETS
from po_book.pretrained import load_lm, save_lm
from po_book.runner import Diverged
from po_book.runs import read_log
from po_book.tasks import ChainAddition, Countdown, is_held_out
from po_book.terms import InLoss
from po_book.train_lm import train_lm

TASK = ChainAddition(2, 3)
SMALL = tiny_config(
    steps=3, prompts=4, group_size=4, max_new_tokens=6, warmup=0, lr=1e-3, epochs=1,
    minibatches=1, anneal=False,
)


def model(seed=0):
    return tiny_lm(char_tokenizer(), width=32, layers=2, heads=2, context=32, seed=seed)


def count_ones(prompts, completions, **columns):
    "A reward that differs within nearly every group of random texts."
    return [text.count("1") + 0.1 * text.count("2") for text in completions]


def run(objective="grpo", config=SMALL, start=None, reward=count_ones, **settings):
    settings = {"progress": False, "device": "cpu"} | settings
    start = model() if start is None else start
    return train_lm(start, char_tokenizer(), TASK, reward, objective, config, **settings)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def gradient(objective, config):
    "Gradient of the first step, before it is cut or used."
    seen = {}

    def look(self, parameters, max_norm):
        seen["g"] = torch.cat([p.grad.flatten().clone() for p in parameters])
        return torch.tensor(0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.Accelerator.clip_grad_norm_", look)
        run(objective, replace(config, steps=1))
    return seen["g"]


LANGUAGE = [name for name in PRESETS if name not in ("reinforce", "a2c", "trpo", "ppo-kl", "ppo")]


@pytest.mark.parametrize("name", ["reinforce", "a2c", "ppo-kl", "ppo", *LANGUAGE])
def test_every_preset_learns_from_the_same_call(name):
    done = run(name)
    assert [row["step"] for row in done.log] == [1, 2, 3]
    assert (weights(done.model) - weights(model())).abs().max() > 1e-4
    assert all(math.isfinite(x) for row in done.log for x in row.values())
    first = done.log[0]
    assert first["approx_kl"] == pytest.approx(0, abs=1e-9)
    assert first.get("clip_fraction", 0) == 0
    assert ("kl" in first) == PRESETS[name].kl.needed
    assert ("value_loss" in first) == PRESETS[name].advantage.critic


def test_a_few_steps_make_the_rewarded_letter_more_frequent():
    config = replace(SMALL, steps=25, prompts=8, group_size=8, lr=3e-3)
    done = run("dr-grpo", config)
    _, rewards = done.curve("reward")
    assert sum(rewards[-5:]) > 5 * sum(rewards[:5])


@pytest.mark.parametrize("name", ["rlhf-ppo", "grpo", "dapo", "rloo", "gspo", "gmpo", "grpo-tis", "reinforce++"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_do_not_change_the_gradient(name, micro_batch):
    whole = gradient(name, SMALL)
    parts = gradient(name, replace(SMALL, micro_batch=micro_batch))
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["dr-grpo", "rloo"])
def test_leaving_out_dead_groups_does_not_change_the_gradient(name, monkeypatch):
    dead = ("1", "2")  # prompts that begin so have one reward for all

    def reward(prompts, completions, **columns):
        ones = count_ones(prompts, completions)
        return [0.0 if q[0] in dead else x for q, x in zip(prompts, ones)]

    config = replace(SMALL, prompts=8, steps=1)
    grads, rows = [], []
    read = lm_step.token_logprobs

    def counted(policy, ids, *rest, **options):
        rows.append(len(ids))
        return read(policy, ids, *rest, **options)

    monkeypatch.setattr(lm_step, "token_logprobs", counted)
    for keep_all in (False, True):
        with monkeypatch.context() as patch:
            if keep_all:
                patch.setattr(lm_step, "live_rows", lambda objective, batch, size: batch)
            patch.setattr(
                "accelerate.Accelerator.clip_grad_norm_",
                lambda self, ps, m: grads.append(
                    torch.cat([p.grad.flatten().clone() for p in ps])
                ) or torch.tensor(0.0),
            )
            objective = replace(PRESETS[name], kl=PRESETS["dr-grpo"].kl)
            done = run(objective, config, reward=reward)
    assert 0 < done.log[0]["dead_groups"] < 1
    assert rows[0] < rows[1] == 32
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


def test_a_batch_of_dead_groups_changes_nothing():
    done = run("dr-grpo", reward=lambda prompts, completions, **_: [1.0] * len(prompts))
    assert torch.equal(weights(done.model), weights(model()))
    assert [row["dead_groups"] for row in done.log] == [1, 1, 1]


def test_the_same_seed_gives_the_same_run_and_another_another():
    logs = [run(seed=seed).curve("reward") for seed in (0, 0, 1)]
    assert logs[0] == logs[1] != logs[2]


def test_every_preset_has_settings_that_it_allows():
    for name in ["reinforce", "a2c", "ppo-kl", "ppo", *LANGUAGE]:
        config = default_lm_config(name)
        fit_objective(PRESETS[name], config)
        assert config == default_lm_config(PRESETS[name])
    assert default_lm_config("rloo").epochs == 1 < default_lm_config("grpo").epochs


def test_inner_epochs_leave_the_old_policy():
    done = run("grpo", replace(SMALL, epochs=2, minibatches=2, lr=1e-2))
    assert all(row["approx_kl"] > 1e-6 for row in done.log)


# Choices of the sampler


def test_dynamic_sampling_fills_the_batch_with_informative_groups(monkeypatch):
    seen = []
    batch = module._batch

    def look(run, learner, answers):
        seen.append(answers.rewards)
        return batch(run, learner, answers)

    monkeypatch.setattr(module, "_batch", look)
    done = run("dapo", replace(SMALL, max_draws=50), reward=rare)
    assert all(x.shape == (4, 4) for x in seen)
    assert all((x != x[:, :1]).any(1).all() for x in seen)
    assert all(row["drawn_groups"] > 4 and row["dead_groups"] > 0 for row in done.log)


def rare(prompts, completions, **columns):
    return [float(text.startswith("1")) for text in completions]


def test_dynamic_sampling_stops_where_there_is_no_signal():
    def one(prompts, completions, **columns):
        return [1.0] * len(prompts)

    with pytest.raises(NoSignal) as stopped:
        run("dapo", replace(SMALL, max_draws=3), reward=one)
    assert "stopped after 0 steps" in stopped.value.__notes__[0]


def test_informative_is_what_the_reward_says_not_what_length_costs(monkeypatch):
    "Responses of a hopeless group differ in their penalty, and are drawn again."
    seen = []
    batch = module._batch

    def look(run, learner, answers):
        seen.append((answers.samples.texts(learner.tokenizer), answers.rewards))
        return batch(run, learner, answers)

    monkeypatch.setattr(module, "_batch", look)
    run("dapo", replace(SMALL, max_draws=50, overlong_cache=3), reward=rare)
    for texts, rewards in seen:
        verdicts = torch.tensor(rare(texts, texts)).view(4, 4)
        assert (verdicts != verdicts[:, :1]).any(1).all()
        assert (rewards <= verdicts).all() and (rewards < verdicts).any()


def test_truncated_completions_are_left_out_of_the_loss_but_not_of_their_group():
    plain = run("dr-grpo", replace(SMALL, steps=1))
    dropped = run("dr-grpo", replace(SMALL, steps=1, drop_truncated=True))
    assert 0 < plain.log[0]["truncated"] < 1
    assert plain.log[0]["reward"] == dropped.log[0]["reward"]
    assert plain.log[0]["grad_norm"] != dropped.log[0]["grad_norm"]


@pytest.mark.parametrize("drop", [False, True])
def test_the_mask_of_the_loss_has_the_rows_of_finished_completions(drop, monkeypatch):
    "And of the truncated ones too, unless they are dropped."
    seen, real = [], module.learnable
    monkeypatch.setattr(module, "learnable", lambda *args: seen.append((args[2].samples, real(*args))) or seen[-1][1])
    run("dr-grpo", replace(SMALL, steps=1, drop_truncated=drop))
    ((samples, batch),) = seen
    finished = samples.finished
    assert finished.any() and not finished.all()
    assert torch.equal(batch["mask"].any(1), finished if drop else torch.ones_like(finished))
    assert torch.equal(batch["mask"][finished], samples.mask[finished])


@pytest.mark.parametrize("anneal, paces", [(True, [0.5, 0.75, 0.5, 0.25]), (False, [0.5, 1, 1, 1])])
def test_the_rate_rises_and_falls_if_it_may(anneal, paces, monkeypatch):
    rates, real = [], torch.optim.AdamW.step

    def step(self, closure=None):
        rates.append(self.param_groups[0]["lr"])
        return real(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(config=replace(SMALL, steps=4, warmup=1, lr=0.25, anneal=anneal))
    assert rates == pytest.approx([0.25 * pace for pace in paces])


def test_the_soft_penalty_is_part_of_the_reward():
    config = replace(SMALL, steps=1)
    plain, punished = run(config=config), run(config=replace(config, overlong_cache=3))
    assert punished.log[0]["reward"] < plain.log[0]["reward"]


def test_a_method_brings_its_own_price_of_length_unless_another_is_asked_for():
    config, groups = replace(SMALL, steps=1, max_new_tokens=16), replace(PRESETS["dapo"], selection=AllGroups())
    of_its_own, none, two = (run(groups, replace(config, overlong_cache=n)) for n in (None, 0, 2))
    assert [x.config.overlong_cache for x in (of_its_own, none, two)] == [3, 0, 2]  # 16 / 5
    assert of_its_own.log[0]["reward"] < none.log[0]["reward"]
    assert run("grpo", config).config.overlong_cache == 0


def test_a_batch_asks_at_once_for_what_the_last_one_took(monkeypatch):
    asked, fill = [], lm_batch.fill_groups
    monkeypatch.setattr(lm_batch, "fill_groups", lambda *x, **how: asked.append(how["dead"]) or fill(*x, **how))
    done = run("dapo", replace(SMALL, max_draws=50), reward=rare)
    _, dead = done.curve("dead_groups")
    assert asked == [0.0, *dead[:-1]] and min(dead) > 0
    assert all(row["draws"] >= 1 for row in done.log)


def resetting(every):
    "GRPO that renews its reference."
    return replace(PRESETS["grpo"], kl=InLoss(reset_every=every))


def test_resetting_the_reference_brings_the_divergence_back_to_zero():
    config = replace(SMALL, steps=4, lr=1e-2)
    kept, reset = (run(resetting(n), config).curve("kl")[1] for n in (0, 2))
    assert kept[:2] == reset[:2]
    assert kept[2] > 1e-3 and reset[2] == pytest.approx(0, abs=1e-9)


# Nothing is lost


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(tmp_path):
    config = replace(SMALL, steps=6, checkpoint_every=2, minibatches=2)
    for name, objective in ("grpo", resetting(3)), ("rlhf-ppo", "rlhf-ppo"):
        whole = run(objective, config, out=tmp_path / f"{name}-whole")

        def stop(row):
            if row["step"] == 5:
                raise KeyboardInterrupt

        out = tmp_path / name
        with pytest.raises(KeyboardInterrupt):
            run(objective, config, out=out, report=stop)
        assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-00000004"]
        again = run(objective, config, out=out, resume=True)
        skip = {"seconds", "tokens_per_second", "sampling"}
        a, b = ([{k: x for k, x in row.items() if k not in skip} for row in r.log]
                for r in (whole, again))
        assert a == b
        assert torch.equal(weights(whole.model), weights(again.model))
        saved, _ = load_lm(out / "model")
        assert torch.equal(weights(saved), weights(again.model))
        rows = (out / "log.csv").read_text().splitlines()
        assert len(rows) == 7 and rows[0].startswith("step,seconds,reward")


def test_a_checkpoint_cut_short_is_not_taken_for_one(tmp_path):
    config = replace(SMALL, steps=4, checkpoint_every=2)

    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config=config, out=tmp_path, report=stop)
    half = tmp_path / "checkpoint.part"
    shutil.copytree(tmp_path / "checkpoint-00000002", half)
    (half / "pytorch_model.bin").write_bytes(b"half")
    done = run(config=config, out=tmp_path, resume=True)
    assert [row["step"] for row in done.log] == [1, 2, 3, 4]
    assert not half.exists()


def test_what_was_asked_is_written_down(tmp_path):
    run("dapo", out=tmp_path, asked={"task": "chain-addition"})
    asked = json.loads((tmp_path / "run.json").read_text())
    assert asked["task"] == "chain-addition" and asked["seed"] == 0
    assert asked["config"]["group_size"] == 4
    assert asked["objective"]["trust"] == {"is": "Clip", "low": 0.2, "high": 0.28}
    with pytest.raises(ValueError, match="holds a run already"):
        run("dapo", out=tmp_path)


def test_the_settings_of_the_process_are_left_as_they_were():
    start = model()
    before = torch.get_float32_matmul_precision(), start.config._attn_implementation
    state = torch.get_rng_state()
    run("rlhf-ppo", start=start)
    assert before == (torch.get_float32_matmul_precision(), start.config._attn_implementation)
    assert torch.equal(state, torch.get_rng_state())
    assert not start.training


def test_scores_are_of_held_out_problems():
    config = replace(SMALL, eval_every=2, eval_prompts=8, eval_samples=2)
    steps, success = run(config=config).curve("success")
    assert steps == [2] and 0 <= success[0] <= 1


def test_problems_are_held_out_in_an_evaluation_and_not_in_training(monkeypatch):
    graded, asked = [], []
    real = module.verdicts

    def success(model, tokenizer, task, prompts, *rest, **how):
        graded.extend(prompts)
        return real(model, tokenizer, task, prompts, *rest, **how)

    def reward(prompts, completions, **columns):
        asked.extend(prompts)
        return count_ones(prompts, completions)

    monkeypatch.setattr(module, "verdicts", success)
    run(config=replace(SMALL, eval_every=2, eval_prompts=8, eval_samples=2), reward=reward)
    assert graded == list(dict.fromkeys(TASK.prompts(8, held_out=True)))  # each once
    assert len(graded) > 4 and all(map(is_held_out, graded))
    assert len(asked) >= 3 * 16 and not any(map(is_held_out, asked))


# Bad input

COUNTS = [
    "prompts", "group_size", "max_new_tokens", "max_draws", "steps", "epochs", "minibatches",
    "eval_prompts", "eval_samples", "checkpoint_every",
]  # fmt: skip
COUNTS_OR_NONE = ["micro_batch", "overlong_cache", "warmup", "eval_every"]


def test_gradients_of_any_length_may_be_asked_for():
    assert replace(SMALL, max_grad_norm=math.inf).max_grad_norm == math.inf


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=0), "steps must be positive, got 0"),
        (dict(lr=float("nan")), "lr must be positive, got nan"),
        (dict(micro_batch=-1), "micro_batch must be at least 0, got -1"),
        (dict(minibatches=3), "minibatches must be a divisor of prompts 4, got 3"),
        (dict(overlong_cache=6), "overlong_cache must be below max_new_tokens 6, got 6"),
        (dict(temperature=math.inf), r"temperature must be in \(0, inf\), got inf"),
        (dict(temperature=0.0), r"temperature must be in \(0, inf\), got 0.0"),
        (dict(temperature=math.nan), r"temperature must be in \(0, inf\), got nan"),
        (dict(lr=math.inf), r"lr must be in \(0, inf\), got inf"),
        (dict(lr=-1e-4), "lr must be positive, got -0.0001"),
        (dict(max_grad_norm=math.nan), "max_grad_norm must be positive, got nan"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be positive, got 0.0"),
        *[(dict([(name, x)]), f"{name} must be a whole number, got {x}")
          for name in COUNTS + COUNTS_OR_NONE for x in (2.5, True, math.inf)],
        *[(dict([(name, x)]), f"{name} must be positive, got {x}")
          for name in COUNTS for x in (0, -1)],
        *[(dict([(name, -1)]), f"{name} must be at least 0, got -1")
          for name in COUNTS_OR_NONE],
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    "objective, change, message",
    [
        ("gropo", {}, "objective must be one of .*, got 'gropo'"),
        ("trpo", {}, "a Radius needs steps of its own"),
        ("rloo", dict(epochs=2), "OneStep takes one gradient step a batch"),
        ("grpo", dict(group_size=1), "group_size must be at least 2, got 1"),
        ("grpo", dict(max_new_tokens=60), "the model's context is 32"),
    ],
)
def test_objectives_and_settings_that_do_not_fit(objective, change, message):
    with pytest.raises(ValueError, match=message):
        run(objective, replace(SMALL, **change))


def test_without_a_run_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no run: there is no run.json"):
        run(out=tmp_path / "nowhere", resume=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is not of a run: JSONDecodeError"):
        run(out=tmp_path, resume=True)


def test_without_a_folder_there_is_nothing_to_resume():
    with pytest.raises(ValueError, match="out must be the folder of the run to resume"):
        run(resume=True)


def test_rewards_that_are_missing_or_wrong_are_named():
    def silent(prompts, completions, **_):
        return [None] * len(prompts)

    def nan(prompts, completions, **_):
        return [float("nan")] * len(prompts)

    def broken(prompts, completions, **_):
        return [1 / (len(text) - len(text)) for text in completions]

    with pytest.raises(ValueError, match="says nothing about row 0"):
        run(reward=silent)
    with pytest.raises(ValueError, match="finite rewards"):
        run(reward=nan)
    with pytest.raises(ZeroDivisionError) as failed:
        run(reward=broken)
    assert "reward function broken failed on row 0" in failed.value.__notes__[0]


def test_weights_that_went_bad_are_noticed_and_the_checkpoint_kept(tmp_path):
    start = model()

    def poison(row):
        if row["step"] == 2:
            with torch.no_grad():
                start.lm_head.weight.fill_(torch.nan)

    config = replace(SMALL, steps=4, checkpoint_every=1)
    with pytest.raises(ValueError, match="logits that are not finite") as failed:
        run(config=config, out=tmp_path, start=start, report=poison)
    assert f"its last checkpoint is in {tmp_path}" in failed.value.__notes__[0]


def test_a_step_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    norms = iter([1.0, float("nan")])
    monkeypatch.setattr(
        "accelerate.Accelerator.clip_grad_norm_", lambda *_: torch.tensor(next(norms))
    )
    with pytest.raises(Diverged, match="grad_norm not finite"):
        run(config=replace(SMALL, checkpoint_every=1), out=tmp_path)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000001"]


# A folder belongs to a run, and disks refuse


def stopped(out, step=3, config=replace(SMALL, steps=4, checkpoint_every=2), **how):
    "A run of Dr. GRPO that is stopped in the middle of this step."

    def stop(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("dr-grpo", config, out=out, report=stop, **how)
    return config


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_has_one_trainer_at_a_time(tmp_path):
    "It is locked before the checkpoint is read, and free again after an error."
    out, refused = tmp_path / "r", []

    def second(row):
        before = content(out)
        for again in dict(resume=True), dict(resume=False):
            with pytest.raises(ValueError, match="r: another process is training in this"):
                run(out=out, **again)
        assert content(out) == before and out / "run.lock" in before
        refused.append(row["step"])
        if row["step"] == 2:
            raise KeyboardInterrupt

    config = replace(SMALL, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(config=config, out=out, report=second)
    assert refused == [1, 2] and not (out / "run.lock").exists()
    done = run(config=config, out=out, resume=True)
    assert [row["step"] for row in done.log] == [1, 2, 3] and not (out / "run.lock").exists()


OTHERS = {
    "objective": (dict(objective="dr-grpo"), "objective.advantage.scale must be 'group' as .*run.json says, got 'none'"),
    "lr": (dict(config=replace(SMALL, lr=0.5)), "config.lr must be 0.001 as .*, got 0.5"),
    "group": (dict(config=replace(SMALL, group_size=8)), "config.group_size must be 4 as .*, got 8"),
    "fewer": (dict(config=replace(SMALL, steps=1)), "config.steps must be 3 as .*, got 1"),
    "seed": (dict(seed=9), "seed must be 0 as .*, got 9"),
    "task": (dict(task=Countdown()), r"problems must be 'ChainAddition\(.*' as .*, got 'Countdown\("),
    "asked": (dict(asked={"place": "b"}), "place must be 'a' as .*, got 'b'"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", OTHERS.values(), ids=OTHERS)
def test_a_run_of_which_something_else_was_asked_is_not_resumed(change, message, tmp_path):
    def stop(row):
        raise KeyboardInterrupt

    asked = dict(task=TASK, objective="grpo", config=SMALL, seed=0, asked={"place": "a"})
    how = dict(reward=count_ones, device="cpu", out=tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_lm(model(), char_tokenizer(), **asked, **how, report=stop)
    before, other = content(tmp_path), model()
    with pytest.raises(ValueError, match=message):
        train_lm(other, char_tokenizer(), **asked | change, **how, resume=True)
    assert content(tmp_path) == before and torch.equal(weights(other), weights(model()))


def test_what_changes_no_number_may_differ(tmp_path):
    config = stopped(tmp_path)
    again = run("dr-grpo", replace(config, checkpoint_every=1, micro_batch=2), out=tmp_path, resume=True)
    assert len(again.log) == 4


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    config = stopped(tmp_path)
    wide = tiny_lm(char_tokenizer(), width=64, layers=2, heads=2, context=32)
    said = "checkpoint-00000002 is damaged, or of another model$"
    with pytest.raises(ValueError, match=said):
        run("dr-grpo", config, out=tmp_path, resume=True, start=wide)
    path = tmp_path / "checkpoint-00000002" / "pytorch_model.bin"
    for data in b"", path.read_bytes()[:1000]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=said):
            run("dr-grpo", config, out=tmp_path, resume=True)
    assert not (tmp_path / "run.lock").exists()


@contextmanager
def files_up_to(size):
    "Longer files are refused, by the system itself."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 500, 20_000, 150_000])
def test_a_disk_that_takes_no_more_is_said_and_the_last_checkpoint_stays(size, tmp_path):
    "Whoever writes: torch does not say why it could not."
    config = replace(SMALL, steps=4, checkpoint_every=2)
    whole = run("dr-grpo", config)
    limit = files_up_to(size)

    def shrink(row):
        if row["step"] == 3:
            limit.__enter__()

    with pytest.raises(OSError, match=r"File too large.*: '.*r/(log\.csv|checkpoint-00000004)") as failed:
        try:
            run("dr-grpo", config, out=tmp_path / "r", report=shrink)
        finally:
            limit.__exit__(None, None, None)
    assert failed.value.errno == errno.EFBIG
    assert failed.value.__notes__ == [f"stopped after 4 steps; its last checkpoint is in {tmp_path / 'r'}"]
    left = {p.name for p in (tmp_path / "r").iterdir()}
    assert left == {"checkpoint-00000002", "log.csv", "run.json"}
    again = run("dr-grpo", config, out=tmp_path / "r", resume=True)
    assert torch.equal(weights(again.model), weights(whole.model))


def test_no_checkpoint_is_without_its_log(tmp_path, monkeypatch):
    "Whoever is killed between the two has the rows of both."
    seen = []

    def save(learner, log, out, *_):
        seen.append((len(read_log(out)), len(log)))

    monkeypatch.setattr(module, "save_learner", save)
    run("dr-grpo", replace(SMALL, steps=4, checkpoint_every=2), out=tmp_path)
    assert seen == [(2, 2), (4, 4)]


def test_a_disk_that_is_full_at_the_start_leaves_nothing_behind(tmp_path):
    with files_up_to(100), pytest.raises(OSError, match="File too large: '.*r/run.json'"):
        run(out=tmp_path / "r")
    assert not list((tmp_path / "r").iterdir())
    run(out=tmp_path / "r")


def test_a_model_is_saved_whole_or_stays_as_it_was(tmp_path):
    tokenizer = char_tokenizer()
    save_lm(tmp_path / "lm", model(), tokenizer)
    before = content(tmp_path)
    for size in 100, 20_000:
        with files_up_to(size), pytest.raises(OSError, match="File too large: '.*lm'"):
            save_lm(tmp_path / "lm", model(seed=1), tokenizer)
        assert content(tmp_path) == before
    (tmp_path / "lm.part").mkdir()  # of a process that was killed
    (tmp_path / "lm.part" / "half").touch()
    save_lm(tmp_path / "lm", model(seed=1), tokenizer)
    assert torch.equal(weights(load_lm(tmp_path / "lm")[0]), weights(model(seed=1)))
    assert content(tmp_path).keys() == before.keys()


def test_the_last_model_that_cannot_be_written_is_written_by_whoever_resumes(tmp_path, monkeypatch):
    config, start = replace(SMALL, steps=2), model()
    save = type(start).save_pretrained

    def full(self, folder):
        save(self, folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(start), "save_pretrained", full)
        with pytest.raises(OSError, match="the disk is full, make room: '.*model'") as failed:
            run(config=config, out=tmp_path, start=start)
    assert "stopped after 2 steps; its last checkpoint" in failed.value.__notes__[0]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-00000002", "log.csv", "run.json"}
    run(config=config, out=tmp_path, resume=True)
    assert torch.equal(weights(load_lm(tmp_path / "model")[0]), weights(start))


# Several processes

REFUSED = """
import sys
sys.path.insert(0, {tests!r})
import test_train_lm as t
try:
    t.run(out={out!r})
except ValueError as error:
    # In one call, or the two would mix.
    sys.stdout.write(f"refused: {{error}}\\n")
"""


def launched(script, text):
    "What two processes say that run this."
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_all_processes_say_what_the_main_one_was_refused(tmp_path):
    out, here = tmp_path / "r", str(Path(__file__).parent)
    text = REFUSED.format(tests=here, out=str(out))
    with lock_folder(out):
        said = launched(tmp_path / "refused.py", text)
        assert said.count(f"refused: {out}: another process is training in this") == 2
        assert [p.name for p in out.iterdir()] == ["run.lock"]


ALONE_WRONG = """
import os, sys
sys.path.insert(0, {tests!r})
import test_train_lm as t

def reward(prompts, completions, **columns):
    if os.environ["RANK"] == "1":
        raise KeyError("no such word")
    return [1.0] * len(prompts)

try:
    t.run("grpo", reward=reward)
except Exception as error:
    # In one call, or the two would mix.
    words = os.environ["RANK"], type(error).__name__, error
    sys.stdout.write("{{}} {{}} {{}}\\n".format(*words))
"""


def test_what_fails_in_one_process_ends_all_with_its_words(tmp_path):
    said = launched(tmp_path / "wrong.py", ALONE_WRONG.format(tests=str(Path(__file__).parent)))
    assert sorted(said.splitlines()) == [
        "0 ChildProcessError process 1: KeyError: 'no such word'", "1 KeyError 'no such word'"
    ]  # fmt: skip


SHARED = """
import os, sys, time, torch
from dataclasses import replace
from accelerate import Accelerator
sys.path.insert(0, {tests!r})
import test_train_lm as t
from po_book import train_lm as module

torch.set_num_threads(1)
kept, learn, cut = {{}}, module._batch, Accelerator.clip_grad_norm_

def look(run, learner, answers):
    kept["batch"] = batch = learn(run, learner, answers)
    kept["rank"], kept["rewards"] = learner.accelerator.process_index, answers.rewards
    kept["batch"] = {{name: x.clone() for name, x in batch.items()}}
    return batch

def clip(self, parameters, longest):
    parameters = list(parameters)
    kept["gradient"] = torch.cat([p.grad.flatten() for p in parameters])
    return cut(self, parameters, longest)

module._batch, Accelerator.clip_grad_norm_ = look, clip
time.sleep(int(os.environ["RANK"]))  # the second comes when the first could have begun
config = replace(t.SMALL, steps=1, micro_batch=3)
told = []
done = t.run({name!r}, config, out={out!r} + "/run", report=told.append)
kept["weights"], kept["log"], kept["told"] = t.weights(done.model), done.log, told
torch.save(kept, {out!r} + "/" + str(kept["rank"]) + ".pt")
"""


@pytest.mark.parametrize("name", ["magistral", "rlhf-ppo"])
def test_two_processes_take_the_step_of_one_on_both_batches(name, tmp_path):
    here = str(Path(__file__).parent)
    text = SHARED.format(tests=here, name=name, out=str(tmp_path))
    launched(tmp_path / "shared.py", text)
    one, two = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in (0, 1))
    assert torch.equal(one["weights"], two["weights"])
    assert torch.equal(one["gradient"], two["gradient"])
    assert (tmp_path / "run" / "checkpoint-00000001" / "process-1.pt").exists()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint-00000001", "log.csv", "model", "run.json"
    ]  # fmt: skip
    assert not torch.equal(one["batch"]["ids"][:, :4], two["batch"]["ids"][:, :4])
    assert one["log"] == two["log"] == one["told"] and two["told"] == []
    both = torch.stack([one["rewards"], two["rewards"]])
    assert one["log"][0]["reward"] == pytest.approx(both.mean().item(), abs=1e-6)

    def widen(x, before, length):
        return torch.nn.functional.pad(x, (before, length - x.shape[1] - before))

    starts = [int(x["batch"]["mask"].any(0).int().argmax()) for x in (one, two)]
    before = [max(starts) - n for n in starts]
    length = max(x["batch"]["ids"].shape[1] + n for x, n in zip((one, two), before))
    batch = {
        key: torch.cat([widen(x["batch"][key], n, length) for x, n in zip((one, two), before)])
        for key in one["batch"]
    }
    rewards = torch.cat([one["rewards"], two["rewards"]])
    config = replace(SMALL, prompts=8)
    alone = module.LMRun(PRESETS[name], config, 0, model())
    learner = new_lm_learner(
        alone.model, char_tokenizer(), TASK, count_ones, alone.objective, config, device="cpu"
    )
    values = torch.zeros_like(batch["logp_old"])  # of a critic that has not learned yet
    paid = alone.objective.rewards(
        rewards.flatten(), batch["logp_old"], batch["mask"], batch.get("logp_ref")
    )
    advantages, _ = alone.objective.advantage(Paid(paid, batch["mask"], 4, values))
    torch.testing.assert_close(batch["advantages"], advantages, atol=1e-6, rtol=1e-5)
    seen = {}

    def clip(self, parameters, longest):
        seen["gradient"] = torch.cat([p.grad.flatten() for p in parameters])
        return torch.tensor(0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.Accelerator.clip_grad_norm_", clip)
        trained = learner.networks, learner.optimizer, learner.accelerator
        gradient_step(alone.objective, config, batch, *trained, 1.0)
    assert seen["gradient"].abs().max() > 1e-3
    torch.testing.assert_close(one["gradient"], seen["gradient"], atol=1e-6, rtol=1e-4)


def test_in_mixed_precision_sampler_and_learner_round_alike(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        done = run("grpo", replace(SMALL, lr=1e-2))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    plain = run("grpo", replace(SMALL, lr=1e-2))
    assert {p.dtype for p in done.model.parameters()} == {torch.float32}
    assert done.log[0]["grad_norm"] != plain.log[0]["grad_norm"]
    assert done.log[0]["approx_kl"] < 1e-4 and done.log[0]["clip_fraction"] < 0.01


# Other models, other problems


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_model_that_was_saved_learns_word_problems(kind, tmp_path):
    tokenizer = char_tokenizer("0123456789+=? Whatisum,.")
    sizes = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                 bos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    if kind == "gpt2":
        saved = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes))
    else:
        saved = Qwen2ForCausalLM(Qwen2Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, **sizes,
        ))
    saved.save_pretrained(tmp_path / "model")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(
        json.dumps({"prompt": f"What is {a} + {b}?", "answer": a + b}) + "\n"
        for a in range(6) for b in range(6)
    ))
    lm, its = load_lm(tmp_path / "model")
    seen = []

    def digits(prompts, completions, answer, **columns):
        seen.extend(zip(prompts, answer))
        return [float(sum(x.isdigit() for x in text)) for text in completions]

    config = replace(SMALL, steps=2, eval_every=2, eval_prompts=4)
    start = weights(lm)
    done = train_lm(lm, its, Problems(problems), digits, "grpo", config,
                    device="cpu", progress=False)
    assert (weights(lm) - start).abs().max() > 1e-4
    assert "success" in done.log[-1]
    for prompt, answer in seen:
        a, b = re.findall(r"\d", prompt)
        assert answer == int(a) + int(b)
