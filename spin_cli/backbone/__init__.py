"""The frozen language model: finding it, loading it, reading its neurons."""

from spin_cli.backbone.batching import Encoded, Part, encode, plan_batches, plan_for, refuse_parts
from spin_cli.backbone.fetching import release
from spin_cli.backbone.gathering import (
    FLOAT16_MAX,
    Later,
    MemoryWarning,
    as_stored,
    at_once,
    gather,
)
from spin_cli.backbone.layout import Layout, Stack, summarise
from spin_cli.backbone.loading import Backbone, identify, load
from spin_cli.backbone.placing import choose_device
from spin_cli.backbone.reading import Wanted, read, read_states, run_states

__all__ = [
    "FLOAT16_MAX",
    "Backbone",
    "Encoded",
    "Later",
    "Layout",
    "MemoryWarning",
    "Part",
    "Stack",
    "Wanted",
    "as_stored",
    "at_once",
    "choose_device",
    "encode",
    "gather",
    "identify",
    "load",
    "plan_batches",
    "plan_for",
    "read",
    "read_states",
    "refuse_parts",
    "release",
    "run_states",
    "summarise",
]
