"""The magnitudes that `launch/inspect.py` shows are those that MIGU sums."""

import json
import shutil

import numpy as np
import pytest
import torch

from eval.analysis.magnitudes import Layer, choose, mean_overlap, overlap_of
from eval.measure.magnitudes import magnitudes_of
from eval.report.magnitude_page import write_magnitudes
from pipeline.errors import UserError
from pipeline.model.load import load_for_evaluation
from tests.test_eval import evaluate, prepared  # noqa: F401
from tests.test_experts_mask import EXPERTS, tiny


def test_they_overlap_as_the_evaluation_says_and_are_drawn(prepared):  # noqa: F811
    folder, objective = prepared
    model = load_for_evaluation(folder / "checkpoint", objective, "sdpa")
    layers = [Layer(*x) for x in magnitudes_of(model, folder / "heldout", None, 1000)]
    measured = evaluate(folder, "magnitudes", 1)["overlap"]
    for kind, table in measured["kinds"].items():
        own = [overlap_of(layer, 0.7) for layer in layers if layer.component == kind]
        np.testing.assert_allclose(np.mean(own, axis=0), table, atol=1e-9)
    for layer in layers:
        assert set(layer.magnitudes) == {"a", "b"}
        assert all(m.sum() == pytest.approx(1) for m in layer.magnitudes.values())
    few = [Layer(*x) for x in magnitudes_of(model, folder / "heldout", ["a"], 2)]
    assert list(few[0].magnitudes) == ["a"]
    assert not np.allclose(few[0].magnitudes["a"], layers[0].magnitudes["a"])
    with pytest.raises(UserError, match="has no 'c'"):
        magnitudes_of(model, folder / "heldout", ["c"], 2)
    assert choose(layers, None).component == "ffn_in"
    with pytest.raises(UserError, match="no masked layer 'nothing'"):
        choose(layers, "nothing")
    page = write_magnitudes({"before": (layers, choose(layers, None))}, 0.7, 1000, folder / "page")
    numbers = json.loads((folder / "page/report.json").read_text())["checkpoints"]["before"]
    assert numbers["layer"] == choose(layers, None).name
    assert "<svg" in page.read_text()


def test_each_expert_of_a_mixture_is_a_layer(prepared, tmp_path):  # noqa: F811
    folder, objective = prepared
    if objective != "causal":
        pytest.skip("a mixture is causal here")
    net = tiny("mixtral")
    net.resize_token_embeddings(300)
    with torch.no_grad():
        for block in net.model.layers:
            block.mlp.gate.weight.zero_()  # all tokens go to the same two experts
    net.save_pretrained(tmp_path / "checkpoint")
    shutil.copytree(folder / "heldout", tmp_path / "heldout")
    layers = [
        Layer(*x)
        for x in magnitudes_of(
            load_for_evaluation(tmp_path / "checkpoint", "causal", "sdpa"),
            tmp_path / "heldout", None, 1000,
        )
    ]  # fmt: skip
    down = [layer for layer in layers if layer.component == "ffn_out"]
    paths, experts = zip(*(layer.name.rsplit(".", 1) for layer in down), strict=True)
    assert list(paths) == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 0, 1, 1)]
    assert len(set(experts)) == 2 < EXPERTS
    measured = evaluate(tmp_path, "mixture", 1)["overlap"]["kinds"]["ffn_out"]
    own = [overlap_of(layer, 0.7) for layer in down]
    np.testing.assert_allclose(np.mean(own, axis=0), measured, atol=1e-9)


def test_checkpoints_have_names_that_tell_them_apart():
    import importlib

    names = importlib.import_module("launch.inspect")._names
    first, second = (f"runs/{r}/stages/01_math/checkpoint" for r in ("ft", "migu"))
    assert names([first, "hub/model"]) == ["01_math", "hub/model"]
    assert names([first, second]) == ["ft/01_math", "migu/01_math"]
    far = "other/ft/stages/01_math/checkpoint"
    assert names([first, far]) == [first, far]
    with pytest.raises(UserError, match="given twice"):
        names([first, first])


def test_the_overlap_by_hand():
    values = {"x": np.array([4.0, 3, 2, 1, 0]), "y": np.array([4.0, 0, 3, 1, 2])}
    layer = Layer("l", "q", values)
    np.testing.assert_allclose(overlap_of(layer, 0.6), [[1, 0.5], [0.5, 1]])  # two rows are kept
    assert mean_overlap(layer, 0.6) == 0.5
