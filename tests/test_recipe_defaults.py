"""Recipes of earlier versions, read as today's."""

import json
from dataclasses import asdict

import pytest
import yaml

from eval.analysis.recipe_defaults import with_defaults
from pipeline.run.recipe_file import RECIPES, load_recipe
from pipeline.yaml_file import Loader, read_yaml


@pytest.mark.parametrize("name", ["demo_base", "toy_tasks", "llama2_magicoder_lora"])
def test_a_key_that_an_earlier_version_did_not_know_has_its_default(name):
    """A run of then and a run of now do not differ in it."""
    whole = json.loads(json.dumps(asdict(load_recipe(name))))
    assert with_defaults(yaml.load(read_yaml(RECIPES / f"{name}.yaml"), Loader)) == whole
    assert with_defaults(whole) == whole
