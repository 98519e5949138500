"""The recorded path of a sampler: states and outputs of one run, and the update that leads from step to step.

Every update here has the form xh' = gain*xh + now*x0_k + before*x0_(k-1), with x0_k = xh_k - s_k*u_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hasten.cache.engine.records import Floats, Grid, SeedRecord
from hasten.cache.engine.rules import Quantity, Variable, position
from hasten.core.errors import InvalidSetting


@dataclass(frozen=True)
class Update:
    """Coefficients of the sampler's update at every step, each (T,); `before` is 0 for one-step samplers."""

    gain: Floats
    now: Floats
    before: Floats

    @classmethod
    def of(cls, grid: Grid) -> Update:
        """Euler: xh' = (s'/s)*xh + (1-s'/s)*x0, the same as xh + (s'-s)*u.

        DPM-Solver++(2M) (arXiv:2211.01095, midpoint) puts x0_k + (x0_k - x0_(k-1))*h_k/(2*h_(k-1)) in place of x0,
        with h the step in log(alpha/sigma); the first step and one to s = 0 are Euler's.
        """
        s = np.array(grid.flow_time)
        gain = s[1:] / s[:-1]
        extra = np.zeros_like(gain) if grid.solver == "euler" else _second_order(s)
        return cls(gain, (1 - gain) * (1 + extra), -(1 - gain) * extra)


@dataclass(frozen=True)
class Path:
    """One run, or several pooled: row vectors of `states` xh (T+1, d) and `velocities` u (T, d).

    d is the dimension of the samples, or the T+1 of a calibration record, whose vectors have the same inner products.
    """

    grid: Grid
    update: Update
    states: Floats
    velocities: Floats

    @classmethod
    def of(cls, grid: Grid, basis: ArrayLike) -> Path:
        """The path of the columns (xh_0, u_0, ..., u_(T-1)) of `basis`, (d, T+1); raises for another number."""
        vectors = np.asarray(basis, dtype=np.float64).T
        if len(vectors) != grid.steps + 1:
            raise InvalidSetting(f"A grid of {grid.steps} steps needs {grid.steps + 1} vectors, not {len(vectors)}.")
        update = Update.of(grid)
        return cls(grid, update, _follow(grid, update, vectors), vectors[1:])

    @property
    def flow_time(self) -> Floats:
        """s at the T+1 nodes."""
        return np.array(self.grid.flow_time)

    @property
    def clean(self) -> Floats:
        """x0 = xh - s*u at every step, (T, d)."""
        return self.states[:-1] - self.flow_time[:-1, None] * self.velocities

    def mixture(self, quantity: Quantity) -> tuple[Floats, Floats]:
        """(a, b), each (T,), with quantity = a*xh + b*u.

        noise = xh + (1-s)*u; v = alpha*noise - sigma*x0.
        """
        s, ones = self.flow_time[:-1], np.ones(self.grid.steps)
        if quantity == "clean" or (quantity == "output" and self.grid.prediction == "sample"):
            return ones, -s
        if quantity == "velocity" or self.grid.prediction == "flow_prediction":
            return 0 * ones, ones
        if self.grid.prediction == "epsilon":
            return ones, 1 - s
        alpha, sigma = np.array(self.grid.alpha[:-1]), np.array(self.grid.sigma[:-1])
        return alpha - sigma, alpha * (1 - s) + sigma * s

    def values(self, quantity: Quantity) -> Floats:
        """The quantity at every step, (T, d)."""
        a, b = self.mixture(quantity)
        return a[:, None] * self.states[:-1] + b[:, None] * self.velocities

    def positions(self, variable: Variable) -> Floats:
        """Where the T+1 nodes lie along `variable`."""
        levels = zip(self.grid.alpha, self.grid.sigma, strict=True)
        return np.array([position(variable, step, alpha, sigma) for step, (alpha, sigma) in enumerate(levels)])


def path_of(grid: Grid, record: SeedRecord) -> Path:
    """The path of one calibration record."""
    return Path.of(grid, record.basis())


def _second_order(s: Floats) -> Floats:
    """h_k/(2*h_(k-1)) at every step, 0 where the solver takes a first-order step."""
    with np.errstate(divide="ignore"):
        lam = np.log((1 - s) / s)
    h = np.diff(lam)
    extra = np.zeros_like(h)
    usable = np.isfinite(h[1:])
    extra[1:][usable] = h[1:][usable] / (2 * h[:-1][usable])
    return extra


def _follow(grid: Grid, update: Update, vectors: Floats) -> Floats:
    states = [vectors[0]]
    before = np.zeros_like(vectors[0])
    for k, s in enumerate(grid.flow_time[:-1]):
        clean = states[-1] - s * vectors[k + 1]
        states.append(update.gain[k] * states[-1] + update.now[k] * clean + update.before[k] * before)
        before = clean
    return np.array(states)
