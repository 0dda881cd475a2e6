"""Magnitudes of outputs, as they are recorded while a model runs."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
)

from pipeline.attachment import attach
from pipeline.errors import UserError
from pipeline.migu import magnitude
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.targets import Target, find_targets
from tests.families import FAMILIES, family
from tests.reference import MODELS


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
