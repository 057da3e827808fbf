"What a language-model run is made of, and models from elsewhere that learn."
import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_models import MODELS, SMALL, adapted, dropping, generator, save_tiny

from po_book.credit import Informative
from po_book.data import Problems
from po_book.language_model import char_tokenizer, tiny_lm
from po_book.lm_learner import (
    LMConfig, default_lm_config, fit_objective, make_accelerator, new_lm_learner, restore_learner, save_learner,
    tiny_config,
)
from po_book.objective import PRESETS
from po_book.pretrained import is_peft, load_lm, save_lm
from po_book.rollout import spawn_seed
from po_book.sampling import sample
from po_book.tasks import ChainAddition, is_held_out, sft
from po_book.terms import InLoss
from po_book.train_lm import train_lm

TASK = ChainAddition(2, 3)
FEW = tiny_config(steps=2, prompts=4, group_size=4, max_new_tokens=8, warmup=0, anneal=False, epochs=1,
                  minibatches=1)
RESET = replace(PRESETS["grpo"], kl=InLoss(reset_every=2))
QUIET = dict(device="cpu", progress=False)


def by_length(prompts, completions, **columns):
    return [float(len(x)) for x in completions]


@pytest.fixture
def tokenizer():
    return char_tokenizer()


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_group_of_one_is_refused_where_others_are_needed():
    one = replace(FEW, group_size=1)
    for objective in (PRESETS["grpo"], PRESETS["rloo"], replace(PRESETS["rlhf-ppo"], selection=Informative())):
        with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
            fit_objective(objective, one)
    for name in "rlhf-ppo", "reinforce++":
        assert fit_objective(PRESETS[name], one) == PRESETS[name]


# Devices and precisions


def test_every_run_gets_the_precision_and_the_device_it_asks_for(monkeypatch):
    for asked, got in [("bf16", "bf16"), (None, "no"), ("float32", "no"), ("bf16", "bf16")]:
        made = make_accelerator("cpu", asked)
        assert (made.mixed_precision, made.device.type) == (got, "cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as a launcher says it
    assert make_accelerator("auto").mixed_precision == "bf16"
    assert make_accelerator("auto", "float32").mixed_precision == "no"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu", "mps", 3])
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(device, tokenizer):
    if torch.cuda.is_available() and str(device).startswith("cuda"):
        pytest.skip("it is there")
    with pytest.raises(ValueError, match="device"):
        train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, TASK, by_length, "grpo", FEW, device=device,
                 progress=False)


@pytest.mark.parametrize("sharded", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_networks_in_pieces_are_refused_by_name(sharded, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{sharded}", "true")
    with pytest.raises(ValueError, match=rf"does not shard networks \({sharded}\).*adapters"):
        make_accelerator()


def test_precisions_that_a_device_does_not_have_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="precision must be bf16 or float32 on a CPU, got fp16"):
        make_accelerator("cpu", "fp16")
    with pytest.raises(ValueError, match="precision"):
        LMConfig(precision="fp8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda in several processes, got cpu:0"):
        make_accelerator("cpu:0")


@pytest.mark.cuda
def test_a_card_without_bfloat16_refuses_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="precision must be fp16 or float32 on this GPU"):
        make_accelerator("cuda", "bf16")


# Settings


def test_a_pretrained_model_gets_other_rates_than_a_tiny_one(tokenizer):
    large = tiny_lm(tokenizer, width=512, layers=4, heads=8)
    assert sum(p.numel() for p in large.parameters()) > 10_000_000
    assert default_lm_config("grpo", large) == LMConfig() and LMConfig().lr == 1e-6
    assert default_lm_config("grpo", adapted(base=large)).lr == 1e-5
    tiny = default_lm_config("grpo", tiny_lm(tokenizer, **SMALL))
    assert tiny == default_lm_config("grpo") == tiny_config() and tiny.lr == 1e-4
    assert (default_lm_config("rloo", large).epochs, default_lm_config("rloo", large).minibatches) == (1, 1)


# The caller's model


def test_gradients_that_were_there_do_not_enter_the_first_step(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    clean = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator())
    lengths = [train_lm(x, tokenizer, TASK, by_length, "grpo", FEW, **QUIET).log[0]["grad_norm"]
               for x in (model, clean)]
    assert lengths[0] == lengths[1] > 0 and torch.equal(flat(model), flat(clean))
    assert all(p.grad is None for p in model.parameters())


