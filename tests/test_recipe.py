"""Mistakes in a recipe, a DeepSpeed JSON or an override are reported together, before any work."""

import gzip
import json

import pytest

from pipeline.engine.config import load_ds_config, memory_per_rank, resolve_ds_config
from pipeline.errors import UserError
from pipeline.run.recipe_file import RECIPES, load_recipe
from tests.corpora import write_cl_benchmark

GOOD = """
name: tiny
model: {config: {model_type: roberta}, train_tokenizer: 300}
data: {domains: {prose: {embedded: prose}, math: {embedded: math}}}
stages: [math]
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def problems(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.fixture
def das(tmp_path, monkeypatch):
    """Where the benchmark's corpora would be."""
    for name in ("yelp_restaurant", "acl_anthology", "ai_corpus", "format_pubmed_small"):
        (tmp_path / f"{name}.txt").write_text("a document\n")
    write_cl_benchmark(tmp_path)
    monkeypatch.setenv("CL_BENCHMARK", str(tmp_path))
    for name in ("phone", "camera"):
        (tmp_path / "absa/post_train").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"absa/post_train/{name}.txt").write_text("a document\n")
    monkeypatch.setenv("MIGU_DAS", str(tmp_path))
    for name in ("restaurant", "acl", "ai", "phone", "pubmed", "camera"):
        folder = tmp_path / "das/domains" / name
        folder.mkdir(parents=True, exist_ok=True)
        for side in ("train", "val"):
            (folder / f"{side}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    monkeypatch.setenv("MIGU_DATA", str(tmp_path))


def test_every_recipe_of_the_project_is_valid_and_in_the_docs(das):
    page = (RECIPES.parents[1] / "docs" / "recipes.md").read_text()
    for path in sorted(RECIPES.glob("*.yaml")):
        load_recipe(path.stem)
        assert f"| `{path.stem}` |" in page


def test_the_two_recipes_of_the_benchmark_differ_in_their_corpora_only(das):
    hub, files = (load_recipe(f"roberta_das{x}") for x in ("", "_files"))
    assert list(hub.data.domains) == list(files.data.domains)
    assert [s.domain for s in hub.stages] == list(hub.data.domains)
    for r in (hub, files):  # 640,000 sequences of 164 tokens
        assert {s.steps for s in r.stages} == {640_000 // r.train.batch_size}
        r.name, r.data.domains = "", {}
    assert hub == files
    assert hub.data.sequence_length == 164
    small = load_recipe("roberta_das_small")
    assert [s.domain for s in small.stages] == [s.domain for s in hub.stages]
    assert list(small.evaluate.end_tasks.tasks) == list(hub.evaluate.end_tasks.tasks)


def test_missing_corpora_of_the_benchmark_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MIGU_DAS", str(tmp_path))
    message = problems("roberta_das_files")
    assert "6 problems" in message
    assert str(tmp_path / "acl_anthology.txt") in message


CAUSAL = GOOD.replace("roberta}", "llama}").replace("300}", "300, objective: causal}")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optimizer.lr=.inf", "optimizer.lr: inf is no finite number"),
        ("stages[0].epochs=.nan", "stages[0].epochs: nan is no finite number"),
        ("evaluate.domains=[maht]", "evaluate.domains"),
        ("optimiser.lr=1", "optimiser: unknown key, on the command line"),
        (f"{'a' * 5000}=1", f"{'a' * 80}...: unknown key"),
        ("data.domains.prose.instruction={}", "embedded corpus 'prose' is text without prompts"),
        ("data.domains.c={embedded: functions}", "data.domains.c.instruction: give {}"),
        ("data.template=chat", "data.template: has no effect"),
        ("data.domains.prose.sample=1.5", r"sample: 1.5 is outside (0, 1]"),
        ("data.domains.prose.sample_seed=1", "sample_seed: has no effect"),
        ("stages=[{domain: math, steps: 5, evaluate_every: 5}]", "evaluate_every: 5 has no effect"),
        ("evaluate.benchmarks={a: {shots: -1}}", "evaluate.benchmarks.a.shots"),
        ("evaluate.benchmarks={a: {shot: 1}}", "did you mean 'shots'?"),
        ("evaluate.humaneval={top_p: 0.5}", "have no effect without `samples`"),
        ("evaluate.humaneval={samples: 2, temperature: 0}", "temperature: must be positive"),
        ("evaluate.humaneval={sandbox: none}", "evaluate.humaneval.sandbox"),
        ("evaluate.benchmark_files=/nowhere", "no such folder"),
        ("data.keep_apart=masks model.attention=flash_attention_2", "takes no masks"),
        ("data.keep_apart=rows data.cross_document=true", "data.keep_apart: has no effect"),
        ("data.keep_apart=positions model.objective=masked", "makes no masks from positions"),
    ],
)
def test_mistakes_in_tuning_and_evaluation(write, override, problem):
    overrides = override.split(" ") if override.startswith("data.keep_apart") else [override]
    assert problem in problems(write(CAUSAL), "stages=[{domain: math, steps: 5}]", *overrides)


