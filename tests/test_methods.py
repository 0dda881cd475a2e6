"""The defining property of each small method, on the pieces of every kind of engine."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pipeline.engine.config import resolve_engine_config
from pipeline.errors import UserError
from pipeline.methods.half import Half
from pipeline.methods.l2_to_start import L2ToStart
from pipeline.methods.method import Start, Teacher
from pipeline.methods.olora import OLora
from pipeline.methods.source_columns import SourceColumns, input_norms
from pipeline.model.lora import EARLIER, add_adapter
from pipeline.ranks import rank, world_size
from pipeline.recipe import L2ToStart as L2Settings
from pipeline.recipe import Lora, Recipe
from pipeline.recipe import OLora as OLoraSettings
from pipeline.recipe import SourceColumns as SourceSettings
from pipeline.run import nearest
from pipeline.run.methods import METHODS, NEEDS, needs_table, teacher_at
from pipeline.run.problems import check_precision
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from pipeline.run.train import train_stage
from pipeline.shard import ParameterShards
from tests.reference import MODELS, micro_batches
from tests.spawn import run_ranks
from tests.test_anchor import BUILDS
from tests.test_anchor_run import build_base
from tests.test_baselines import texts
from tests.test_parity import recipe_for
from tests.test_run import ROOT, tiny_recipe

KINDS = ("zero0", "zero2", "zero3", "fsdp")


def start_of(engine, stage=1):
    """What the methods here look at of a stage's start."""
    return SimpleNamespace(engine=engine, stage=stage)


