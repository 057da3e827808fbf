"Tiny models of several kinds, and how their rows are scored."
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from po_book.language_model import char_tokenizer, tiny_lm, token_logprobs

SMALL = dict(width=32, layers=2, heads=2, context=32)
PROMPTS = ["3+8+5=", "9=", "1+1+1+1="]
COMMON = dict(vocab_size=18, eos_token_id=1, bos_token_id=None, pad_token_id=None)
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, **SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**COMMON, **SIZES, head_dim=16, sliding_window=4, final_logit_softcapping=8.0)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**COMMON, **SIZES, logit_scale=3.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**COMMON, **SIZES, logits_scaling=0.3)),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def save_tiny(name: str, folder) -> None:
    "Write a tiny model whose weights are large enough to have opinions."
    tokenizer = char_tokenizer()
    torch.manual_seed(0)
    make = MODELS.get(name, lambda: tiny_lm(tokenizer, **SMALL))
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)


def scored(model, rows, **settings):
    return token_logprobs(
        model, rows.ids, rows.mask, attention_mask=rows.attention_mask, **settings
    )
