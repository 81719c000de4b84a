"""The path on a device: as `path` walks it, but with all points on their way at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli.probe.batched import MAX_STEPS, Batch, State, Task, to_device
from spin_cli.probe.blocks import Remote
from spin_cli.probe.device import DeviceRows
from spin_cli.probe.labels import CERTAIN, columns_of
from spin_cli.probe.logistic import certify, constant, make_problem, only_class, stack
from spin_cli.probe.problem import F64, Problem
from spin_cli.probe.results import Fit

SETTLED = 0.3
"""Share of the tolerance to which float32 goes, so that the certificate in float64 finds less."""


class DeviceWalk:
    """Solves the points of a path side by side; a point is ready when it is asked for.

    Sparse points end first, so a path that is left early leaves the long ones undone.

    Parameters
    ----------
    X : standardised rows on the device
    y, n_classes, weight, multi_class, tol : as for `fit_path`; ``weight`` one number per row
    loose : violation, relative to a point's own l1, at which it is ready
    """

    def __init__(
        self,
        X: DeviceRows,
        y: NDArray[np.intp],
        n_classes: int,
        weight: F64,
        multi_class: str,
        tol: float,
        loose: float,
    ) -> None:
        self.X, self.tol, self.loose = X, tol, loose
        self.multi_class = "labels" if y.ndim == 2 else multi_class
        self.ovr = y.ndim == 2 or (n_classes > 2 and multi_class == "ovr")
        self.problems = _problems(X, y, n_classes, weight, self.ovr)
        self.fixed = [_only(problem) if self.ovr else None for problem in self.problems]
        tops = [p.lambda_max() for p, f in zip(self.problems, self.fixed, strict=True) if f is None]
        self.lambda_max, self.unit = max(tops), _unit(tops)
        self.null = np.concatenate(
            [
                problem.null_intercept() if only is None else [CERTAIN if only else -CERTAIN]
                for problem, only in zip(self.problems, self.fixed, strict=True)
            ]
        )
        self.task = Task(
            X,
            to_device(np.hstack([problem.Y for problem in self.problems]), X.device),
            to_device(weight[:, None], X.device),
            torch.zeros(0, device=X.device),
            softmax=self.problems[0].K > 1,
        )
        self.asked = 0
        self.batch: Batch | None = None

    def start(self, l1: F64) -> None:
        """Set the points of a path on their way."""
        goal = np.maximum(self.loose * l1, SETTLED * self.tol * self.unit)
        state = State(
            torch.zeros(self.X.shape[1], len(l1), len(self.null), device=self.X.device),
            to_device(np.tile(self.null, (len(l1), 1)), self.X.device),
        )
        self.batch, self.goal = self._batch(l1, state, goal), goal

    def step(self, l1: float, l2: float) -> Fit:
        """The next point of the path, roughly."""
        if self.batch is None or l2 > 0.0:
            raise ValueError("only paths that were started, with an l1 penalty alone")
        state, worst, used = self.batch.until(self.asked, MAX_STEPS)
        W, b = _numpy(state)
        goal = self.goal[self.asked]
        self.asked += 1

        def rough(problem: Problem, w: F64, c: F64) -> Fit:
            value = problem.loss(problem.logits(w, c)) + l1 * float(np.abs(w).sum())
            coef, kkt = w.astype(np.float32), worst / self.unit
            return Fit(coef, c, 1 / l1, value, kkt, used, bool(worst <= goal))

        return self._join(W, b, l1, rough)

    def settle(self, fit: Fit, l1: float, l2: float) -> Fit:  # noqa: ARG002
        """To the tolerance, from a fit on the way, with a certificate in float64."""
        start = State(
            to_device(fit.coef.T[:, None, :], self.X.device),
            to_device(fit.intercept[None, :], self.X.device),
        )
        batch = self._batch(np.array([l1]), start, np.array([SETTLED * self.tol * self.unit]))
        state, _, used = batch.until(0, MAX_STEPS)

        def exact(problem: Problem, w: F64, c: F64) -> Fit:
            return certify(problem, w, c, l1, 0.0, used, self.tol)

        return self._join(*_numpy(state), l1, exact)

    def _batch(self, l1: F64, state: State, goal: F64) -> Batch:
        penalties = to_device(l1, self.X.device)
        task = Task(self.X, self.task.Y, self.task.weight, penalties, self.task.softmax)
        return Batch(task, state, goal)

    def _join(self, W: F64, b: F64, l1: float, make: Callable[[Problem, F64, F64], Fit]) -> Fit:
        """One fit of weights (K, d) and intercepts (K,); one-versus-rest is made class by class."""
        if not self.ovr:
            return make(self.problems[0], W, b)
        parts = []
        for k, (problem, only) in enumerate(zip(self.problems, self.fixed, strict=True)):
            if only is None:
                parts.append(make(problem, W[k : k + 1], b[k : k + 1]))
            else:
                parts.append(constant(cast(Any, self.X), only, 2, l1))
        return stack(parts, self.multi_class)


def count_selected(
    X: Remote,
    y: NDArray[Any],
    n_classes: int,
    best: Fit,
    weights: NDArray[Any],
    tol: float,
    between: Callable[[], None],
) -> NDArray[np.float64]:
    """How often each column (d,) has a weight, over fits from *best* on with other weights of rows.

    Parameters
    ----------
    weights : (B, N), of the rows, for each fit
    between : called while the fits go on; what it raises ends them
    """
    rows = cast(DeviceRows, X)
    problems = _problems(rows, y.astype(np.intp), n_classes, np.ones(len(y)), y.ndim == 2)
    unit = _unit([p.lambda_max() for p in problems if y.ndim == 1 or _only(p) is None])
    count = len(weights)
    task = Task(
        rows,
        to_device(np.hstack([problem.Y for problem in problems]), rows.device),
        to_device(weights.T, rows.device),
        to_device(np.full(count, 1.0 / best.C), rows.device),
        softmax=problems[0].K > 1,
    )
    W = np.repeat(best.coef.T[:, None, :], count, 1)
    start = State(
        to_device(W, rows.device), to_device(np.tile(best.intercept, (count, 1)), rows.device)
    )
    batch = Batch(task, start, np.full(count, SETTLED * tol * unit))
    counts = np.zeros(X.shape[1])
    for index in range(count):
        between()
        state, _, _ = batch.until(index, MAX_STEPS)
        counts += _numpy(state)[0].any(0)
    return counts


def _problems(
    X: DeviceRows, y: NDArray[np.intp], n_classes: int, weight: F64, ovr: bool
) -> list[Problem]:
    """One problem; or one for each class against the rest, or for each label."""
    if not ovr:
        return [make_problem(X, y, n_classes, weight)]
    targets = columns_of(y, n_classes, ovr=True)
    return [make_problem(X, target, 2, weight) for target in targets]


def _unit(tops: list[float]) -> float:
    """What the tolerance is a share of: the least `lambda_max` of a problem that has any."""
    return min((top for top in tops if top > 0.0), default=0.0)


def _only(problem: Problem) -> int | None:
    """0 or 1 for a class without a row, or with all of them."""
    return only_class((problem.Y[:, 0] > 0).astype(np.intp), problem.weight)


def _numpy(state: State) -> tuple[F64, F64]:
    """Weights (K, d) and intercepts (K,) of a state of one problem."""
    W = state.W[:, 0].T.cpu().numpy().astype(np.float64)
    return W, state.b[0].cpu().numpy().astype(np.float64)
