"""Write what was measured: numbers as JSON and arrays or rows beside them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint import replace_file


def write_json(path: Path, result: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(result, indent=2) + "\n").encode())


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As .npz."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    replace_file(path, buffer.getvalue())
