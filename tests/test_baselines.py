"""DAS, EWC, distillation and DER++: each equals a plain loop, whatever the engine shards."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.method_settings import Das as DasSettings
from pipeline.method_settings import DerPlusPlus as DerSettings
from pipeline.method_settings import Distill as DistillSettings
from pipeline.method_settings import Ewc as EwcSettings
from pipeline.methods.das import TEMPERATURE, Das, _losses, _proxies
from pipeline.methods.derpp import DerPlusPlus
from pipeline.methods.distill import Distill
from pipeline.methods.ewc import Ewc
from pipeline.methods.importance import accumulated, gates_of, measure_importance, soft_masks
from pipeline.methods.method import Start, Teacher
from pipeline.methods.sampled_text import one_document
from pipeline.model.attention import separate_documents
from pipeline.ranks import rank, world_size
from pipeline.recipe import BadSteps, Stage
from pipeline.run.methods import check_methods
from pipeline.run.recipe_file import load_recipe
from pipeline.run.train import train_stage
from pipeline.shard import ParameterShards
from tests.reference import BETAS, CLIP, EPS, LR, MODELS, WEIGHT_DECAY, micro_batches, step_loss
from tests.spawn import run_ranks
from tests.test_anchor import BUILDS, LENGTH, teacher_of, tokenizer_of
from tests.test_experts_mask import tiny
from tests.test_parity import recipe_for

STEPS = 3
SHARDED = ("zero2", "zero3", "fsdp")


def recipe_with(name, **methods):
    recipe = recipe_for(name, 4)
    recipe.stages = [Stage("x", steps=STEPS), Stage("x", steps=STEPS)]
    for key, value in methods.items():
        setattr(recipe, key, value)
    return recipe


def start_of(engine, recipe, stage, folder, frozen=None, sequences=()):
    return Start(
        stage, recipe, tokenizer_of((recipe.model.objective == "masked" and "roberta") or "llama"),
        lambda which: Teacher(lambda: frozen, dict), lambda domain, count: iter(sequences[:count]),
        folder, folder, None, engine,
    )  # fmt: skip


def texts(count):
    """Packed sequences of one document each."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 53, (count, LENGTH), generator=generator).numpy()
    return [one_document(row, row >= 0, True) for row in ids]


