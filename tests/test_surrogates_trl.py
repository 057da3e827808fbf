"Surrogates against TRL's own trainers: CISPO, SAPO, GSPO as a level of the ratio, GMPO."
import pytest
import torch
from test_trl import batch, trainer, trl_loss  # noqa: F401  (two are fixtures)

from po_book.grpo import aggregate
from po_book.surrogates import cispo_surrogate, gmpo_surrogate, gspo_surrogate, sapo_surrogate


def ours(surrogate, batch, how):
    "Loss and gradient of a surrogate with one advantage a response."
    logp, mask = batch["logp"].clone().requires_grad_(), batch["mask"]
    advantages = batch["advantages"][:, None].expand_as(logp)
    loss = -aggregate(surrogate(logp, batch["logp_old"], advantages, mask), mask, how)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def agree(mine, theirs):
    assert mine[1].abs().max() > 1e-3
    for got, want in zip(mine, theirs):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.fixture
def set_(trainer, monkeypatch):  # noqa: F811
    return lambda name, value: monkeypatch.setattr(trainer, name, value)


def test_cispo_is_trls_whose_bound_is_the_weight_itself(trainer, batch, set_):  # noqa: F811
    set_("epsilon_high", 1.3)
    theirs = trl_loss(trainer, batch, "cispo", 0.0)

    def surrogate(logp, old, advantages, mask):
        return cispo_surrogate(logp, old, advantages, clip_high=0.3)

    assert ((batch["logp"] - batch["logp_old"]).exp() > 1.3)[batch["mask"]].any()
    agree(ours(surrogate, batch, "token"), theirs)


@pytest.mark.parametrize("tau", [(1.0, 1.05), (2.0, 5.0)])
def test_sapo_is_trls(trainer, batch, monkeypatch, tau):  # noqa: F811
    monkeypatch.setattr(trainer.args, "sapo_temperature_pos", tau[0])
    monkeypatch.setattr(trainer.args, "sapo_temperature_neg", tau[1])
    theirs = trl_loss(trainer, batch, "sapo", 0.0)

    def surrogate(logp, old, advantages, mask):
        return sapo_surrogate(logp, old, advantages, *tau)

    agree(ours(surrogate, batch, "sample"), theirs)


@pytest.mark.parametrize("bounds", [(0.2, 0.3), (0.05, 0.1), (3e-4, 4e-4)])
def test_gspo_is_trls_with_sequences(trainer, batch, set_, bounds):  # noqa: F811
    set_("importance_sampling_level", "sequence")
    set_("epsilon_low", bounds[0])
    set_("epsilon_high", bounds[1])
    theirs = trl_loss(trainer, batch, "grpo", 0.0)
    agree(ours(lambda *x: gspo_surrogate(*x, *bounds), batch, "sample"), theirs)


@pytest.mark.parametrize("bounds", [(0.4, 0.4), (0.1, 0.2)])
def test_gmpo_is_trls(trainer, batch, set_, monkeypatch, bounds):  # noqa: F811
    "But for a response without tokens: there TRL adds its advantage, a constant."
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    set_("epsilon_low", bounds[0])
    set_("epsilon_high", bounds[1])
    monkeypatch.setattr(type(trainer), "_compute_loss", gmpo.GMPOTrainer._compute_loss)
    loss, gradient = trl_loss(trainer, batch, "grpo", 0.0)
    constant = (batch["advantages"] * ~batch["mask"].any(1)).mean()
    theirs = loss + constant, gradient
    agree(ours(lambda *x: gmpo_surrogate(*x, *bounds), batch, "sample"), theirs)
