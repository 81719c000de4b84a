"""Stage 4: new texts to labels, as a stream."""

from spin_cli.prediction.exits import check_exit
from spin_cli.prediction.predictor import Predictor, open_predictor, settle
from spin_cli.prediction.scoring import Evaluation, seen_split
from spin_cli.prediction.stream import Prediction, predict, read_input

__all__ = [
    "Evaluation",
    "Prediction",
    "Predictor",
    "check_exit",
    "open_predictor",
    "predict",
    "read_input",
    "seen_split",
    "settle",
]