def test_without_any_reward_nothing_moves_after_fine_tuning(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    sft(model, tokenizer, TASK.prompts(50), [TASK.solution(q) for q in TASK.prompts(50)], 3)
    before = flat(model)
    run = train_lm(model, tokenizer, TASK, lambda **rows: [0.0] * len(rows["prompts"]), "dr-grpo", FEW, **QUIET)
    assert [row["grad_norm"] for row in run.log] == [0, 0] and torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_with_dropout_and_in_any_mode_the_ratio_begins_at_one(kind, recompute, tokenizer):
    model = dropping(kind)
    config = replace(FEW, recompute=recompute)
    row = train_lm(model, tokenizer, TASK, by_length, "grpo", config, **QUIET).log[0]
    assert abs(row["approx_kl"]) < 1e-6 and abs(row["kl"]) < 1e-6 and row["clip_fraction"] == 0
    assert all(m.training for m in model.modules())


def test_computed_anew_a_run_ends_with_the_same_weights(tokenizer):
    ends = []
    for recompute in (False, True):
        model = tiny_lm(tokenizer, **SMALL).double()
        train_lm(model, tokenizer, TASK, by_length, "grpo", replace(FEW, recompute=recompute), **QUIET)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)  # samples say their logs in float32


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_computes_layers_anew_if_it_was_asked_to(recompute, tokenizer):
    model, rows = tiny_lm(tokenizer, **SMALL), []
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda _, x: rows.append(len(x[0])) if torch.is_grad_enabled() else None
    )
    config = replace(FEW, steps=1, micro_batch=4, recompute=recompute)
    train_lm(model, tokenizer, TASK, by_length, "grpo", config, **QUIET)
    # Where caches are kept, the four prompts are read apart from the sixteen completions.
    assert rows == ([16, 16] if recompute else [4, 16])


def test_a_run_is_sampled_and_scored_by_the_law_that_was_asked(tokenizer):
    how = dict(eval_every=2, eval_prompts=8, eval_samples=4)
    config = replace(FEW, top_k=1, **how)
    greedy = train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, TASK, by_length, "dr-grpo", config, **QUIET)
    assert [row["dead_groups"] for row in greedy.log] == [1, 1]
    assert greedy.log[1]["pass@4"] == greedy.log[1]["success"]  # four times the same answer
    warm = replace(FEW, top_k=3, temperature=0.7)
    row = train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, TASK, by_length, "grpo", warm, **QUIET).log[0]
    assert abs(row["approx_kl"]) < 1e-6 and abs(row["kl"]) < 1e-6


def test_a_run_stops_completions_at_the_texts_it_was_given(tokenizer):
    config = replace(FEW, stop=("1", "2", "3"), prompts=8)
    texts = []

    def reward(prompts, completions, finished, **columns):
        texts.extend(zip(completions, finished))
        return by_length(prompts, completions)

    train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, TASK, reward, "grpo", config, **QUIET)
    assert all(not set(text[:-1]) & {*"123"} for text, _ in texts)
    ended = [text for text, finished in texts if finished and text[-1:] in ("1", "2", "3")]
    assert len(ended) > 10


def test_a_reward_is_told_which_step_it_is(tokenizer):
    seen = []

    def reward(prompts, completions, trainer_state, **columns):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        return by_length(prompts, completions)

    train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, TASK, reward, "grpo", FEW, **QUIET)
    assert seen == [(0, 2), (1, 2)]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["auto", torch.float32], ids=str)
def test_a_file_of_two_bytes_learns_as_one_of_four(half, dtype, tmp_path, tokenizer):
    save_lm(tmp_path / "lm", tiny_lm(tokenizer, **SMALL).to(half), tokenizer)
    model, its = load_lm(tmp_path / "lm", dtype=dtype)
    before, config = flat(model).double(), replace(FEW, steps=5, lr=1e-6)
    train_lm(model, its, TASK, by_length, "grpo", config, **QUIET)
    moves = (flat(model).double() - before).abs()
    assert model.dtype == torch.float32
    assert (moves > 0).double().mean() > 0.95
    assert moves.max() < 5 * 1e-6 * 1.1


