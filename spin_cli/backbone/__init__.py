"""The frozen language model: finding it, loading it, reading its neurons."""

from spin_cli.backbone.batching import Encoded, encode, plan_batches
from spin_cli.backbone.discovery import Layout, Stack
from spin_cli.backbone.loading import Backbone, load
from spin_cli.backbone.reading import Wanted, read, read_states, run_states

__all__ = [
    "Backbone",
    "Encoded",
    "Layout",
    "Stack",
    "Wanted",
    "encode",
    "load",
    "plan_batches",
    "read",
    "read_states",
    "run_states",
]
