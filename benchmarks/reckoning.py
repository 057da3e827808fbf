"""What a GRPO step of a causal model should need, from its shape: bytes and seconds.

A number is exact where it is a count (weights, gradients, moments, the cache), counted on
the CPU where autograd decides (what a token leaves for the backward pass), and assumed
where a card decides: what CUDA takes for itself, and how much of its peak a card reaches.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

from po_book.language_model import token_logprobs
from po_book.lm_learner import Precision
from po_book.pretrained import float32_masters, learning

GIB = 2**30
MAX_LOGITS = 2**26  # that `token_logprobs` holds at a time
RANK = 16           # of adapters, on all linear layers
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    "Of a Qwen2 with tied embeddings; as it stands, that of Qwen2.5-0.5B."

    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocabulary: int = 151_936

    @property
    def config(self) -> Qwen2Config:
        return Qwen2Config(
            hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate, vocab_size=self.vocabulary,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip

    @property
    def table(self) -> int:
        "Numbers of the embeddings, which are the head as well."
        return self.vocabulary * self.hidden

    @property
    def kv_width(self) -> int:
        "Numbers of a token that a layer keeps to be attended to."
        return 2 * self.kv_heads * self.hidden // self.heads


@dataclass(frozen=True)
class Job:
    "A step of GRPO without a reference, one gradient step a batch."

    shape: Shape = Shape()
    prompts: int = 8
    group: int = 8           # completions of each
    prompt: int = 100        # tokens of a prompt
    new: int = 128           # tokens of a completion
    micro_tokens: int = 2048  # of a pass
    precision: Precision = "float32"  # of products
    lora: bool = False       # only adapters learn; what they are added to has that precision
    recompute: bool = False  # layers keep their input only

    @property
    def name(self) -> str:
        words = "LoRA" if self.lora else "all weights", self.precision
        return ", ".join([*words, *["recompute"] * self.recompute])

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def read(self) -> int:
        "Tokens that the learner reads: layers computed anew read a prompt in every row."
        each = self.rows if self.recompute else self.prompts
        return each * self.prompt + self.rows * self.new

    @property
    def part(self) -> float:
        "Share of the batch that goes through the model at once, padding counted."
        return min(1.0, self.micro_tokens / (self.rows * (self.prompt + self.new)))


def build(shape: Shape, precision: Precision = "float32", lora: bool = False, device: str = "cpu"):
    "A model with random weights: all of them learn, or adapters do."
    torch.manual_seed(0)
    store = DTYPES[precision] if lora else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=store).eval()
    if lora:
        where = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, where)
    return float32_masters(model)


@cache
def counted(shape: Shape, lora: bool) -> tuple[int, int]:
    "All weights, and those that learn."
    model = build(shape, lora=lora, device="meta")
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)


def _kept(model, rows: int, tokens: int, autocast: bool) -> int:
    "Bytes that a backward pass keeps."
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids, real = torch.ones(2, rows, tokens, dtype=torch.long)
    mask = torch.arange(tokens).expand(rows, -1) > 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            alive = token_logprobs(model, ids, mask, attention_mask=real.bool())
    assert alive.requires_grad  # while it lives, no address is used twice
    return sum(kept.values())


@cache
def kept_a_token(shape: Shape, half: bool, lora: bool, recompute: bool) -> tuple[float, float]:
    "Bytes that the first layer with all around it keeps of a token, and any further one."
    tokens, found = 17, []  # sixteen to score a row: 64 and 128, of which none are padding
    for layers in 1, 2:
        precision = "bf16" if half else "float32"
        model = build(replace(shape, layers=layers, vocabulary=64), precision, lora)
        with learning(model, recompute):
            few, many = (_kept(model, rows, tokens, half) for rows in (4, 8))
        found.append((many - few) / (4 * tokens))
    return found[0], found[1] - found[0]


def memory(job: Job, context: float = 0.5) -> dict[str, float]:
    """GiB by what holds them; `context` GiB are what CUDA takes for itself.

    `all` is the fuller of two moments: a backward pass, and the last token sampled.
    """
    half, shape = job.precision != "float32", job.shape
    whole, learns = counted(shape, job.lora)
    store, number = (2 if half and job.lora else 4), (2 if half else 4)
    first, further = kept_a_token(shape, half, job.lora, job.recompute)
    _, layer = kept_a_token(shape, half, job.lora, False)
    read, scored = job.part * job.read, job.part * job.rows * job.new
    parts = {
        "weights": store * (whole - learns) + 4 * learns,
        "moments": 8 * learns,
        "gradients": 4 * learns,
        # The table's gradient comes from its use as a head and from its use as a table.
        "second gradient of the table": 0 if job.lora else 4 * shape.table,
        "weights in two bytes": 2 * whole if half and not job.lora else 0,
        "activations": read * (first + (shape.layers - 1) * further),
        # They, their exponentials and their gradient; or a layer that is computed anew.
        "logits": max(
            (12 + 4 * half) * min(MAX_LOGITS, scored * shape.vocabulary), read * layer
        ),
        "cache": number * shape.kv_width * shape.layers * job.rows * (job.prompt + job.new),
        "logits of a token": 4 * 4 * job.rows * shape.vocabulary,
        "context": context * GIB,
    }
    sampling = "cache", "logits of a token"
    always = "weights", "moments", "context"
    learning = [name for name in parts if name not in (*sampling, *always)]
    fuller = max(sum(parts[name] for name in names) for names in (sampling, learning))
    parts["all"] = fuller + sum(parts[name] for name in always)
    return {name: x / GIB for name, x in parts.items()}


@dataclass(frozen=True)
class Card:
    "What a card can do; as it stands, a T4."

    flops: float = 8.1e12       # in float32
    half_flops: float = 65e12   # in float16
    bandwidth: float = 320e9    # bytes a second
    memory: float = 14.7        # GiB that can be used
    reached: float = 0.3        # assumed: share of the peaks
    layer: float = 1.5e-3       # assumed: seconds to start the kernels of a layer


def seconds(job: Job, card: Card = Card()) -> tuple[float, float]:
    "Of sampling, and of all that is learnt from it."
    half = job.precision != "float32"
    whole, _ = counted(job.shape, job.lora)
    rate = card.reached * (card.half_flops if half else card.flops)
    # Masters of four bytes are read, written in two and read again for every token.
    moved = whole * ((2 if job.lora else 8) if half else 4)
    token = job.shape.layers * card.layer + moved / (card.reached * card.bandwidth)
    drawn = job.prompts * job.prompt + job.rows * job.new
    sampling = job.new * token + 2 * whole * drawn / rate
    # Forward 2; backward 2 for what a layer is given and 2 for its weights.
    passes = 4 if job.lora else 6
    passes += 2 * job.recompute + 2 * half  # in two bytes samples are scored once more
    return sampling, passes * whole * job.read / rate
