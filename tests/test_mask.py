"""Which linears, which rows, and the arithmetic of masking a slice."""

from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from pipeline.attachment import attach
from pipeline.errors import UserError
from pipeline.migu import magnitude
from pipeline.migu.gradient_mask import GradientMask, NonFiniteMagnitude
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.mask import kept_count, select_rows
from pipeline.migu.targets import Target, count_rows, find_targets
from pipeline.ranks import rank
from pipeline.recipe import Mask
from pipeline.shard import Shard
from tests.reference import MODELS, masked_linears
from tests.spawn import run_ranks

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


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    output_dim=st.integers(0, 1),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_masking_any_cut_of_a_weight_equals_masking_the_whole(shape, output_dim, data):
    """A matrix, or the experts of a mixture."""
    weight, old, inputs = torch.randn(shape), torch.randn(shape), -1 - output_dim
    broadcast = torch.rand(shape).amax(inputs, keepdim=True) < 0.7
    keep = broadcast.flatten()
    cuts = data.draw(st.lists(st.integers(0, weight.numel()), max_size=5))
    bounds = sorted({0, *cuts, weight.numel()})
    masked, restored = weight.flatten().clone(), weight.flatten().clone()
    magnitudes = torch.zeros(len(keep))
    for start, end in pairwise(bounds):
        shard = Shard("w", masked[start:end], start, tuple(shape))
        shard.add_magnitudes(magnitudes, output_dim)
        shard.mask(keep, output_dim)
        shard = Shard("w", restored[start:end], start, tuple(shape))
        shard.restore(old.flatten()[start:end], keep, output_dim)
    assert torch.equal(masked.view(shape), weight * broadcast)
    assert torch.equal(restored.view(shape), torch.where(broadcast, weight, old))
    torch.testing.assert_close(magnitudes, weight.abs().sum(inputs).flatten())


def test_an_overflow_in_a_masked_row_still_shows():
    gradient = torch.tensor([float("inf"), 1.0])
    Shard("w", gradient, 0, (2, 1)).mask(torch.tensor([False, True]))
    assert gradient[0].isnan()


@given(rows=st.integers(1, 5000), percent=st.integers(0, 99))
def test_the_exact_rule_keeps_the_papers_count(rows, percent):
    threshold = percent / 100
    kept = kept_count(rows, threshold)
    assert kept == rows - Fraction(percent, 100) * rows // 1
    assert 1 <= kept <= rows
    scores = torch.rand(rows).round(decimals=1)  # with many ties
    assert int(select_rows(scores, [rows], threshold).sum()) == kept


def test_ninety_rows_at_point_seven():
    assert kept_count(90, 0.7) == 27  # floats: 0.7 * 90 = 62.99..., which would keep 28


@pytest.mark.parametrize("rows", [10, 64, 77, 768, 1024])
def test_the_quantile_rule_is_the_authors(rows):
    scores = torch.rand(rows)
    keep = select_rows(scores, [rows], 0.7, "quantile")
    assert torch.equal(keep, scores >= torch.quantile(scores, 0.7))
    assert int(keep.sum()) == kept_count(rows, 0.7, "quantile")


def test_layers_of_several_widths_are_selected_one_by_one():
    sizes = [5, 8, 5, 1]
    scores = torch.rand(sum(sizes))
    keep = select_rows(scores, sizes, 0.6)
    for part, kept in zip(scores.split(sizes), keep.split(sizes), strict=True):
        best = part.topk(kept_count(len(part), 0.6)).indices
        assert set(best.tolist()) == set(kept.nonzero().flatten().tolist())


@pytest.mark.parametrize("name", MODELS)
def test_all_linears_of_the_blocks_are_targets(name):
    model = MODELS[name]()
    targets = find_targets(model)
    assert [t.name for t in targets] == [f"{n}.weight" for n in masked_linears(name, model)]
    assert all(t.component != "other" for t in targets)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_of_a_known_family_has_a_component(name):
    targets = find_targets(family(name))
    _, _, components, linears = FAMILIES[name]
    assert {t.component for t in targets} == components
    assert len(targets) == linears


