"""Read the `.pt` and `.pth` files that other projects publish weights in; no code in them runs."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

# What some files hold beside tensors: numpy's scalars and arrays, as numpy 1 and 2 name them.
_REBUILD: dict[str, Any] = {
    "scalar": np.float64(0).__reduce__()[0],
    "_reconstruct": np.zeros(1).__reduce__()[0],
}
_TYPES = (np.ndarray, np.dtype, *(type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "?")))


def read_torch_file(path: Path, expected: str) -> Any:
    """Read a file of `torch.save`.

    Args:
        path: of the file.
        expected: what a user should have given, for the message.

    Raises:
        ValueError: if it is missing, damaged, or holds more than tensors, numbers and arrays.
    """
    allowed: list[Any] = [*_TYPES]
    for name, function in _REBUILD.items():
        allowed += [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path} is not a file; expected {expected}") from error
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a checkpoint ({str(error).strip().splitlines()[0]}); expected "
            f"{expected}, download it again"
        ) from error
