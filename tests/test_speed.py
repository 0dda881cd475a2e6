"""What a step's seconds come to."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.engine.config import resolve_engine_config
from pipeline.model.load import build_model, load_config
from pipeline.ranks import world_size
from pipeline.recipe import Lora, Model
from pipeline.run.dry_run import describe_run
from pipeline.run.measure import measure_steps
from pipeline.run.recipe_file import load_recipe
from pipeline.run.speed import training_flops
from tests.reference import MODELS
from tests.spawn import run_ranks
from tests.test_run import tiny_recipe


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


def measured(path):
    """By objective: the lines of `--measure`, for a run of two stages on two ranks."""
    found = {}
    for objective, config in CONFIGS.items():
        change = [f"model.config={config}", f"model.objective={objective}", "mask.threshold=0.5"]
        recipe = load_recipe(path, change)
        config = resolve_engine_config("ds_configs/zero2.json", recipe, world_size(), "cpu")
        found[objective] = measure_steps(recipe, config)
    return found


CONFIGS = {
    "masked": "{model_type: roberta, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,"
    " intermediate_size: 24, max_position_embeddings: 34}",
    "causal": "{model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 34}",
    "seq2seq": "{model_type: t5, d_model: 16, d_kv: 8, d_ff: 24, num_layers: 1, num_heads: 2}",
}


def test_some_steps_of_every_objective_are_measured_and_nothing_is_written(tmp_path):
    path = tiny_recipe(tmp_path)
    there = set(tmp_path.iterdir())
    for found in run_ranks(measured, 2, path):
        assert found.keys() == CONFIGS.keys()
        for steps, memory, first, second, whole in found.values():
            seconds = float(re.search(r"([\d.]+) s a step", steps)[1])
            assert "tokens/s" in steps
            assert "GB at its peak" in memory
            assert first.startswith("  1 a: ")
            assert second.startswith("  2 b: ")
            minutes = float(re.search(r"in all ([\d.]+) minutes", whole)[1])
            assert minutes == pytest.approx(24 * seconds / 60, abs=0.06)
    assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("native", "trained", "evaluated", "told"),
    [
        (False, "bf16", "fp32", "train.precision: fp32 is faster"),
        (False, "fp32", "bf16", "; evaluate.precision: fp32 is faster"),
        (False, "auto", "fp32", None),
        (True, "bf16", "bf16", None),
    ],
)
def test_bf16_that_a_processor_emulates_is_told(
    native, trained, evaluated, told, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.engine.config.cpu_has_bf16", lambda: native)
    monkeypatch.setattr("pipeline.engine.config.has_bf16", lambda: native)  # of a GPU
    recipe = load_recipe(tiny_recipe(tmp_path))
    recipe.train.precision, recipe.evaluate.precision = trained, evaluated
    text = describe_run(recipe, resolve_engine_config(None, recipe, 1, "cpu"), 1)
    assert ("bf16 is emulated" in text) == bool(told)
    assert (told or "") in text