@pytest.mark.parametrize(
    ("name", "qkv", "ffn_in"),
    [
        ("gpt2", (8, 8, 8), (32,)),
        ("phi3", (8, 4, 4), (20, 20)),
        ("modernbert", (8, 8, 8), (20, 20)),
    ],
)
def test_the_parts_of_a_fused_linear_are_where_the_model_cuts_it(name, qkv, ffn_in):
    model = family(name)
    targets = {t.component: t for t in find_targets(model, split_fused=True)}
    parts = {component: t.parts for component, t in targets.items()}
    assert parts == {"qkv": qkv, "o": (8,), "ffn_in": ffn_in, "ffn_out": (8,)}
    entered = {}
    for component in ("o", "ffn_out"):
        targets[component].observed.register_forward_pre_hook(
            lambda _module, inputs, component=component: entered.update({component: inputs[0]})
        )

    def without(component, part):
        """What enters the linear that follows, with one part's rows set to zero."""
        target = targets[component]
        before = target.weight.detach().clone()
        with torch.no_grad():
            target.weight.split(target.parts, dim=target.output_dim)[part].zero_()
            model(input_ids=torch.arange(5, 15)[None])
            target.weight.copy_(before)
        return entered["o" if component == "qkv" else "ffn_out"]

    assert not without("qkv", 2).any()  # attention over values that are zero
    q, k = without("qkv", 0), without("qkv", 1)  # without q or without k: the same mean of values
    assert q.any()
    torch.testing.assert_close(q, k)
    if len(ffn_in) == 2:  # a product: zero without the gate and without the other
        assert not without("ffn_in", 0).any()
        assert not without("ffn_in", 1).any()


def test_split_fused_selects_in_each_part():
    model = family("phi3")
    mask = GradientMask(model, Mask(split_fused=True), seed=0)
    with mask.recording():
        model(input_ids=torch.arange(5, 15)[None]).logits.square().sum().backward()
    magnitudes = mask.recorder.scores.clone()
    mask.apply(Plain(model), 1)
    at = 0
    for target in mask.targets:
        keep, _ = mask.rows_by_name(mask.keep)[target.name]
        assert torch.equal(target.weight.grad.abs().sum(1) > 0, keep)
        for part in target.parts:
            best = magnitudes[at : at + part].topk(kept_count(part, 0.7)).indices
            assert set(mask.keep[at : at + part].nonzero().flatten().tolist()) == set(best.tolist())
            at += part
    counts = count_rows(mask.targets, 0.7, "exact")
    assert counts["qkv"] == {"linears": 1, "rows": 16, "kept": 3 + 2 + 2}  # jointly 5
    assert sum(c["kept"] for c in counts.values()) == int(mask.keep.sum())


def test_of_a_fused_lora_layer_only_b_has_parts():
    model = peft.get_peft_model(
        family("gpt2"), peft.LoraConfig(r=6, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    assert [t.parts for t in find_targets(model, split_fused=True)] == [(6,), (8, 8, 8)]


def test_split_fused_is_refused_where_it_cannot_work():
    for name, layer in (
        ("bloom", r"transformer\.h\.0\.self_attention\.query_key_value"),
        ("gpt_neox", r"gpt_neox\.layers\.0\.attention\.query_key_value"),
    ):
        with pytest.raises(UserError, match=layer):
            find_targets(family(name), split_fused=True)
    for name, components in (("llama", None), ("gpt2", ["ffn"]), ("bloom", ["ffn"])):
        with pytest.raises(UserError, match="split_fused: has no effect"):
            find_targets(family(name), components, split_fused=True)
    unknown = family("phi3")
    unknown.config.model_type = "phi30"
    with pytest.raises(UserError, match=r"qkv_proj.*'phi30'"):
        find_targets(unknown, split_fused=True)


def test_components_choose_among_the_linears():
    model = MODELS["llama"]()
    assert {t.component for t in find_targets(model, ["attention", "ffn_out"])} == {
        "q",
        "k",
        "v",
        "o",
        "ffn_out",
    }
    head = find_targets(model, ["head"])
    assert [t.name for t in head] == ["lm_head.weight"]
    with pytest.raises(UserError, match="unknown component 'qq'"):
        find_targets(model, ["qq"])
    with pytest.raises(UserError, match="shares its weight with the embeddings"):
        find_targets(MODELS["roberta"](), ["head"])


def test_conv1d_counts_its_columns_as_outputs():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    targets = find_targets(GPT2LMHeadModel(GPT2Config(**sizes)))
    assert {(t.component, t.rows, t.output_dim) for t in targets} == {
        ("qkv", 24, 1),
        ("o", 8, 1),
        ("ffn_in", 32, 1),
        ("ffn_out", 8, 1),
    }


def test_models_that_cannot_be_masked_are_refused():
    with pytest.raises(UserError, match="nothing to mask"):
        find_targets(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))
    config = AutoConfig.for_model("llama4_text", **MIXTURE, intermediate_size_mlp=8)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"layers\.0\S*experts.*in a way of their own"):
        find_targets(model)
    assert {t.component for t in find_targets(model, ["attention"])} == {"q", "k", "v", "o"}
    found = find_targets(model, partly=True)
    assert "experts.gate_up_proj" not in {t.name for t in found}


