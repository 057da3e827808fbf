"The sampler is not the learner: weights by hand and by enumeration, TRL's own, extremes."
import itertools
import math

import pytest
import torch
from torch.autograd.functional import jacobian

from po_book.language_model import char_tokenizer, tiny_lm
from po_book.mismatch import (
    band_weights,
    check_mismatch,
    mismatch_metrics,
    truncated_weights,
)
from po_book.ppo import MAX_LOG_RATIO

MASK = torch.arange(4) < torch.tensor([[4], [2], [1], [0]])


def close(got, want, atol=1e-12):
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def pair(seed=0, spread=0.8, rows=4, length=4):
    "Log-probabilities of the learner and of the sampler."
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(2, rows, length, dtype=torch.float64, generator=generator)
    old = -numbers[0].abs()
    return old, (old + spread * numbers[1]).clamp(max=0)


def by_hand(old, sampler, mask, whole):
    "The ratio of every token, or the product over its row, in loops."
    out = torch.zeros_like(old)
    for i, row in enumerate(mask.tolist()):
        ratios = [math.exp(o - s) for o, s in zip(old[i].tolist(), sampler[i].tolist())]
        product = math.prod(r for r, real in zip(ratios, row) if real)
        for t, real in enumerate(row):
            out[i, t] = (product if whole else ratios[t]) if real else 0
    return out