def test_overrides_lie_over_the_file(write):
    path = write(GOOD.replace("[math]", "[{domain: math, steps: 5}]"))
    recipe = load_recipe(
        path,
        [
            "stages[0].steps=7",
            "optimizer.lr=1e-4",
            "data.domains.math.max_documents=3",
            "mask.components=[q, k]",
        ],
    )
    assert recipe.stages[0].steps == 7
    assert recipe.optimizer.lr == 1e-4
    assert recipe.data.domains["math"].max_documents == 3
    assert recipe.mask.components == ["q", "k"]


def test_all_problems_come_together_with_key_place_and_suggestion(write):
    path = write(GOOD + "mask: {treshold: 0.5}\noptimizer: {lr: fast}\ntrain: {batch_sise: 3}\n")
    message = problems(path, "seed=x", "model.config.model_type=roberta")
    assert "5 problems" in message
    assert "stages[0]: give exactly one of" in message  # of the values that are no numbers too
    assert f"mask.treshold: unknown key, in {path}; did you mean 'threshold'?" in message
    assert "train.batch_sise: unknown key" in message
    assert "'batch_size'" in message
    assert "optimizer.lr:" in message
    assert "write a number, got 'fast'" in message
    assert "seed:" in message
    assert "on the command line" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mask.threshold=1.0", "outside [0, 1)"),
        ("mask.threshold=-0.1", "outside [0, 1)"),
        ("mask.criterion=weight mask.normalize=token", "mask.normalize: has no effect"),
        ("mask.random_redraw=step", "mask.random_redraw: has no effect"),
        ("mask.from_stage=2", "not one of the stages 1 to 1"),
        ("stages=[{domain: mth, steps: 1}]", "did you mean 'math'?"),
        ("stages=[{domain: math, steps: 1, epochs: 1}]", "exactly one of"),
        ("data.domains.math={files: [/no/such/file.jsonl]}", "/no/such/file.jsonl"),
        ("data.domains.math={embedded: maths}", "math"),
        ("data.domains.math={embedded: math, hub: a/b}", "exactly one of"),
        ("data.domains.a/b={embedded: math}", "data.domains.a/b: a name is made of"),
        ("model.path=x/y", "exactly one of `path` and `config`"),
        ("optimizer.warmup=1.5", "outside [0, 1)"),
        ("data.domains.math={hub: a/b, chat_field: m}", "responses are learnt by a causal"),
        ("seed=-1", "seed: -1 must be at least 0"),
        ("evaluate.domains=[]", "evaluate.domains: the list is empty"),
        ("notakeyvalue", "written key=value"),
        (
            "model.tokenizer=${oc.env:NOWHERE}/t",
            "model.tokenizer: the environment variable",
        ),
        ("model.tokenizer=${seeds}", "model.tokenizer: Interpolation key 'seeds' not found"),
    ],
)
def test_contradictions_are_explained(write, override, expected):
    assert expected in problems(
        write(GOOD.replace("[math]", "[{domain: math, steps: 1}]")),
        *(
            override.split(" mask.")
            if " mask." not in override
            else [override.split()[0], override.split()[1]]
        ),
    )


def test_a_missing_recipe_names_the_ones_there_are():
    assert "demo" in problems("no_such_recipe")


def recipe(write, *overrides):
    return load_recipe(write(GOOD.replace("[math]", "[{domain: math, steps: 1}]")), overrides)


def ds_problems(config, r, ranks=1):
    with pytest.raises(UserError) as caught:
        resolve_ds_config(config, r, ranks, "cpu")
    return str(caught.value)


def test_auto_is_filled_from_the_recipe(write):
    config = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    r = recipe(write, "train.batch_size=48", "train.gradient_clipping=0.5")
    filled = resolve_ds_config(config, r, 3, "cpu")
    assert filled["train_batch_size"] == 48
    assert filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 4
    assert filled["gradient_clipping"] == 0.5
    assert not filled["bf16"]["enabled"]  # a CPU trains in fp32 where nothing else is asked
    explicit = resolve_ds_config(
        config, recipe(write, "train.precision=bf16", "train.batch_size=48"), 3, "cpu"
    )
    assert explicit["bf16"]["enabled"] is True