def plain(name, stages=1, term=None, edit=None, after=None):
    """The weights after STEPS steps of each stage of a loop without an engine or a mask.

    term: (model, stage, step, batches) -> added to the loss. edit: (model, stage), of the gradient.
    """
    model = MODELS[name]().train()
    for stage in range(1, stages + 1):
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}]
        groups += [{"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
        for step, batches in enumerate(micro_batches(name, STEPS, 2)):
            optimizer.zero_grad()
            loss = step_loss(name, model, batches)
            (loss if term is None else loss + term(model, stage, step, batches)).backward()
            if edit is not None:
                edit(model, stage)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        if after is not None:
            after(model, stage)
    return {n: p.detach() for n, p in model.named_parameters()}


def trained(name, kind, recipe, method, prepare, stages=1):
    """The weights after training under an engine, on this rank's share."""
    build, settings = BUILDS[kind]
    engine = build(MODELS[name]().train(), recipe, settings)
    for stage in range(1, stages + 1):
        prepare(engine, stage)
        engine.start_stage(method.micro_batches())
        mine = (step[rank() :: world_size()] for step in micro_batches(name, STEPS, 2))
        train_stage(engine, None, mine, recipe, stage, STEPS, None, methods=[method])
        method.finish(engine, stage)
    weights = {n: w.clone() for n, w in engine.full_weights()}
    engine.close()
    return weights


def worst(found, expected):
    return max(float((found[n] - w).abs().max()) for n, w in expected.items())


def any_importance(name):
    """Numbers as an importance has them: heads share theirs over their features."""
    net, generator = MODELS[name](), torch.Generator().manual_seed(3)
    found = {}
    for gate in gates_of(net):
        heads = net.config.num_attention_heads if gate.kind == "heads" else gate.size
        numbers = torch.rand(heads, generator=generator)
        found[gate.key] = numbers.repeat_interleave(gate.size // heads)
    return found


def soften(importance, model, _stage):
    parameters = dict(model.named_parameters())
    for n, (keep, dimension) in soft_masks(model, importance).items():
        shape = [1] * parameters[n].dim()
        shape[dimension] = -1
        parameters[n].grad.mul_(keep.view(shape))


def soft_masked(name, kind):
    importance = any_importance(name)
    recipe = recipe_with(name, das=DasSettings(contrast=0.0))
    das = Das(recipe)

    def prepare(engine, stage):
        das._engine = engine
        das._use(importance)

    return worst(
        trained(name, kind, recipe, das, prepare), plain(name, edit=partial(soften, importance))
    )


def consolidated(name, kind, folder):
    fisher, old, sums = {}, {}, {}

    def edit(model, stage):
        for n, p in model.named_parameters():
            sums[n] = sums.get(n, 0) + p.grad**2
            if stage > 1:
                p.grad += 50.0 * fisher[n] * (p.detach() - old[n])

    def after(model, stage):
        for n, p in model.named_parameters():
            fisher[n] = 4 * sums[n] / STEPS  # of batches of 4 sequences
            old[n] = p.detach().clone()
        sums.clear()

    expected = plain(name, stages=2, edit=edit, after=after)
    recipe = recipe_with(name, ewc=EwcSettings(weight=50.0))
    ewc = Ewc(recipe)
    folder = folder / f"{name}-{kind}".replace(" ", "-")

    def prepare(engine, stage):
        ewc.prepare(start_of(engine, recipe, stage, folder))

    return worst(trained(name, kind, recipe, ewc, prepare, stages=2), expected)


def test_a_step_that_is_left_out_is_not_in_the_fisher_information(tmp_path):
    recipe = recipe_with("roberta", ewc=EwcSettings(), bad_steps=BadSteps(policy="skip"))
    net = torch.nn.Linear(3, 2, bias=False)
    engine = SimpleNamespace(
        module=net, shards=ParameterShards(net), device=torch.device("cpu")
    )  # fmt: skip
    ewc = Ewc(recipe)
    ewc.prepare(start_of(engine, recipe, 1, tmp_path))
    for step, value in enumerate((2.0, torch.nan, 1e30, 2.0), start=1):
        net.weight.grad = torch.full((2, 3), 2.0)
        net.weight.grad[0, 0] = value
        ewc.edit(engine.shards, step, 0.1)
    ewc.finish(engine, 1)
    ewc.prepare(start_of(engine, recipe, 2, tmp_path))
    assert ewc._fisher["weight"].tensor.tolist() == [4.0 * recipe.train.batch_size] * 6


def test_the_fisher_information_is_the_mean_over_all_stages_before(tmp_path):
    """By hand: of gradients of one value a step. The third stage is of an attempt of its own."""
    recipe = recipe_with("roberta", ewc=EwcSettings(weight=3.0))
    net = torch.nn.Linear(3, 2, bias=False)
    engine = SimpleNamespace(
        module=net, shards=ParameterShards(net), device=torch.device("cpu")
    )  # fmt: skip
    ewc, size = Ewc(recipe), recipe.train.batch_size
    means = [(1 + 4) / 2, 9.0, (1 + 1 + 16) / 3]
    for stage, values in enumerate(([1.0, 2.0], [3.0], [1.0, 1.0, 4.0]), start=1):
        if stage == 3:
            ewc = Ewc(recipe)
        ewc.prepare(start_of(engine, recipe, stage, tmp_path))
        fisher = size * sum(means[: stage - 1]) / max(stage - 1, 1)
        net.weight.data += 0.5
        for step, value in enumerate(values, start=1):
            net.weight.grad = torch.full((2, 3), value)
            ewc.edit(engine.shards, step, 0.1)
            expected = torch.full((2, 3), value + 3.0 * fisher * 0.5)
            torch.testing.assert_close(net.weight.grad, expected)
        ewc.finish(engine, stage)
    ewc.prepare(start_of(engine, recipe, 4, tmp_path))
    assert ewc._fisher["weight"].tensor.tolist() == pytest.approx([size * sum(means) / 3] * 6)


def importance_of(name, general):
    recipe = recipe_with(name, das=DasSettings(sequences=70))
    net = MODELS[name]().eval().requires_grad_(False)
    start = start_of(None, recipe, 0, None, sequences=texts(70))
    losses = _proxies if general else _losses
    found = measure_importance(net, losses(Das(recipe), net, start, ["x"]))
    return {key: value.tolist() for key, value in found.items()}


def compare_sharded(folder):
    found = {}
    for i, kind in enumerate(SHARDED):
        for j, name in enumerate(("roberta", "llama")):
            found[f"das, {name}, {kind}"] = soft_masked(name, kind)
            if (i + j) % 2 == 0:
                found[f"ewc, {name}, {kind}"] = consolidated(name, kind, folder)
    return found, importance_of("roberta", True), importance_of("llama", False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return run_ranks(compare_sharded, 2, tmp_path_factory.mktemp("sharded"))


def test_soft_masks_and_penalties_on_shards_equal_one_process(sharded):
    for found, *_ in sharded:
        for case, difference in found.items():
            assert difference < (1e-6 if case.startswith("das") else 1e-5), case


def test_importance_is_the_same_however_the_text_is_shared(sharded):
    for _, *shared in sharded:
        for found, alone in zip(
            shared, (importance_of("roberta", True), importance_of("llama", False)), strict=True
        ):
            for key, values in found.items():
                assert values == pytest.approx(alone[key], abs=1e-4), key


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_importance_is_the_gradient_of_a_gate(name):
    """A factor on the inputs of a linear is one on its columns: its gradient is their weights
    times theirs, summed; on its outputs, the row's and the bias's."""
    net = MODELS[name]().eval()
    [batch] = micro_batches(name, 1, 1)[0]
    found = measure_importance(net, [lambda: step_loss(name, net, [batch])])
    step_loss(name, net, [batch]).backward()
    assert len(found) == 3 * net.config.num_hidden_layers
    for gate in gates_of(net):
        linear = gate.module
        product = linear.weight * linear.weight.grad
        sums = product.sum(1 if gate.kind == "outputs" else 0)
        if gate.kind == "outputs" and linear.bias is not None:
            sums = sums + linear.bias * linear.bias.grad
        if gate.kind == "heads":
            sums = sums.view(net.config.num_attention_heads, -1).sum(1)
        expected = ((sums - sums.mean()) / sums.std()).tanh().abs().detach()
        if gate.kind == "heads":
            expected = expected.repeat_interleave(gate.size // len(expected))
        torch.testing.assert_close(found[gate.key], expected, atol=2e-3, rtol=2e-3)


def test_what_mattered_to_any_stage_is_protected_and_of_shared_heads_the_most_important():
    """Four heads of two features, of which the first two, and the last two, share key and value."""
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=6,
        )
    )  # fmt: skip
    found = {g.key: torch.zeros(g.size) for g in gates_of(net)}
    key = "model.layers.0:heads"
    first = {**found, key: torch.tensor([0.25, 0.75, 0.0, 0.125]).repeat_interleave(2)}
    second = {**found, key: torch.tensor([0.5, 0.0, 0.0, 0.25]).repeat_interleave(2)}
    importance = accumulated([first, second, found])
    assert importance[key].tolist() == [0.5, 0.5, 0.75, 0.75, 0.0, 0.0, 0.25, 0.25]
    masks = soft_masks(net, importance)
    kept = {n.split(".")[-2]: (keep.tolist(), along) for n, (keep, along) in masks.items()}
    assert kept["q_proj"] == ([0.5, 0.5, 0.25, 0.25, 1.0, 1.0, 0.75, 0.75], 0)
    assert kept["k_proj"] == kept["v_proj"] == ([0.25, 0.25, 0.75, 0.75], 0)
    assert kept["o_proj"] == (kept["q_proj"][0], 1)


def contrasted(name, kind):
    """A gate on the inputs of a linear is a factor on its columns, so that the general view can be
    had from a model with other weights."""
    importance = any_importance(name)

    def representation(model, batch):
        ids = batch["input_ids"]
        return model.base_model(ids, attention_mask=batch["attention_mask"])[0].mean(1)

    def term(model, _stage, _step, batches):
        factors, total, count = {}, 0.0, 0
        modules = {m: n for n, m in model.named_modules()}
        for gate in gates_of(model):
            factor, n = importance[gate.key], modules[gate.module]
            weight = factors.get(f"{n}.weight", model.get_parameter(f"{n}.weight"))
            if gate.kind == "outputs":
                factors[f"{n}.weight"] = weight * factor[:, None]
                if gate.module.bias is not None:
                    factors[f"{n}.bias"] = gate.module.bias * factor
            else:
                factors[f"{n}.weight"] = weight * factor
        for batch in batches:
            first = representation(model, batch)
            gated = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            body = {n.removeprefix(f"{model.base_model_prefix}."): p for n, p in factors.items()}
            general = torch.func.functional_call(model.base_model, body, kwargs=gated)[0].mean(1)
            others = torch.cat([first, general])
            likeness = F.cosine_similarity(first[:, None], others[None], dim=-1) / TEMPERATURE
            loss = F.cross_entropy(likeness, torch.arange(len(first)))
            labels = batch["labels"][:, 1:] if name == "llama" else batch["labels"]
            predicted = int((labels >= 0).sum())
            total, count = total + loss * predicted, count + predicted
        return 0.3 * total / count

    recipe = recipe_with(name, das=DasSettings(contrast=0.3))
    das = Das(recipe)

    def prepare(engine, stage):
        das._engine = engine
        das._use(importance)

    return worst(
        trained(name, "zero2", recipe, das, prepare),
        plain(name, term=term, edit=partial(soften, importance)),
    )


def distilled(name, kind):
    t = 2.0

    def term(model, _stage, _step, batches):
        total, count, frozen = 0.0, 0, teacher_of(name)
        for batch in batches:
            labels = batch["labels"]
            if name == "llama":
                labels = F.pad(labels[:, 1:], (0, 1), value=-100)
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            ours, theirs = (
                (m(**inputs).logits[labels >= 0] / t).log_softmax(-1) for m in (model, frozen)
            )
            total = total + F.kl_div(ours, theirs, reduction="sum", log_target=True)
            count += len(ours)
        return 0.7 * t * t * total / count

    recipe = recipe_with(name, kd=DistillSettings(weight=0.7, temperature=t))
    kd = Distill(recipe)

    def prepare(engine, stage):
        kd.prepare(start_of(engine, recipe, stage, None, teacher_of(name)))

    return worst(trained(name, kind, recipe, kd, prepare), plain(name, term=term))


def replayed(name, folder):
    """The second stage alone, whose buffer is of a teacher's."""
    settings = DerSettings(sequences=10, fraction=0.75, alpha=0.4, beta=0.6)
    recipe = recipe_with(name, derpp=settings)
    method = DerPlusPlus(recipe)
    stages = []

    def prepare(engine, stage):
        start = start_of(engine, recipe, 2, folder / name, teacher_of(name), texts(10))
        separation = separate_documents(MODELS[name](), name != "roberta", False, "rows", LENGTH)
        start = replace(start, separation=separation)
        method.prepare(start)
        stages.append([method.batches(step) for step in range(1, STEPS + 1)])

    weights = trained(name, "zero2", recipe, method, prepare)
    frozen = teacher_of(name)

    def term(model, _stage, step, _batches):
        total, count = 0.0, 0
        for batch in stages[0][step]:
            labels = batch["labels"]
            targets = F.pad(labels[:, 1:], (0, 1), value=-100) if name == "llama" else labels
            ids = batch["input_ids"]
            right = F.cross_entropy(
                model(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum"
            )
            wanted = labels >= 0
            with torch.no_grad():
                then = frozen.base_model(ids)[0][wanted]
            distance = ((model.base_model(ids)[0][wanted] - then) ** 2).mean(-1).sum()
            total, count = total + 0.6 * right + 0.4 * distance, count + int(wanted.sum())
        assert sum(len(b["labels"]) for b in stages[0][step]) == 3
        return total / count

    return worst(weights, plain(name, term=term))


def test_the_buffer_has_rows_of_every_earlier_stage(tmp_path):
    """In the third stage those of the first as they were kept, and other rows every step."""
    recipe = recipe_with("llama", derpp=DerSettings(sequences=6, fraction=0.75))
    recipe.stages = [Stage(domain, steps=STEPS) for domain in "abc"]
    rows, nets = texts(18), [MODELS["llama"]().eval(), teacher_of("llama")]
    of = {domain: rows[6 * i : 6 * i + 6] for i, domain in enumerate("abc")}
    for stage, net in enumerate(nets, start=2):
        method = DerPlusPlus(recipe)
        start = start_of(None, recipe, stage, tmp_path, net)
        method.prepare(replace(start, domain=lambda domain, count: iter(of[domain][:count])))
    ids = torch.stack([torch.from_numpy(row.ids) for row in (*of["a"], *of["b"])]).long()
    assert torch.equal(method._buffer["input_ids"], ids)
    for net, part in zip(nets, (slice(6), slice(6, 12)), strict=True):
        with torch.no_grad():
            hidden = net.base_model(ids[part])[0][:, 1:]  # nothing is predicted at the first token
        torch.testing.assert_close(method._buffer["hidden"][part, 1:], hidden)
    steps = [torch.cat([b["input_ids"] for b in method.batches(s)]).tolist() for s in range(9)]
    assert {len(step) for step in steps} == {3}
    drawn = {tuple(row) for step in steps for row in step}
    for part in (slice(6), slice(6, 12)):
        assert drawn & {tuple(row) for row in ids[part].tolist()}
    assert len({str(step) for step in steps}) > 5
    again = torch.cat([b["input_ids"] for b in method.batches(8)])
    assert again.tolist() == steps[8]  # as behind an interruption


def compare_alone(folder):
    found = {}
    for name in ("roberta", "llama"):
        kind = "fsdp" if name == "llama" else "zero3"
        found[f"contrast, {name}, {kind}"] = contrasted(name, kind)
        found[f"derpp, {name}"] = replayed(name, folder)
        kind = "zero3" if name == "llama" else "fsdp"
        found[f"kd, {name}, {kind}"] = distilled(name, kind)
    return found


def test_each_loss_equals_a_plain_loop(tmp_path):
    for case, difference in run_ranks(compare_alone, 1, tmp_path)[0].items():
        assert difference < 1e-5, case


BASE = """
model: {config: {model_type: roberta}, train_tokenizer: 300}
data: {domains: {a: {embedded: prose}, b: {embedded: math}}}
stages: [{domain: a, steps: 3}, {domain: b, steps: 3}]
"""


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["das={}", "data.prepare=false"], "das: reads a stage's text again"),
        (["derpp={}", "stages=[{domain: a, steps: 3}]", "data.domains.b=null"], "derpp: has no"),
        (["ewc={weight: 0}"], "ewc.weight: must be positive"),
        (["ewc={}", "train.precision=fp16"], "ewc: sums squared gradients"),
        (["kd={temperature: 0}"], "kd.temperature: must be positive"),
        (["das={dropout: 1.0}"], r"das.dropout: 1.0 is outside \(0, 1\)"),
        (["das={contrast: -1}"], "das.contrast: must be at least 0"),
        (["das={}", "model.gradient_checkpointing=true"], "das.contrast: closes units"),
        (["derpp={alpha: 0, beta: 0}"], "derpp: has no effect where alpha and beta are 0"),
        (["derpp={fraction: 0.001}"], "derpp.fraction: .* is less than one sequence"),
        (["das={contrasts: 1}"], "das.contrasts: unknown key"),
    ],
)
def test_what_a_method_cannot_do_is_said(tmp_path, overrides, problem):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(BASE)
    if "data.domains.b=null" in overrides:
        recipe.write_text(BASE.replace(", b: {embedded: math}", ""))
        overrides = overrides[:2]
    with pytest.raises(UserError, match=problem):
        load_recipe(recipe, overrides)


@pytest.mark.parametrize(
    ("settings", "net", "problem"),
    [
        ("das={}", MODELS["gpt2"], "das: gpt2 is not supported: its attention heads"),
        ("das={}", MODELS["llama"], "das: llama has no dropout"),
        ("hft={}", partial(tiny, "mixtral"), r"layers\.0\.mlp\.experts.*hft"),
        ("ssu={text: b}", partial(tiny, "mixtral"), r"layers\.0\.mlp\.experts.*ssu"),
    ],
)
def test_what_a_model_lacks_for_a_method_is_said_before_it_is_loaded(
    tmp_path, settings, net, problem
):
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    recipe = load_recipe(path, [settings])
    with torch.device("meta"):
        model = net()
    with pytest.raises(UserError, match=problem):
        check_methods(model, recipe)
    check_methods(MODELS["roberta"](), recipe)
