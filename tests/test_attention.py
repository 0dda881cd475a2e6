"""Packed documents are apart in every family of docs/models.md, and a run starts with the proof."""

import re
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from pipeline.data.mlm import collate
from pipeline.errors import UserError
from pipeline.model import attention
from pipeline.model.attention import Separation, packed_differs, separate_documents
from pipeline.model.positions import longest_input

VOCABULARY, LENGTH, WINDOW = 61, 24, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
SMALL = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MASKED = {  # (name in docs/models.md) -> (model type, configuration)
    "RoBERTa": ("roberta", SIZES),
    "XLM-RoBERTa": ("xlm-roberta", SIZES),
    "BERT": ("bert", SIZES),
    "ELECTRA": ("electra", {**SIZES, "embedding_size": 16}),
    "DistilBERT": (
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "DeBERTa-v2": ("deberta-v2", {**SIZES, **DEBERTA}),
    "ALBERT": ("albert", {**SIZES, "embedding_size": 16}),
    "ModernBERT": ("modernbert", {**SIZES, "local_attention": 6, "global_attn_every_n_layers": 2}),
    "MPNet": ("mpnet", SIZES),
    "XLM-RoBERTa-XL": ("xlm-roberta-xl", SIZES),
    "ESM": ("esm", {**SIZES, "position_embedding_type": "absolute", "mask_token_id": 5}),
    "Longformer": ("longformer", {**SIZES, "attention_window": [4, 4]}),
}
CAUSAL = {
    "Llama": ("llama", GROUPED),
    "Mistral": ("mistral", {**GROUPED, "sliding_window": WINDOW}),
    "Qwen3": ("qwen3", GROUPED),
    "Phi3": ("phi3", {**SIZES, "num_key_value_heads": 2, "sliding_window": WINDOW}),
    "Gemma 2": ("gemma2", {**GROUPED, **KINDS}),
    "Gemma 3": ("gemma3_text", {**GROUPED, **KINDS}),
    "gpt-oss": ("gpt_oss", {**GROUPED, **KINDS, "num_local_experts": 4}),
    "OPT": ("opt", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "BLOOM": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "GPT-2": ("gpt2", SMALL),
    "GPT-NeoX": ("gpt_neox", SIZES),
    "GPT-J": ("gptj", {**SMALL, "rotary_dim": 4}),
    "GPT-Neo": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 40,
        },
    ),
    "Falcon": ("falcon", {**SIZES, "alibi": False}),
    "Falcon with ALiBi": ("falcon", {**SIZES, "alibi": True}),
    "MPT": (
        "mpt",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 40},
    ),
    "Mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4}),
    "Qwen2-MoE": ("qwen2_moe", {**GROUPED, **EXPERTS}),
    "Mamba": (
        "mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
}
FAMILIES = MASKED | CAUSAL
# Their layers are not told the positions, by which flash attention knows the documents.
UNTOLD = {"GPTBigCode": ("gpt_bigcode", SMALL), "Persimmon": ("persimmon", SIZES)}


def family(name, attention="eager"):
    """With weights so large that every leak shows. None: it has no such attention."""
    kind, values = (FAMILIES | UNTOLD)[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values)
    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.3
    auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    try:
        return auto.from_config(config, attn_implementation=attention).eval()
    except ValueError as error:
        if "does not support an attention implementation" in str(error):
            return None
        raise


def separation(model, name, **options):
    kwargs = {"cross_document": False, "way": "auto", "length": LENGTH, **options}
    return separate_documents(model, name in CAUSAL, **kwargs)


