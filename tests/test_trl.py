"GRPO against TRL's own trainer: advantages, losses and their gradients, reward functions."
import asyncio
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from po_book.grpo import group_advantages, grpo_loss
from po_book.language_model import char_tokenizer, tiny_lm
from po_book.ppo import ratio
from po_book.reward_models import RewardModel, classifier_reward, judge
from po_book.rewards import (
    OFFERED,
    RewardLog,
    compute_rewards,
    mean_metrics,
    verifier,
    weighted_sum,
)

trl = pytest.importorskip("trl", exc_type=ImportError)
datasets = pytest.importorskip("datasets", exc_type=ImportError)

GROUP, MAX_LEN = 4, 6
AGGREGATIONS = {  # TRL's name: ours
    "grpo": ("sample", None),
    "bnpo": ("token", None),
    "dapo": ("token", None),
    "dr_grpo": ("constant", MAX_LEN),
}


def close(got, want, atol=1e-6):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    "TRL's trainer around a tiny model. Its reward function says what `given` holds."
    tokenizer, given = char_tokenizer(), SimpleNamespace(rewards=None)

    def reward(prompts, completions, **columns):
        return given.rewards.flatten().tolist()

    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=2 * GROUP,
        num_generations=GROUP,
        max_completion_length=MAX_LEN,
        epsilon=0.2,
        epsilon_high=0.3,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.GRPOTrainer(
        model=tiny_lm(tokenizer, width=16, layers=1, heads=2),
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1+2=", "3+4="]}),
        processing_class=tokenizer,
    )
    trainer.given = given
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


# Advantages


def trl_advantages(trainer, rewards, scale):
    trainer.given.rewards, trainer.scale_rewards = rewards, scale
    inputs = [{"prompt": p} for p in ("1+2=", "3+4=") for _ in range(GROUP)]
    return trainer._generate_and_score_completions(inputs)["advantages"].view_as(rewards)


@pytest.fixture(params=[0, 1], ids=["real rewards", "right or wrong"])
def rewards(request):
    rewards = random(2, GROUP, seed=5)
    return (rewards > 0).float() if request.param else rewards


@pytest.mark.parametrize("scale, over", [("group", 1), ("batch", (0, 1))])
def test_scaled_advantages_are_trls_but_for_the_sample_deviation(
    trainer, rewards, scale, over
):
    "TRL has G - 1 under the root, and adds 1e-4 to that root."
    std = rewards.std(over, correction=0, keepdim=True)
    count = GROUP if scale == "group" else 2 * GROUP
    theirs = trl_advantages(trainer, rewards, scale)
    sample_std = std * (count / (count - 1)) ** 0.5
    exact = group_advantages(rewards, scale, eps=0)
    assert exact.abs().max() > 0.5
    close(theirs, exact * std / (sample_std + 1e-4))


def test_unscaled_advantages_are_trls(trainer, rewards):
    close(trl_advantages(trainer, rewards, "none"), group_advantages(rewards, "none"))


def test_a_group_of_equal_rewards_gets_nothing_in_both(trainer):
    rewards = torch.tensor([[1.0] * GROUP, [0.0, 1.0, 1.0, 0.0]])
    for scale in "group", "batch", "none":
        theirs = trl_advantages(trainer, rewards, scale)
        ours = group_advantages(rewards, scale)
        assert theirs[0].eq(0).all() and ours[0].eq(0).all()
        assert theirs[1].ne(0).all() and ours[1].ne(0).all()


# Losses


@pytest.fixture
def batch():
    "Log-probabilities and masks of eight completions, one of them empty."
    lengths = torch.tensor([6, 1, 3, 0, 5, 2, 6, 4])
    old = -random(8, MAX_LEN, seed=1).abs() - 0.1
    return {
        "logp": old + 0.4 * random(8, MAX_LEN, seed=2),
        "logp_old": old,
        "logp_ref": old + 0.5 * random(8, MAX_LEN, seed=3),
        "advantages": random(8, seed=4),
        "mask": torch.arange(MAX_LEN) < lengths[:, None],
    }


