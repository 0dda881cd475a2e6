"""Runs with an anchor: where its text comes from, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.checkpoint import read_manifest
from pipeline.data.prepare import prepare
from pipeline.data.tokenizer import train_tokenizer
from pipeline.engine.config import resolve_engine_config
from pipeline.errors import UserError
from pipeline.methods.anchor import Anchor
from pipeline.ranks import world_size
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.spawn import run_ranks
from tests.test_run import tiny_recipe, write_corpus


def run(recipe, overrides, folder, engine="zero0"):
    """The KL of every step of a run of these ranks, and the folders of anchor text."""
    fixed = [f"data.prepared={folder / 'prepared'}", "optimizer={lr: 1.0e-2, schedule: constant}"]
    dropout = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    if not any("lora" in o for o in overrides):
        fixed += [f"model.config.{key}=0" for key in dropout]
    fsdp = ["engine.kind=fsdp"] if engine == "fsdp" else []
    whole = load_recipe(recipe, [*fixed, *overrides, *fsdp])
    json_file = None if fsdp else f"ds_configs/{engine}.json"
    config = resolve_engine_config(json_file, whole, world_size(), "cpu")
    nothing = lambda *_: None  # noqa: E731
    run_recipe(whole, config, folder / "runs", nothing, nothing, nothing)
    lines = (folder / "runs" / whole.name / "log.jsonl").read_text().splitlines()
    steps = [e["methods"]["anchor"] for e in map(json.loads, lines) if e["event"] == "step"]
    return steps, sorted((folder / "prepared").glob("anchor-*"))


@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_with_lora_the_live_teacher_is_the_model_without_its_adapter(tmp_path, quantize):
    """It needs no copy, and its KL is that of the cached predictions of all tokens."""
    recipe = tiny_recipe(tmp_path)
    model = "model={path: base, objective: causal, lora: {r: 4, dropout: 0, quantize: QUANTIZE}}"
    base = build_base(tmp_path / "base")
    lora = [model.replace("base", str(base)).replace("QUANTIZE", quantize)]
    lora += ["stages=[{domain: a, steps: 4}]", "mask={threshold: 0.5}"]
    live, cached = (
        run(recipe, [*lora, f"name={name}", f"anchor={{tokens: 300, fraction: 0.5, cache: {k}}}"],
            tmp_path)[0]
        for name, k in (("live", 0), ("cached", 300))
    )  # fmt: skip
    assert live[-1] > 1e-4
    assert cached == pytest.approx(live, rel=1e-3, abs=1e-6)
    engines = ("zero2", "zero3") if quantize == "4bit" else ("zero2", "zero3", "fsdp")
    overrides = [*lora, "anchor={tokens: 300, fraction: 0.5, cache: 0}"]
    for found in run_ranks(run_on, 2, recipe, overrides, tmp_path, engines):
        for engine, steps in found.items():
            assert steps == pytest.approx(live, rel=1e-3, abs=1e-6), engine


def run_on(recipe, overrides, folder, engines):
    return {e: run(recipe, [*overrides, f"name={e}"], folder, e)[0] for e in engines}


def build_base(folder):
    """A causal model and its tokenizer in a folder."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_text_of_a_domain_is_that_of_its_files(tmp_path):
    """Files that change, and settings that make other tokens of them, make another text."""
    write_corpus(tmp_path / "c.jsonl.gz", "a")
    domain = f"data.domains.c={{files: ['{tmp_path}/c.jsonl.gz'], heldout_fraction: 0.2}}"
    fixed = [domain, "anchor={text: c}", f"data.prepared={tmp_path / 'prepared'}"]
    tokenizer = train_tokenizer(["a text"], 300)

    def key(*overrides):
        recipe = load_recipe(tiny_recipe(tmp_path), [*fixed, *overrides])
        prepare(recipe, "c", tokenizer)
        return Anchor(recipe)._key(SimpleNamespace(tokenizer=tokenizer), {})

    first = key()
    assert key() == first
    found = {first, key("data.packing=false"), key(domain.replace("0.2", "0.3"))}
    write_corpus(tmp_path / "c.jsonl.gz", "b")
    assert len({*found, key()}) == 4


def test_an_anchor_in_a_run(tmp_path):
    """The teacher's own text and a domain's; the base or the stage before; text is shared by runs
    that would make the same."""
    recipe = tiny_recipe(tmp_path)
    small = "anchor={tokens: 300, fraction: 0.5, cache: 64"
    steps, texts = run(recipe, ["name=one", f"{small}}}"], tmp_path)
    assert len(texts) == 1
    assert abs(steps[0]) < 1e-5 < steps[-1]  # the KL to the model that it was
    told = json.loads((tmp_path / "runs/one/kept/anchor/stage-00.json").read_text())
    assert told.items() >= {"folder": str(texts[0]), **read_manifest(texts[0])}.items()
    free, texts = run(recipe, ["name=two", f"{small}, weight: 1.0e-6}}"], tmp_path)
    assert len(texts) == 1
    assert steps[-1] < free[-1]  # of the same text
    previous, texts = run(recipe, ["name=three", f"{small}, teacher: previous}}"], tmp_path)
    assert len(texts) == 2  # of the base the same, of stage 1 another
    assert abs(previous[12]) < 1e-5 < previous[11]
    only_a = "stages=[{domain: a, steps: 3}]"
    assert run(recipe, ["name=four", f"{small}, text: b}}", only_a], tmp_path)[0]
    # Controls: text without sense, and its own loss in place of the KL, which starts far from 0.
    steps, _ = run(recipe, ["name=five", f"{small}, text: random}}", only_a], tmp_path)
    assert abs(steps[0]) < 1e-5
    learnt = "anchor={tokens: 300, fraction: 0.5, loss: cross_entropy}"
    assert run(recipe, ["name=six", learnt, only_a], tmp_path)[0][0] > 4
    with pytest.raises(UserError, match=r"anchor\.text: a stage trains on 'b'"):
        load_recipe(recipe, [f"{small}, text: b}}"])
    with pytest.raises(UserError, match="less than one sequence a step"):
        load_recipe(recipe, ["anchor={fraction: 0.1}"])
