"""A head with one layer of hidden units, trained in torch with early stopping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics, probe
from spin_cli.choices import ClassWeight
from spin_cli.training.search import Split

if TYPE_CHECKING:
    import torch

UNITS, DROPOUT, INPUT_DROPOUT = 64, 0.5, 0.2
RATE, DECAY, BATCH = 1e-3, 1e-2, 64
MOST_EPOCHS, PATIENCE = 100, 8


@dataclass(frozen=True)
class Layers:
    """Weights on standardised columns: ``relu(x A' + a) B' + b``."""

    hidden: NDArray[np.float32]
    """(m, n)"""
    hidden_bias: NDArray[np.float64]
    weight: NDArray[np.float32]
    """(K, m)"""
    bias: NDArray[np.float64]
    epochs: int
    val_probs: NDArray[np.float64]

    def folded(
        self, standard: probe.Standardised
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """The first layer for raw columns."""
        like = probe.Fit(self.hidden, self.hidden_bias, 1.0, 0.0, 0.0, 0, True)
        return probe.fold_back(like, standard)


def fit_mlp(
    values: NDArray[Any], split: Split, seed: int, epochs: int | None = None
) -> tuple[Layers, probe.Standardised]:
    """Fit by AdamW, and keep the epoch with the lowest log loss on val rows.

    Parameters
    ----------
    values : (N, n) columns; rows as in ``split.codes``
    epochs : train for exactly so many, without a look at val rows; None: stop early

    Notes
    -----
    One thread and a generator of its own: the same seed gives the same weights.
    """
    import torch

    standard = probe.standardise(values[split.train])
    X, y = torch.from_numpy(standard.X), torch.from_numpy(split.codes[split.train])
    X_val, y_val = torch.from_numpy(standard.transform(values[split.val])), split.codes[split.val]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _model(X.shape[1], split.outputs)
            best: Layers | None = None
            lowest = float("inf")
            for epoch, _ in enumerate(_epochs(model, X, y, split, epochs or MOST_EPOCHS), 1):
                probs = _probabilities(model, X_val, split.n_classes, split.kind)
                loss = metrics.log_loss(y_val, probs)
                if best is None or epoch == epochs or (epochs is None and loss < lowest):
                    lowest, best = loss, _keep(model, epoch, probs)
                if epochs is None and epoch - best.epochs >= PATIENCE:
                    break
    finally:
        torch.set_num_threads(threads)
    if best is None:  # no epoch at all
        raise ValueError(f"epochs {epochs}: one or more were expected")
    return best, standard


def fit_final_mlp(
    values: NDArray[Any], split: Split, seed: int, refit: bool
) -> tuple[Layers, probe.Standardised]:
    """Stop early on val rows; with *refit*, train as long again on train and val together."""
    found, standard = fit_mlp(values, split, seed)
    if not refit:
        return found, standard
    whole = replace(split, train=np.arange(len(split.codes)))
    again, standard = fit_mlp(values, whole, seed, found.epochs)
    return replace(again, val_probs=found.val_probs), standard


def _model(n: int, outputs: int) -> torch.nn.Sequential:
    import torch

    return torch.nn.Sequential(
        torch.nn.Dropout(INPUT_DROPOUT),
        torch.nn.Linear(n, UNITS),
        torch.nn.ReLU(),
        torch.nn.Dropout(DROPOUT),
        torch.nn.Linear(UNITS, outputs),
    )


def _epochs(
    model: torch.nn.Sequential, X: torch.Tensor, y: torch.Tensor, split: Split, epochs: int
) -> Iterator[None]:
    """Train, and come up for air after every epoch."""
    import torch

    weight = torch.ones(y.shape)
    if split.class_weight is ClassWeight.BALANCED:
        balanced = probe.balanced_weights(split.codes[split.train], split.n_classes)
        weight = torch.from_numpy(balanced).float()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(y)).split(BATCH):  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
            z = model(X[rows])
            if y.dim() == 2:  # any number of labels
                losses = torch.nn.functional.softplus(z * (1.0 - 2.0 * y[rows]))
            elif split.n_classes == 2:
                losses = torch.nn.functional.softplus(z[:, 0] * (1.0 - 2.0 * y[rows]))
            else:
                losses = torch.nn.functional.cross_entropy(z, y[rows], reduction="none")
            (losses * weight[rows]).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        yield


def _probabilities(
    model: torch.nn.Sequential, X: torch.Tensor, n_classes: int, kind: str
) -> NDArray[np.float64]:
    import torch

    model.eval()
    with torch.no_grad():
        return metrics.probabilities(model(X).double().numpy(), n_classes, kind)


def _keep(model: torch.nn.Sequential, epoch: int, probs: NDArray[np.float64]) -> Layers:
    first, last = cast("torch.nn.Linear", model[1]), cast("torch.nn.Linear", model[4])
    return Layers(
        hidden=first.weight.detach().numpy().copy(),
        hidden_bias=first.bias.detach().numpy().astype(np.float64),
        weight=last.weight.detach().numpy().copy(),
        bias=last.bias.detach().numpy().astype(np.float64),
        epochs=epoch,
        val_probs=probs,
    )
