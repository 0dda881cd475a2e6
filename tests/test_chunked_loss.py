"""Logits that exist a part at a time give the losses and weights of the whole."""

import os

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration

import pipeline.model.chunked_loss
from pipeline.errors import UserError
from pipeline.model.chunked_loss import ChunkedLoss
from pipeline.model.load import PredictedPositions, predict, predicted_places
from pipeline.ranks import world_size
from tests.reference import MODELS, micro_batches, train_reference
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, recipe_for, train_shares, zero_engine

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))
VOCABULARY = 53
CHUNK = 4 * VOCABULARY  # four tokens


def compare_engines():
    """By case, the largest weight difference to the reference after some steps."""
    pipeline.model.chunked_loss.CHUNK = CHUNK
    found = {}
    cases = [("llama", "zero3", "row_sparse"), ("roberta", "fsdp", "dense")]
    if EVERYTHING:
        cases += [
            ("gpt2", "zero2", "row_sparse"),
            ("t5", "zero0", "dense"),
            ("t5", "zero3", "dense"),
        ]
    for name, engine, backward in cases:
        recipe = recipe_for(name, 2 * world_size() * 2)
        recipe.train.chunked_loss, recipe.mask.backward = True, backward
        build = fsdp_engine if engine == "fsdp" else zero_engine
        sharded = build(MODELS[name]().train(), recipe, ENGINES.get(engine, {}))
        steps = micro_batches(name, 2, world_size() * 2)
        weights, _ = train_shares(sharded, recipe, steps)
        expected, _ = train_reference(name, steps)
        found[name, engine] = max(float((weights[n] - w).abs().max()) for n, w in expected.items())
    return found


def test_chunks_give_the_losses_and_weights_of_the_whole():
    for results in run_ranks(compare_engines, 2):
        for case, difference in results.items():
            assert difference < 1e-6, case


class Widest(TorchDispatchMode):
    """The most logits that one tensor has; those with `hidden` rows are the head's weight."""

    logits = 0

    def __init__(self, hidden):
        super().__init__()
        self._weight = (hidden, VOCABULARY)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if not isinstance(tensor, torch.Tensor) or tensor.shape == self._weight:
                continue
            if tensor.shape[-1:] == (VOCABULARY,):
                self.logits = max(self.logits, tensor.numel())
        return output


@pytest.mark.parametrize("name", ["roberta", "llama", "t5"])
def test_no_tensor_holds_more_logits_than_a_chunk(name, monkeypatch):
    monkeypatch.setattr(pipeline.model.chunked_loss, "CHUNK", CHUNK)
    model = MODELS[name]()
    inputs = {k: v for k, v in micro_batches(name, 1, 1)[0][0].items() if k != "labels"}
    shape = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(-3, VOCABULARY, shape, generator=generator).clamp_min(-100)
    head = PredictedPositions(model)
    logits = predict(model.forward, inputs, targets >= 0, head)
    whole = F.cross_entropy(logits, targets[targets >= 0], reduction="none")
    chunked = ChunkedLoss(head)
    with Widest(head.output.weight.shape[1]) as widest:
        learnt = targets[targets >= 0]
        places = predicted_places(targets, len(learnt))
        losses = chunked.losses(model.forward, inputs, places, learnt)
        losses.sum().backward()
    torch.testing.assert_close(losses, whole, rtol=0, atol=1e-6)
    assert 0 < widest.logits <= CHUNK < logits.numel()
    torch.testing.assert_close(predict(model.forward, inputs, targets >= 0, head), logits)
    chunked.close()
    head.close()
    assert model(**inputs).logits.shape == (*shape, VOCABULARY)


def test_a_model_that_changes_its_logits_is_refused():
    model = MODELS["llama"]()
    plain = model.forward

    def capped(**inputs):
        output = plain(**inputs)
        output.logits = output.logits.tanh()
        return output

    ids = torch.arange(12)[None]
    with pytest.raises(UserError, match=r"train\.chunked_loss: .* caps, scales"):
        ChunkedLoss(PredictedPositions(model)).losses(
            capped, {"input_ids": ids}, predicted_places(ids, ids.numel()), ids[0]
        )
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=60, d_model=12, encoder_layers=1, decoder_layers=1,
                   encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                   decoder_ffn_dim=16, max_position_embeddings=40)
    )  # fmt: skip
    head = PredictedPositions(bart)  # a bias is added behind it, of the shape of logits
    with pytest.raises(UserError, match=r"train\.chunked_loss: .* adds to logits"):
        ChunkedLoss(head).losses(
            bart.forward, {"input_ids": ids, "decoder_input_ids": ids},
            predicted_places(ids, ids.numel()), ids[0],
        )  # fmt: skip
    model = MODELS["llama"]()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="head is a Sequential"):
        ChunkedLoss(PredictedPositions(model))
