"""Stage 2: from activations to the neurons that matter, one probe per layer, site and pooling."""

from spin_cli.selected import MASKS, PROBES, SCORES
from spin_cli.selection.stage import default_metric, read_labels, request_of, select

__all__ = ["MASKS", "PROBES", "SCORES", "default_metric", "read_labels", "request_of", "select"]
