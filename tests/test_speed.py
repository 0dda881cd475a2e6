"""What a step's seconds come to."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.model.load import build_model, load_config
from pipeline.recipe import Lora, Model
from pipeline.run.speed import training_flops
from tests.reference import MODELS


def recipe_of(objective, length):
    return SimpleNamespace(
        model=SimpleNamespace(objective=objective), data=SimpleNamespace(sequence_length=length)
    )


@pytest.mark.parametrize(("family", "read", "predicted"), [("llama", 30, 30), ("t5", 40, 12)])
def test_operations_are_those_that_torch_counts(family, read, predicted):
    model = MODELS[family]()
    ids = torch.randint(5, model.config.vocab_size, (1, read))
    inputs = {"input_ids": ids}
    if family == "t5":
        inputs = {"input_ids": ids[:, predicted:], "labels": ids[:, :predicted]}
    per_token, per_prediction = training_flops(model, recipe_of("causal", 0))
    attention, _ = training_flops(model, recipe_of("causal", 1))
    assert attention > per_token
    with FlopCounterMode(display=False) as counter:
        output = model(**inputs)
        (output.loss if family == "t5" else output.logits.sum()).backward()
    counted = counter.get_flop_counts()["Global"].items()
    products = sum(n for op, n in counted if str(op) in ("aten.mm", "aten.addmm"))
    assert per_token * read + per_prediction * predicted == pytest.approx(products, rel=1e-6)


def test_packed_weights_count_as_what_they_are(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path)
    found = set()
    for quantize in ("none", "8bit", "4bit"):
        settings = Model(path=str(tmp_path), objective="causal", lora=Lora(r=4, quantize=quantize))
        model = build_model(settings, load_config(settings, 300), None, 0)
        found.add(training_flops(model, recipe_of("causal", 8)))
    assert len(found) == 1
