"""Which rows are kept, and the arithmetic of masking a slice."""

from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.migu.gradient_mask import GradientMask, NonFiniteMagnitude
from pipeline.migu.mask import kept_count, select_rows
from pipeline.ranks import rank
from pipeline.recipe import Mask
from pipeline.shard import Shard
from tests.reference import MODELS
from tests.spawn import run_ranks


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
