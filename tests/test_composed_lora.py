"""Adapters by stage, of which every text takes its own shares."""

import json
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from eval.measure.lm import losses_of, measure_in_engine
from pipeline.engine.config import resolve_engine_config
from pipeline.errors import UserError
from pipeline.methods.anchor import _without_adapter
from pipeline.methods.mocl import Mocl
from pipeline.model.composed_lora import add_composed, load_composed, save_composed
from pipeline.model.load import load_for_evaluation
from pipeline.model.save import adapter_names
from pipeline.ranks import meet, on_rank0, world_size
from pipeline.recipe import Lora
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.reference import MODELS
from tests.spawn import run_ranks
from tests.test_finetune import RECIPE, answer
from tests.test_lora import randomize_b

IDS = torch.arange(5, 25).reshape(2, 10)
REAL = torch.arange(10) < torch.tensor([[10], [7]])
LORA = Lora(r=2, alpha=4, dropout=0.0, incremental=True, composed=True)
KIND = "SEQ_2_SEQ_LM"


def answered(net, rows=slice(None)):
    return net(
        input_ids=IDS[rows], attention_mask=REAL[rows].long(), decoder_input_ids=IDS[rows, :4]
    ).logits


def published(net, folder):
    folder.mkdir()
    names = set(adapter_names(net))
    weights = [(n, p.detach()) for n, p in net.named_parameters() if n in names]
    save_composed(net, weights, folder, torch.float32)
    return folder


def two_stages(folder):
    """(a model in its second stage, what its first has published)"""
    MODELS["t5"]().save_pretrained(folder / "base")
    net = MODELS["t5"]().eval()
    add_composed(net, LORA, str(folder / "base"), None, KIND, seed=1)
    first = published(randomize_b(net), folder / "first")
    net = MODELS["t5"]().eval()
    load_composed(net, first, LORA, KIND, seed=1)
    torch.manual_seed(5)
    for name, p in net.named_parameters():
        if "lora_B.default" in name:
            p.data.normal_(std=0.5)
    return net, first


def test_each_adapter_counts_by_the_cosine_of_a_text_to_its_key(tmp_path):
    net, first = two_stages(tmp_path)
    layer = net.encoder.block[0].layer[0].SelfAttention.q
    seen = {}
    layer.register_forward_hook(lambda _m, x, y: seen.update(x=x[0], y=y))
    answered(net)
    embedded = net.shared(IDS)
    keys = torch.cat([net.composition.earlier, net.composition.new])
    for row, length in enumerate((10, 7)):  # padding does not count
        text = embedded[row, :length].mean(0)
        cosines = (keys @ text) / keys.norm(dim=1) / text.norm()
        shares = (8 * cosines).softmax(0)
        x = seen["x"][row]
        a, b = layer.lora_A, layer.lora_B
        adapters = [b[n].weight @ a[n].weight for n in ("earlier", "default")]
        added = sum(2 * share * (x @ w.T) for share, w in zip(shares, adapters, strict=True))
        torch.testing.assert_close(seen["y"][row], layer.base_layer(x) + added)
        torch.testing.assert_close(net.composition.distance[row], 1 - cosines[1])
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert all(".default." in n or n == "composition.new" for n in trained)
    assert "composition.new" in trained
    alone = load_for_evaluation(first, "seq2seq", "sdpa")  # of one stage: all of its adapter
    assert torch.equal(alone.composition.shares, torch.empty(0))
    answered(alone)
    assert torch.equal(alone.composition.shares, torch.ones(2, 1))


def test_a_text_does_not_see_the_others_of_its_batch(tmp_path):
    net, _ = two_stages(tmp_path)
    together = answered(net)
    torch.testing.assert_close(answered(net, slice(1, 2)), together[1:])


def test_what_is_published_is_read_here_and_refused_by_peft(tmp_path):
    net, first = two_stages(tmp_path)
    second = published(net, tmp_path / "second")
    one, two = (load_file(f / "adapter_model.safetensors") for f in (first, second))
    assert one.keys() == two.keys()
    for name, weight in one.items():  # the first stage's, to the bit
        earlier, _ = two[name].split(len(weight) if name == "keys" else 2,
                                     dim=1 if "lora_B" in name else 0)  # fmt: skip
        assert torch.equal(earlier, weight), name
    again = load_for_evaluation(second, "seq2seq", "sdpa")
    torch.testing.assert_close(answered(again), answered(net))
    # Written word by word: the shares are those of the prompt throughout.
    how = {"attention_mask": REAL.long(), "max_new_tokens": 4, "min_new_tokens": 4,
           "do_sample": False}  # fmt: skip
    written = again.generate(input_ids=IDS, **how)
    logits = again(input_ids=IDS, attention_mask=REAL.long(), decoder_input_ids=written[:, :-1])
    assert torch.equal(written[:, -1], logits.logits[:, -1].argmax(-1))
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(MODELS["t5"](), second)
    save_file({**two, "keys": two["keys"][:1]}, second / "adapter_model.safetensors")
    with pytest.raises(UserError, match="its keys are not those of 2 stages"):
        load_for_evaluation(second, "seq2seq", "sdpa")


