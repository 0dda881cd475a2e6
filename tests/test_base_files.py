"""A run's base is its files, not its place."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.model.lora import base_of
from pipeline.run.folder import open_run
from pipeline.run.recipe_file import load_recipe
from tests.test_run import tiny_recipe


@pytest.fixture(params=["path", "tokenizer"])
def begun(request, tmp_path):
    """(key, begin): a run that has measured something, of a recipe beside which its model or
    tokenizer lies; `begin` enters the run with the recipe of a place."""
    place = tmp_path / "here"
    (place / "base").mkdir(parents=True)
    recipe = tiny_recipe(tmp_path).rename(place / "tiny.yaml")
    for name, content in (
        ("config.json", b"{}"), ("model.safetensors", bytes(10**6)), ("README.md", b"of it")
    ):  # fmt: skip
        (place / "base" / name).write_bytes(content)
    text = recipe.read_text()
    model = text[text.index("model:") : text.index("data:")]
    given = {"path": "{path: base}", "tokenizer": "{config: {model_type: gpt2}, tokenizer: base}"}
    recipe.write_text(text.replace(model, f"model: {given[request.param]}\n"))

    def begin(place: Path) -> str:
        with open_run(tmp_path / "run", load_recipe(place / "tiny.yaml"), {}):
            return (tmp_path / "run/recipe.yaml").read_text()

    begin(place)
    (tmp_path / "run/stages").mkdir()
    return request.param, begin


@pytest.mark.parametrize("older", [False, True])
def test_a_run_goes_on_with_its_base_from_another_place(begun, older, tmp_path):
    key, begin = begun
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(here, there)
    (there / "base/README.md").write_text("more of it")
    if older:  # than the file: the first place is looked at
        (tmp_path / "run/base.json").unlink()
    else:
        shutil.rmtree(here / "base")
    assert f"{key}: {there}/base\n" in begin(there)
    (there / "base").rename(there / "away")
    with pytest.raises(UserError, match=rf"model\.{key}: '{there}/base', .*, 'base' now"):
        begin(there)  # an id of the hub, as there is no such folder


@pytest.mark.parametrize("moved", [False, True])
def test_other_files_are_another_base_wherever_they_lie(begun, moved, tmp_path):
    key, begin = begun
    place = tmp_path / "here"
    if moved:
        place = tmp_path / "there"
        shutil.copytree(tmp_path / "here", place)
    before = (tmp_path / "run/recipe.yaml").read_text()
    weights = place / "base/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"1")  # of the same size
    with pytest.raises(UserError, match=rf"model\.{key}: {place}/base has other .*: model.safe"):
        begin(place)
    assert (tmp_path / "run/recipe.yaml").read_text() == before
    weights.write_bytes(content)
    begin(place)


def test_what_nobody_can_tell_is_refused(begun, tmp_path):
    key, begin = begun
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "run/base.json").unlink()
    with pytest.raises(UserError, match=rf"model\.{key}: .* as the first is gone"):
        begin(tmp_path / "there")
    (tmp_path / "run/base.json").write_text("{}")
    with pytest.raises(UserError, match=r"base\.json: damaged"):
        begin(tmp_path / "there")


def test_an_adapter_finds_the_base_where_its_run_has_it_now(tmp_path):
    adapter = tmp_path / "run/stages/01_a/checkpoint"
    adapter.mkdir(parents=True)
    recorded = {"base_model_name_or_path": str(tmp_path / "old/base"), "revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(recorded))
    recipe, new = tmp_path / "run/recipe.yaml", tmp_path / "new/base"
    recipe.write_text(f"model:\n  path: {new}\n")
    with pytest.raises(UserError, match=r"its base model .*old/base is gone"):
        base_of(adapter)
    (tmp_path / "old/base").mkdir(parents=True)
    assert base_of(adapter)[0] == str(tmp_path / "old/base")
    new.mkdir(parents=True)  # what the run was checked to go on with
    assert base_of(adapter)[0] == str(new)
