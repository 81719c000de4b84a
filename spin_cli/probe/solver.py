"""Proximal Newton on a working set of weights."""

from __future__ import annotations

import numpy as np

from spin_cli.probe.columns import Array, Columns, Index
from spin_cli.probe.curvature import Curvature
from spin_cli.probe.fista import fista
from spin_cli.probe.problem import F64, Problem, violation
from spin_cli.probe.quadratic import solve_quadratic
from spin_cli.probe.results import Fit
from spin_cli.probe.smooth import Gram, minimise_smooth

MAX_PAIRS = 3000
"""Above this many weights in the working set the Hessian costs more than FISTA."""


CLEAR = 0.1
"""Share of l1 by which a weight violates clearly."""
KEEP_SMALL, KEEP_LARGE, LARGE = 0.4, 0.95, 400
"""The old Hessian is kept while each step shrinks the violation to this share; longer where the
working set is large and a new Hessian dear."""


NEWTON_STEPS, LBFGS_STEPS, GRAM_STEPS = 5, 150, 15
"""Steps that each usually needs for ridge penalties on standardised columns; the last of L-BFGS
with a `Gram` matrix."""
MAX_GRAM = 6000
"""Columns up to which a `Gram` matrix is made."""
LBFGS_TOL = 1e-5
"""Below this share of `lambda_max` L-BFGS may stall."""