def test_a_prediction_has_the_distance_of_its_row():
    method = object.__new__(Mocl)
    method.factor = 0.5
    method._composition = type("", (), {"distance": torch.tensor([0.2, 0.6])})
    targets = torch.tensor([[-100, 3, 4], [5, -100, -100]])
    found = method.weigh(torch.tensor([1.0, 2.0, 3.0]), None, targets, {})
    torch.testing.assert_close(found, torch.tensor([1.1, 2.1, 3.3]))


def run_stages(folder):
    path = folder / "recipe.yaml"
    on_rank0(lambda: path.write_text(RECIPE + "optimizer: {lr: 0.02}\nmocl: {}\n"))
    nothing = lambda *_: None  # noqa: E731
    base = load_recipe(
        path, [f"data.prepared={folder}/prepared", "name=base", "mocl=null",
               "stages=[{domain: subject, steps: 1}]"]
    )  # fmt: skip
    zero2 = "ds_configs/zero2.json"
    run_recipe(base, resolve_engine_config(zero2, base, world_size(), "cpu"), folder,
               nothing, nothing, nothing)  # fmt: skip
    fixed = (
        f"data.prepared={folder}/prepared",
        f"model.path={folder}/base/stages/00_base/checkpoint",
        "model.config=null",
        "model.train_tokenizer=null",
        "model.lora={incremental: true, composed: true, dropout: 0}",
        "model.overrides={dropout_rate: 0.0}",
    )
    runs = {
        "zero3": ("ds_configs/zero3.json", ()),
        "fsdp": (None, ("engine.kind=fsdp",)),
        "split": (zero2, ("train.micro_batch_size=1",)),
    }
    for name, (zero, more) in runs.items():
        meet()
        recipe = load_recipe(path, [*fixed, f"name={name}", *more])
        config = resolve_engine_config(zero, recipe, world_size(), "cpu")
        evaluate = answer if name == "zero3" else nothing
        run_recipe(recipe, config, folder, measure_in_engine, evaluate, nothing)
        if name == "zero3":  # as after an interruption: the stage is published, and not measured
            measured = folder / "zero3/stages/01_subject/eval.json"
            on_rank0(partial(measured.rename, measured.with_name("first.json")))
            run_recipe(recipe, config, folder, measure_in_engine, evaluate, nothing)


def test_every_engine_and_split_publishes_the_same(tmp_path):
    """With MIGU's mask. Keys move toward their texts; those of earlier stages stay, to the bit."""
    run_ranks(run_stages, 2, tmp_path)
    found = {
        run: [
            load_file(tmp_path / run / f"stages/{s}/checkpoint/adapter_model.safetensors")
            for s in ("01_subject", "02_mood")
        ]
        for run in ("zero3", "fsdp", "split")
    }
    for run, (first, second) in found.items():
        assert torch.equal(second["keys"][:1], first["keys"]), run
        for name, weight in second.items():
            torch.testing.assert_close(weight, found["zero3"][1][name], atol=1e-4, rtol=0)
    checkpoint = tmp_path / "zero3/stages/02_mood/checkpoint"
    net = load_for_evaluation(checkpoint, "seq2seq", "sdpa")
    alone = losses_of(net, tmp_path / "zero3/heldout")

    measured = json.loads((checkpoint.parent / "eval.json").read_text())["domains"]
    assert measured["mood"]["loss"] == pytest.approx(alone["mood"], rel=1e-4)
    assert (checkpoint.parent / "tasks.json").is_file()
    first = tmp_path / "zero3/stages/01_subject"
    one, two = (json.loads((first / f).read_text())["domains"] for f in ("first.json", "eval.json"))
    assert two["mood"]["loss"] == pytest.approx(one["mood"]["loss"], rel=1e-5)  # all of its share


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mocl={}"], "mocl: draws the keys of composed adapters; set model.lora="),
        (["model.lora={composed: true}"], "set model.lora.incremental=true"),
        (["model.lora={composed: true, incremental: true}"], "nothing draws the keys"),
        (["model.lora={composed: true, incremental: true}", "mocl={}", "data.packing=true"],
         "set data.packing=false"),
        (["model.lora={composed: true, incremental: true}", "mocl={weight: 0}"],
         "mocl.weight: must be positive"),
        (["model.lora={composed: true, incremental: true, quantize: 4bit}", "mocl={}"],
         "has not been tried with it"),
    ],
)  # fmt: skip
def test_what_composed_adapters_do_not_go_with_is_named(tmp_path, overrides, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n" + RECIPE)
    with pytest.raises(UserError, match=message):
        load_recipe(path, overrides)


def test_taking_the_adapters_off_for_a_moment_trains_no_more_of_them(tmp_path):
    net, _ = two_stages(tmp_path)
    with_all, trained = answered(net), {n for n, p in net.named_parameters() if p.requires_grad}
    with _without_adapter(net):
        alone = answered(net)
    torch.testing.assert_close(alone, answered(MODELS["t5"]().eval()))
    assert not torch.allclose(alone, with_all)
    torch.testing.assert_close(answered(net), with_all)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == trained
