"Tiny models of several kinds, and how their rows are scored."
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from po_book.language_model import char_tokenizer, tiny_lm, token_logprobs

SMALL = dict(width=32, layers=2, heads=2, context=32)
LORA = dict(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
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


def adapted(seed: int = 0, zero: bool = False, base: nn.Module | None = None, **how) -> nn.Module:
    "A tiny model with adapters, which do something unless they begin at zero."
    torch.manual_seed(seed)
    base = tiny_lm(char_tokenizer(), **SMALL) if base is None else base
    return get_peft_model(base, LoraConfig(**LORA, init_lora_weights=zero), **how)


def dropping(kind: str):
    "A model that drops out where it can."
    torch.manual_seed(0)
    if kind == "opt":  # its layers drop out by themselves, not by modules
        sizes = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=2)
        config = OPTConfig(vocab_size=18, word_embed_proj_dim=32, max_position_embeddings=64, **sizes,
                           dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
        return OPTForCausalLM(config).train()
    config = GPT2Config(vocab_size=18, n_embd=32, n_layer=3, n_head=2, n_positions=64, resid_pdrop=0.5)
    return GPT2LMHeadModel(config).train()


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