def test_mistakes_in_the_json_come_together(write):
    config = {
        "train_batch_sise": 3,
        "scheduler": {},
        "train_batch_size": 7,
        "bf16": {"enabled": True},
        "steps_per_print": "auto",
        "zero_optimization": {
            "stage": 2,
            "overlap_com": True,
            "round_robin_gradients": True,
            "offload_param": {"device": "cpu"},
        },
    }
    message = ds_problems(config, recipe(write, "train.precision=fp32"))
    for part in (
        "train_batch_sise: unknown key (DeepSpeed would ignore it); did you mean 'train_batch_size",
        "scheduler: takes no effect here",
        "train_batch_size: 7, but the recipe's train.batch_size gives 32",
        "bf16.enabled: true, but the recipe's train.precision is fp32",
        "zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?",
        "zero_optimization.round_robin_gradients: not supported",
        "zero_optimization.offload_param: needs stage 3 or more, got 2",
        'steps_per_print: "auto" is not filled here',
    ):
        assert part in message


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: write a number"),
        ({"train_micro_batch_size_per_gpu": "4"}, "train_micro_batch_size_per_gpu: write a number"),
        ({"optimizer": {"params": None}}, "optimizer.params: must be an object"),
        ({"optimizer": {"param": {"lr": 1}}}, "optimizer.param: unknown key"),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled: write true, false or "auto"'),
        ({"bf16": {"enable": True}}, "bf16: says nothing of `enabled`"),
        ({"steps_per_print": "x"}, "steps_per_print: write a number"),
        ({"data_types": {"grad_accum_dtype": "foo"}}, "write fp32, bf16 or fp16, got 'foo'"),
        ({"data_types": {"param_dtype": "bf16"}}, "param_dtype: bf16, but the run trains in fp32"),
        (
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            "without ZeRO gradients are summed in bf16",
        ),
        ({"tensorboard": True}, "tensorboard: must be an object"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype: unknown key"),
        ({"communication_data_type": "fp64"}, "communication_data_type. Supported data types"),
        ({"bf16": {"enabled": True, "grad_check": 1}}, "grad_check: Extra inputs"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads: checkpoints",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            "zero_optimization.offload_optimizer: must be an object",
        ),
        (
            {"zero_optimization": {"stage": 3, "leaf_module": []}},
            "zero_optimization: leaf_module configuration",
        ),
        (
            {"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2.0},
            "gradient_predivide_factor: DeepSpeed has it from stage 2 on only",
        ),
    ],
)
def test_a_value_over_which_deepspeed_would_stumble_is_named(write, config, part):
    assert part in ds_problems(config, recipe(write))


def test_a_batch_that_does_not_divide_is_refused(write):
    message = ds_problems({}, recipe(write, "train.batch_size=32"), ranks=3)
    assert "choose train.batch_size a multiple of 30" in message
    assert "1 problem\n" in message


def test_fp16_on_a_cpu_is_refused(write):
    assert "a CPU cannot train in fp16" in ds_problems({"fp16": {"enabled": True}}, recipe(write))


def test_broken_or_missing_json_names_file_and_line(write):
    path = write('{"a": 1,\n "b": }', "ds.json")
    with pytest.raises(UserError, match=r"ds\.json:2: not JSON"):
        load_ds_config(path)
    with pytest.raises(UserError, match=r"no such file; the folder has ds\.json"):
        load_ds_config(path.with_name("dz.json"))


def test_memory_follows_the_zero_stage():
    sizes = {}
    for stage in range(4):
        config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
        sizes[stage] = sum(sum(s) for s in memory_per_rank(1000, config, 4).values())
    # bf16 weights and gradients, fp32 master copy and two moments (Rajbhandari et al. 2020, 3.1)
    assert sizes == {0: 16_000, 1: 4_000 + 3_000, 2: 2_000 + 500 + 3_000, 3: 500 + 500 + 3_000}


def test_the_project_configurations_resolve(write):
    for path in sorted((RECIPES.parent.parent / "ds_configs").glob("*.json")):
        resolved = resolve_ds_config(load_ds_config(path), recipe(write), 2, "cpu", path.name)
        assert json.dumps(resolved).count("auto") == 0
