"""Residual connection, norm, modulation and rounding in one pass."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hasten.kernels import residual
from hasten.kernels.activations import float8_tokens, int8_tokens
from hasten.kernels.coded import Coded, Coding, code, coded_linear
from hasten.kernels.hadamard import rotate
from hasten.kernels.residual import Added, Norm, Normalizing, add, add_and_normalize, normalize
from hasten.kernels.rounding import quantize_float8, quantize_integer
from tests.kernels.fused_cases import values

WIDTH = 48


def test_it_is_what_a_block_writes_out_step_by_step() -> None:
    x, y = values(2, 5, WIDTH), values(2, 5, WIDTH, seed=1)
    shift, scale, gate = values(2, 3 * WIDTH).chunk(3, -1)
    total, out = add_and_normalize(x, Added(y, gate), Normalizing(Norm("layer", 1e-6), shift, scale))
    wanted = x + gate[:, None] * y
    assert torch.allclose(total, wanted, atol=1e-6)
    normed = F.layer_norm(wanted, (WIDTH,), eps=1e-6)
    assert isinstance(out, torch.Tensor)
    assert torch.allclose(out, normed * (1 + scale[:, None]) + shift[:, None], atol=1e-5)


def test_modulation_by_token_and_the_norm_of_what_is_added() -> None:
    x, y, weight = values(2, 5, WIDTH), values(2, 5, WIDTH, seed=1), values(WIDTH)
    gate, scale = values(2, 5, WIDTH, seed=2), values(2, 1, WIDTH)
    rms = torch.nn.functional.rms_norm
    assert torch.allclose(
        add(x, Added(y, gate, Norm("rms", 1e-5, weight))), x + gate * rms(y, (WIDTH,), weight, 1e-5), atol=1e-5
    )
    out = normalize([x], Normalizing(Norm("rms", 1e-5, weight), None, scale))
    assert isinstance(out, torch.Tensor)
    assert torch.allclose(out, rms(x, (WIDTH,), weight, 1e-5) * (1 + scale), atol=1e-5)


def test_two_streams_are_joined() -> None:
    first, second, shift = values(2, 3, WIDTH), values(2, 5, WIDTH), values(2, WIDTH)
    how = Normalizing(Norm("layer", 1e-6), shift)
    apart = [normalize([one], how) for one in (first, second)]
    joined = normalize([first, second], how)
    assert isinstance(joined, torch.Tensor)
    assert torch.equal(joined, torch.cat([part for part in apart if isinstance(part, torch.Tensor)], 1))


def test_half_precision_rounds_once_and_does_not_overflow() -> None:
    x, y = values(1, 4, WIDTH, dtype=torch.bfloat16), values(1, 4, WIDTH, dtype=torch.bfloat16, seed=1)
    gate = values(1, WIDTH, dtype=torch.bfloat16)
    exact = (x.double() + gate.double()[:, None] * y.double()).to(torch.bfloat16)
    assert torch.equal(add(x, Added(y, gate)), exact)
    large = torch.full((1, 1, 8), 60000.0, dtype=torch.float16)
    assert add(large, Added(large)).eq(65504).all()


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_codes_are_those_of_the_smoothed_and_rotated_tokens(kind: str) -> None:
    x, smooth = values(2, 3, WIDTH), values(WIDTH).abs() + 0.5
    coding = Coding(kind, smooth, 16)  # pyright: ignore[reportArgumentType]
    found = normalize([x], Normalizing(Norm("layer", 1e-6), coding=coding))
    assert isinstance(found, Coded)
    tokens = rotate(F.layer_norm(x, (WIDTH,), eps=1e-6) / smooth, 16).reshape(-1, WIDTH)
    codes, scales = (int8_tokens if kind == "int8" else float8_tokens)(tokens)
    assert torch.allclose(found.scales.flatten(), scales.flatten(), rtol=1e-5)
    near = (found.codes.float().reshape(-1, WIDTH) - codes.float()).abs() <= codes.float().abs() / 8 + 1
    assert near.all()
    error = (found.values().reshape(-1, WIDTH) - tokens).norm() / tokens.norm()
    assert error < (0.01 if kind == "int8" else 0.04)


@pytest.mark.parametrize("number", ["int8", "float8"])
def test_products_with_codes(number: str) -> None:
    matrix, bias, x = values(24, 32), values(24), values(2, 5, 32)
    weight = quantize_integer(matrix, 8) if number == "int8" else quantize_float8(matrix)
    given = code(x, Coding(number), torch.float32)  # pyright: ignore[reportArgumentType]
    found = coded_linear(given, weight, bias)
    assert torch.allclose(found, F.linear(given.values(), weight.dequantize(), bias), atol=1e-5)
    assert (found - F.linear(x, matrix, bias)).norm() / found.norm() < 0.05


def test_operators_keep_their_contracts() -> None:
    x, y, six = values(2, 5, WIDTH), values(2, 5, WIDTH, seed=1), values(2, 3 * WIDTH)
    shift, scale, gate = six.chunk(3, -1)
    checks = ("test_schema", "test_faketensor")
    facts = (False, 0.0, "layer", 1e-6)
    given = (x, None, y, gate, None, None, None, shift, scale, None)
    for end in (("", 1), ("int8", 16), ("float8", 1)):
        torch.library.opcheck(residual._operator, (*given, *facts, *end), test_utils=checks)
    torch.library.opcheck(residual._operator, (x, y, *[None] * 8, *facts, "", 1), test_utils=checks)
    only = (x, None, y, *[None] * 7, True, 1e-5, "", 0.0, "", 1)
    torch.library.opcheck(residual._operator, only, test_utils=checks)


def test_gradients_flow_through_the_reference() -> None:
    x, gate = values(1, 3, 8).requires_grad_(), values(1, 8).requires_grad_()
    total, out = add_and_normalize(x, Added(x, gate), Normalizing(Norm("layer", 1e-6)))
    assert isinstance(out, torch.Tensor)
    (total + out).sum().backward()
    assert x.grad is not None
    assert gate.grad is not None
