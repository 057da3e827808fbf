"Samples from a server: its law, its log-probabilities, whole runs, failures, bad answers."
import copy
import json
import math
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import SMALL, scored
from tiny_server import TinyServer

from po_book import train_lm as module
from po_book.language_model import char_tokenizer, enumerate_completions, pack, tiny_lm, toy_lm
from po_book.lm_learner import tiny_config
from po_book.objective import PRESETS
from po_book.samplers import Request, ask_sampler
from po_book.sampling import join, sample
from po_book.servers import ServerSampler
from po_book.tasks import ChainAddition
from po_book.terms import Banded, NoCorrection, Truncated
from po_book.train_lm import train_lm

PROMPTS = ["3+8+5=", "9=", "1+1+1+1="]
QUICK = dict(tries=2, pause=0.0)


def shaken(model, seed=0, scale=0.1):
    "The model with weights large enough to have opinions."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def learner(tokenizer):
    return shaken(tiny_lm(tokenizer, **SMALL))


@pytest.fixture
def server(learner, tokenizer):
    made = TinyServer(copy.deepcopy(learner), tokenizer)
    yield made
    made.stop()


def sampler(server, **settings):
    return ServerSampler(server.url, "tiny", **QUICK | settings)


# Samples


@pytest.mark.parametrize("law", [{}, {"temperature": 0.7}, {"top_k": 5, "top_p": 0.8}, {"min_p": 0.3}])
def test_log_probabilities_are_those_of_the_law(server, learner, tokenizer, law):
    there = sampler(server, processed=True)
    drawn = ask_sampler(there, learner, tokenizer, PROMPTS, Request(4, 12, **law, seed=5))
    with torch.no_grad():
        torch.testing.assert_close(drawn.logps, scored(learner, drawn, **law), rtol=0, atol=1e-5)
    assert not drawn.logps[~drawn.mask].any()
    assert drawn.finished.tolist() == [
        row[mask][-1].item() == tokenizer.eos_token_id for row, mask in zip(drawn.ids, drawn.mask)
    ]


def test_groups_stand_beside_their_prompts(server, learner, tokenizer):
    drawn = ask_sampler(sampler(server), learner, tokenizer, PROMPTS, Request(3, 8))
    before = [row[real & ~mask].tolist()
              for row, real, mask in zip(drawn.ids, drawn.attention_mask, drawn.mask)]
    assert before == [tokenizer(p).input_ids for p in PROMPTS for _ in range(3)]


def test_completions_come_as_often_as_their_probability_says():
    model, letters = toy_lm(seed=3)
    server = TinyServer(copy.deepcopy(model), letters)
    n, prompts = 500, [[4]] * 20
    drawn = ask_sampler(sampler(server), model, letters, prompts, Request(n, 3, seed=1))
    server.stop()
    every = enumerate_completions(letters("ab").input_ids, stop=1, max_new_tokens=3)
    with torch.no_grad():
        p = scored(model, pack([[4]] * len(every), every, 0)).sum(-1).exp()
    counts = {tuple(o): 0 for o in every}
    for row, mask in zip(drawn.ids, drawn.mask):
        counts[tuple(row[mask].tolist())] += 1
    frequencies = torch.tensor(list(counts.values())) / (n * len(prompts))
    error = (p * (1 - p) / (n * len(prompts))).sqrt()
    assert ((frequencies - p).abs() < 4.5 * error + 1e-4).all()