def trl_loss(trainer, batch, loss_type, beta, weighted_kl=False):
    "TRL's loss and its gradient in the log-probabilities."
    logp, mask = batch["logp"].clone().requires_grad_(), batch["mask"]
    trainer.loss_type, trainer.beta = loss_type, beta
    trainer.args.use_bias_correction_kl = weighted_kl
    no_entropy = torch.zeros_like(logp)
    patch = pytest.MonkeyPatch()
    patch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *args, **options: (logp, no_entropy, None),
    )
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": torch.ones_like(ids[:, :2]),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["logp_old"],
        "ref_per_token_logps": batch["logp_ref"],
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    patch.undo()
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_loss_and_gradient_are_trls(trainer, batch, loss_type, beta):
    theirs = trl_loss(trainer, batch, loss_type, beta)
    how, max_len = AGGREGATIONS[loss_type]
    logp = batch.pop("logp").requires_grad_()
    loss, metrics = grpo_loss(
        logp, **batch, beta=beta, clip_high=0.3, aggregate=how, max_len=max_len
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    assert metrics["clip_fraction"] > 0.1 and gradient.abs().max() > 1e-3
    close(loss.detach(), theirs[0])
    close(gradient, theirs[1])


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_trls_default_penalty_is_ours_corrected(trainer, batch, loss_type):
    theirs = trl_loss(trainer, batch, loss_type, 0.3, weighted_kl=True)
    how = AGGREGATIONS[loss_type]
    logp = batch.pop("logp").requires_grad_()
    settings = dict(clip_high=0.3, aggregate=how[0], max_len=how[1])
    loss, _ = grpo_loss(logp, **batch, beta=0.3, corrected=True, **settings)
    (gradient,) = torch.autograd.grad(loss, logp)
    close(loss.detach(), theirs[0])
    close(gradient, theirs[1])


def test_the_aggregations_tell_each_other_apart(trainer, batch):
    names = "grpo", "dapo", "dr_grpo"
    losses = [trl_loss(trainer, batch, name, 0.3)[0] for name in names]
    for i in range(3):
        assert (losses[i] - losses[i - 1]).abs() > 1e-2


# Reward functions


PAIRS = [("1+2=", "3"), ("1+2=", "4,"), ("3+4=", ""), ("3+4=", "7")]
ANSWERS = ["3", "3", "7", "7"]


def ask_trl(trainer, rewards, pairs=PAIRS, processing_class=None):
    "What TRL hears from each reward function about each row, and what it logs."
    prompts, completions = map(list, zip(*pairs))
    inputs = [{"prompt": q, "answer": a} for q, a in zip(prompts, ANSWERS)]
    ids = [[5, 1], [5, 6], [1], [7, 1]]
    trainer._pending_metrics.clear()
    trainer._pending_extra_logs.clear()
    patch = pytest.MonkeyPatch()
    patch.setattr(trainer, "reward_funcs", rewards)
    patch.setattr(trainer, "reward_func_names", [f"{i}" for i in range(len(rewards))])
    patch.setattr(trainer, "reward_processing_classes", [processing_class] * len(rewards))
    table = trainer._calculate_rewards(inputs, prompts, completions, ids)
    patch.undo()
    return table.T.tolist(), dict(trainer._pending_metrics), dict(trainer._pending_extra_logs)


def ask_here(trainer, reward, pairs=PAIRS):
    "The same of ours, with the same state and tokens."
    prompts, completions = map(list, zip(*pairs))
    log = RewardLog(len(pairs))
    said = compute_rewards(
        reward,
        prompts,
        completions,
        answer=ANSWERS,
        completion_ids=[[5, 1], [5, 6], [1], [7, 1]],
        trainer_state=trainer.state,
        log_metric=log.log_metric,
        log_extra=log.log_extra,
    )
    return said, log


@pytest.fixture(scope="module")
def loop(trainer):
    "TRL starts its event loop only where it is made with functions that wait."
    from trl.trainer.utils import shutdown_event_loop_in_daemon, start_event_loop_in_daemon

    thread, trainer.async_loop, ready = start_event_loop_in_daemon(name="test")
    ready.wait()
    yield
    shutdown_event_loop_in_daemon(thread, trainer.async_loop)


def everything(
    prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs
):
    "Asks for all that TRL gives."
    assert trainer_state.global_step == 0 and trainer_state.max_steps == 0
    right = [o == a for o, a in zip(completions, answer)]
    log_extra("read", completions)
    log_metric("right", sum(right) / len(right))
    return [None if ids == [1] else x + len(ids) for x, ids in zip(right, completion_ids)]


async def waits(completions, answer, **kwargs):
    await asyncio.sleep(0)
    return [float(o == a) for o, a in zip(completions, answer)]


def ours():
    "Rewards of this library."
    tokenizer = char_tokenizer()
    model = RewardModel(tiny_lm(tokenizer, width=16, layers=1, heads=2), tokenizer)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    rule = verifier(lambda q, o: str(eval(q[:-1])) == o)

    async def ask(question):
        await asyncio.sleep(0)
        return f"{len(question)}/1000"

    return {
        "verifier": rule,
        "reward model": model.reward,
        "judge": judge(lambda question: f"{len(question)}", top=1000),
        "judge that waits": judge(ask, top=1000),
        "sum": weighted_sum([rule, waits, everything], [1.0, 0.5, 0.25]),
    }


@pytest.mark.parametrize("reward", [everything, waits], ids=["all arguments", "coroutine"])
def test_a_function_written_for_trl_runs_here(trainer, loop, reward):
    (theirs,), metrics, extras = ask_trl(trainer, [reward])
    said, log = ask_here(trainer, reward)
    nan = float("nan")
    close(torch.tensor([nan if x is None else x for x in said]).nan_to_num(-9), torch.tensor(theirs).nan_to_num(-9))
    assert log.told == metrics and log.extras == extras


def test_trls_own_functions_run_here():
    pytest.importorskip("math_verify")
    from trl.rewards import accuracy_reward, get_repetition_penalty_reward

    log, (prompts, completions) = RewardLog(2), zip(*chat([("1+2=", r"\boxed{3}"), ("1+2=", "4")]))
    data = {"solution": ["$3$", "$3$"], "completion_ids": [[5, 5, 5, 5], [1, 2, 3]]}
    total = weighted_sum([accuracy_reward, get_repetition_penalty_reward(2)], [1.0, 0.5])
    told = {"log_extra": log.log_extra, "log_metric": log.log_metric}
    said = compute_rewards(total, prompts, completions, **data, **told)
    assert said == pytest.approx([1 - 0.5 * 2 / 3, 0.0])
    assert log.extras["solution"] == ["$3$", "$3$"]
    assert mean_metrics([log])["rewards/repetition_penalty_reward/mean"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize("name", ours())
def test_our_rewards_run_in_trl(trainer, loop, name):
    reward = ours()[name]
    (theirs,), metrics, extras = ask_trl(trainer, [reward])
    said, log = ask_here(trainer, reward)
    close(torch.tensor(said), torch.tensor(theirs))
    assert max(said) > min(said)
    assert log.told == metrics and log.extras == extras


def test_the_log_of_a_sum_in_trl(trainer, loop):
    _, metrics, extras = ask_trl(trainer, [ours()["sum"]])
    assert metrics == {
        "right": [0.5],
        "rewards/verified/weight": [1.0],
        "rewards/verified/mean": [0.5],
        "rewards/waits/weight": [0.5],
        "rewards/waits/mean": [0.5],
        "rewards/everything/weight": [0.25],
        "rewards/everything/mean": [8 / 3],
    }
    assert extras == {"read": ["3", "4,", "", "7"]}


def chat(pairs):
    return [
        ([{"role": "user", "content": q}], [{"role": "assistant", "content": o}])
        for q, o in pairs
    ]


def test_messages_reach_our_rewards_as_they_do_in_trl(trainer, loop):
    def verify(prompt, text):
        return str(eval(prompt[0]["content"][:-1])) == text

    rewards = verifier(verify), ours()["judge"], ours()["judge that waits"]
    theirs, _, _ = ask_trl(trainer, list(rewards), chat(PAIRS))
    for reward, want in zip(rewards, theirs):
        close(torch.tensor(ask_here(trainer, reward, chat(PAIRS))[0]), torch.tensor(want))
    assert theirs[0] == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("rows", [PAIRS, chat(PAIRS)], ids=["texts", "messages"])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_classifiers_rewards_are_those_of_trl(trainer, rows, pad):
    "Also where the end token pads, which the template puts at the end."
    tokenizer = char_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=18, num_labels=1, initializer_range=0.5, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    said, _ = ask_here(trainer, classifier_reward(model, tokenizer, batch_size=3), rows)
    model.config.pad_token_id = tokenizer.pad_token_id  # as TRL's trainer does
    (theirs,), _, _ = ask_trl(trainer, [model], rows, tokenizer)
    close(torch.tensor(said), torch.tensor(theirs), 1e-5)
    assert max(said) - min(said) > 0.1


def test_trl_trains_on_our_rewards_and_offers_what_the_page_says(tmp_path):
    "A step of its trainer, with a sum of ours that hears all it has to say."
    tokenizer, offered = char_tokenizer(), []

    def listens(completions, **columns):
        offered.append(columns)
        columns["log_metric"]("heard", len(completions))
        return [float(len(o)) for o in completions]

    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.GRPOTrainer(
        model=tiny_lm(tokenizer, width=16, layers=1, heads=2),
        reward_funcs=[weighted_sum([listens, waits], [1.0, 0.5]), waits],
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1+2="], "answer": ["3"]}),
        processing_class=tokenizer,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    (columns,) = offered
    assert {*OFFERED} - {*columns} == {"finished"} and columns["answer"] == ["3"] * 4
    assert log["heard"] == 4 and log["rewards/listens/weight"] == 1.0
    assert log["rewards/waits/weight"] == 0.5
    total = log["rewards/listens/mean"] + 0.5 * log["rewards/waits/mean"]
    assert log["reward"] == pytest.approx(total + log["rewards/waits/mean"], abs=1e-6)
    for ids in columns["completion_ids"]:
        assert 1 not in ids[:-1] and (ids[-1] == 1 or len(ids) == 4)
