"""What every test shares."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def prepared_corpora(tmp_path_factory):
    """Prepared corpora go to a folder of the session, not to the user's cache."""
    os.environ["MIGU_PREPARED"] = str(tmp_path_factory.mktemp("prepared"))
