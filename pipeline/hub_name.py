"""What a name is, a folder here or an id of the hub, and the hub asked for it where it answers."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from pipeline.errors import UserError
from pipeline.network import of_the_network, offline, reason, retried

T = TypeVar("T")

TIMEOUT = 5.0  # seconds until the hub counts as unreachable


def missing_folder(name: str) -> str | None:
    """What is wrong with a name that is, by its looks, the path of a folder that is not there.

    An id of the hub is `name` or `owner/name`.
    """
    if not name or os.path.exists(os.path.expanduser(name)):
        return None
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        return f"no such folder: {name}"
    return None


def from_hub(field: str, name: str, fetch: Callable[[], T]) -> T:
    """What `fetch` loads of a folder or an id of the hub; failures of the network are `retried`.

    Where the hub does not answer, only the local cache is asked, so that nobody waits for minutes.

    Args:
        field: of the recipe or the command line, for messages.

    Raises:
        UserError: no such folder; the hub does not answer, or is not to be asked, and the cache has
            not all of it. Other errors are those of `fetch`.
    """
    if problem := missing_folder(name):
        raise UserError(f"{field}: {problem}")
    if os.path.exists(os.path.expanduser(name)):
        return fetch()
    why = "HF_HUB_OFFLINE is set" if offline() else unreachable()
    if why is None:
        return retried(f"{field} {name}", fetch)
    with cache_only():
        try:
            return fetch()
        except Exception as error:
            if not of_the_network(error):
                raise
    raise UserError(
        f"{field}: {name} is no folder here, is not (whole) in the local cache, and the hub cannot "
        f"be asked ({why}). Give a local folder, or load it once where there is a network; what is "
        "in the cache is found with HF_HUB_OFFLINE=1 too"
    )


def unreachable() -> str | None:
    """Why the hub does not answer, after `TIMEOUT`; None where it does. Asked once a minute."""
    return _asked(int(time.monotonic() // 60))


@lru_cache(maxsize=1)
def _asked(_minute: int) -> str | None:
    from huggingface_hub import constants, get_session

    end = time.monotonic() + TIMEOUT
    while True:
        try:
            get_session().head(constants.ENDPOINT, timeout=max(0.5, end - time.monotonic()))
            return None  # whatever it says
        except Exception as error:  # no name, no route, no answer, a proxy that refuses: many kinds
            if time.monotonic() + 1 > end:
                return f"{constants.ENDPOINT}: {reason(error)}"
            time.sleep(1)  # a connection may drop


@contextmanager
def cache_only() -> Iterator[None]:
    """In it the libraries look into their caches alone, as with HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    # Where `datasets` is not loaded, nothing asks it.
    configs: list[Any] = [constants]
    if datasets := sys.modules.get("datasets"):
        configs.append(datasets.config)
    before = [config.HF_HUB_OFFLINE for config in configs]
    for config in configs:
        config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.HF_HUB_OFFLINE = value
