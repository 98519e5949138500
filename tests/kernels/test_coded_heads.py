"""Heads as 8-bit floats: what the codes stand for, the bounds that serve as scales, and what those cost."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hasten.kernels import coded_heads, rotary
from hasten.kernels.coded_heads import LARGEST, CodedHeads, code_heads
from hasten.kernels.rotary import HeadNorm, Heads
from tests.kernels.fused_cases import head_streams, values

CASES = {name: (streams, norm) for name, streams, norm in head_streams(3, 16, torch.float32, "cpu")}


@pytest.mark.parametrize("case", CASES)
def test_codes_stand_for_what_the_plain_pass_computes(case: str) -> None:
    streams, norm = CASES[case]
    coded = code_heads(streams, norm)
    assert (coded.scales.shape, coded.scales.dtype, coded.dtype) == ((3, 2, 3), torch.float32, torch.float32)
    for found, wanted in zip(coded.values(), rotary.prepare(streams, norm), strict=True):
        assert found.shape == wanted.shape
        # Half a step of 3 bits, and of the smallest numbers, which are multiples of 2**-9 of a scale.
        assert ((found - wanted).abs() <= wanted.abs() / 16 + coded.scales.max() * 2**-10).all()
    assert all(codes.dtype == torch.float8_e4m3fn for codes in (coded.query, coded.key, coded.value))
    assert coded.value.float().abs().amax((1, 3)).eq(LARGEST).all(), "values use the whole range"


@pytest.mark.parametrize("across", [False, True])
def test_the_bound_holds_and_is_reached(across: bool) -> None:
    """Heads with all their length in a pair of channels, turned into one of them, where the weight is largest."""
    size = 16
    angle = torch.full((1, 4, size // 2), -math.pi / 4)
    weight = torch.full((2 * size if across else size,), 0.1)
    weight[:2] = 3.0
    x = torch.zeros(1, 4, 2, size)
    x[:, :, 0, :2] = torch.tensor([1.0, 10.0, 1e3, 1e6])[:, None]
    one = Heads(x, x.flip(3), x + 1, weight, weight, (angle.cos(), angle.sin()))
    coded = code_heads([one], HeadNorm(1e-12, across))
    assert coded.query[:, :, 0, 0].float().eq(LARGEST).all()
    query, _, _ = rotary.prepare([one], HeadNorm(1e-12, across))
    assert torch.allclose(coded.values()[0], query, rtol=0.07, atol=0.01)


def test_streams_that_are_joined_share_a_scale() -> None:
    small, large = ((Heads(x, x, x, weight, weight)) for x, weight in (
        (values(1, 4, 2, 16), torch.full((16,), 0.5)), (values(1, 4, 2, 16) * 9, torch.full((16,), 4.0))))  # fmt: skip
    scales = [code_heads(streams, HeadNorm(1e-6)).scales for streams in ([small, large], [large, small], [large])]
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[0], scales[2])
    assert scales[0][0].allclose(torch.tensor(4.0 * 4 / LARGEST))


def test_a_scale_for_each_sample_and_head() -> None:
    sizes = torch.tensor([[1e-6, 1.0, 3e4], [5.0, 1e-3, 0.0]])[:, None, :, None]
    query, key, value = (
        values(2, 5, 6, 8) * sizes.repeat_interleave(2, 2),
        values(2, 7, 3, 8),
        values(2, 7, 3, 8) * sizes,
    )
    coded = code_heads([Heads(query, key, value)])
    for found, wanted in zip(coded.values(), (query, key, value), strict=True):
        apart, whole = (
            (part.unflatten(2, (3, -1)).square().sum((1, 3, 4))).sqrt() for part in (found - wanted, wanted)
        )
        assert (apart <= 0.04 * whole).all()
    assert coded.scales.gt(0).all()


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    near, far, values = (part.transpose(1, 2).double() for part in (query, key, value))
    return F.scaled_dot_product_attention(near, far, values)


@pytest.mark.parametrize("loose", [1.0, 3.0, 8.0])
def test_a_scale_from_the_bound_costs_nothing_measurable(loose: float) -> None:
    """Against scales of the largest numbers; also where one weight is larger than the others."""
    torch.manual_seed(0)
    x, key, value = (torch.randn(1, 256, 2, 128) for _ in range(3))
    weight = torch.ones(128)
    weight[5] = loose
    angles = torch.rand(1, 256, 64)
    one = Heads(x, key, value, weight, torch.ones(128), (angles.cos(), angles.sin()))
    bounded = code_heads([one], HeadNorm(1e-6))
    exact = rotary.prepare([one], HeadNorm(1e-6))
    searched = code_heads([Heads(*exact)])
    assert (bounded.scales[:2] > 1.8 * searched.scales[:2]).all(), "the bound is not what it is compared with"
    wanted = attention(*exact)
    errors = [float((attention(*coded.values()) - wanted).norm() / wanted.norm()) for coded in (bounded, searched)]
    assert 0.005 < errors[1] < 0.1
    assert errors[0] < 1.05 * errors[1]


def test_what_is_not_a_number_stays_visible() -> None:
    x = values(1, 5, 2, 16)
    spoilt = x.clone()
    spoilt[0, 3, 1, 2] = torch.nan
    one = Heads(spoilt, x, spoilt, torch.ones(16), torch.ones(16))
    query, _, value = code_heads([one], HeadNorm(1e-6)).values()
    for found in (query, value):
        assert found[0, 3, 1, 2].isnan()
        assert found[0, :, 0].isfinite().all()


def test_no_gradients() -> None:
    x = values(1, 5, 2, 16).requires_grad_()
    assert not any(part.requires_grad for part in code_heads([Heads(x, x, x)]).values())


def test_the_operator_keeps_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = ("test_schema", "test_faketensor")
    for streams, norm in CASES.values():
        facts = (norm is not None, 1e-6, norm is not None and norm.across)
        second = streams[1] if len(streams) > 1 else None
        given: Any = (*rotary.flat(streams[0]), *rotary.flat(second), *facts)
        torch.library.opcheck(coded_heads._operator, given, test_utils=checks)


def test_compiled_code_goes_through_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded_heads, "served", lambda *_: True)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(coded_heads, "codes_float8", lambda _: True)  # pyright: ignore[reportUnknownLambdaType]
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    streams, norm = CASES["joined, real"]

    def run() -> CodedHeads:
        return code_heads(streams, norm)

    torch._dynamo.reset()
    found: Any = torch.compile(run, backend=backend, fullgraph=True)()
    wanted = run()
    assert sum("code_heads" in name for name in graphs[0]) == 1
    for name in ("query", "key", "value", "scales"):
        assert torch.equal(getattr(found, name).float(), getattr(wanted, name).float())
    assert dataclasses.is_dataclass(found)
