"""L1-regularised logistic regression, from sparse to dense.

::

    standardise -> Standardised        features with mean 0 and standard deviation 1
    fit, fit_path -> Fit, Path         one optimum; a warm-started path and the choice of a point
    Gram                               what several ridge fits to one matrix share
    predict_proba, fold_back           probabilities; weights for raw features
    rank_neurons -> Ranking            all of it for one matrix, on given rows
    rank_again -> Ranking              the same on other rows, C being known
"""

from spin_cli.probe.again import rank_again
from spin_cli.probe.blocks import Blocks, take_rows
from spin_cli.probe.logistic import balanced_weights, fit, lambda_max
from spin_cli.probe.path import fit_path
from spin_cli.probe.ranking import Ranking, class_shares, rank_neurons
from spin_cli.probe.results import ConvergenceWarning, Fit, Path, fold_back, predict_proba
from spin_cli.probe.smooth import Gram
from spin_cli.probe.standard import Standardised, standardise

__all__ = [
    "Blocks",
    "ConvergenceWarning",
    "Fit",
    "Gram",
    "Path",
    "Ranking",
    "Standardised",
    "balanced_weights",
    "class_shares",
    "fit",
    "fit_path",
    "fold_back",
    "lambda_max",
    "predict_proba",
    "rank_again",
    "rank_neurons",
    "standardise",
    "take_rows",
]