def test_equal_prompts_of_one_call_get_other_texts_and_a_seed_repeats(server, learner, tokenizer):
    there = sampler(server)
    a, b, c = (
        ask_sampler(there, learner, tokenizer, ["9="] * 4, Request(4, 12, seed=s)).ids
        for s in (0, 0, 1)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len({tuple(row) for row in a.tolist()}) > 12


def test_all_settings_are_said(server, learner, tokenizer):
    there = sampler(server, processed=True, api_key="secret")
    request = Request(2, 7, 0.5, 4, 0.9, 0.1, ("1,",), seed=11)
    ask_sampler(there, learner, tokenizer, ["9=", "9="], request)
    asked = sorted((body for _, body, _ in server.asked), key=lambda body: body["seed"])
    assert [body["seed"] for body in asked] == [11, 13]
    want = dict(
        model="tiny", prompt=tokenizer("9=").input_ids, n=2, max_tokens=7, temperature=0.5,
        top_k=4, top_p=0.9, min_p=0.1, stop=["1,"], logprobs=1, return_token_ids=True,
        include_stop_str_in_output=True, no_stop_trim=True, repetition_penalty=1.0,
        presence_penalty=0.0, frequency_penalty=0.0, skip_special_tokens=False, seed=11,
    )
    assert asked[0] == want
    assert {key for *_, key in server.asked} == {"Bearer secret"}
    ask_sampler(there, learner, tokenizer, ["9="], Request(2, 6))
    body = server.asked[-1][1]
    assert (body["top_k"], body["top_p"], body["min_p"]) == (-1, 1.0, 0.0)


def test_requests_are_on_their_way_together(server, learner, tokenizer):
    "All of a batch arrive before the first is answered."
    arrived, all_here = [], threading.Event()
    answer = server.answer

    def waiting(*asked):
        arrived.append(asked)
        if len(arrived) == 3:
            all_here.set()
        assert all_here.wait(30)
        return answer(*asked)

    server.answer = waiting
    ask_sampler(sampler(server), learner, tokenizer, PROMPTS, Request(1, 2))
    assert len(arrived) == 3


# Weights


@pytest.mark.parametrize("words", ["sglang", "vllm"])
def test_the_server_gets_the_weights(server, learner, tokenizer, tmp_path, words):
    there = sampler(server, reload=words, folder=tmp_path / "new" / "folder")
    for seed in 1, 2:
        shaken(learner, seed)
        there.load(learner)
        drawn = ask_sampler(there, learner, tokenizer, PROMPTS, Request(4, 12))
        with torch.no_grad():
            torch.testing.assert_close(drawn.logps, scored(learner, drawn), rtol=0, atol=1e-5)
    paths = [body.get("model_path") or body["kwargs"]["weights_path"]
             for path, body, _ in server.asked if path in ("/update_weights_from_disk", "/collective_rpc")]
    assert len(set(paths)) == 2  # a server may remember a name
    assert [str(x) for x in (tmp_path / "new" / "folder").iterdir()] == paths[1:]
    if words == "vllm":
        assert [path for path, *_ in server.asked].count("/reset_prefix_cache") == 2


def test_a_hook_gets_the_folder(server, learner, tmp_path):
    seen = []
    there = sampler(server, reload=lambda folder: seen.append((folder, sorted(x.name for x in folder.iterdir()))), folder=tmp_path)
    there.load(learner)
    assert seen[0][0].parent == tmp_path and "model.safetensors" in seen[0][1]
    assert not server.asked


def test_settings_of_generate_that_would_be_refused_do_no_harm(server, learner, tmp_path):
    learner.generation_config.temperature = 0.5  # without do_sample it is not saved
    settings = learner.generation_config
    sampler(server, reload="sglang", folder=tmp_path).load(learner)
    assert learner.generation_config is settings and settings.temperature == 0.5


def test_without_reload_nothing_is_written(server, learner, tmp_path):
    sampler(server, folder=tmp_path).load(learner)
    assert not server.asked and not [*tmp_path.iterdir()]


def test_a_server_that_cannot_load_says_why(server, learner, tmp_path):
    there = sampler(server, reload="sglang", folder=tmp_path)
    server.load = lambda folder: (200, b'{"success": false, "message": "no room"}')
    with pytest.raises(ValueError, match="weights must be such that .* loads them, .*no room"):
        there.load(learner)


def test_adapters_are_refused(server, learner, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(learner, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="model must be without adapters"):
        sampler(server, reload="sglang", folder=tmp_path).load(adapted)


# Failures


@pytest.mark.parametrize("failure", [None, 500, 503, 429])
def test_a_failure_is_tried_again(server, learner, tokenizer, failure):
    server.failures = [failure, failure]
    there = sampler(server, tries=3)
    request = Request(2, 6, seed=3)
    got = ask_sampler(there, learner, tokenizer, ["9="], request)
    assert len(server.asked) == 3
    assert torch.equal(got.ids, ask_sampler(there, learner, tokenizer, ["9="], request).ids)


@pytest.mark.parametrize("failure, why", [(None, "ConnectionError"), (503, "status 503: not now")])
def test_at_last_the_error_says_where_and_what_to_do(server, learner, tokenizer, failure, why):
    server.failures = [failure] * 9
    with pytest.raises(ConnectionError, match=f"{server.url}/v1/completions has not answered in 4 tries .{why}.*resume=True"):
        ask_sampler(sampler(server, tries=4), learner, tokenizer, ["9="], Request(2, 6))
    assert len(server.asked) == 4


def test_pauses_double(server, learner, tokenizer, monkeypatch):
    pauses = []
    monkeypatch.setattr("po_book.servers.sleep", pauses.append)
    server.failures = [500] * 9
    with pytest.raises(ConnectionError):
        ask_sampler(sampler(server, tries=5, pause=0.5), learner, tokenizer, ["9="], Request(2, 6))
    assert pauses == [0, 0.5, 1.0, 2.0, 4.0]


def test_a_server_that_is_not_there(learner, tokenizer):
    there = ServerSampler("http://127.0.0.1:9", "tiny", **QUICK)
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9/v1/completions has not answered in 2 tries"):
        ask_sampler(there, learner, tokenizer, ["9="], Request(2, 6))


def test_a_slow_answer_is_a_failure(server, learner, tokenizer):
    wait = threading.Event()
    server.prepare = lambda path, body: wait.wait(5)
    with pytest.raises(ConnectionError, match="ReadTimeout|Timeout"):
        ask_sampler(sampler(server, tries=1, timeout=0.2), learner, tokenizer, ["9="], Request(2, 6))
    wait.set()


def test_a_refusal_is_not_tried_again(server, learner, tokenizer):
    there = ServerSampler(server.url, "another", **QUICK)
    with pytest.raises(ValueError, match="refuses what it is asked, status 404: The model does not exist"):
        ask_sampler(there, learner, tokenizer, ["9="], Request(2, 6))
    assert len(server.asked) == 1


# Bad answers


def drop(name):
    return lambda choices: [choice.pop(name) for choice in choices]


def put(**changes):
    return lambda choices: choices[0].update(changes)


BAD = {
    "token_ids of http.* must be of a vLLM or an SGLang": drop("token_ids"),
    "token_logprobs of http.* must give log-probabilities, got None": drop("logprobs"),
    "finish_reason of http.* must be stop or length, got 'abort'": put(finish_reason="abort"),
    "choices of http.* must be 2, got 1": lambda choices: choices.pop(),
    r"completions\[0\].logps must be as many as its 2 tokens, got 1": put(token_ids=[3, 1], logprobs={"token_logprobs": [-1.0]}),
    r"completions\[0\].ids must be tokens of the tokenizer, 0 to 17, got 18": put(token_ids=[18, 1], logprobs={"token_logprobs": [-1.0, -1.0]}),
    r"completions\[0\].logps must be finite and not positive, got 0.5": put(token_ids=[3, 1], logprobs={"token_logprobs": [0.5, -1.0]}),
    r"completions\[0\].logps must be finite and not positive, got None": put(token_ids=[3, 1], logprobs={"token_logprobs": [None, -1.0]}),
    r"completions\[0\].logps must be finite and not positive, got nan": put(token_ids=[3, 1], logprobs={"token_logprobs": [math.nan, -1.0]}),
    r"completions\[0\] must be of 1 to 6 tokens, got 0": put(token_ids=[], logprobs={"token_logprobs": []}),
    r"completions\[0\] must be of 1 to 6 tokens, got 7": put(token_ids=[3] * 7, logprobs={"token_logprobs": [-1.0] * 7}),
    r"completions\[0\], which is finished, must be with one of the end tokens": put(token_ids=[3], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"),
}


@pytest.mark.parametrize("message", BAD)
def test_malformed_answers_are_named(server, learner, tokenizer, message):
    server.change = BAD[message]
    with pytest.raises(ValueError, match=message.replace("must give", ".*must give")):
        ask_sampler(sampler(server), learner, tokenizer, ["9="], Request(2, 6))


@pytest.mark.parametrize("text", [b"<html>", b"[]", b'{"error": "x"}', b""])
def test_what_is_no_answer_is_refused(server, learner, tokenizer, text):
    server.completions = lambda body: (200, text)
    with pytest.raises(ValueError, match="must answer in JSON, got|must give choices, got"):
        ask_sampler(sampler(server), learner, tokenizer, ["9="], Request(2, 6))


@pytest.mark.parametrize("law", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_law_that_a_server_may_not_report_is_refused(server, learner, tokenizer, law):
    with pytest.raises(ValueError, match="processed must be true .*processed_logprobs"):
        ask_sampler(sampler(server), learner, tokenizer, ["9="], Request(2, 6, **law))
    assert not server.asked


def test_bad_settings_are_refused(tmp_path):
    make = lambda **x: ServerSampler("http://localhost", "tiny", **x)  # noqa: E731
    for settings, message in (
        ({"tries": 0}, "tries must be at least 1, got 0"),
        ({"pause": -1.0}, "pause must be at least 0, got -1.0"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"at_once": 0}, "at_once must be at least 1, got 0"),
        ({"reload": "tgi", "folder": tmp_path}, "reload must be one of sglang, vllm, got 'tgi'"),
        ({"reload": "vllm"}, "folder must be one that the server reads too, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**settings)
    for url in "localhost:8000", 8000:
        with pytest.raises(ValueError, match="url must be an address with http:// or https://, got"):
            ServerSampler(url, "tiny")


@pytest.mark.parametrize("tail", ["/", "/v1", "/v1/"])
def test_an_address_may_have_its_usual_end(server, learner, tokenizer, tail):
    there = ServerSampler(server.url + tail, "tiny", **QUICK)
    assert len(ask_sampler(there, learner, tokenizer, ["9="], Request(2, 6)).ids) == 2


# Whole runs

TASK = ChainAddition(2, 3)
CONFIG = tiny_config(
    steps=3, prompts=4, group_size=4, max_new_tokens=6, warmup=0, lr=1e-3, epochs=1,
    minibatches=1, anneal=False, checkpoint_every=1,
)


def count_ones(prompts, completions, **columns):
    return [text.count("1") + 0.1 * text.count("2") for text in completions]


def small(seed=0):
    return tiny_lm(char_tokenizer(), width=32, layers=2, heads=2, context=32, seed=seed)


def run(there, config=CONFIG, start=None, objective="grpo", **settings):
    how = {"progress": False, "device": "cpu", "sampler": there} | settings
    start = small() if start is None else start
    return train_lm(start, char_tokenizer(), TASK, count_ones, objective, config, **how)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def small_server():
    made = TinyServer(small(seed=9), char_tokenizer())  # others than the learner's
    yield made
    made.stop()


def test_a_run_is_that_of_the_same_samples_without_a_server(small_server, tmp_path, monkeypatch):
    through = run(sampler(small_server, reload="sglang", folder=tmp_path))

    def same(model, tokenizer, prompts, group_size, *room, generator, at_once, **law):
        "The texts that the server writes, by the learner itself."
        seed = torch.randint(2**31, (), generator=generator).item()
        parts = [
            sample(model, tokenizer, [prompt], group_size, *room, **law,
                   generator=torch.Generator().manual_seed(seed + i * group_size))
            for i, prompt in enumerate(prompts)
        ]
        return join(parts, tokenizer.pad_token_id)

    monkeypatch.setattr(module, "sample", same)
    direct = run(None)
    torch.testing.assert_close(weights(through.model), weights(direct.model), rtol=0, atol=1e-5)
    for mine, theirs in zip(through.log, direct.log):
        for name in set(theirs) - {"seconds", "sampling", "tokens_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
        assert set(mine) - set(theirs) == {"mismatch", "mismatch_kl", "mismatch_ratio"}
        assert mine["mismatch"] < 1e-5 and mine["mismatch_ratio"] == pytest.approx(1, abs=1e-5)
    reloads = [path for path, *_ in small_server.asked].count("/update_weights_from_disk")
    assert reloads == 3
    seeds = [body["seed"] for _, body, _ in small_server.asked if "seed" in body]
    assert len(set(seeds)) == 12


def test_a_run_through_a_server_learns(small_server, tmp_path):
    config = tiny_config(
        steps=30, prompts=8, group_size=8, max_new_tokens=6, warmup=0, lr=3e-3, epochs=1,
        minibatches=1, anneal=False,
    )
    done = run(sampler(small_server, reload="sglang", folder=tmp_path), config)
    rewards = [row["reward"] for row in done.log]
    assert sum(rewards[-5:]) / 5 > 3 * sum(rewards[:5]) / 5


def test_a_stale_server_shows_in_the_log(small_server):
    small_server.model = shaken(small(), scale=0.05)
    row = run(sampler(small_server)).log[0]
    assert 0.01 < row["mismatch"] < 1 and row["mismatch_kl"] > 1e-4 and row["mismatch_ratio"] > 1.05


@pytest.mark.parametrize("correction", [Truncated(), Banded(), Truncated(whole=True)])
def test_a_correction_is_one_where_the_server_is_the_learner(small_server, tmp_path, correction):
    there = sampler(small_server, reload="sglang", folder=tmp_path)
    plain, corrected = (
        run(there, objective=replace(PRESETS["grpo"], correction=x)).model
        for x in (NoCorrection(), correction)
    )
    apart = (weights(plain) - weights(corrected)).abs()
    # Where a gradient is zero but for rounding, Adam makes a step of the rounding.
    assert apart.quantile(0.999) < 1e-6 and apart.max() < CONFIG.lr / 10


def test_a_correction_weighs_the_samples_of_a_stale_server(small_server):
    "A band that holds no ratio but one leaves nothing to learn from."
    small_server.model = shaken(small(), scale=0.05)
    there, start = sampler(small_server), small()
    before = weights(start).clone()
    narrow = replace(PRESETS["dr-grpo"], correction=Banded(1.0, 1.0))
    assert torch.equal(weights(run(there, start=start, objective=narrow).model), before)


def test_a_server_that_dies_ends_the_run_and_it_goes_on_when_it_is_back(small_server, tmp_path):
    out, there = tmp_path / "run", sampler(small_server, reload="sglang", folder=tmp_path)
    whole = run(sampler(small_server, reload="sglang", folder=tmp_path))
    steps = []

    def die(path, body):
        "In the middle of the third step."
        steps.append(path)
        if steps.count("/update_weights_from_disk") == 3 and path == "/v1/completions":
            small_server.failures = [None] * 99

    small_server.prepare = die
    with pytest.raises(ConnectionError, match=small_server.url) as caught:
        run(there, out=out)
    assert f"stopped after 2 steps; its last checkpoint is in {out}" in caught.value.__notes__
    assert [x.name for x in out.glob("checkpoint-*")] == ["checkpoint-00000002"]
    small_server.failures, small_server.prepare = [], lambda path, body: None
    small_server.stop()
    small_server.start()
    resumed = run(there, out=out, resume=True)
    assert len(resumed.log) == 3
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=1e-6)


def test_one_failure_in_the_middle_changes_nothing(small_server, tmp_path):
    there = sampler(small_server, reload="sglang", folder=tmp_path)
    whole = run(there)
    count = iter(range(100))
    small_server.prepare = lambda path, body: (
        next(count) in (2, 9) and small_server.failures.append(None)
    )
    again = run(there)
    torch.testing.assert_close(weights(again.model), weights(whole.model), rtol=0, atol=1e-6)


def test_a_server_of_another_tokenizer_is_refused(small_server, tmp_path):
    "It has the learner's weights, and its tokens are in another order."
    order = torch.randperm(18, generator=torch.Generator().manual_seed(3))

    def renamed(choices):
        for choice in choices:
            choice["token_ids"] = [int(order[t]) for t in choice["token_ids"]]
            choice["finish_reason"] = "length"

    small_server.change = renamed
    start = shaken(small(), scale=0.2)
    there = sampler(small_server, reload="sglang", folder=tmp_path)
    with pytest.raises(ValueError, match="logp_sampler must be within 1 nats .*another tokenizer"):
        run(there, start=start)


def test_another_sampler_is_written_down_and_asked_for_again(small_server, tmp_path):
    out, folder = tmp_path / "run", tmp_path
    there = sampler(small_server, reload="sglang", folder=folder)
    run(there, out=out)
    assert json.loads((out / "run.json").read_text())["sampler"] == "ServerSampler"
    with pytest.raises(ValueError, match="sampler must be 'ServerSampler' as .* says, got 'None'|got None"):
        run(None, out=out, resume=True)


def test_what_is_no_sampler_is_refused():
    for bad in 3, lambda prompts, request: [], SimpleNamespace(load=print):
        with pytest.raises(ValueError, match="sampler must be None, or callable with a method load"):
            run(bad)


def test_where_the_learner_scores_again_the_log_says_how_far_it_is():
    cut = run(None, tiny_config(**vars_of(CONFIG) | {"top_p": 0.5})).log[0]
    assert 0.3 < cut["mismatch"] < 1.2 and cut["mismatch_ratio"] <= 1.0
    assert "mismatch" not in run(None).log[0]
    rounded = run(None, tiny_config(**vars_of(CONFIG) | {"precision": "bf16"})).log[0]
    assert 0 < rounded["mismatch"] < 0.05


SHARED = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, test_servers as t

torch.set_num_threads(1)
first = os.environ["RANK"] == "0"
there = t.ServerSampler({url!r}, "tiny", reload="sglang" if first else None, folder={folder!r})
done = t.run(there)
print("largest %r\\n" % max(row["mismatch"] for row in done.log), end="", flush=True)
"""


def test_two_processes_share_a_server(small_server, tmp_path):
    "One gives it weights, both wait for that, and each asks with its own seeds."
    here = str(Path(__file__).parent)
    script = tmp_path / "shared.py"
    script.write_text(SHARED.format(tests=here, url=small_server.url, folder=str(tmp_path / "w")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    mismatches = [float(x) for x in re.findall(r"largest (\S+)", done.stdout)]
    assert len(mismatches) == 2 and max(mismatches) < 1e-5  # so the weights were the new ones
    paths = [path for path, *_ in small_server.asked]
    assert paths == (["/update_weights_from_disk"] + ["/v1/completions"] * 8) * 3
    seeds = [body["seed"] for _, body, _ in small_server.asked if "seed" in body]
    assert len(set(seeds)) == 24


def vars_of(config):
    return {name: x for name, x in vars(config).items() if name != "vocabulary"}