def test_in_bfloat16_every_ratio_begins_at_one_and_weights_stay_float32(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    run = train_lm(model, tokenizer, TASK, by_length, "grpo", replace(FEW, precision="bf16", lr=1e-6), **QUIET)
    assert model.dtype == torch.float32
    assert abs(run.log[0]["approx_kl"]) < 1e-5 and run.log[0]["clip_fraction"] == 0


def test_where_everything_is_masked_nothing_is_learnt_and_no_mean_is_told(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(18), requires_grad=False)
    model.lm_head.bias[tokenizer.eos_token_id] = -torch.inf  # it never ends
    before = flat(model)
    row = train_lm(model, tokenizer, TASK, by_length, "grpo", replace(FEW, drop_truncated=True), **QUIET).log[0]
    assert row["truncated"] == 1 and row["grad_norm"] == 0 and torch.equal(flat(model), before)
    assert not {"kl", "approx_kl", "clip_fraction"} & row.keys()


def test_what_a_task_cannot_give_is_said_before_the_first_step(tokenizer):
    rows = [{"prompt": q, "answer": "1"} for q in ("1+1=", "1+2=") if not is_held_out(q)]
    seen = []
    how = dict(report=seen.append, **QUIET)
    with pytest.raises(ValueError, match="too few held-out problems: add rows"):
        train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, Problems(rows), by_length, "grpo",
                 replace(FEW, eval_every=2), **how)
    chat = Problems([{"prompt": [{"role": "user", "content": "1+1="}], "answer": 2}])
    with pytest.raises(ValueError, match="chat_template"):
        train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, chat, by_length, "grpo", FEW, **how)
    with pytest.raises(ValueError, match="the model's context is 32"):
        train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, TASK, by_length, "grpo",
                 replace(FEW, max_new_tokens=30), **how)
    assert not seen


# Adapters


def test_only_adapters_learn_and_what_they_are_added_to_is_the_reference(tmp_path, tokenizer):
    save_lm(tmp_path / "base", tiny_lm(tokenizer, **SMALL), tokenizer)
    model = adapted(base=load_lm(tmp_path / "base")[0], zero=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = replace(FEW, lr=1e-2, checkpoint_every=1)
    run = train_lm(model, tokenizer, TASK, by_length, "grpo", config, out=tmp_path / "run", **QUIET)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name}
    assert abs(run.log[0]["kl"]) < 1e-6 < run.log[1]["kl"]
    saved = torch.load(next((tmp_path / "run").glob("checkpoint-*")) / "pytorch_model.bin", weights_only=True)
    assert saved and all("lora" in name for name in saved)
    again, _ = load_lm(tmp_path / "run" / "model")
    assert is_peft(again) and torch.equal(flat(again), flat(model))


def test_a_run_of_adapters_goes_on_as_if_it_had_not_been_stopped(tmp_path, tokenizer):
    config, ends = replace(FEW, steps=4, checkpoint_every=1, lr=1e-2), []
    whole = adapted(zero=True)
    train_lm(whole, tokenizer, TASK, by_length, "grpo", config, **QUIET)
    how = dict(out=tmp_path, **QUIET)
    train_lm(adapted(zero=True), tokenizer, TASK, by_length, "grpo", config, report=lambda row: row["step"] < 2, **how)
    again = adapted(zero=True)
    run = train_lm(again, tokenizer, TASK, by_length, "grpo", config, resume=True, **how)
    assert [row["step"] for row in run.log] == [1, 2, 3, 4]
    assert torch.equal(flat(again), flat(whole)) and not ends


def test_ppo_with_adapters_has_a_critic_of_its_own(tokenizer):
    model = adapted(zero=True)
    run = train_lm(model, tokenizer, TASK, by_length, "rlhf-ppo", replace(FEW, lr=1e-3), **QUIET)
    assert run.log[1]["value_loss"] > 0 and abs(run.log[0]["kl"]) < 1e-6


def test_a_reference_that_is_the_model_itself_cannot_be_reset(tokenizer):
    with pytest.raises(ValueError, match="reset_every must be 0 with adapters"):
        train_lm(adapted(zero=True), tokenizer, TASK, by_length, RESET, FEW, **QUIET)


def test_a_run_that_begins_with_adapters_is_measured_from_them_and_may_reset(tokenizer):
    config = replace(FEW, steps=3, lr=1e-2)
    log = train_lm(adapted(), tokenizer, TASK, by_length, RESET, config, **QUIET).log
    assert abs(log[0]["kl"]) < 1e-6 < log[1]["kl"] and abs(log[2]["kl"]) < 1e-6


# Other tokenizers, other settings of generate


def test_tokens_that_nobody_can_read_are_neither_drawn_nor_counted(tokenizer):
    torch.manual_seed(0)
    model = MODELS["gpt2"]()
    model.resize_token_embeddings(64)
    drawn = sample(model, tokenizer, ["1+2="] * 4, 8, 16, generator=generator())
    assert drawn.ids.max() < len(tokenizer)
    run = train_lm(model, tokenizer, TASK, by_length, "grpo", FEW, **QUIET)
    assert abs(run.log[0]["approx_kl"]) < 1e-6
    assert run.config.vocabulary == len(tokenizer) == 18


