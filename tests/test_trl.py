"GRPO against TRL's own trainer: its advantages, its losses and their gradients."
from types import SimpleNamespace

import pytest
import torch

from po_book.grpo import group_advantages, grpo_loss
from po_book.language_model import char_tokenizer, tiny_lm

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
