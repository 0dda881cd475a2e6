"""Weights written one after another are the files that transformers writes of the whole model."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pipeline.model.blocks import find_blocks
from pipeline.model.save import save_model
from tests.reference import MODELS

SMALL = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tied_llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))


def tiny_mixtral():
    """Its experts are one parameter in the model and one tensor each in the files."""
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3))


ALL = {**MODELS, "tied llama": tied_llama, "mixtral": tiny_mixtral}


def files(folder):
    """All tensors of a folder, and the names of their files."""
    paths = sorted(folder.glob("*.safetensors"))
    return {n: w for p in paths for n, w in load_file(p).items()}, [p.name for p in paths]


@pytest.mark.parametrize("name", ALL)
def test_the_files_are_those_of_save_pretrained(name, tmp_path):
    model = ALL[name]()
    model.save_pretrained(tmp_path / "theirs")
    expected, _ = files(tmp_path / "theirs")
    weights = [(n, p.detach()) for n, p in model.named_parameters()]
    for folder, limit in (("one", 10**9), ("several", 9000)):
        save_model(model, weights, tmp_path / folder, torch.float32, limit)
        found, names = files(tmp_path / folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(w, expected[n]) for n, w in found.items())
        others = {"config.json", "generation_config.json"} & {
            p.name for p in (tmp_path / "theirs").iterdir()
        }
        assert others <= {p.name for p in (tmp_path / folder).iterdir()}
        again = type(model).from_pretrained(tmp_path / folder)
        assert all(torch.equal(p, model.get_parameter(n)) for n, p in again.named_parameters())
        if folder == "one":
            assert names == ["model.safetensors"]
        else:
            index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
            assert set(index["weight_map"].values()) == set(names)
            assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
            for file in names:
                held = load_file(tmp_path / folder / file)
                size = sum(w.nbytes for w in held.values())
                assert size <= 9000 or len(held) == 1
                assert all(index["weight_map"][n] == file for n in held)


def test_half_precision_is_named_in_the_configuration(tmp_path):
    model = MODELS["llama"]()
    weights = ((n, p.detach()) for n, p in model.named_parameters())
    save_model(model, weights, tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {w.dtype for w in files(tmp_path)[0].values()} == {torch.bfloat16}


def test_no_more_than_a_block_and_a_file_is_held(tmp_path):
    model = tied_llama()
    alive = peak = 0

    def gone(size):
        nonlocal alive
        alive -= size

    def weights():
        nonlocal alive, peak
        for n, p in model.named_parameters():
            copy = p.detach().clone()
            alive += copy.nbytes
            peak = max(peak, alive)
            weakref.finalize(copy, gone, copy.nbytes)
            yield n, copy
            del copy

    limit = 9000
    save_model(model, weights(), tmp_path, torch.float32, limit)
    blocks = [model.get_submodule(n) for n in find_blocks(model)]
    block = max(sum(p.nbytes for p in b.parameters()) for b in blocks)
    whole = sum(p.nbytes for p in model.parameters())
    assert peak <= limit + 2 * block < whole
