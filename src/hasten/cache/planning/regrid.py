"""Another grid from recorded outputs: another step count, scheduler shift or resolution bucket without new runs.

The outputs along the path are taken as a function of flow time and interpolated between the recorded nodes. Every new
vector is a linear combination of recorded ones, so the inner products become G' = W G W^T (W acts on the factor of G).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hasten.cache.engine.records import Floats, Grid, SeedRecord
from hasten.cache.planning.path import path_of
from hasten.cache.planning.segments import Ints, lagrange
from hasten.core.errors import InvalidSetting


def interpolation(nodes: Floats, at: Floats, degree: int = 3) -> Floats:
    """Weights, (n, T), of values at the falling `nodes`, (T,), in those at the places `at`, (n,).

    Inside of the nodes by the polynomial of `degree` through the nearest ones (1 is piecewise linear), outside linear.
    """
    result = np.zeros((len(at), len(nodes)))
    inside = (at <= nodes[0]) & (at >= nodes[-1])
    for rows, width in ((inside, degree + 1), (~inside, 2)):
        columns = _nearest(nodes, at[rows], min(width, len(nodes)))
        part = np.zeros((len(columns), len(nodes)))
        np.put_along_axis(part, columns, lagrange(nodes[columns], at[rows]), axis=1)
        result[rows] = part
    return result


def regrid(record: SeedRecord, recorded: Grid, wanted: Grid, degree: int = 3) -> SeedRecord:
    """What the record would be if the run had used the grid `wanted`.

    The new path starts at the recorded state of its first flow time, so that a later start (img2img strength) is
    fine. Between recorded nodes the result knows no more than the record: with many more steps than were recorded,
    predicted errors come out too small; record at the largest step count and re-plan to smaller ones.
    Raises InvalidSetting for flow times more than about one recorded spacing outside of the recorded ones.
    """
    path = path_of(recorded, record)
    s, at = path.flow_time, np.array(wanted.flow_time[:-1])
    _check_range(s[:-1], at)
    weights, start = interpolation(s[:-1], at, degree), at[0]
    node = int(np.clip(np.searchsorted(-s, -start, side="right") - 1, 0, recorded.steps - 1))
    first = path.states[node] + (start - s[node]) * path.velocities[node]
    vectors = np.vstack([first, weights @ path.velocities])
    return SeedRecord.of(vectors @ vectors.T, seed=record.seed, prompt=record.prompt)


def regrid_gains(gains: Sequence[float], recorded: Grid, wanted: Grid) -> tuple[float, ...]:
    """Landing gains at the nodes of `wanted`, linear in flow time between recorded ones; none stay none."""
    if not gains:
        return ()
    return tuple(np.interp(wanted.flow_time, recorded.flow_time[::-1], gains[::-1]).tolist())


def _check_range(nodes: Floats, at: Floats) -> None:
    if len(nodes) < 2:
        raise InvalidSetting("A record of one step cannot be taken to another grid.")
    high, low = 2 * nodes[0] - nodes[1], 2 * nodes[-1] - nodes[-2]
    if at.max() > high or at.min() < min(low, nodes[-1] / 2):
        raise InvalidSetting(
            f"The wanted steps have flow times from {at.max():.4g} to {at.min():.4g}, the recorded ones from "
            f"{nodes[0]:.4g} to {nodes[-1]:.4g}: too far outside to plan; calibrate on the wanted grid."
        )


def _nearest(nodes: Floats, at: Floats, width: int) -> Ints:
    """Indices, (n, width), of adjacent nodes around each place, as far as there are any in the middle."""
    after = np.searchsorted(-nodes, -at, side="left")
    first = np.clip(after - width // 2, 0, len(nodes) - width)
    return first[:, None] + np.arange(width)
