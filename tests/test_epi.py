"""EPI: an adapter a task, and the text finds its own."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eval.measure.checkpoint import Checkpoint
from eval.measure.lm import measure_in_engine
from eval.measure.tasks import answers
from pipeline.data.encode import Encoder
from pipeline.data.heldout import load_tasks
from pipeline.engine.config import resolve_engine_config
from pipeline.errors import UserError
from pipeline.model.load import load_for_evaluation
from pipeline.model.prompt import add_prompt, save_prompt
from pipeline.model.task_adapters import (
    TaskAdapters,
    class_statistics,
    nearest,
    precision_of,
    representations,
    save_tasks,
)
from pipeline.ranks import on_rank0, world_size
from pipeline.recipe import Answers, Prompt
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.reference import MODELS
from tests.spawn import run_ranks
from tests.test_finetune import RECIPE, answer


def test_the_nearest_class_is_that_of_the_mahalanobis_distance():
    torch.manual_seed(0)
    points = torch.randn(40, 3) * torch.tensor([5.0, 1.0, 0.2])
    classes = ["a"] * 15 + ["b"] * 25
    points[15:] += torch.tensor([0.0, 3.0, 1.0])
    means, scatter = class_statistics(points, classes)
    whole = points.double().numpy()
    by_hand = [whole[:15].mean(0), whole[15:].mean(0)]
    apart = np.concatenate([whole[:15] - by_hand[0], whole[15:] - by_hand[1]])
    np.testing.assert_allclose(means.numpy(), by_hand)
    np.testing.assert_allclose(scatter.numpy(), apart.T @ apart)
    precision = precision_of(scatter, 40)
    distances = [[(x - m) @ precision.numpy() @ (x - m) for m in by_hand] for x in whole]
    assert nearest(points.double(), means, precision) == np.argmin(distances, axis=1).tolist()


def run_stages(folder):
    path = folder / "recipe.yaml"
    on_rank0(lambda: path.write_text(RECIPE + "optimizer: {lr: 0.05}\n"))
    epi = ("start_from=base", "epi={sequences: 30}", "model.lora={}")
    recipe = load_recipe(path, [f"data.prepared={folder}/prepared", "name=epi", *epi])
    config = resolve_engine_config("ds_configs/zero2.json", recipe, world_size(), "cpu")
    run_recipe(recipe, config, folder, measure_in_engine, answer, lambda _: None)


def test_every_text_is_answered_by_the_adapter_that_it_finds(tmp_path):
    run_ranks(run_stages, 2, tmp_path)
    heldout, stages = tmp_path / "epi/heldout", tmp_path / "epi/stages"
    first, second = stages / "01_subject/checkpoint", stages / "02_mood/checkpoint"
    held = {1: [first / "experts/01"], 2: [second / "experts/01", second / "experts/02"]}
    assert sorted(p.name for p in (first / "experts").iterdir()) == ["01", "tasks.safetensors"]
    for own, copies in ((first, [held[1][0], held[2][0]]), (second, [held[2][1]])):
        for copy in copies:  # to the bit, whatever was trained later
            files = [p / "adapter_model.safetensors" for p in (own, copy)]
            whole, there = map(load_file, files)
            assert all(torch.equal(w, there[n]) for n, w in whole.items())

    base = load_for_evaluation(stages / "00_base/checkpoint", "seq2seq", "sdpa")
    checkpoint = Checkpoint(str(second), None, None, "seq2seq", "fp32", "sdpa", "cpu")
    encoder = Encoder.of(checkpoint.tokenizer, "seq2seq", "plain")
    tasks = load_tasks(heldout)
    lines = (stages / "02_mood/answers.jsonl").read_text().splitlines()
    nets = {
        stage: load_for_evaluation(second / f"experts/{stage:02d}", "seq2seq", "sdpa")
        for stage in (1, 2)
    }
    found, chosen = load_file(second / "experts/tasks.safetensors"), set()
    for line in map(json.loads, lines):
        options, examples = tasks[line["task"]]
        example = examples[line["row"]]
        [point] = representations(base, encoder.prompts([example])).double()
        apart = point - found["means"].double()
        distances = (apart @ found["precision"].double() * apart).sum(1)
        stage = int(found["stages"][distances.argmin()])
        assert line["expert"] == stage
        assert line["found"] == (line["task"] == ("subject", "mood")[stage - 1])
        said = answers(nets[stage], encoder, [example], options, Answers(max_new_tokens=9))
        assert said == [line["said"]]
        chosen.add(stage)
    assert chosen == {1, 2}
    assert found["means"].shape[0] == 4 + 2  # a class for each answer
    scores = json.loads((stages / "02_mood/tasks.json").read_text())["tasks"]
    assert all(0 <= scores[task]["found"] <= 1 for task in scores)


def test_prompts_are_experts_too(tmp_path):
    torch.manual_seed(0)
    MODELS["t5"]().save_pretrained(tmp_path / "base")
    for stage in (1, 2):
        net = MODELS["t5"]()
        add_prompt(net, Prompt(tokens=2), str(tmp_path / "base"), None, seed=stage)
        folder = tmp_path / f"experts/{stage:02d}"
        folder.mkdir(parents=True)
        save_prompt(net, net.soft_prompt.named_parameters("soft_prompt"), folder, torch.float32)
    save_tasks(tmp_path, torch.eye(18)[:2], torch.tensor([1, 2]), torch.eye(18), [["a"], ["b"]])
    loaded = TaskAdapters(tmp_path, load_for_evaluation(tmp_path / "experts/02", "seq2seq", "sdpa"))
    text = torch.arange(5, 12)[None]
    for stage in (1, 2):
        loaded.use(stage)
        alone = load_for_evaluation(tmp_path / f"experts/{stage:02d}", "seq2seq", "sdpa")
        whole = torch.cat([torch.from_numpy(alone.soft_prompt.ids)[None], text], dim=1)
        one, other = (
            m(input_ids=whole, decoder_input_ids=text).logits for m in (loaded.net, alone)
        )
        assert torch.equal(one, other)
    assert loaded.described(2, "a") == {"expert": 2, "found": False}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "set start_from=base, and model.lora"),
        (("start_from=base", "model.lora={}", "data.packing=true"), "set data.packing=false"),
        (("epi.sequences=1",), "epi.sequences: must be at least 2"),
    ],
)
def test_what_it_needs_is_named(tmp_path, overrides, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n" + RECIPE)
    with pytest.raises(UserError, match=message):
        load_recipe(path, ["epi={}", *overrides])
