"""Products in 16 and 32 bits that end with something more than a bias, where cuBLAS does that on the way."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hasten.kernels.serving import launches

_SIXTEEN = (torch.float16, torch.bfloat16)


def add_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """found + x @ weight.T, [..., outputs]; where no gradients are wanted on a GPU, into the memory of `found`."""
    flat, rows = found.reshape(-1, found.shape[-1]), x.reshape(-1, x.shape[-1])
    if not found.is_cuda or torch.is_grad_enabled():
        return torch.addmm(flat, rows, weight.t()).reshape(found.shape)
    flat = flat if flat.is_contiguous() else flat.contiguous()
    _add_product(flat, rows, weight)
    return flat.reshape(found.shape)


@torch.library.custom_op("hasten::add_product", mutates_args=("found",))
def _add_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    # `addmm` would copy what is added to first.
    found.addmm_(x, weight.t())


def fuses_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Does `linear_gelu` save a pass over the output?"""
    sixteen = x.dtype in _SIXTEEN and x.dtype == weight.dtype and bias is not None
    return x.is_cuda and sixteen and not torch.is_grad_enabled()


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x @ weight.T + bias), approximated by tanh; GELU is taken of the sums before they are rounded."""
    found = _linear_gelu(x.reshape(-1, x.shape[-1]), weight, bias)
    return found.reshape(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("hasten::linear_gelu", mutates_args=())
def _linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    launches["linear_gelu"] += 1
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@_linear_gelu.register_fake
def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
