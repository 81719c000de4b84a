"""spin: strong text classifiers out of a frozen language model's internal neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spin_cli.prediction.classifier import Classifier

__version__ = "0.1.0"
__all__ = ["Classifier", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Classifier`, and torch with it, only when it is asked for."""
    if name == "Classifier":
        from spin_cli.prediction.classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
