"""Recipes of earlier versions, read as today's."""

import json
from dataclasses import asdict

import pytest
import yaml
from omegaconf import OmegaConf

from pipeline.run.folder import _differences
from pipeline.run.recipe_defaults import with_defaults
from pipeline.run.recipe_file import RECIPES, load_recipe
from pipeline.yaml_file import Loader, read_yaml


def test_a_run_of_an_earlier_version_goes_on():
    """It lacks keys of today, also within what it has; a value other than the default differs."""
    now = load_recipe("demo_base").to_yaml()
    then = yaml.safe_load(now)
    del then["anchor"], then["optimizer"]["name"], then["stages"][0]["max_repetitions"]
    assert _differences(OmegaConf.create(then), OmegaConf.create(now)) == []
    changed = now.replace("anchor: null", "anchor: {}")
    assert changed != now
    (said,) = _differences(OmegaConf.create(then), OmegaConf.create(changed))
    assert said == "anchor: None there, {} now"


@pytest.mark.parametrize("name", ["demo_base", "toy_tasks", "llama2_magicoder_lora"])
def test_a_key_that_an_earlier_version_did_not_know_has_its_default(name):
    """A run of then and a run of now do not differ in it."""
    whole = json.loads(json.dumps(asdict(load_recipe(name))))
    assert with_defaults(yaml.load(read_yaml(RECIPES / f"{name}.yaml"), Loader)) == whole
    assert with_defaults(whole) == whole
