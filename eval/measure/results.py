"""Write what was measured: numbers as JSON and arrays or rows beside them."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np


def write_json(path: Path, result: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(result, indent=2) + "\n").encode())


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As .npz."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    replace_file(path, buffer.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
