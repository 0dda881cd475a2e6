"""Continual pretraining and fine-tuning with MIGU; `attach` adds the mask to other loops."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.attachment import attach

__all__ = ["attach"]


def __getattr__(name: str) -> Any:
    if name == "attach":  # imports torch and transformers only when it is asked for
        from pipeline.attachment import attach

        return attach
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
