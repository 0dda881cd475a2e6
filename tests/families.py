"""Small models of the families of docs/models.md, and what of each is masked."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

SIZES = {
    "vocab_size": 29,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **ENDS, "num_key_value_heads": 1}
T5 = {"vocab_size": 29, "d_model": 8, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 2}
SIDES = {"layers": 1, "attention_heads": 2, "ffn_dim": 20}
BART = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in SIDES.items()}
Q_K_V = {"q", "k", "v", "o", "ffn_in", "ffn_out"}
GATED = {*Q_K_V, "ffn_gate"}
FUSED = {"qkv", "o", "ffn_in", "ffn_out"}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
MIXTURE = {**GROUPED, **EXPERTS, "initializer_range": 0.5}
QWEN = {**MIXTURE, "num_experts": 3, "moe_intermediate_size": 12}
FAMILIES = {  # (model type, configuration, components, masked weights): docs/models.md
    "roberta": ("roberta", SIZES, Q_K_V, 6),
    "bert": ("bert", SIZES, Q_K_V, 6),
    "electra": ("electra", {**SIZES, "embedding_size": 6}, Q_K_V, 6),
    "distilbert": (
        "distilbert",
        {"vocab_size": 29, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 20},
        Q_K_V,
        6,
    ),
    "deberta": (
        "deberta-v2",
        {
            **SIZES,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": False,
        },
        Q_K_V,
        8,
    ),
    "albert": ("albert", {**SIZES, "embedding_size": 6}, Q_K_V, 6),
    "modernbert": ("modernbert", {**SIZES, **ENDS, "cls_token_id": 1, "sep_token_id": 2}, FUSED, 4),
    "llama": ("llama", GROUPED, GATED, 7),
    "mistral": ("mistral", GROUPED, GATED, 7),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 6}, GATED, 7),
    "phi3": ("phi3", GROUPED, FUSED, 4),
    "opt": ("opt", {**SIZES, "ffn_dim": 20, "word_embed_proj_dim": 6}, Q_K_V, 6),
    "bloom": ("bloom", {"vocab_size": 29, "hidden_size": 8, "n_layer": 1, "n_head": 2}, FUSED, 4),
    "gpt2": (
        "gpt2",
        {**ENDS, "vocab_size": 29, "n_embd": 8, "n_layer": 1, "n_head": 2},
        FUSED,
        4,
    ),
    "gpt_neox": ("gpt_neox", SIZES, FUSED, 4),
    "t5": ("t5", T5, Q_K_V, 16),
    "t5_gated": ("t5", {**T5, "feed_forward_proj": "gated-gelu"}, GATED, 18),
    "bart": ("bart", {**BART, "vocab_size": 29, "d_model": 8}, Q_K_V, 16),
    "mixtral": ("mixtral", MIXTURE, Q_K_V, 6),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 12}, GATED, 9),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "head_dim": 6}, Q_K_V, 6),
    "olmoe": ("olmoe", QWEN, Q_K_V, 6),
    "gpt_oss": ("gpt_oss", {**MIXTURE, "head_dim": 4}, Q_K_V, 6),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
CAUSAL = ("llama", "mistral", "qwen3", "phi3", "opt", "bloom", "gpt2", "gpt_neox", *MIXTURES)


def family(name):
    kind, sizes, *_ = FAMILIES[name]
    auto = AutoModelForCausalLM if name in CAUSAL else AutoModelForMaskedLM
    auto = AutoModelForSeq2SeqLM if kind in ("t5", "bart") else auto
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **sizes)).eval()
