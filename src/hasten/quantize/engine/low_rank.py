"""The matrix of low rank that takes most of an error away, as it shows in the output.

Source: with C the Cholesky factor of the second moments of the inputs, the error of the output that a change D of the
weight makes is the sum of squares of D C, so that the best correction of rank r is SVD_r(D C) C^-1 (Eckart and Young).
"""

from __future__ import annotations

import torch

from hasten.kernels.modules import LowRank
from hasten.quantize.engine.gptq import cholesky

DAMPING = 1e-3
EXACT = 1024
"""Up to so many rows or columns the singular values are computed exactly."""
SPARE, ROUNDS = 16, 4
"""Of the randomized method (Halko et al. 2009, https://arxiv.org/abs/0909.4061): spare vectors, and power rounds."""


def whitening(second: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factors of second moments, [blocks, size, size] float32."""
    return torch.stack([cholesky(moments, DAMPING).float() for moments in second])


def correction(change: torch.Tensor, factor: torch.Tensor, rank: int, kind: torch.dtype) -> LowRank:
    """The side branch of a rank that comes nearest to a change, [outputs, inputs], as the output sees it.

    `factor` is what `whitening` gives; `kind` the type that the branch is stored in.
    """
    blocks, size, _ = factor.shape
    parts = change.reshape(change.shape[0], blocks, size).transpose(0, 1)
    left, values, right = leading(torch.cat(list(parts @ factor), 1), rank)
    root = values.sqrt()
    inputs = (right * root).mT.reshape(-1, blocks, size).transpose(0, 1)
    inputs = torch.linalg.solve_triangular(factor, inputs, upper=False, left=False)
    return LowRank(down=torch.cat(list(inputs), 1).to(kind).contiguous(), up=(left * root).to(kind).contiguous())


def leading(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values, [rank], and their vectors as columns, [rows, rank] and [columns, rank]."""
    if min(matrix.shape) > EXACT:
        return _randomized(matrix, rank)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = left[:, :rank], values[:rank], right[:rank].mT
    return found[0].float(), found[1].float(), found[2].float()


def _randomized(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = min(rank + SPARE, *matrix.shape)
    start = torch.randn(matrix.shape[1], count, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank].mT


def product_of(branch: LowRank) -> torch.Tensor:
    """What a side branch adds to the weight, [outputs, inputs] float32."""
    return branch.up.float() @ branch.down.float()