class Solver:
    """Minimises ``f + l1‖W‖₁ + l2/2 ‖W‖²`` for one penalty after another, from where it stands.

    Notes
    -----
    Outer loop: one product with the whole of X finds the weights that violate the optimality
    conditions; they join the working set. Inner loop: proximal Newton steps on the working set
    (Lee, Sun & Saunders 2014) with a Hessian kept over steps and penalties as long as it serves.
    """

    def __init__(
        self,
        problem: Problem,
        W: Array | None = None,
        b: F64 | None = None,
        gram: Gram | None = None,
    ) -> None:
        self.problem = problem
        self.gram = Gram() if gram is None else gram
        K, d = problem.K, problem.X.shape[1]
        self.W = np.zeros((K, d)) if W is None else W.astype(np.float64)
        self.b = problem.null_intercept() if b is None else b.astype(np.float64)
        self.lambda_max = problem.lambda_max()
        self.columns = Columns(problem)
        self.curvature = Curvature(problem, self.columns)
        self.stale = True
        self.iterations = 0
        self._look()

    def place(self, W: Array, b: F64) -> None:
        """Start the next solve from other weights; columns and Hessian are kept."""
        self.W, self.b = W.astype(np.float64), b.astype(np.float64)
        self._look()

    def snapshot(self, l1: float, l2: float, kkt: float, tol: float) -> Fit:
        """Where the solver stands, with the violation that `solve` gave."""
        penalty = l1 * np.abs(self.W).sum() + 0.5 * l2 * (self.W * self.W).sum()
        objective = self.problem.loss(self.z) + float(penalty)
        coef = self.W.astype(self.problem.X.dtype)
        C = 1.0 / (l1 + l2)
        return Fit(coef, self.b.copy(), C, objective, kkt, self.iterations, kkt <= tol)

    def _look(self) -> None:
        self.z = self.problem.logits(self.W, self.b)
        self.gradient = self.problem.gradient(self.problem.residual(self.z))

    def solve(self, l1: float, l2: float, tol: float, max_iter: int) -> float:
        """Go to the optimum for these penalties.

        Parameters
        ----------
        tol : largest violation accepted, relative to `lambda_max`
        max_iter : steps allowed in this call

        Returns
        -------
        float
            The largest violation, relative to `lambda_max`, on gradients in X's dtype.
        """
        self.iterations = 0
        unit = self.lambda_max
        if unit == 0.0:  # nothing to learn from these columns
            self.place(np.zeros_like(self.W), self.problem.null_intercept())
            return 0.0
        worst, best = np.inf, np.inf
        stuck, first = 0, True
        while True:
            wrong = violation(self.W, self.gradient + l2 * self.W, l1)
            worst = max(float(wrong.max(initial=0.0)), self._intercept_violation()) / unit
            stuck = 0 if worst < 0.9 * best else stuck + 1
            best = min(best, worst)
            if worst <= tol or self.iterations >= max_iter or stuck > 5:
                return worst
            classes, features = self._working_set(wrong, l1, first)
            first = False
            self._descend(classes, features, l1, l2, max(0.1 * worst, 0.3 * tol) * unit, max_iter)
            self.gradient = self.problem.gradient(self.problem.residual(self.z))

    def _intercept_violation(self) -> float:
        return float(np.abs(self.problem.residual(self.z).sum(0)).max())

    def _working_set(self, wrong: F64, l1: float, first: bool) -> tuple[Index, Index]:
        """Weights that are not zero or that violate; at first only if they violate clearly.

        Right behind a step to a smaller penalty many do, and most of the slight ones no longer once
        the others have moved.
        """
        clear = wrong > (CLEAR * l1 if first else 0.0)
        classes, features = np.nonzero((self.W != 0) | clear)
        return classes, features

    def _descend(
        self, classes: Index, features: Index, l1: float, l2: float, tol: float, max_iter: int
    ) -> None:
        if l1 == 0.0 and (how := self._without_l1(tol)) != "newton":
            self._smooth(how, l2, tol, max_iter - self.iterations)
            return
        if len(features) > MAX_PAIRS:
            self._fista(features, l1, l2, tol, max_iter - self.iterations)
            return
        self.columns.add(np.unique(features))
        K = self.problem.K
        pairs = _Pairs(
            np.concatenate([np.arange(K), classes]),
            np.concatenate([np.zeros(K, np.intp), self.columns.number_of[features]]),
            features,
            K,
        )
        before = np.inf
        for _ in range(20):
            R = self.problem.residual(self.z)
            u = np.concatenate([self.b, self.W[classes, features]])
            g = pairs.gradient(self.columns, R)
            penalty = np.full(len(u), l1)
            penalty[:K] = 0.0
            g[K:] += l2 * u[K:]
            worst = _worst(u, g, penalty)
            if worst <= tol or self.iterations >= max_iter:
                return
            keep = KEEP_SMALL if len(u) < LARGE else KEEP_LARGE
            if self.stale or worst > keep * before:
                self.curvature.reset(self.problem.probs(self.z))
                self.stale = False
            before = worst
            if not self._newton(pairs, u, g, penalty, l2, 0.1 * worst):
                self.stale = True
                return

    def _without_l1(self, tol: float) -> str:
        """Which way gets to *tol* first without an l1 penalty: ``newton``, ``lbfgs`` or ``gram``.

        Operations of a few Newton steps (the Hessian of K(K + 1)/2 blocks and its factor), of
        L-BFGS, each of which takes longer, as it waits for memory, and of fewer steps of L-BFGS
        after the Gram matrix and its factor.
        """
        (K, d), N = self.W.shape, len(self.z)
        if tol < LBFGS_TOL * self.lambda_max:
            return "newton" if K * d <= MAX_PAIRS else "lbfgs"
        wait = 10 / min(K, 4)
        step = 4 * N * d * K * wait
        first = 0 if self.gram.known(self.problem.weight) else N * d * d
        costs = {
            "newton": NEWTON_STEPS * (K * (K + 1) / 2 * d * d * N + (K * d) ** 3 / 3),
            "lbfgs": LBFGS_STEPS * step,
            "gram": first + d**3 / 3 + GRAM_STEPS * (step + 4 * K * d * d * wait),
        }
        if K * d > MAX_PAIRS:
            del costs["newton"]
        if d > MAX_GRAM:
            del costs["gram"]
        return min(costs, key=lambda way: costs[way])

    def _smooth(self, how: str, l2: float, tol: float, max_iter: int) -> None:
        """L-BFGS, where there is no l1 penalty."""
        problem = self.problem
        factor = self.gram.factor(problem, l2) if how == "gram" else None
        self.W, self.b, used = minimise_smooth(problem, self.W, self.b, l2, tol, max_iter, factor)
        self.z = problem.logits(self.W, self.b)
        self.iterations += used

    def _fista(self, features: Index, l1: float, l2: float, tol: float, max_iter: int) -> None:
        problem = self.problem
        self.columns.add(np.unique(features))
        self.W, self.b, used = fista(problem, self.columns, self.W, self.b, l1, l2, tol, max_iter)
        self.z = problem.logits(self.W, self.b)
        self.iterations += used

    def _newton(self, pairs: _Pairs, u: F64, g: F64, penalty: F64, l2: float, tol: float) -> bool:
        """One step with a line search; False where no step goes down."""
        self.iterations += 1
        P = self.problem.probs(self.z)
        H = self.curvature.matrix(pairs.classes, pairs.numbers, P)
        K, eps = self.problem.K, np.finfo(H.dtype).eps
        H.flat[:: len(H) + 1] += 4 * eps * np.trace(H) / len(H)
        H.flat[K * (len(H) + 1) :: len(H) + 1] += l2
        if K > 1:  # the same shift of all intercepts changes nothing: hold it still
            H[:K, :K] += np.trace(H[:K, :K]) / K**2
        dtype = H.dtype
        target = solve_quadratic(
            H,
            g.astype(dtype),
            penalty.astype(dtype),
            u.astype(dtype),
            tol,
            pairs.flat() if K > 1 and l2 == 0.0 else None,
        ).astype(np.float64)
        move = target - u
        dz = pairs.logits(self.columns, move)
        old = self.problem.loss(self.z)
        start = penalty @ np.abs(u) + 0.5 * l2 * (u[K:] @ u[K:])
        slack = 10 * eps * eps * abs(old) if eps > 1e-10 else 10 * eps * abs(old)
        slope = float(g @ move + penalty @ (np.abs(target) - np.abs(u)))
        t = 1.0
        for _ in range(20):
            v = target if t == 1.0 else u + t * move
            z = self.z + t * dz
            end = penalty @ np.abs(v) + 0.5 * l2 * (v[K:] @ v[K:])
            if self.problem.loss(z) + end - old - start <= 1e-4 * t * min(slope, 0.0) + slack:
                self.z, self.b = z, v[:K].copy()
                self.W[pairs.classes[K:], pairs.features] = v[K:]
                return True
            t *= 0.5
        return False


