"""Products that end with something more: what they give, and that the operators keep their contracts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hasten.kernels import linear
from hasten.kernels.linear import add_product, fuses_gelu, linear_gelu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_of_a_product(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, weight, bias = (torch.randn(s, device=device, dtype=dtype) for s in ((2, 5, 32), (48, 32), (48,)))
    with torch.no_grad():
        found = linear_gelu(x, weight, bias)
        assert fuses_gelu(x, weight, bias) == (device == "cuda")
    expected = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")
    assert found.shape == expected.shape
    assert (found.float() - expected).norm() < (1e-5 if device == "cpu" else 1e-2) * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_a_product_is_added(device: str) -> None:
    found, x, weight = (torch.randn(s, device=device) for s in ((2, 5, 48), (2, 5, 32), (48, 32)))
    expected = found + x @ weight.t()
    with torch.no_grad():
        assert torch.allclose(add_product(found, x, weight), expected, atol=1e-2 if device == "cuda" else 1e-5)


def test_operators_keep_their_contracts() -> None:
    x, weight, bias, found = torch.randn(5, 32), torch.randn(48, 32), torch.randn(48), torch.randn(5, 48)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(linear._linear_gelu, (x, weight, bias), test_utils=checks)
    torch.library.opcheck(linear._add_product, (found, x, weight), test_utils=checks)