def test_a_weight_of_two_linears_is_refused_by_name():
    model = MODELS["roberta"]()
    layers = model.roberta.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    with pytest.raises(
        UserError, match=r"layer\.1\S*query\.weight and \S*layer\.0\S*query\.weight are"
    ):
        find_targets(model)
    assert find_targets(model, ["k"])


def test_mamba_has_no_experts():
    sizes = {"vocab_size": 29, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    assert len(find_targets(mamba)) == 4  # in_proj, x_proj, dt_proj, out_proj


def _recorded(model, ids, normalize="none"):
    targets = find_targets(model)
    recorder = MagnitudeRecorder(targets, normalize)
    with recorder.recording():
        model(input_ids=ids)
    model(input_ids=ids)  # not recorded
    total = recorder.reduce()
    assert not recorder.reduce().any()
    return targets, total.split([t.rows for t in targets])


def test_magnitudes_are_sums_of_absolute_outputs():
    model = MODELS["roberta"]().eval()
    ids = torch.randint(5, 53, (2, 7))
    outputs = []
    layer = model.roberta.encoder.layer[0].attention.self.query
    layer.register_forward_hook(lambda m, i, o: outputs.append(o.detach()))
    targets, magnitudes = _recorded(model, ids)
    at = [t.observed for t in targets].index(layer)
    torch.testing.assert_close(magnitudes[at], outputs[0].abs().sum((0, 1)))
    _, normalized = _recorded(model, ids, "token")
    each = outputs[0] / outputs[0].abs().sum(-1, keepdim=True)
    torch.testing.assert_close(normalized[at], each.abs().sum((0, 1)))


@pytest.mark.parametrize("normalize", ["none", "token"])
def test_magnitudes_of_small_bf16_outputs_are_added_up_in_fp32(normalize, monkeypatch):
    """Part by part: 301 tokens of two outputs each, one 256 times as large as the other. In bf16
    neither their norm, 257, nor a part's sum, of 301 times the same, would be exact."""
    monkeypatch.setattr(magnitude, "CACHED", 2 * 301)
    layer, small = nn.Identity(), 2.0**-20
    recorder = MagnitudeRecorder([Target("x", torch.empty(2, 2), layer, "x", 2)], normalize)
    outputs = torch.tensor([[-256 * small, small]]).repeat(1001, 1)
    real = torch.ones(1, 1001, dtype=torch.bool)
    real[0, 5] = real[0, 700] = False
    outputs[~real[0]] = 3 * small
    with recorder.recording(real):
        layer(outputs.bfloat16())
    unit = small if normalize == "none" else 1 / 257
    expected = 999 * unit * torch.tensor([256.0, 1.0])
    torch.testing.assert_close(recorder.reduce(), expected, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("normalize", ["none", "token"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_adds_nothing_to_a_magnitude(name, normalize):
    """A padded batch gives the sums of its rows alone, on both sides of an encoder-decoder."""
    model, lengths = family(name), (3, 9, 1)
    both = model.config.is_encoder_decoder
    targets = [t for t in find_targets(model) if t.tokens != "none"]
    recorder = MagnitudeRecorder(targets, normalize)
    ids, decoder_ids = torch.randint(3, 29, (2, 3, 9))
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    decoder_real = real.flip(0)

    def record(rows, length, decoder_length, with_padding):
        inputs = {"input_ids": ids[rows, :length], "attention_mask": real[rows, :length].long()}
        if both:
            inputs["decoder_input_ids"] = decoder_ids[rows, :decoder_length]
        with recorder.recording(*((real, decoder_real) if with_padding else ())):
            model(**inputs)

    record(slice(0, 3), 9, 9, with_padding=True)
    padded = recorder.reduce()
    for row, length in enumerate(lengths):
        record(slice(row, row + 1), length, lengths[-1 - row], with_padding=False)
    torch.testing.assert_close(padded, recorder.reduce(), rtol=1e-5, atol=1e-5)
    record(slice(0, 3), 9, 9, with_padding=False)
    assert not torch.allclose(padded, recorder.reduce(), rtol=1e-2)


def test_a_layer_that_sees_some_tokens_only_is_refused_where_some_are_padding():
    layer = nn.Linear(3, 4)
    recorder = MagnitudeRecorder([Target("expert.weight", layer.weight, layer, "other", 4)])
    real = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with recorder.recording(real):
        layer(torch.randn(5, 3))  # flattened, without the padding
    assert recorder.reduce().all()
    refused = pytest.raises(UserError, match=r"expert\.weight sees 4 of the 6")
    with refused, recorder.recording(real):
        layer(torch.randn(4, 3))
    with recorder.recording(torch.ones(2, 3)):
        layer(torch.randn(4, 3))
    assert recorder.reduce().all()
    assert recorder.observed.all()
    with recorder.recording():
        layer(torch.randn(0, 3))  # an expert that no token has chosen
    assert not recorder.reduce().any()
    assert not recorder.observed.any()


def test_a_module_called_twice_adds_up_and_a_recompute_does_not():
    sizes = {
        "vocab_size": 20,
        "embedding_size": 4,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    ids = torch.randint(5, 20, (2, 5))
    torch.manual_seed(0)
    albert = AlbertForMaskedLM(AlbertConfig(num_hidden_layers=3, **sizes)).eval()
    calls = []
    first = find_targets(albert)[0].observed
    first.register_forward_hook(lambda m, i, o: calls.append(o.abs().sum((0, 1)).detach()))
    _, magnitudes = _recorded(albert, ids)
    torch.testing.assert_close(magnitudes[0], sum(calls[:3]))

    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    bert = BertForMaskedLM(BertConfig(**sizes)).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            bert.gradient_checkpointing_enable({"use_reentrant": False})
        recorder = MagnitudeRecorder(find_targets(bert))
        with recorder.recording():
            loss = bert(input_ids=ids).logits.sum()
        loss.backward()
        results.append(recorder.reduce())
        recorder.close()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("name", "gpu"), [("roberta", False), ("llama", False), ("llama", True)])
def test_a_compiled_model_records_the_same_magnitudes_without_a_graph_break(name, gpu, monkeypatch):
    if gpu:
        monkeypatch.setattr(magnitude, "_absolute_sums", magnitude.compiled_as_is)
    model, ids = MODELS[name](), torch.randint(5, 53, (2, 7))
    recorder = MagnitudeRecorder(find_targets(model))
    real = torch.arange(7) < torch.tensor([[7], [4]])
    with recorder.recording(real):
        model(input_ids=ids)
    eager = recorder.reduce()
    torch.compiler.reset()
    graphs = []

    def count_graphs(module, inputs):
        graphs.append(module)
        return aot_eager(module, inputs)

    compiled = torch.compile(model, backend=count_graphs, fullgraph=True)  # raises at a break
    for _ in range(3):
        with recorder.recording(real.clone()):
            compiled(input_ids=ids)
        assert torch.equal(recorder.reduce(), eager)
        compiled(input_ids=ids)
        assert not recorder.reduce().any()
    assert len(graphs) == 2  # one that records and one that does not


def test_attach_masks_a_compiled_model_alike():
    kept = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = MODELS["llama"]().train()
        if compiled:
            model = torch.compile(model, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attached = attach(model, optimizer)
        for _ in range(2):
            model(input_ids=torch.arange(5, 15)[None]).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        kept.append(attached.mask.keep)
    assert torch.equal(*kept)


def test_attach_to_a_model_that_has_run_compiled_is_not_silent():
    torch.compiler.reset()
    model = torch.compile(MODELS["llama"](), backend="aot_eager")
    model(input_ids=torch.arange(5, 15)[None])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    model(input_ids=torch.arange(5, 15)[None]).logits.square().mean().backward()
    with pytest.raises(RuntimeError, match="recorded no forward"):
        optimizer.step()


class Plain:
    """An engine of one process that shards nothing."""

    def __init__(self, model):
        self.parameters = dict(model.named_parameters())

    def gradient_shards(self, names):
        for n in names:
            p = self.parameters[n]
            yield Shard(n, p.grad.view(-1), 0, tuple(p.shape))

    def weight_shards(self, names):
        for n in names:
            p = self.parameters[n]
            yield Shard(n, p.detach().view(-1), 0, tuple(p.shape))


def _masked_rows(model, settings, step=1, seed=0):
    mask = GradientMask(model, settings, seed)
    with mask.recording():
        loss = model(input_ids=torch.arange(5, 15)[None]).logits.square().sum()
    loss.backward()
    expected = {
        "weight": lambda p: p.detach().abs().sum(1),
        "gradient": lambda p: p.grad.abs().sum(1),
    }
    named = dict(model.named_parameters())
    scores = None
    if settings.criterion in expected:
        scores = torch.cat([expected[settings.criterion](named[t.name]) for t in mask.targets])
    mask.apply(Plain(model), step)
    mask.close()
    for target in mask.targets:
        keep, _ = mask.rows_by_name(mask.keep)[target.name]
        assert torch.equal(named[target.name].grad.abs().sum(1) > 0, keep)
    model.zero_grad()
    return mask, scores


@pytest.mark.parametrize("criterion", ["weight", "gradient"])
def test_rows_are_ranked_by_weight_or_gradient(criterion):
    mask, scores = _masked_rows(MODELS["llama"](), Mask(criterion=criterion))
    assert torch.equal(mask.keep, select_rows(scores, mask.sizes, 0.7))


def test_random_rows_stay_for_a_stage_or_are_drawn_each_step():
    model = MODELS["llama"]()
    per_stage = Mask(criterion="random")
    rows = [
        _masked_rows(model, per_stage, step, seed)[0].keep
        for step, seed in [(1, 0), (2, 0), (1, 1)]
    ]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    per_step = Mask(criterion="random", random_redraw="step")
    rows = [_masked_rows(model, per_step, step)[0].keep for step in (1, 2)]
    assert not torch.equal(*rows)


def test_a_non_finite_magnitude_stops_before_the_gradient_is_touched():
    model = MODELS["llama"]()
    mask = GradientMask(model, Mask(), seed=0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 0] = float("nan")
    with mask.recording():
        model(input_ids=torch.arange(5, 15)[None])
    engine = SimpleNamespace(gradient_shards=pytest.fail)
    with pytest.raises(NonFiniteMagnitude, match=r"layers\.1\.mlp\.up_proj"):
        mask.apply(engine, 1)


def refused_unobserved():
    """What a rank is told where nothing observed a layer that has a gradient on rank 1 alone."""
    model = MODELS["llama"]()
    mask = GradientMask(model, Mask(), seed=0)
    mask.recorder._hooks[-1].remove()
    with mask.recording():
        loss = model(input_ids=torch.arange(5, 15)[None]).logits.square().sum()
    loss.backward()
    if rank() == 0:
        model.get_parameter(mask.targets[-1].name).grad.zero_()
    try:
        mask.apply(Plain(model), 1)
    except UserError as error:
        return mask.targets[-1].name, str(error)


def test_a_layer_that_nothing_observed_is_refused_on_every_rank():
    for name, message in run_ranks(refused_unobserved, 2):
        assert f"{name} has a gradient in this step, but its layer was not called" in message
