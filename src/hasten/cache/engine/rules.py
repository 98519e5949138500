"""Forecast rules: how the output of a step that is not computed is guessed from the outputs that were.

Coordinates of a deterministic sampler: network input x = alpha*x0 + sigma*noise; flow time s = sigma/(alpha+sigma);
state xh = x/(alpha+sigma); velocity u = noise - x0. In these DDIM (eta 0), Euler on EDM noise levels and
flow-matching Euler are the same update xh' = xh + (s'-s)*u.

A forecast is sum_j c_j*snapshot_j over the newest full outputs. The c_j depend on positions alone, host numbers, so
raw snapshots are kept and no differences of tensors are ever formed (differences cancel in half precision).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from hasten.core.errors import InvalidSetting, UnknownName

Quantity = Literal["velocity", "clean", "output"]
Variable = Literal["index", "flow_time", "angle"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
VARIABLES: tuple[Variable, ...] = get_args(Variable)
MAX_ORDER = 3


@dataclass(frozen=True)
class Rule:
    """A forecast rule, written `quantity/variable/order`, then `c` when it corrects, then `@trust` below 1.

    `quantity` is what is extrapolated: the velocity, the clean sample x0, or the network's own output (epsilon,
    v or velocity, whatever the model predicts). `variable` is along what: the step index, the flow time s, or
    the angle arctan(sigma/alpha). `order` is the degree of the polynomial; 0 holds the newest output.

    With `correct` the skipped steps are integrated again as soon as the next output is known, with values
    interpolated between the true outputs at both ends (the corrector idea of UniPC, arXiv:2302.04867).
    That output itself was computed at the uncorrected state and is not computed again; at the corrected state its
    `quantity` is taken to be the same.

    `trust` is the part of the extrapolated change that is believed, from 1 to 0 (hold). Under strong guidance and
    over wide gaps half of it is better than all (measured on the bundled models).
    """

    quantity: Quantity = "velocity"
    variable: Variable = "index"
    order: int = 1
    correct: bool = False
    trust: float = 1.0

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise UnknownName("quantity to forecast", str(self.quantity), QUANTITIES)
        if self.variable not in VARIABLES:
            raise UnknownName("variable to forecast along", str(self.variable), VARIABLES)
        _check_order(self.order)
        if not 0 <= self.trust <= 1:
            raise InvalidSetting(f"The trust in a forecast is a number from 0 to 1, not {self.trust!r}.")

    def __str__(self) -> str:
        trust = "" if self.trust == 1 else f"@{self.trust:g}"
        return f"{self.quantity}/{self.variable}/{self.order}{'c' if self.correct else ''}{trust}"

    def weights(self, positions: Sequence[float], at: float) -> tuple[float, ...]:
        """Coefficients of the forecast at `at`, like the function `weights` at full trust."""
        full = weights(positions, at, self.order)
        return (*(self.trust * one for one in full[:-1]), self.trust * full[-1] + 1 - self.trust)


def parse_rule(text: str) -> Rule:
    """Read "velocity/index/1c"; raises InvalidSetting or UnknownName saying which part is wrong."""
    parts = text.split("/")
    if len(parts) != 3:
        raise InvalidSetting(f"{text!r} is no forecast rule; write quantity/variable/order, such as velocity/index/1c.")
    quantity, variable, order = parts
    found = re.fullmatch(r"([0-9])(c?)(?:@([0-9.]{1,8}))?", order, flags=re.ASCII)
    if found is None or (found[3] or "0").count(".") > 1 or found[3] == ".":
        raise InvalidSetting(
            f"{text!r}: the order must be a digit, then c for correct, then @ and a trust such as @0.5, not {order!r}."
        )
    trust = 1.0 if found[3] is None else float(found[3])
    return Rule(cast("Quantity", quantity), cast("Variable", variable), int(found[1]), bool(found[2]), trust)


def position(variable: Variable, step: int, alpha: float, sigma: float) -> float:
    """Where a step lies along `variable`: `step` itself, s = sigma/(alpha+sigma), or arctan(sigma/alpha) in radians."""
    if variable == "index":
        return float(step)
    return sigma / (alpha + sigma) if variable == "flow_time" else math.atan2(sigma, alpha)


def weights(positions: Sequence[float], at: float, order: int) -> tuple[float, ...]:
    """Coefficients of the polynomial through the newest `order`+1 snapshots, evaluated at `at` (Lagrange).

    `positions` are those of the snapshots, newest last. The result has min(`order`+1, number of snapshots)
    coefficients, which belong to the newest snapshots, newest last: with a short history the order is lower.
    Raises InvalidSetting without snapshots, for two at one place, and for an order outside 0..3.
    """
    nodes = _newest(positions, order)
    return tuple(
        math.prod((at - other) / (node - other) for k, other in enumerate(nodes) if k != j)
        for j, node in enumerate(nodes)
    )


def correction_weights(positions: Sequence[float], following: float, at: float, order: int) -> tuple[float, ...]:
    """Coefficients that interpolate at `at` between earlier snapshots and the output that follows at `following`.

    The last coefficient belongs to the following output, the others to the newest max(`order`, 1) snapshots.
    """
    return weights([*positions, following], at, max(order, 1))


def taylor_weights(positions: Sequence[float], at: float, order: int) -> tuple[float, ...]:
    """Coefficients of the TaylorSeer forecast (arXiv:2503.06923), positions in steps; otherwise like `weights`.

    The factors are renewed at each full step n: D_0 = y_n and D_j = (D_(j-1) at n - D_(j-1) at n-1) / window,
    where the window is the number of steps from full step n-1 to n for every j. The forecast k steps after the
    newest is sum_j D_j * k^j / j!. For order 1 this is the line through the newest two; beyond, it is not the
    polynomial through the snapshots (for a second difference that would have k*(k+window)/2 in place of k^2/2).
    """
    nodes = _newest(positions, order)
    ahead = at - nodes[-1]
    total = [0.0] * len(nodes)
    for degree, factor in enumerate(_taylor_factors(nodes)):
        scale = ahead**degree / math.factorial(degree)
        total = [value + scale * part for value, part in zip(total, factor, strict=True)]
    return tuple(total)


def _taylor_factors(nodes: Sequence[float]) -> list[list[float]]:
    """D_0, D_1, ... at the newest node, each as coefficients on the snapshots."""
    count = len(nodes)
    row = [[float(j == n) for j in range(count)] for n in range(count)]  # D_0 as it was at every node
    factors = [row[-1]]
    while len(row) > 1:
        first = count - len(row) + 1
        windows = [nodes[n] - nodes[n - 1] for n in range(first, count)]
        row = [
            [(now - before) / window for now, before in zip(row[k + 1], row[k], strict=True)]
            for k, window in enumerate(windows)
        ]
        factors.append(row[-1])
    return factors


def _newest(positions: Sequence[float], order: int) -> list[float]:
    _check_order(order)
    nodes = list(positions)[-(order + 1) :]
    if not nodes:
        raise InvalidSetting("A forecast needs at least one full output before it.")
    if len(set(nodes)) < len(nodes) or not all(map(math.isfinite, nodes)):
        raise InvalidSetting(f"The outputs of a forecast need distinct, finite positions, not {nodes}.")
    return nodes


def _check_order(order: object) -> None:
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= MAX_ORDER:
        raise InvalidSetting(f"The order of a forecast is a whole number from 0 (hold) to {MAX_ORDER}, not {order!r}.")
