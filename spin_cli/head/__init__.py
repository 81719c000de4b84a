"""The trained head: what it is and answers (`model`), and its files (`files`)."""

from spin_cli.head.files import CARD, CONFIG, LABELS, METRICS, WEIGHTS, load_head, save_head
from spin_cli.head.model import Head, HeadFeature, blocks_needed

__all__ = [
    "CARD",
    "CONFIG",
    "LABELS",
    "METRICS",
    "WEIGHTS",
    "Head",
    "HeadFeature",
    "blocks_needed",
    "load_head",
    "save_head",
]