def packed(*rows, seed=0):
    """A batch of these rows' documents, padded; `place` numbers its tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = max(sum(lengths) for lengths in rows)
    shape = (len(rows), length)
    ids = torch.randint(6, VOCABULARY, shape, generator=generator)
    segments = torch.full(shape, -1)
    for row, lengths in enumerate(rows):
        documents = [i for i, n in enumerate(lengths) for _ in range(n)]
        segments[row, : len(documents)] = torch.tensor(documents)
    ids[segments < 0] = 1
    labels = ids.masked_fill(segments < 0, -100)
    batch = collate(
        [tuple(x.numpy() for x in row) for row in zip(ids, labels, segments, strict=True)]
    )
    return {**batch, "place": torch.arange(ids.numel()).view(shape)}


def run(model, separation, batch):
    """Logits of the batch's real tokens, in its order; the tensors that went along are checked."""
    inputs, tokens = separation.arrange(batch, torch.float32)
    logits = model(**inputs).logits
    real = tokens.get("real", torch.ones_like(inputs["input_ids"])).bool()
    place = tokens["place"][real]
    assert torch.equal(tokens["labels"][real], batch["input_ids"].flatten()[place])
    assert torch.equal(inputs["input_ids"][real], tokens["labels"][real])
    assert (tokens["labels"][~real] == -100).all()
    assert torch.equal(place.sort().values, batch["place"][batch["segments"] >= 0])
    return logits[real][place.argsort()]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_alone(name, attention):
    model = family(name, attention)
    if model is None:
        pytest.skip(f"{name} has no {attention} attention")
    batch = packed((9, 1, 12), (20,), (2, 7, 4))
    found = run(model, separation(model, name), batch)
    at = 0
    for row in range(3):
        for segment in range(int(batch["segments"][row].max()) + 1):
            document = batch["input_ids"][row][batch["segments"][row] == segment][None]
            alone = model(input_ids=document, attention_mask=torch.ones_like(document)).logits[0]
            here = found[at : at + len(alone)]
            torch.testing.assert_close(here, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
            at += len(alone)
    assert at == len(found)
    together = separation(model, name, cross_document=True)
    assert packed_differs(model, together, LENGTH) > 1e-2  # the measure sees what a mistake does


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cross_document", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_the_past_does_not_see_the_future(name, cross_document, attention):
    model = family(name, attention)
    if model is None:
        pytest.skip(f"{name} has no {attention} attention")
    kept = separation(model, name, cross_document=cross_document)
    batch = packed((9, 12), (17, 2))
    before = run(model, kept, batch)
    batch["input_ids"][0, 20] = batch["labels"][0, 20] = 7 + batch["input_ids"][0, 20] % 7
    changed = (run(model, kept, batch) - before).abs().amax(1) > 1e-4 * before.abs().max()
    assert changed.nonzero().flatten().tolist() == [20]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_says_how_each_family_is_kept_apart(name):
    page = (Path(__file__).parents[1] / "docs/models.md").read_text()
    ways = dict(re.findall(r"^\| ([^|]+) \| `(positions|masks|rows)` \|", page, re.M))
    assert set(ways) == set(FAMILIES)
    assert separation(family(name), name).way == ways[name]


@given(rows=st.lists(st.lists(st.integers(1, 9), max_size=5).map(tuple), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_every_way_gives_the_same_for_any_documents(rows):
    """Rows of padding only included; `flat` is how flash attention takes its rows."""
    if not any(rows):
        return
    batch = packed(*rows)
    model, config = LLAMA, LLAMA.config
    ways = [Separation(w, config, causal=True, first=0) for w in ("positions", "masks", "rows")]
    ways.append(Separation("positions", config, causal=True, first=0, flat=True))
    ways = [Separation(**{**vars(w), "takes_cache": True}) for w in ways]
    first, *others = (run(model, way, batch) for way in ways)
    assert torch.isfinite(first).all()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


LLAMA = family("Llama")


def test_a_batch_of_padding_only_has_a_loss():
    """A rank whose rows are all empty at the end of an epoch goes through the forward too."""
    batch = {k: t[:1] for k, t in packed((), (8,)).items()}
    for way in ("positions", "masks", "rows", "together"):
        kept = separation(LLAMA, "Llama", **(
            {"cross_document": True} if way == "together" else {"way": way}
        ))  # fmt: skip
        inputs, tokens = kept.arrange(batch, torch.float32)
        assert torch.isfinite(LLAMA(**inputs).logits).all()
        assert (tokens["labels"] == -100).all()
        assert not tokens["real"].any()


def test_a_family_that_ignores_what_it_is_told_is_found_out(monkeypatch):
    model = family("GPT-2")
    assert separation(model, "GPT-2").way == "positions"
    forward = type(model.transformer).forward

    def without(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    without.__signature__ = attention.signature(forward)
    monkeypatch.setattr(type(model.transformer), "forward", without)
    assert separation(model, "GPT-2").way == "rows"  # with masks, positions still run on
    assert separation(model, "GPT-2", way="positions").way == "positions"  # taken without proof
    monkeypatch.setattr(attention, "_candidates", lambda *_: ["positions", "masks"])
    with pytest.raises(UserError, match=r"positions: the hidden states differ.*cross_document"):
        separation(model, "GPT-2")


@pytest.mark.parametrize("name", ["OPT", "Llama", "ModernBERT", "GPT-2"])
def test_the_proof_works_in_half_precision_and_with_an_adapter(name):
    full = family(name)
    expected = separation(full, name).way
    half = full.bfloat16()
    assert separation(half, name).way == expected
    assert packed_differs(half, separation(half, name, cross_document=True), LENGTH) > 0.1
    linear = next(
        n for n, m in half.named_modules() if n.endswith(("fc1", "gate_proj", "Wi", "c_fc"))
    )
    half.add_adapter(peft.LoraConfig(r=2, target_modules=[linear], fan_in_fan_out=name == "GPT-2"))
    assert separation(half, name).way == expected


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("Llama", "positions"),
        ("Gemma 2", "positions"),
        ("OPT", "positions"),
        ("BERT", "rows"),
        ("GPTBigCode", "rows"),
        ("Persimmon", "rows"),
    ],
)
def test_flash_attention_gets_positions_in_one_long_row_and_no_mask(name, way):
    model = family(name)
    model.config._attn_implementation = "flash_attention_2"  # stood in for without a GPU
    kept = separation(model, name)
    assert model.config._attn_implementation == "flash_attention_2"
    inputs, _ = kept.arrange(packed((9, 1, 12), (20,)), torch.float32)
    assert (kept.way, kept.flat) == (way, way == "positions")
    if kept.flat:
        assert inputs["position_ids"].tolist() == [
            [*range(9), 0, *range(12), *range(20), *range(2)]
        ]
    assert ("attention_mask" in inputs) == (way == "rows")


def test_the_proof_leaves_the_model_and_the_random_numbers_as_they_were():
    model = family("RoBERTa").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    separation(model, "RoBERTa")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["RoBERTa", "MPNet", "XLM-RoBERTa-XL", "ESM", "BERT", "GPT-2"])
def test_the_longest_input_is_the_longest_that_the_model_takes(name):
    model = family(name)
    limit = longest_input(model)
    ids = torch.full((1, limit + 1), 7)
    model(input_ids=ids[:, :-1])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)