# Weights


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("cap", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("seed", range(5))
def test_truncated_weights_are_those_of_a_loop(seed, cap, whole):
    data = *pair(seed), MASK
    want = by_hand(*data, whole).clamp(max=cap)
    close(truncated_weights(*data, cap=cap, whole=whole), want)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("low, high", [(0.5, 5.0), (0.0, 1.5), (0.9, math.inf), (1.0, 1.0)])
@pytest.mark.parametrize("seed", range(5))
def test_band_weights_are_those_of_a_loop(seed, low, high, whole):
    data = *pair(seed), MASK
    want = by_hand(*data, whole)
    want[(want < low) | (want > high)] = 0
    close(band_weights(*data, low, high, whole), want)


def test_the_defaults_are_a_cap_of_two_and_a_band_from_a_half_to_five():
    old = torch.tensor([[0.4, 0.9, 0.98, 0.9, 0.31]]).log()
    drawn = torch.tensor([[0.9, 0.3, 0.2, 0.17, 0.62 - 1e-4]]).log()
    mask = torch.ones(1, 5, dtype=torch.bool)
    close(truncated_weights(old, drawn, mask), [[4 / 9, 2, 2, 2, 0.5]], 1e-4)
    close(band_weights(old, drawn, mask), [[0, 3, 4.9, 0, 0.5]], 1e-4)


def test_both_bounds_of_a_band_are_inside():
    zero = torch.zeros(1, 2, dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    old = torch.tensor([[0.25, 1.0]], dtype=torch.float64).log()
    drawn = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    assert band_weights(old, drawn, mask, 0.5, 4.0).tolist() == [[0.5, 4.0]]
    assert band_weights(zero, zero, mask, 1.0, 1.0).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("weights", [truncated_weights, band_weights])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_outside_the_mask_reaches_nothing(weights, whole):
    old, sampler = pair()
    want = weights(old, sampler, MASK, whole=whole)
    old, sampler = (x.masked_fill(~MASK, bad) for x, bad in ((old, torch.nan), (sampler, 7.0)))
    close(weights(old, sampler, MASK, whole=whole), want)
    assert not want[~MASK].any() and not want[3].any()


@pytest.mark.parametrize("weights", [truncated_weights, band_weights])
@pytest.mark.parametrize("whole", [False, True])
def test_a_sampler_that_is_the_learner_gets_ones(weights, whole):
    old, _ = pair()
    close(weights(old, old, MASK, whole=whole), MASK.double())


@pytest.mark.parametrize("weights", [truncated_weights, band_weights])
def test_only_the_difference_counts_and_rows_may_be_shuffled(weights):
    old, sampler = pair()
    want = weights(old, sampler, MASK, whole=True)
    close(weights(old - 3, sampler - 3, MASK, whole=True), want, 1e-12)
    order = torch.tensor([2, 0, 3, 1])
    close(weights(old[order], sampler[order], MASK[order], whole=True), want[order])


@pytest.mark.parametrize("weights", [truncated_weights, band_weights])
def test_a_whole_response_of_one_token_is_that_token(weights):
    old, sampler = pair()
    one = torch.arange(4) == torch.tensor([[0], [1], [2], [3]])
    close(weights(old, sampler, one, whole=True), weights(old, sampler, one))


# Extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [False, True])
def test_ratios_that_would_overflow_are_cut(dtype, whole):
    old = torch.tensor([[-1.0] * 3, [-1000.0] * 3], dtype=dtype)
    data = old, old.flip(0), torch.ones(2, 3, dtype=torch.bool)
    largest = truncated_weights(*data, cap=math.inf, whole=whole)
    assert largest.dtype == dtype and largest.isfinite().all()
    cut = 5.5 if dtype == torch.float16 else MAX_LOG_RATIO
    close(largest[0].double().log(), [cut] * 3, 0.06)
    close(truncated_weights(*data, whole=whole)[0], [2.0] * 3)
    close(band_weights(*data, whole=whole), torch.zeros(2, 3))


@pytest.mark.parametrize("whole", [False, True])
def test_a_token_that_is_impossible_for_the_learner_has_no_weight(whole):
    old, sampler = pair()
    old[0, 1] = -torch.inf
    assert truncated_weights(old, sampler, MASK, whole=whole)[0, 1] < 1e-8
    assert band_weights(old, sampler, MASK, whole=whole)[0, 1] == 0
    told = mismatch_metrics(old, sampler, MASK)
    assert all(x.isfinite() for x in told.values())


def test_weights_and_metrics_carry_no_gradient():
    old, sampler = pair()
    for x in (truncated_weights(old, sampler, MASK), band_weights(old, sampler, MASK),
              *mismatch_metrics(old, sampler, MASK).values()):
        assert not x.requires_grad


# The gradient, by enumeration


def enumerated(h, seed=0):
    "Responses of three tokens: log-probabilities under both, scores, advantages."
    generator = torch.Generator().manual_seed(seed)
    theta, noise = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    every = torch.tensor(list(itertools.product(range(2), repeat=3)))
    before = torch.nn.functional.pad(every[:, :-1], (1, 0), value=2)
    logps = lambda z: z.log_softmax(-1)[before, every]  # noqa: E731
    A = torch.randn(8, dtype=torch.float64, generator=generator)
    return logps(theta), logps(theta + h * noise), jacobian(logps, theta).flatten(2), A


@pytest.mark.parametrize("seed", range(5))
def test_exact_weights_of_responses_are_unbiased_and_no_others(seed):
    old, sampler, score, A = enumerated(0.7, seed)
    mask, drawn = torch.ones_like(old, dtype=torch.bool), sampler.sum(-1).exp()

    def mean(weights, law=drawn):
        return torch.einsum("o,otk,ot,o->k", law, score, weights, A)

    exact = mean(torch.ones_like(old), old.sum(-1).exp())
    whole = truncated_weights(old, sampler, mask, cap=math.inf, whole=True)
    close(mean(whole), exact)
    close(drawn @ whole[:, 0], 1.0)
    for biased in (torch.ones_like(old), truncated_weights(old, sampler, mask, cap=math.inf),
                   truncated_weights(old, sampler, mask, cap=1.0, whole=True)):
        assert (mean(biased) - exact).norm() > 0.01 * exact.norm()


@pytest.mark.parametrize("cap", [1.0, 1.5, 3.0])
def test_the_cap_bounds_the_second_moment(cap):
    old, sampler, *_ = enumerated(1.5)
    mask = torch.ones_like(old, dtype=torch.bool)
    w = truncated_weights(old, sampler, mask, cap=cap, whole=True)[:, 0]
    assert sampler.sum(-1).exp() @ w**2 <= cap


# Metrics


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_a_loop(seed):
    old, sampler = pair(seed)
    d = [o - s for o, s, real in zip(old.flatten().tolist(), sampler.flatten().tolist(),
                                     MASK.flatten().tolist()) if real]
    told = mismatch_metrics(old, sampler, MASK)
    assert list(told) == ["mismatch", "mismatch_kl", "mismatch_ratio"]
    close(told["mismatch"], sum(map(abs, d)) / len(d))
    close(told["mismatch_kl"], sum(math.exp(x) - 1 - x for x in d) / len(d))
    close(told["mismatch_ratio"], math.exp(max(d)))


def test_the_divergence_is_that_of_the_learner_from_the_sampler():
    "By enumeration of one token: samples are the sampler's."
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])  # learner, sampler
    one = torch.ones(1, 1, dtype=torch.bool)
    each = [mismatch_metrics(a.log().view(1, 1), b.log().view(1, 1), one)["mismatch_kl"]
            for a, b in zip(p, q)]
    close(q @ torch.stack(each), (q * (q / p).log()).sum(), 1e-6)


def test_without_tokens_metrics_are_zero():
    told = mismatch_metrics(*pair(), torch.zeros_like(MASK))
    assert all(x == 0 for x in told.values())
    check_mismatch(*pair(), torch.zeros_like(MASK))


# The same model?


