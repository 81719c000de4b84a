"""The texts behind activations, for stages that come later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin_cli.config import DataConfig
from spin_cli.dataset.collection import reread
from spin_cli.errors import SpinError
from spin_cli.typed import from_plain


def read_texts(folder: Path, manifest: Mapping[str, Any], most: int) -> list[str] | str:
    """The texts of the activations in *folder*, in their order; or why they cannot be had.

    Parameters
    ----------
    manifest : of the activations
    most : more texts than these are not read
    """
    request, rows = manifest["request"], manifest["counts"]["rows"]
    if rows > most:
        return f"there are over {most:,} texts"
    try:
        options = from_plain(DataConfig, request["options"]["data"])
        found = [row.text for row in reread(request["data"], options, folder)]
    except (SpinError, OSError) as error:
        return f"the texts cannot be read again ({error})"
    except (KeyError, TypeError, ValueError) as error:
        return f"the manifest does not say how the texts were read ({error})"
    return found if len(found) == rows else "the texts are not those that were read"
