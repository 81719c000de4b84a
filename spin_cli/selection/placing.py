"""On which device the probes are solved."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from spin_cli.choices import Solver
from spin_cli.config import SelectConfig
from spin_cli.errors import UsageError

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def choose(config: SelectConfig) -> Any:
    """The `torch.device` that ``--device`` means; None for the CPU, where numpy is the faster.

    Raises
    ------
    ModelError
        There is no such device here.
    UsageError
        The reference recipe is asked for on a GPU.
    """
    name = config.device
    if config.solver is Solver.REFERENCE:
        if name not in ("auto", "cpu"):
            raise UsageError(f"--device {name}: the reference recipe runs on the CPU")
        return None
    if name == "cpu" or (name == "auto" and not _has_driver()):
        return None
    # torch takes a second to import: only where it is needed
    import torch

    from spin_cli.backbone import choose_device

    if name == "auto" and not torch.cuda.is_available():
        return None
    return choose_device("cuda" if name == "auto" else name)


def _has_driver() -> bool:
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True
