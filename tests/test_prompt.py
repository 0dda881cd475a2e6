"""Soft prompts: PEFT reads what is published, and nothing else of the model moves."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from eval.measure.lm import losses_of, measure_in_engine
from pipeline.engine.config import resolve_engine_config
from pipeline.errors import UserError
from pipeline.model.attention import arrange, separate_documents
from pipeline.model.load import load_for_evaluation
from pipeline.model.prompt import add_prompt, save_prompt, without_prompt
from pipeline.ranks import meet, on_rank0, world_size
from pipeline.recipe import Prompt
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.spawn import run_ranks
from tests.test_finetune import RECIPE, answer

MODELS = {
    "causal": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=60, n_positions=40,
                   bos_token_id=1, eos_token_id=1)
    ),
    "seq2seq": lambda: T5ForConditionalGeneration(
        T5Config(d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, vocab_size=60,
                 decoder_start_token_id=0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("objective", MODELS)
def test_peft_reads_it_and_answers_the_same(tmp_path, objective):
    torch.manual_seed(0)
    base = MODELS[objective]().eval()
    base.save_pretrained(tmp_path / "base")
    add_prompt(base, Prompt(tokens=3), str(tmp_path / "base"), None, seed=1)
    base.soft_prompt.new.data.normal_()
    save_prompt(base, base.soft_prompt.named_parameters("soft_prompt"), tmp_path / "prompt",
                torch.float32)  # fmt: skip
    ours = load_for_evaluation(tmp_path / "prompt", objective, "sdpa")
    theirs = PeftModel.from_pretrained(MODELS[objective](), tmp_path / "prompt")
    plain = MODELS[objective]().from_pretrained(tmp_path / "base").eval()
    theirs.base_model.load_state_dict(plain.state_dict())
    theirs.eval()

    ids = torch.randint(2, 60, (2, 9))
    labels = ids.clone()
    labels[:, :5] = -100
    batch = {"input_ids": ids, "labels": labels, "segments": torch.zeros_like(ids)}
    separation = separate_documents(ours, objective == "causal", False, "auto", 9)
    inputs, tokens = arrange(batch, separation, ours)
    mine = ours(**inputs).logits[tokens["labels"] >= 0]
    given, tokens = separation.arrange(batch, torch.float32)
    if objective == "causal":
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = theirs(**given).logits
    their = logits[:, -labels.shape[1] :][labels >= 0] if objective == "causal" else logits.flatten(
        0, 1
    )  # fmt: skip
    torch.testing.assert_close(mine, their)
    with without_prompt(ours):  # the base
        inputs, tokens = arrange(batch, separation, ours)
        alone = ours(**inputs).logits[tokens["labels"] >= 0]
    assert not torch.allclose(alone, mine)
    expected = plain(**separation.arrange(batch, torch.float32)[0]).logits
    torch.testing.assert_close(alone, expected[tokens["labels"] >= 0])

    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 4}
    front = torch.from_numpy(np.tile(ours.soft_prompt.ids, (2, 1)))
    known = torch.cat([front, ids], dim=1)
    said = ours.generate(input_ids=known, attention_mask=torch.ones_like(known), **settings)
    their = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(said[:, -4:], their[:, -4:])


def run_stages(folder):
    path = folder / "recipe.yaml"
    on_rank0(lambda: path.write_text(RECIPE + "mask: {enabled: false}\noptimizer: {lr: 0.3}\n"))
    nothing = lambda *_: None  # noqa: E731
    fixed = (f"data.prepared={folder}/prepared", "model.prompt={tokens: 3, progressive: true}")
    for name, more in {"zero3": (), "fsdp": ("engine.kind=fsdp",)}.items():
        meet()
        recipe = load_recipe(path, [*fixed, f"name={name}", *more])
        zero = None if name == "fsdp" else "ds_configs/zero3.json"
        config = resolve_engine_config(zero, recipe, world_size(), "cpu")
        evaluate = answer if name == "zero3" else nothing
        run_recipe(recipe, config, folder, measure_in_engine, evaluate, nothing)
        if name == "zero3":  # as after an interruption: the stage is published, and not measured
            measured = folder / "zero3/stages/01_subject/eval.json"
            on_rank0(partial(measured.rename, measured.with_name("first.json")))
            run_recipe(recipe, config, folder, measure_in_engine, evaluate, nothing)


def test_each_stage_adds_a_prompt_before_the_frozen_earlier_ones(tmp_path):
    run_ranks(run_stages, 2, tmp_path)
    found = {
        run: [
            load_file(tmp_path / run / f"stages/{s}/checkpoint/adapter_model.safetensors")
            for s in ("01_subject", "02_mood")
        ]
        for run in ("zero3", "fsdp")
    }
    for run, (first, second) in found.items():
        (one,), (two,) = first.values(), second.values()
        assert (one.shape, two.shape) == ((3, 16), (6, 16))
        assert torch.equal(two[3:], one), run  # to the bit
        assert torch.isfinite(two).all()
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    stages = tmp_path / "zero3/stages"
    losses = [
        json.loads((stages / s / "eval.json").read_text())["domains"]["mood"]["loss"]
        for s in ("00_base", "01_subject", "02_mood")
    ]
    base = load_for_evaluation(stages / "00_base/checkpoint", "seq2seq", "sdpa")
    alone = losses_of(base, tmp_path / "zero3/heldout")
    assert losses[0] == pytest.approx(alone["mood"], rel=1e-5)  # no prompt yet
    assert len(set(losses)) == 3  # each with its prompts
    first = json.loads((stages / "01_subject/first.json").read_text())["domains"]["mood"]["loss"]
    assert losses[1] == pytest.approx(first, rel=1e-5)  # without the prompt of stage 2
    assert all((stages / s / "tasks.json").is_file() for s in ("00_base", "01_subject", "02_mood"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mask.enabled=true", "no linear is trained whose rows could be masked"),
        ("data.packing=true", "set data.packing=false"),
        ("model.lora={}", "give at most one of `lora` and `prompt`"),
        ("kd={}", "kd: has nothing to work on beside model.prompt"),
        ("model.prompt.tokens=0", "model.prompt.tokens: 0 must be at least 1"),
    ],
)
def test_what_a_prompt_does_not_go_with_is_named(tmp_path, override, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n" + RECIPE)
    with pytest.raises(UserError, match=message):
        load_recipe(path, ["mask.enabled=false", "model.prompt={}", override])