class _Pairs:
    """The working set as pairs (class, number of a column); the first K are the intercepts."""

    def __init__(self, classes: Index, numbers: Index, features: Index, K: int) -> None:
        self.classes, self.numbers, self.features, self.K = classes, numbers, features, K

    def flat(self) -> Index:
        """Positions (K, G) of the features that are in the set with every class."""
        order = np.lexsort((self.classes[self.K :], self.features))
        features, counts = np.unique(self.features, return_counts=True)
        whole = np.isin(self.features[order], features[counts == self.K])
        return np.asarray(order[whole].reshape(-1, self.K).T + self.K)

    def gradient(self, columns: Columns, R: F64) -> F64:
        """Of the loss, for each pair."""
        full = columns.products(R.T, self.numbers)
        return np.asarray(full[self.classes, np.arange(len(self.numbers))], np.float64)

    def logits(self, columns: Columns, move: F64) -> F64:
        """Change of the logits (N, K) for a change of the pairs' weights."""
        V = np.zeros((self.K, columns.count))
        V[self.classes, self.numbers] = move
        return np.asarray(columns.times(V).T, np.float64)


def _worst(u: F64, g: F64, penalty: F64) -> float:
    at_zero = np.maximum(np.abs(g) - penalty, 0.0)
    return float(np.where(u != 0, np.abs(g + penalty * np.sign(u)), at_zero).max())