def test_the_mean_distance_decides():
    old, _ = pair()
    check_mismatch(old, old, MASK)
    check_mismatch(old - 1, old, MASK)
    with pytest.raises(ValueError, match=r"logp_sampler must be within 1 nats .*got 1\.1: .*tokenizer"):
        check_mismatch(old - 1.1, old, MASK)
    check_mismatch(old - 1.1, old, MASK, limit=1.2)
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        check_mismatch(old, old, MASK, limit=0)


def test_one_wild_token_in_many_is_no_other_model():
    old = torch.full((1, 100), -1.0)
    sampler = old.clone()
    old[0, 3] = -torch.inf
    check_mismatch(old, sampler, torch.ones(1, 100, dtype=torch.bool))


# Bad input


@pytest.mark.parametrize("function", [truncated_weights, band_weights, mismatch_metrics, check_mismatch])
def test_bad_data_is_refused_in_words(function):
    old, sampler = pair()
    with pytest.raises(ValueError, match="logp_sampler must have mask's shape"):
        function(old, sampler[:, :3], MASK)
    with pytest.raises(ValueError, match="mask must have shape"):
        function(old[0], sampler[0], MASK[0])
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        function(old, sampler, MASK.long())
    with pytest.raises(ValueError, match="logp_old must be detached"):
        function(old.clone().requires_grad_(), sampler, MASK)
    with pytest.raises(ValueError, match="logp_sampler must be detached"):
        function(old, sampler.clone().requires_grad_(), MASK)
    for name, bad in ("logp_old", torch.nan), ("logp_old", torch.inf), ("logp_sampler", -torch.inf), ("logp_sampler", torch.nan):
        data = {"logp_old": old.clone(), "logp_sampler": sampler.clone()}
        data[name][1, 1] = bad
        with pytest.raises(ValueError, match=f"{name} must be finite, got {bad}"):
            function(**data, mask=MASK)


def test_bounds_without_one_between_them_are_refused():
    data = *pair(), MASK
    with pytest.raises(ValueError, match="cap must be at least 1, got 0.5"):
        truncated_weights(*data, cap=0.5)
    with pytest.raises(ValueError, match=r"low must be in \[0, 1\], got 1.1"):
        band_weights(*data, low=1.1)
    with pytest.raises(ValueError, match=r"low must be in \[0, 1\], got -0.1"):
        band_weights(*data, low=-0.1)
    with pytest.raises(ValueError, match="high must be at least 1, got 0.9"):
        band_weights(*data, high=0.9)
    with pytest.raises(ValueError, match="high must be at least 1, got nan"):
        band_weights(*data, high=math.nan)


# TRL's own


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    "TRL's trainer around a tiny model, as if an engine had sampled for it."
    trl = pytest.importorskip("trl", exc_type=ImportError)
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    tokenizer = char_tokenizer()
    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=8,
        num_generations=4, max_completion_length=6, report_to="none", use_cpu=True, bf16=False,
    )
    made = trl.GRPOTrainer(
        model=tiny_lm(tokenizer, width=16, layers=1, heads=2),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1+2=", "3+4="]}),
        processing_class=tokenizer,
    )
    made.model.train()
    generate, noise = made._generate, torch.Generator().manual_seed(0)

    def sampled(prompts):
        "What TRL samples, with log-probabilities that an engine might have said."
        made.use_vllm = False
        ids, completions, *rest = generate(prompts)
        rest[2] = [(-2.9 + 0.6 * torch.randn(len(c), generator=noise)).tolist() for c in completions]
        made.use_vllm = True
        return ids, completions, *rest

    made._generate = sampled
    return made


@pytest.mark.parametrize("low, high", [(None, 3.0), (0.5, 1.5), (0.9, None)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_weights_and_metrics_are_trls(trainer, mode, low, high):
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_min = None if "truncate" in mode else low
    trainer.vllm_importance_sampling_clip_max = high or (3.0 if "truncate" in mode else None)
    inputs = [{"prompt": p} for p in ("1+2=", "3+4=") for _ in range(4)]
    got = trainer._generate_and_score_completions(inputs)
    mask = got["completion_mask"].bool()
    data = got["old_per_token_logps"], got["sampling_per_token_logps"], mask
    theirs = (got["importance_sampling_ratio"] * mask).expand_as(mask)
    whole = mode.startswith("sequence")
    if "truncate" in mode:
        ours = truncated_weights(*data, cap=high or 3.0, whole=whole)
    else:
        ours = band_weights(*data, low or 0.0, high or math.inf, whole)
    close(ours, theirs, 1e-6)
    assert len(theirs[mask].unique()) > 1
    told = mismatch_metrics(*data)
    logged = trainer._metrics["train"]["sampling/sampling_logp_difference/mean"][-1]
    close(told["mismatch"], logged, 1e-6)
