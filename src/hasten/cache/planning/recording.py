"""What calibration keeps of an uncached run: the inner products of its outputs, gathered while it runs."""

from __future__ import annotations

import numpy as np
import torch

from hasten.cache.engine.records import Floats, Grid, SeedRecord
from hasten.cache.planning.path import Path
from hasten.core.errors import BrokenOutput, InvalidSetting

CHUNK = 1 << 18
"""Elements that are converted to float64 at a time."""


class Recorder:
    """Gathers one run of one image on `grid`, beginning with the state xh_0 = x/(alpha+sigma) at the first step.

    Outputs are kept as float32 where they are, (T+1) times the size of the sample, and multiplied in float64.
    Nothing waits for the device before `record`.
    """

    def __init__(self, grid: Grid, start: torch.Tensor) -> None:
        self.grid = grid
        self._shape = start.shape
        size = grid.steps + 1
        self._vectors = start.new_zeros((size, start.numel()), dtype=torch.float32)
        self._gram = start.new_zeros((size, size), dtype=torch.float64)
        self._count = 0
        self._append(start)

    @torch.no_grad()
    def add(self, velocity: torch.Tensor) -> None:
        """Add the next step's velocity (after guidance); raises InvalidSetting for a wrong shape or one too many."""
        if velocity.shape != self._shape:
            shapes = f"{tuple(velocity.shape)}, the start {tuple(self._shape)}"
            raise InvalidSetting(f"A recorded velocity has the shape {shapes}.")
        if self._count > self.grid.steps:
            raise InvalidSetting(f"The grid has {self.grid.steps} steps, but one more output was recorded.")
        self._append(velocity)

    def record(self, *, seed: int, prompt: str = "") -> SeedRecord:
        """What was gathered; raises InvalidSetting when steps are missing, BrokenOutput for NaN or infinity."""
        return SeedRecord.of(self._products(), seed=seed, prompt=prompt)

    def discrepancy(self, final: torch.Tensor) -> float:
        """|final - expected|/|expected|, with the state that the grid's update makes of the recorded outputs.

        Rounding alone gives 1e-2 (bfloat16) to 1e-6. More means that the sampler is not the one that the grid
        names, for example because it adds noise, and that a plan from this record would be wrong.
        """
        self._products()
        mix = Path.of(self.grid, np.eye(self.grid.steps + 1)).states[-1]
        weights = torch.tensor(mix, device=self._vectors.device)
        apart = expected = torch.zeros((), dtype=torch.float64, device=self._vectors.device)
        for part, chunk in zip(self._vectors.split(CHUNK, dim=1), final.reshape(-1).split(CHUNK), strict=True):
            made = weights @ part.double()
            apart = apart + (chunk.double() - made).square().sum()
            expected = expected + made.square().sum()
        return float((apart / expected).sqrt())

    def _products(self) -> Floats:
        if self._count <= self.grid.steps:
            raise InvalidSetting(f"{self._count - 1} of {self.grid.steps} outputs were recorded.")
        gram = self._gram.cpu().numpy()
        if not np.isfinite(gram).all():
            raise BrokenOutput("An output recorded for calibration holds NaN or infinite numbers.")
        return gram

    def _append(self, vector: torch.Tensor) -> None:
        row, rows = self._count, self._vectors[: self._count + 1]
        self._vectors[row] = vector.detach().reshape(-1)
        for part in rows.split(CHUNK, dim=1):
            wide = part.double()
            self._gram[row, : row + 1] += wide @ wide[row]
        self._gram[: row + 1, row] = self._gram[row, : row + 1].clone()
        self._count += 1
