"""Which linears, which rows, and the arithmetic of masking a slice."""

from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from pipeline.errors import UserError
from pipeline.migu.gradient_mask import GradientMask, NonFiniteMagnitude
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.mask import kept_count, select_rows
from pipeline.migu.shard import Shard
from pipeline.migu.targets import find_targets
from pipeline.recipe import Mask
from tests.reference import MODELS, masked_linears


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    output_dim=st.integers(0, 1),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_masking_any_cut_of_a_matrix_equals_masking_the_whole(rows, columns, output_dim, data):
    weight = torch.randn(rows, columns)
    keep = torch.tensor(
        data.draw(
            st.lists(
                st.booleans(), min_size=weight.shape[output_dim], max_size=weight.shape[output_dim]
            )
        )
    )
    cuts = data.draw(st.lists(st.integers(0, rows * columns), max_size=5))
    bounds = sorted({0, *cuts, rows * columns})
    flat = weight.clone().flatten()
    magnitudes = torch.zeros(weight.shape[output_dim])
    for start, end in pairwise(bounds):
        shard = Shard("w", flat[start:end], start, (rows, columns))
        shard.add_magnitudes(magnitudes, output_dim)
        shard.mask(keep, output_dim)
    broadcast = keep[:, None] if output_dim == 0 else keep[None, :]
    assert torch.equal(flat.view(rows, columns), weight * broadcast)
    torch.testing.assert_close(magnitudes, weight.abs().sum(1 - output_dim))


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
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 11,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
    }
    with pytest.raises(UserError, match="experts"):
        find_targets(MixtralForCausalLM(MixtralConfig(**sizes)))


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
