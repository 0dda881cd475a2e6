"""What every test shares."""

import gc
import os

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # busy ones too
settings.load_profile("any machine")

# Few tests that take long: begun first, so that no worker is left alone with them at the end.
LONG = {
    f"test_{name}.py"
    for name in (
        "instruct_run", "run", "parity", "engine", "lora", "attach", "resume", "cluster",
        "killed_runs", "nodes", "humaneval", "fsdp", "sweep", "anchor", "finetune",
    )
}  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
    gc.freeze()  # what the tests import: else each full collection walks it


@pytest.fixture(scope="session", autouse=True)
def prepared_corpora(tmp_path_factory):
    """Prepared corpora go to a folder of the session, not to the user's cache."""
    os.environ["MIGU_PREPARED"] = str(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(autouse=True)
def no_launcher():
    """A test that joins a process group in its own process leaves the launcher's variables behind,
    and the commands that later tests start would take them for theirs."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
