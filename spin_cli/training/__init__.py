"""Stage 3: from masks to one head, everything about it chosen on validation data."""

from spin_cli.training.stage import request_of, train

__all__ = ["request_of", "train"]