def with_earlier(model):
    """Frozen earlier adapters of 4 ranks, and a new one of 2; no part of either is zero."""
    for name, r, seed in ((EARLIER, 4, 1), ("default", 2, 2)):
        if name == EARLIER:
            add_adapter(model, Lora(r=r, dropout=0.0), None, None, "CAUSAL_LM", seed)
            model.peft_config[EARLIER] = model.peft_config.pop("default")
            for module in model.modules():
                for part in ("lora_A", "lora_B", "lora_dropout", "scaling", "r", "lora_alpha"):
                    held = getattr(module, part, None)
                    if held is not None and hasattr(held, "keys") and "default" in held:
                        held[EARLIER] = held.pop("default")
        else:
            add_adapter(model, Lora(r=r, dropout=0.0), None, None, "CAUSAL_LM", seed)
    model.set_adapter([EARLIER, "default"])
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name and ".default." in name)
        if ".lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def added(engine, method):
    """{(weight, start): (what `edit` added to the gradient, the weight's shape)} of this rank."""
    batch = micro_batches("llama", 1, world_size())[0][rank()]
    logits = engine.forward(input_ids=batch["input_ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten())
    engine.backward(loss, last=True)
    names = [n for n, p in engine.module.named_parameters() if p.requires_grad]
    before = [s.tensor.clone() for s in engine.shards.gradient_shards(names)]
    method.edit(engine.shards, 1, 1e-3)
    after = list(engine.shards.gradient_shards(names))
    return {
        (s.name, s.start): s.tensor - old
        for s, old in zip(after, before, strict=True)
        if s.tensor.numel()
    }


def largest_error(pieces, expected):
    """Against whole tensors by name; what is not named has nothing added."""
    worst = 0.0
    for (name, start), piece in pieces.items():
        whole = expected.get(name, torch.zeros(start + piece.numel())).flatten()
        worst = max(worst, float((piece - whole[start : start + piece.numel()]).abs().max()))
    return worst


def penalties():
    found = {}
    for kind in KINDS:
        build, settings = BUILDS[kind]
        recipe = recipe_for("llama", 2 * world_size())
        recipe.olora = OLoraSettings(weight=0.5)
        model = with_earlier(MODELS["llama"]().train())
        expected = {}
        for name, p in model.named_parameters():
            if ".lora_A.default." in name:
                earlier = model.get_parameter(name.replace(".default.", f".{EARLIER}."))
                new = p.detach().clone().requires_grad_()
                (0.5 * (earlier.detach() @ new.t()).abs().sum()).backward()
                expected[name] = new.grad
        engine = build(model, recipe, settings)
        method = OLora(recipe)
        method.prepare(start_of(engine))
        found[f"olora, {kind}"] = largest_error(added(engine, method), expected)
        engine.close()

        recipe = recipe_for("llama", 2 * world_size())
        recipe.l2_to_start = L2Settings(weight=0.3)
        model = MODELS["llama"]().train()
        first = {n: p.detach().clone() for n, p in model.named_parameters()}
        engine = build(model, recipe, settings)
        method = L2ToStart(recipe)
        method.prepare(start_of(engine))
        moved = {n: w + torch.sin(torch.arange(w.numel())).view_as(w) for n, w in first.items()}
        engine.load_weights(moved.items())
        expected = {n: 0.3 * (moved[n] - w) for n, w in first.items()}
        found[f"l2_to_start, {kind}"] = largest_error(added(engine, method), expected)
        engine.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_penalties_add_their_gradient_to_every_engines_pieces(ranks):
    for results in run_ranks(penalties, ranks):
        for case, error in results.items():
            assert error < 1e-6, case


def moved_by(kind, method, recipe, stage):
    """By weight: the rows or columns of it that three steps changed."""
    build, settings = BUILDS[kind]
    engine = build(MODELS["llama"]().train(), recipe, settings)
    method.prepare(start_of(engine, stage))
    before = {n: w.clone() for n, w in engine.full_weights()}
    steps = micro_batches("llama", 3, world_size())
    mine = iter([s[rank() : rank() + 1] for s in steps])
    train_stage(engine, None, mine, recipe, 1, 3, log=None, methods=[method])
    changed = {n: w != before[n] for n, w in engine.full_weights()}
    engine.close()
    return changed


def frozen():
    found = []
    for kind in ("zero2", "zero3"):
        recipe = recipe_for("llama", 2 * world_size())
        recipe.optimizer.weight_decay = 0.0
        for stage in (1, 2):
            method = Half(recipe)
            changed = moved_by(kind, method, recipe, stage)
            same = sorted(n for n, c in changed.items() if not c.any())
            found.append((same, sorted(method.frozen)))
        recipe.ssu = SourceSettings(share=0.5)
        method = SourceColumns(recipe)
        keep = torch.arange(30) % 2 == 0
        name = "model.layers.0.self_attn.q_proj.weight"
        method._keep = {name: (keep, 1)}
        changed = moved_by(kind, method, recipe, 1)
        found.append((changed[name].any(0).tolist(), keep.tolist()))
    return found


def test_what_a_method_freezes_does_not_move_and_all_else_does():
    halves = run_ranks(frozen, 2)[0]
    for moved, expected in halves:
        assert moved == expected
    first, second = halves[0][0], halves[1][0]
    assert first != second  # another half in another stage
    assert len(first) == len(second) == 2 * (2 + 1)  # of 4 and 3 matrices in each of 2 blocks


def example_of_the_docs():
    """Whether embeddings moved in the first and in the second half of a stage."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    names = {}
    exec(text.split("```python\n")[-1].split("```")[0], names)
    recipe = recipe_for("llama", 2)
    recipe.optimizer.weight_decay = 0.0
    moved = []
    for length in (6, 4):  # of the stage, whose first 3 steps are done
        recipe.stages[0].steps = length
        changed = moved_by("zero2", names["LateEmbeddings"](recipe), recipe, 1)
        moved.append(bool(changed["model.embed_tokens.weight"].any()))
    return moved


def test_the_example_of_the_docs_does_what_it_says():
    assert run_ranks(example_of_the_docs, 1)[0] == [False, True]


def test_the_page_has_what_each_method_says_that_it_needs():
    """The paper's Table 1."""
    assert needs_table() in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(set(m.needs) <= set(NEEDS) for m in METHODS)
    settings = {f.name for f in dataclasses.fields(Recipe)}
    assert {m.name for m in METHODS} <= settings


def test_input_norms_are_those_of_the_real_tokens():
    net = MODELS["llama"]().eval()
    ids = torch.arange(5, 17)[None]
    real = torch.arange(12)[None] < 9
    seen = {}
    linear = net.model.layers[1].mlp.down_proj
    hook = linear.register_forward_pre_hook(lambda _m, x: seen.update(x=x[0][0].detach()))
    norms = input_norms(net, [({"input_ids": ids}, real), ({"input_ids": ids}, None)])
    hook.remove()
    expected = (seen["x"][:9].square().sum(0) + seen["x"].square().sum(0)).sqrt()
    torch.testing.assert_close(norms["model.layers.1.mlp.down_proj"], expected)


def run(folder, overrides):
    recipe = load_recipe(tiny_recipe(folder), overrides)
    config = resolve_engine_config("ds_configs/zero2.json", recipe, 1, "cpu")
    nothing = lambda *_: None  # noqa: E731
    run_recipe(recipe, config, folder / "runs", nothing, nothing, nothing)
    return [folder / f"runs/tiny/stages/{stage}/checkpoint" for stage in ("01_a", "02_b")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_incremental_adapters_stay_as_they_were(tmp_path, precision):
    """What is published is one adapter: the earlier ones' ranks, to the bit, and the new ones."""
    base = build_base(tmp_path / "base")
    model = f"model={{path: {base}, objective: causal, lora: {{r: 4, incremental: true}}}}"
    anchor = "anchor={cache: 0, tokens: 1k}"  # which takes all adapters off and puts them on again
    more = ["olora={weight: 0.1}"] if precision == "fp32" else [anchor]
    first, second = run(tmp_path, [model, f"train.precision={precision}", *more])
    ranks = [json.loads((f / "adapter_config.json").read_text())["r"] for f in (first, second)]
    scales = [json.loads((f / "adapter_config.json").read_text())["lora_alpha"] / r
              for f, r in zip((first, second), ranks, strict=True)]  # fmt: skip
    assert ranks == [4, 8]
    assert scales[0] == scales[1]
    old, new = (load_file(f / "adapter_model.safetensors") for f in (first, second))
    assert old.keys() == new.keys()
    for name, weight in old.items():
        earlier, added = new[name].split(4, dim=0 if "lora_A" in name else 1)
        assert torch.equal(earlier, weight)
        assert added.any()


def test_every_stage_may_start_from_the_base(tmp_path):
    """A stage that cannot move ends with the base's weights, not with those of stage 1."""
    stages = "stages=[{domain: a, steps: 4}, {domain: b, steps: 4, lr: 1.0e-30}]"
    first, second = run(tmp_path, [stages, "start_from=base", "train.publish_dtype=bfloat16"])
    base = tmp_path / "runs/tiny/stages/00_base/checkpoint"
    one, two, zero = (load_file(f / "model.safetensors") for f in (first, second, base))
    far = {n: float((one[n] - w.bfloat16()).abs().max()) for n, w in zero.items()}
    assert max(far.values()) > 1e-3
    assert all(float((two[n] - w.bfloat16()).abs().max()) < 1e-20 for n, w in zero.items())


def test_a_stage_may_start_from_the_nearest_of_all_before(tmp_path):
    """The second stage learns nothing but noise, so that the third, which cannot move, ends with
    the weights of the first."""
    base = build_base(tmp_path / "base")
    model = f"model={{path: {base}, objective: causal}}"
    stages = "stages=[{domain: a, steps: 8}, {domain: b, steps: 4, lr: 1}, {domain: a, steps: 1}]"
    fixed = ["optimizer.lr=0.01", "stages[2].lr=1.0e-30", "mask.enabled=false"]
    run(tmp_path, [model, stages, *fixed, "start_from=nearest"])
    folder = tmp_path / "runs/tiny"
    losses = json.loads((folder / "kept/nearest/stage-03.json").read_text())["losses"]
    assert losses[1] < losses[0] < losses[2]
    one, two, three = (
        load_file(folder / f"stages/{stage}/checkpoint/model.safetensors")
        for stage in ("01_a", "02_b", "03_a")
    )
    assert all(float((three[n] - w).abs().max()) < 1e-20 for n, w in one.items())
    assert not any(torch.equal(three[n], w) for n, w in two.items())


def mean_loss_of_shares():
    """Of 40 rows, in batches of which one rank has two and the other one."""
    rows, net = texts(40), MODELS["llama"]().eval()
    recipe = recipe_for("llama", 4)
    nearest.teacher_at = lambda *_: Teacher(lambda: net, dict)  # in this rank's process alone
    start = Start(0, recipe, None, None, lambda _, count: iter(rows[:count]), None, None)
    ids = torch.stack([torch.from_numpy(row.ids) for row in rows]).long()
    with torch.no_grad():
        logits = net(input_ids=ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return nearest.mean_loss(start, 1, "unused"), float(expected)


def test_the_loss_by_which_a_start_is_chosen_is_of_the_text_of_all_ranks():
    found = run_ranks(mean_loss_of_shares, 2)
    assert len({loss for loss, _ in found}) == 1
    for loss, expected in found:
        assert loss == pytest.approx(expected, abs=1e-5)


def test_source_columns_in_a_run(tmp_path):
    """The share of the columns that the base's own text, or a domain's, uses most stays."""
    (tmp_path / "self").mkdir(), (tmp_path / "b").mkdir()
    for text in ("self", "b"):
        whole = f"ssu={{text: {text}, share: 0.25, sequences: 8}}"
        first, _ = run(tmp_path / text, [whole, "mask.enabled=false"])
        base = load_file(tmp_path / text / "runs/tiny/stages/00_base/checkpoint/model.safetensors")
        new = load_file(first / "model.safetensors")
        name = "roberta.encoder.layer.0.intermediate.dense.weight"
        assert int((new[name] == base[name]).all(0).sum()) == 4  # of 16 columns


@pytest.mark.parametrize("start", ["base", "stage"])
def test_the_start_of_the_run_is_the_base(start):
    """In the second stage the weights are still held to those of before the first, or to its own
    start."""
    model = MODELS["llama"]()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = SimpleNamespace(module=model, shards=ParameterShards(model))
    recipe = recipe_for("llama", 2)
    recipe.l2_to_start = L2Settings(start=start)
    method = L2ToStart(recipe)
    method.prepare(start_of(engine, 1))
    for p in model.parameters():
        p.data += 1
    method.prepare(start_of(engine, 2))
    for shard in method.state_shards():
        held = weights[shard.name].flatten() + (start == "stage")
        torch.testing.assert_close(shard.tensor, held)


def test_what_the_weights_are_held_to_is_not_rounded(tmp_path, monkeypatch):
    """Beside a GPU, where frozen models are in half precision."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    recipe, base = recipe_for("llama", 2), MODELS["llama"]()
    recipe.l2_to_start = L2Settings()
    base.save_pretrained(tmp_path)
    model = MODELS["llama"]()
    engine = SimpleNamespace(module=model, shards=ParameterShards(model))
    start = start_of(engine, 2)
    start.teacher = lambda _: teacher_at(recipe, str(tmp_path))
    for p in model.parameters():
        p.data += 1
    method = L2ToStart(recipe)
    method.prepare(start)  # of a run that goes on between its stages
    weights = dict(base.named_parameters())
    for shard in method.state_shards():
        assert torch.equal(shard.tensor, weights[shard.name].flatten())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["olora={}"], "model.lora.incremental=true"),
        (["hft={}", "optimizer.weight_decay=0.1"], "hft: optimizer.weight_decay"),
        (["ewc={}", "mask.refresh=stage"], "refresh: stage splits the weights that ewc works on"),
        (
            ["ewc={}", "model.lora={incremental: true}"],
            "ewc: .* model.lora.incremental freezes that",
        ),
        (["das={}", "mask.refresh=stage"], "refresh: stage splits the weights that das works on"),
        (["ssu={text: c}"], "ssu.text: 'c' is neither"),
        (["ssu={text: a}", "data.prepare=false"], "ssu.text: a domain is taken from its prepared"),
        (["start_from=nearest", "train.publish_dtype=bfloat16"], "set train.publish_dtype=float32"),
        (["start_from=base", "ewc={}"], "start_from: base makes a model of its own .* ewc is for"),
        (["l2_to_start={}", "train.precision=fp16"], "l2_to_start: adds to the gradient"),
        (["kd={teacher: base}", "start_from=base"], "kd.teacher: has no effect where every stage"),
        (
            ["anchor={teacher: previous, tokens: 2k}", "start_from=base"],
            "anchor.teacher: has no effect where every stage",
        ),
        (
            ["anchor={teacher: previous, cache: 0, tokens: 2k}", "model.lora={quantize: 4bit}"],
            "anchor.cache: 0 needs a frozen copy",
        ),
    ],
)
def test_combinations_without_sense_are_refused_by_name(tmp_path, overrides, expected):
    with pytest.raises(UserError, match=expected):
        load_recipe(tiny_recipe(tmp_path), overrides)


def test_fp16_of_deepspeeds_configuration_is_seen_too(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path), ["l2_to_start={}"])
    check_precision(recipe, "bf16")
    with pytest.raises(UserError, match="fp16 enabled:\n  l2_to_start: adds to the gradient"):
        check_precision(recipe, "fp16")
