"""The blocks of a model under `torch.compile`."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.model.blocks import find_blocks

GRAPHS = (
    16  # of a block: with and without magnitudes and dropout, of fixed and varying lengths, ...
)


def check_compiler() -> None:
    """Raises UserError where torch.compile could not make code for this machine."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("train.compile: needs Triton, which is not here; set it to false")
        # Triton builds its bridge to the driver with them when it is first used.
        compiler = any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang"))))
        if not compiler or not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
            raise UserError(
                "train.compile: Triton needs a C compiler (gcc, clang or what CC names) and "
                "Python's headers (python3-dev), which are not both here; install them, or set it "
                "to false"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        raise UserError(
            "train.compile: on a CPU it needs a C++ compiler (g++, or what CXX names), and none is "
            "here; install one, or set it to false"
        ) from None


@contextmanager
def compiled_blocks(net: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Within it the blocks run compiled, each from its next forward on: with the hooks that the
    modules within them have by then. Hooks of the blocks themselves, such as those of FSDP, run as
    they are.

    Raises:
        UserError: a block's code had to be compiled for ever new shapes or hooks.
    """
    torch.compiler.reset()  # code that was made for other hooks
    blocks: list[Any] = [net.get_submodule(name) for name in find_blocks(net)]
    graphs = GRAPHS * len(blocks)  # they share code, and torch would give up at eight graphs of it
    with torch._dynamo.config.patch(
        recompile_limit=graphs,
        accumulated_recompile_limit=max(graphs, 256),
        fail_on_recompile_limit_hit=True,
        skip_nnmodule_hook_guards=False,  # or hooks that come later would be left out
        # What the mask's hooks know of a batch, its padding, has another length in every batch.
        force_nn_module_property_static_shapes=False,
    ):
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=backend)
        try:
            yield
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            raise UserError(
                f"train.compile: a block was compiled {graphs} times, for other shapes or hooks "
                "each time; set it to false (the run goes on from where it was saved)"
            ) from None
        finally:
            for block in blocks:
                vars(block).pop("forward")
