"""Every method over tasks with a small T5, with and without MIGU, on 2 ranks of ZeRO-2 and FSDP2.

Two toy tasks; where the environment variables CL_BENCHMARK and T5_TOKENIZER name the folders of the
paper's files and of T5's tokenizer, the four tasks of its order 1 with that tokenizer.
"""

import json
import os

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.engine.config import resolve_engine_config
from pipeline.errors import Interrupted, UserError
from pipeline.ranks import meet, on_rank0, world_size
from pipeline.run.methods import METHODS, OTHERS
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.spawn import run_ranks
from tests.test_finetune import RECIPE

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))
FILES, TOKENIZER = os.environ.get("CL_BENCHMARK"), os.environ.get("T5_TOKENIZER")
TOYS = ("subject", "mood")
ORDER_1 = {"dbpedia": "TC", "amazon": "SC", "yahoo": "TC", "agnews": "TC"}
PLACE = '{instruction: "Where?", labels: [indoors, outdoors], train_rows: 40}'
# A rate that moves, and moments whose rounding does not.
SETTINGS = (f"data.domains.place={{embedded: toy_place, task: {PLACE}}}", "optimizer.lr=0.01",
            "optimizer.eps=0.001")  # fmt: skip
LORA = ("model.config=null", "model.train_tokenizer=null", "model.tokenizer=null")
OVERRIDES = {
    "entropy_gate": ("entropy_gate={tokens: 5}",),
    "anchor": ("anchor={text: self, tokens: 2k, cache: 8, fraction: 0.5}",),
    "olora": (*LORA, "model.lora={incremental: true}", "olora={}"),
    "mocl": (*LORA, "model.lora={incremental: true, composed: true}", "mocl={}"),
    "pseudo_replay": ("pseudo_replay={sequences: 6, fraction: 0.5}",),
    "epi": (*LORA, "model.lora={}", "start_from=base", "epi={sequences: 20}"),
    "kd": ("kd={}",),
    "ewc": ("ewc={}",),
    "l2_to_start": ("l2_to_start={}",),
    "hft": ("hft={}",),
    "mofo": ("mofo={}",),
    "hat_adapter": (*LORA, "model.lora={}", "hat_adapter={}"),
    "ema": ("ema={}",),
    "publish_average": ("publish_average={}",),
    "mask": (),
    "mask.criterion: fisher": ("mask.criterion=fisher", "mask.refresh=stage"),
    "mask.clusters": ("mask.clusters=3", "mask.cluster_by=magnitude"),
    "model.lora": (*LORA, "model.lora={}"),
    "model.lora.incremental": (*LORA, "model.lora={incremental: true}"),
    "model.lora.experts": (*LORA, "model.lora={r: 4, experts: 2}"),
    "model.prompt": (*LORA, "model.prompt={}"),
    "model.prompt.progressive": (*LORA, "model.prompt={progressive: true}"),
    "stages[].replay": ("stages[1].replay=0.1",),
    "start_from: base": ("start_from=base",),
    "start_from: nearest": ("start_from=nearest",),
}
# They look at one stack of layers, and a T5 has two: refused there, and tested elsewhere.
OF_ONE_STACK = ("das", "derpp", "ssu")
TOGETHER = (
    "entropy_gate",
    "anchor",
    "kd",
    "ewc",
    "l2_to_start",
    "hft",
    "mofo",
    "ema",
    "pseudo_replay",
    "mask.clusters",
)


def cases(method):
    """(name of the run, overrides)"""
    if method == "together":
        together = [o for name in TOGETHER for o in OVERRIDES[name]]
        return _on_engines("together", (*together, "stages[1].replay=0.1"))
    found = []
    ways = (True,) if method.startswith("mask") or not EVERYTHING else (True, False)
    for masked in (False,) if method.startswith("model.prompt") else ways:
        off = () if masked else ("mask.enabled=false",)
        found += _on_engines(str(masked), (*OVERRIDES[method], *off))
    return found


def _on_engines(name, overrides):
    """The last one is interrupted in its second stage, and goes on."""
    interrupted = (f"{name}-interrupted-zero2", (*overrides, "stages[1].evaluate_every=1"))
    return [(f"{name}-zero2", overrides), (f"{name}-fsdp", overrides), interrupted]


