"""Lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence


def list_names(names: Sequence[str], limit: int = 20, quote: str = "'") -> str:
    """Names with commas between, each in the mark *quote*; of very many only the first *limit*."""
    shown = ", ".join(f"{quote}{name}{quote}" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