@pytest.mark.parametrize("kind", ["llama", *MODELS])
def test_every_kind_of_model_learns_and_is_saved(kind, tmp_path):
    save_tiny(kind, tmp_path / "start")
    model, tokenizer = load_lm(tmp_path / "start")
    before = flat(model)
    run = train_lm(model, tokenizer, TASK, by_length, "grpo", FEW, out=tmp_path / "run", **QUIET)
    assert abs(run.log[0]["approx_kl"]) < 1e-6 and not torch.equal(flat(model), before)
    assert torch.equal(flat(load_lm(tmp_path / "run" / "model")[0]), flat(model))


def test_settings_of_generate_that_cannot_be_written_do_not_lose_a_run(tmp_path, tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = False, 0.6, 1.3
    before = flat(model)
    train_lm(model, tokenizer, TASK, by_length, "grpo", FEW, out=tmp_path, **QUIET)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written["repetition_penalty"] == 1.3 and written.get("temperature") is None
    assert settings.temperature == 0.6 and not torch.equal(flat(model), before)


# Randomness and checkpoints


def learner_of(seed: int, config: LMConfig = FEW):
    model = tiny_lm(char_tokenizer(), **SMALL, seed=seed)
    return new_lm_learner(model, char_tokenizer(), TASK, None, PRESETS["grpo"], config, seed, "cpu")


def test_samples_and_minibatches_have_random_numbers_of_their_own():
    learner = learner_of(5)
    assert learner.generator.initial_seed() == spawn_seed(5, "actions", 0)
    assert learner.order.initial_seed() == spawn_seed(5, "minibatches", 0)


def test_a_checkpoint_holds_what_is_needed_and_replaces_the_one_before(tmp_path):
    one, other = learner_of(0), learner_of(1)
    one.asked = 7
    for steps in (1, 2):
        save_learner(one, [{"step": i + 1} for i in range(steps)], tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == ["checkpoint-00000002"]
    assert restore_learner(other, tmp_path) == [{"step": 1}, {"step": 2}]
    assert other.asked == 7 and torch.equal(flat(one.policy), flat(other.policy))
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    assert torch.equal(one.order.get_state(), other.order.get_state())
    assert not torch.equal(flat(one.reference), flat(other.reference))


def test_a_reference_that_was_reset_comes_back(tmp_path):
    one, other = learner_of(0), learner_of(1)
    save_learner(one, [], tmp_path, reset=True)
    restore_learner(other, tmp_path)
    assert torch.equal(flat(one.reference), flat(other.reference))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_learner(learner_of(0), [], tmp_path)
    for shape in (dict(width=24), dict(layers=1), dict(layers=3)):
        model = tiny_lm(char_tokenizer(), **SMALL | shape)
        other = new_lm_learner(model, char_tokenizer(), TASK, None, PRESETS["grpo"], FEW, 0, "cpu")
        with pytest.raises(ValueError, match="damaged, or of another model"):
            restore_learner(other, tmp_path)


def test_a_checkpoint_of_two_processes_is_not_one_of_one(tmp_path):
    save_learner(learner_of(0), [], tmp_path)
    done = tmp_path / "checkpoint-00000000"
    (done / "process-1.pt").write_bytes((done / "process-0.pt").read_bytes())
    with pytest.raises(ValueError, match="is of 2 processes, this run has 1"):
        restore_learner(learner_of(0), tmp_path)


# Reports


def test_a_report_that_returns_false_ends_the_run_with_everything_saved(tmp_path, tokenizer):
    seen = []

    def report(row):
        seen.append(row["step"])
        return len(seen) < 3

    config = replace(FEW, steps=9)
    model = tiny_lm(tokenizer, **SMALL)
    run = train_lm(model, tokenizer, TASK, by_length, "grpo", config, out=tmp_path, report=report, **QUIET)
    assert seen == [1, 2, 3] == [row["step"] for row in run.log]
    assert torch.equal(flat(load_lm(tmp_path / "model")[0]), flat(model))
    assert [x.name for x in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000003"]
    assert len(Path(tmp_path, "log.csv").read_text().splitlines()) == 4


def test_a_report_that_returns_nothing_goes_on(tokenizer):
    run = train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, TASK, by_length, "grpo", FEW, report=lambda row: None, **QUIET)
    assert len(run.log) == FEW.steps


def test_the_accelerator_of_somebody_else_is_left_alone_where_it_fits(tokenizer):
    theirs = Accelerator(cpu=True)
    train_lm(tiny_lm(tokenizer, **SMALL), tokenizer, TASK, by_length, "grpo", FEW, **QUIET)
    assert theirs.device.type == "cpu" and theirs.mixed_precision == "no"
