"""All penalties and classes at once, as columns of one matrix of weights on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli.probe.device import DeviceRows, has_float64

MAX_STEPS = 20_000
"""FISTA steps; one pass over the rows each."""
CHECK = 10
"""Steps between looks at the optimality conditions (a look waits for the device)."""
CENTRE = 50
"""Steps between shifts of weights along the softmax's flat directions."""


@dataclass(frozen=True)
class State:
    """P problems on the same rows, each with K columns of weights."""

    W: torch.Tensor
    """(d, P, K)"""
    b: torch.Tensor
    """(P, K)"""

    def pick(self, index: torch.Tensor) -> State:
        """Some of the problems."""
        return State(self.W.index_select(1, index), self.b.index_select(0, index))


@dataclass(frozen=True)
class Task:
    """``Σ_i w_i loss(y_i, z_i) + l1 ‖W‖₁``; the loss is the softmax's, or one sigmoid a column."""

    X: DeviceRows
    Y: torch.Tensor
    """(N, K), one-hot; for K = 1 the indicator of class 1."""
    weight: torch.Tensor
    """(N, 1), or (N, P) where problems differ in their rows' weights."""
    l1: torch.Tensor
    """(P,)"""
    softmax: bool

    def pick(self, index: torch.Tensor) -> Task:
        """Some of the problems."""
        shared = self.weight.shape[1] == 1
        weight = self.weight if shared else self.weight.index_select(1, index)
        return replace(self, weight=weight, l1=self.l1.index_select(0, index))

    def gradient(self, at: State) -> State:
        """Of the smooth part. One pass over the rows; blocks are summed in float64 if there is."""
        d, P, K = at.W.shape
        V = at.W.reshape(d, P * K)
        dtype = torch.float64 if has_float64(V.device) else torch.float32
        G = torch.zeros(d, P * K, dtype=dtype, device=V.device)
        g = torch.zeros(P, K, dtype=dtype, device=V.device)
        for part, block in self.X:
            z = (block @ V).reshape(-1, P, K) + at.b
            probs = torch.softmax(z, 2) if self.softmax else torch.sigmoid(z)
            R = (probs - self.Y[part, None, :]) * self.weight[part, :, None]
            G += block.T @ R.reshape(-1, P * K)
            g += R.sum(0)
        return State(G.float().reshape(d, P, K), g.float())

    def violation(self, at: State, gradient: State) -> torch.Tensor:
        """Largest violation (P,) of the optimality conditions."""
        l1 = self.l1[:, None]
        G, W = gradient.W, at.W
        wrong = torch.where(W != 0, (G + l1 * W.sign()).abs(), (G.abs() - l1).clamp(min=0))
        return torch.maximum(wrong.amax((0, 2)), gradient.b.abs().amax(1))

    def step_sizes(self) -> torch.Tensor:
        """1 / L (P,), by power iteration from a fixed start, with a margin.

        L is ‖diag(√w) [1 X]‖² times the largest curvature of the loss: 1/4 for a sigmoid, 1/2 for
        the softmax.
        """
        count, device = self.weight.shape[1], self.X.device
        v = torch.ones(self.X.shape[1], count, device=device)
        c = torch.ones(1, count, device=device)
        norm = torch.ones(count, device=device)
        for _ in range(30):
            u, e = torch.zeros_like(v), torch.zeros_like(c)
            for part, block in self.X:
                z = self.weight[part] * (block @ v + c)
                u += block.T @ z
                e += z.sum(0)
            norm = ((u * u).sum(0) + (e * e).sum(0)).sqrt().clamp(min=1e-30)
            v, c = u / norm, e / norm
        step = 1.0 / (1.1 * norm * (0.5 if self.softmax else 0.25))
        return step.expand(len(self.l1))


class Batch:
    """FISTA on many problems side by side, until each has reached its goal.

    Notes
    -----
    Beck & Teboulle (2009) with the gradient-based restart of O'Donoghue & Candès (2015), by
    problem. A problem that has reached its goal leaves the batch, so that the others go on faster.
    """

    def __init__(self, task: Task, start: State, goal: NDArray[np.float64]) -> None:
        self.task, self.goal = task, goal
        self.live = np.arange(len(goal))
        self.step = task.step_sizes()
        self.U = self.V = start
        self.t = torch.ones(len(goal), device=task.X.device)
        self.used = 0
        self.ended: dict[int, tuple[State, float, int]] = {}

    def until(self, index: int, max_steps: int) -> tuple[State, float, int]:
        """Go on until problem *index* has ended.

        Returns
        -------
        The problem's weights as a `State` of one, its largest violation, and the steps it took.
        """
        while index not in self.ended:
            G = self.task.gradient(self.V)
            if self.used % CHECK == 0:
                last = self.used >= max_steps
                keep = self._look(self.task.violation(self.V, G), last)
                if index in self.ended:
                    # G is kept from being stale: the next call begins with a gradient of its own
                    break
                G = G if keep is None else G.pick(keep)
            self._advance(G)
        return self.ended[index]

    def _look(self, worst: torch.Tensor, last: bool) -> torch.Tensor | None:
        """Let the problems go that have ended; the others' places, if any went."""
        found = worst.double().cpu().numpy() if has_float64(worst.device) else worst.cpu().numpy()
        ready = (found <= self.goal[self.live]) | last
        if not ready.any():
            return None
        for place in np.flatnonzero(ready):
            alone = self.V.pick(torch.tensor([int(place)], device=worst.device))
            self.ended[int(self.live[place])] = alone, float(found[place]), self.used
        keep = torch.as_tensor(np.flatnonzero(~ready), device=worst.device)
        self.live = self.live[~ready]
        self.task, self.U, self.V = self.task.pick(keep), self.U.pick(keep), self.V.pick(keep)
        self.step, self.t = self.step.index_select(0, keep), self.t.index_select(0, keep)
        return keep

    def _advance(self, G: State) -> None:
        step = self.step[:, None]
        W = self.V.W - step * G.W
        threshold = step * self.task.l1[:, None]
        W = W - torch.maximum(torch.minimum(W, threshold), -threshold)
        b = self.V.b - step * G.b
        moved = State(W - self.U.W, b - self.U.b)
        uphill = ((self.V.W - W) * moved.W).sum((0, 2)) + ((self.V.b - b) * moved.b).sum(1) > 0
        t = torch.where(uphill, torch.ones_like(self.t), self.t)
        self.used += 1
        if self.task.softmax and self.used % CENTRE == 0:  # rarely: it costs the momentum
            W = centre(W)
            moved, t = State(W - self.U.W, moved.b), torch.ones_like(t)
        t_new = 0.5 * (1.0 + (1.0 + 4.0 * t * t).sqrt())
        push = ((t - 1.0) / t_new)[:, None]
        self.V = State(W + push * moved.W, b + push * moved.b)
        self.U, self.t = State(W, b), t_new


def centre(W: torch.Tensor) -> torch.Tensor:
    """`problem.centre` for weights (d, P, K)."""
    order = W.sort(dim=2).values
    K = W.shape[2]
    low, high = order[..., (K - 1) // 2, None], order[..., K // 2, None]
    return W - torch.maximum(torch.minimum(torch.zeros_like(low), high), low)


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A float32 copy on *device*."""
    return torch.as_tensor(np.ascontiguousarray(array, np.float32), device=device)