def write_recipe(path):
    """Returns the stages' names."""
    recipe = yaml.safe_load(RECIPE)
    if not (FILES and TOKENIZER):
        path.write_text(RECIPE)
        return list(TOYS)
    recipe["model"] |= {"tokenizer": TOKENIZER, "train_tokenizer": None}
    recipe["data"]["domains"] = {
        name: {
            "files": [f"{FILES}/{kind}/{name}/train.json*"],
            "heldout_files": [f"{FILES}/{kind}/{name}/test.json*"],
            "task": {"instruction": f"{name}:", "labels": f"{FILES}/{kind}/{name}/labels.json",
                     "max_words": 16, "train_rows": 40, "test_rows": 2},
        }
        for name, kind in ORDER_1.items()
    }  # fmt: skip
    recipe["data"]["sequence_length"] = 192
    recipe["stages"] = [{"domain": name, "steps": 2} for name in ORDER_1]
    path.write_text(yaml.safe_dump(recipe))
    return list(ORDER_1)


def run_all(folder, method):
    path = folder / "recipe.yaml"
    first, *_ = on_rank0(lambda: write_recipe(path))
    runs = cases(method)
    if any(o in LORA for _, overrides in runs for o in overrides):  # its base
        runs = [("base-zero2", (f"stages=[{{domain: {first}, steps: 1}}]",)), *runs]
    nothing = lambda *_: None  # noqa: E731

    def interrupt(engine, separation, task, recipe):
        if task.step is not None:
            raise Interrupted("SIGTERM")

    for name, overrides in runs:
        meet()
        if any(o in LORA for o in overrides):
            overrides = (f"model.path={folder}/base-zero2/stages/00_base/checkpoint", *overrides)
        fsdp = name.endswith("fsdp")
        kind = ["engine.kind=fsdp"] if fsdp else []
        recipe = load_recipe(
            path,
            [f"data.prepared={folder}/prepared", f"name={name}", *SETTINGS, *overrides, *kind],
        )
        config = resolve_engine_config(
            None if fsdp else "ds_configs/zero2.json", recipe, world_size(), "cpu"
        )
        if "interrupted" in name:
            with pytest.raises(Interrupted):
                run_recipe(recipe, config, folder, interrupt, nothing, nothing)
        run_recipe(recipe, config, folder, nothing, nothing, nothing)


@pytest.mark.parametrize("method", ["together", *(OVERRIDES if EVERYTHING else ("olora",))])
def test_methods_run_over_tasks_on_every_engine(tmp_path, method):
    """What is published is finite; the two engines publish the same, and so, to the bit, does a run
    that goes on in the middle of a stage."""
    run_ranks(run_all, 2, tmp_path, method)
    published = {}
    for name, _ in cases(method):
        *_, last = sorted((tmp_path / name / "stages").iterdir())
        assert last.name == ("04_agnews" if FILES and TOKENIZER else "02_mood")
        [file] = (last / "checkpoint").glob("*.safetensors")
        published[name] = load_file(file)
        assert all(w.isfinite().all() for w in published[name].values())
    for name, weights in published.items():
        if "interrupted" in name:
            log = (tmp_path / name / "log.jsonl").read_text().splitlines()
            begun = [r for r in map(json.loads, log) if r["event"] == "begin" and r["stage"] == 2]
            assert [r["step"] for r in begun] == [0, 1]
        whole = published[name.replace("interrupted-", "")]
        assert all(w.equal(whole[key]) for key, w in weights.items()), name
        other = published.get(name.replace("zero2", "fsdp"), weights)
        assert max(float((other[key] - w).abs().max()) for key, w in weights.items()) < 1e-5


def test_every_method_is_among_them(tmp_path):
    assert {m.name for m in METHODS} | OTHERS.keys() == OVERRIDES.keys() | set(OF_ONE_STACK)
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n" + RECIPE)
    for name in OF_ONE_STACK:
        with pytest.raises(UserError, match=f"{name}: reads the hidden states"):
            load_recipe(path, [*SETTINGS, f"{name}={{}}"])
