"""Loading in the precision of the file: nothing is converted twice, and no bit is lost."""

import pytest
import torch
from safetensors.torch import save_file

from eval.measure.checkpoint import Checkpoint
from eval.measure.classifier import Source, _load
from pipeline.checkpoint import publish
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.model.load import build_model, check_objective, load_config
from pipeline.model.save import adapter_names, save_model
from pipeline.ranks import world_size
from pipeline.recipe import Lora, Model
from pipeline.run.build import _in_fp32, build_engine
from pipeline.run.methods import teacher_at
from tests.reference import MODELS
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, recipe_for, zero_engine

DTYPES = (torch.bfloat16, torch.float16)
KINDS = ("zero2", "zero3", "zero3 offload", "fsdp")


def started(folder, kind):
    """(dtypes as loaded, of the buffers, weights from which a bf16 engine does not start)."""
    recipe = recipe_for("llama", 2 * world_size())
    recipe.train.precision = "bf16"
    model = Model(path=str(folder), objective="causal")
    net = build_model(model, load_config(model), None, seed=0, keep_dtype=True)
    expected = {n: p.detach().clone() for n, p in net.named_parameters()}
    loaded = {p.dtype for p in net.parameters()}
    if kind == "fsdp":
        engine = fsdp_engine(net, recipe, {})
    else:
        engine = zero_engine(net, recipe, ENGINES[kind])
        # DeepSpeed's fp32 weights are copies of the bf16 ones.
        expected = {n: w.bfloat16() for n, w in expected.items()}
    wrong = [n for n, w in engine.full_weights() if not torch.equal(w, expected[n].float())]
    buffers = {b.dtype for b in engine.module.buffers()}
    engine.close()
    return loaded, buffers, wrong


def all_started(folders):
    return {(d, kind): started(f, kind) for d, f in folders.items() for kind in KINDS}


def test_engines_start_from_the_weights_of_the_file(tmp_path):
    folders = {dtype: tmp_path / str(dtype) for dtype in DTYPES}
    for dtype, folder in folders.items():
        MODELS["llama"]().to(dtype).save_pretrained(folder)
    for results in run_ranks(all_started, 2, folders):
        for (dtype, kind), (loaded, buffers, wrong) in results.items():
            assert loaded == {dtype}, kind
            assert buffers == {torch.float32}, kind  # the rotary frequencies
            assert not wrong, (dtype, kind)


@pytest.mark.parametrize("lora", [Lora(r=4), Lora(r=4, experts=2)])
def test_an_adapter_over_a_base_in_half_precision_goes_on_in_fp32(lora, tmp_path):
    """The masters are made of `_in_fp32`: they are what was published, to the bit."""
    MODELS["llama"]().bfloat16().save_pretrained(tmp_path / "base")
    model = Model(path=str(tmp_path / "base"), objective="causal", lora=lora)
    config = load_config(model)
    net = build_model(model, config, None, seed=0, keep_dtype=True)
    names = adapter_names(net)
    published = {n: torch.randn(net.get_parameter(n).shape) for n in names}
    (tmp_path / "adapter").mkdir()
    save_model(net, published.items(), tmp_path / "adapter", torch.float32)
    again = build_model(model, config, tmp_path / "adapter", seed=0, keep_dtype=True)
    exact = dict(_in_fp32(again))
    assert exact.keys() == published.keys()
    assert all(torch.equal(w, published[n]) for n, w in exact.items())
    ids = torch.arange(5, 25).reshape(2, 10)
    assert all(n(input_ids=ids).logits.isfinite().all() for n in (net, again))


class Engine:
    """Keeps what it is given."""

    def __init__(self, *_):
        pass

    def load_weights(self, weights):
        self.given = dict(weights)


def test_what_another_run_keeps_beside_a_checkpoint_is_no_part_of_it(tmp_path, monkeypatch):
    """A model of a run that is under way: its fp32 weights go when its next stage is published."""
    net = MODELS["llama"]()
    net.save_pretrained(tmp_path / "checkpoint")
    weights = {n: p.detach() + 1 for n, p in net.named_parameters()}
    publish(
        tmp_path / "masters", lambda folder: save_file(weights, folder / "masters.safetensors"), {}
    )
    monkeypatch.setattr("pipeline.run.build.ZeroEngine", Engine)
    recipe = recipe_for("llama", 2)
    for path, given in ((str(tmp_path / "checkpoint"), set()), ("its own", set(weights))):
        recipe.model = Model(path=str(tmp_path / "checkpoint"), objective="causal")
        config = load_config(recipe.model)
        recipe.model.path = path
        engine, _ = build_engine(recipe, {}, config, str(tmp_path / "checkpoint"))
        assert engine.given.keys() == given


def test_what_a_recipe_overrides_holds_where_its_base_is_measured_or_teaches(tmp_path):
    base = MODELS["llama"]().eval()
    base.resize_token_embeddings(400)
    base.save_pretrained(tmp_path)
    train_tokenizer(["a few words"], 300).save_pretrained(tmp_path)
    recipe = recipe_for("llama", 2)
    recipe.model = Model(path=str(tmp_path), objective="causal", overrides={"hidden_act": "relu"})
    ids = torch.arange(5, 25).reshape(2, 10)
    trained = build_model(recipe.model, load_config(recipe.model), None, seed=0).eval()
    teacher = teacher_at(recipe, str(tmp_path))
    measured = Checkpoint(str(tmp_path), None, None, "causal", "fp32", "sdpa", "cpu", None,
                          recipe.model.overrides)  # fmt: skip
    copied, _, _ = _load(Source(str(tmp_path), overrides=recipe.model.overrides))  # end tasks
    for net in (teacher.load(), measured.model, copied):
        assert torch.equal(net(input_ids=ids).logits, trained(input_ids=ids).logits)
    known = teacher.identify()
    recipe.model.overrides = {}
    assert teacher_at(recipe, str(tmp_path)).identify() != known


@pytest.mark.parametrize(
    ("name", "objective", "decodes", "problem"),
    [("roberta", "causal", False, "roberta reads the tokens that it would predict"),
     ("roberta", "causal", True, None), ("roberta", "masked", False, None),
     ("llama", "causal", False, None), ("llama", "masked", False, "set model.objective=causal"),
     ("t5", "causal", False, "set model.objective=seq2seq"), ("t5", "seq2seq", False, None)],
)  # fmt: skip
def test_the_objective_is_one_that_the_model_has(name, objective, decodes, problem):
    config = MODELS[name]().config
    config.is_decoder = decodes
    if problem is None:
        check_objective(config, objective)
    else:
        with pytest.raises(UserError, match=f"model.objective: .*{problem}"):
            check_objective(config, objective)
