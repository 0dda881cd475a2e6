"""MIGU in one process, straight from the paper's equations, and the small models it is tried on."""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

THRESHOLD = 0.7
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-2, (0.9, 0.99), 1e-3, 0.1, 0.05


def tiny_roberta() -> RobertaForMaskedLM:
    """Odd sizes: ZeRO's partitions cut rows."""
    torch.manual_seed(0)
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=53,
            hidden_size=21,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=37,
            max_position_embeddings=20,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            type_vocab_size=1,
        )
    )


def tiny_llama() -> LlamaForCausalLM:
    """Grouped-query attention and odd sizes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=53,
            hidden_size=30,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=41,
            max_position_embeddings=20,
        )
    )


def tiny_t5() -> T5ForConditionalGeneration:
    """Encoder, decoder and cross-attention; gated feed-forward; untied head."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=53,
            d_model=18,
            d_kv=7,
            d_ff=25,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            tie_word_embeddings=False,
        )
    )


def tiny_gpt2() -> GPT2LMHeadModel:
    """Conv1D, whose weight is [in, out], and fused QKV."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=53,
            n_embd=21,
            n_layer=2,
            n_head=3,
            n_positions=20,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


MODELS = {"roberta": tiny_roberta, "llama": tiny_llama, "t5": tiny_t5, "gpt2": tiny_gpt2}
CAUSAL = ("llama", "gpt2")
MASKED_LAYERS = {
    "roberta": (
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "t5": ("Attention.q", "Attention.k", "Attention.v", "Attention.o", "wi_0", "wi_1", ".wo"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}


def masked_linears(name: str, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, (torch.nn.Linear, Conv1D))
        and n.endswith(MASKED_LAYERS[name])
        and "lm_head" not in n
    }


def micro_batches(model: str, steps: int, per_step: int, sequences: int = 2) -> list[list[dict]]:
    """[steps][per_step] micro-batches of random tokens; each predicts another number of tokens."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(steps):
        step = []
        for _ in range(per_step):
            ids = torch.randint(5, 53, (sequences, 12), generator=generator)
            predicted = torch.rand(ids.shape, generator=generator) < 0.4
            predicted[:, 1] = True
            batch = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": ids.masked_fill(~predicted, -100),
            }
            if model == "t5":
                batch["decoder_input_ids"] = ids.roll(3, dims=1)
            step.append(batch)
        out.append(step)
    return out


def step_loss(name: str, model: torch.nn.Module, batches: list[dict]) -> torch.Tensor:
    """The mean over all tokens that a step's micro-batches predict."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        labels = batch["labels"]
        if name in CAUSAL:
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count += int((labels >= 0).sum())
    return total / count


def train_reference(
    name: str,
    steps: list[list[dict]],
    strict: bool = False,
    extra: Callable | None = None,
    mask_extra: bool = True,
) -> tuple[dict, list[dict]]:
    """Returns (weights, per step the kept rows of each layer). strict: masked rows do not move.

    extra: (model, step from 0) -> a term of the loss on other text, which no magnitude sees;
    mask_extra: whether its gradient is masked.
    """
    model = MODELS[name]()
    linears = masked_linears(name, model)
    magnitude: dict[str, torch.Tensor] = {}

    def cache(layer):
        def hook(_module, _inputs, output):  # n_i = ||h_i||_1, over the tokens of the batch (Eq. 2)
            n = output.detach().abs().flatten(0, -2).sum(0)
            magnitude[layer] = magnitude.get(layer, 0) + n

        return hook

    for layer, module in linears.items():
        module.register_forward_hook(cache(layer))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0},
        ],
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    kept = []
    for i, batches in enumerate(steps):
        magnitude.clear()
        optimizer.zero_grad()
        step_loss(name, model, batches).backward()
        seen = dict(magnitude)
        if extra is not None and mask_extra:
            extra(model, i).backward()
        magnitude.update(seen)
        masks = {}
        for layer, module in linears.items():
            d_out = len(magnitude[layer])
            t = math.floor(Fraction(str(THRESHOLD)) * d_out)  # Eq. 3
            top = magnitude[layer].argsort(descending=True)[: d_out - t]  # Eq. 4, 5
            masks[layer] = torch.zeros(d_out, dtype=torch.bool).index_fill(0, top, True)
            module.weight.grad *= _along_outputs(module, masks[layer])  # Eq. 6
        kept.append(masks)
        if extra is not None and not mask_extra:
            extra(model, i).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        before = {layer: module.weight.detach().clone() for layer, module in linears.items()}
        optimizer.step()
        if strict:
            for layer, module in linears.items():
                keep = _along_outputs(module, masks[layer])
                module.weight.data = torch.where(keep, module.weight.data, before[layer])
    return {n: p.detach().clone() for n, p in model.named_parameters()}, kept


def _along_outputs(module: torch.nn.Module, mask: torch.Tensor) -> torch.Tensor:
    return mask[None, :] if isinstance(module, Conv1D) else mask[:, None]
