"""The way to xFormers' operator, through its real Python package, with an operator for the CPU put into its list.

The package is not a requirement of the tests (its wheels pin a PyTorch): `pip install --no-deps --target DIR xformers`
and `PYTHONPATH=DIR` bring it in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.attention.bias import Bias
from hasten.attention.kernels import KERNELS
from hasten.attention.kernels.reduction import reduced
from hasten.attention.kernels.xformers_operator import built_for, mismatch
from hasten.core.diagnosis import Obstacle
from tests.attention.fakes import dense, expected
from tests.attention.test_gpu_kernels import CASES, close, tensors

fmha: Any = pytest.importorskip("xformers.ops.fmha")


class OnCpu(fmha.common.AttentionFwOpBase):
    """Computes from the matrix that the package itself makes of its description."""

    OPERATOR = staticmethod(lambda: None)
    SUPPORTED_DEVICES = {"cpu"}
    SUPPORTED_DTYPES = {torch.float32}
    SUPPORTED_MAX_K = 256
    SUPPORTED_ATTN_BIAS_TYPES = (
        type(None),
        torch.Tensor,
        *(getattr(fmha.attn_bias, name) for name in ("LowerTriangularMask", "LowerTriangularFromBottomRightMask",
                                                     "LocalAttentionFromBottomRightMask", "BlockDiagonalMask")),
    )  # fmt: skip
    SUPPORTS_DROPOUT = True
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_DIFFERENT_VALUE_EMBED = False
    NAME = "onCpu"
    seen: list[str] = []

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, None]:
        bias = inp.attn_bias
        cls.seen.append(type(bias).__name__)
        q, k, v = (part.transpose(1, 2) for part in (inp.query, inp.key, inp.value))
        q, k, v = (part.flatten(1, 2) if part.dim() == 5 else part for part in (q, k, v))
        if isinstance(bias, fmha.attn_bias.AttentionBias):
            bias = bias.materialize((q.shape[2], k.shape[2]))
        if isinstance(bias, torch.Tensor) and bias.dim() > 2:
            assert bias.stride(-2) % 8 == 0, "rows of a tensor bias begin at multiples of 8"
        return dense(q, k, v, bias, inp.scale).transpose(1, 2).to(inp.query.dtype), None


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    OnCpu.seen = []
    monkeypatch.setattr(fmha.dispatch, "_dispatch_fw_priority_list", lambda inp, needs_gradient: [OnCpu])  # pyright: ignore


@pytest.mark.parametrize("case", CASES)
def test_descriptions_arrive_as_its_own_classes(case: str) -> None:
    bias, queries, keys = CASES[case]
    q, k, v = tensors(queries, keys, size=16)
    with torch.no_grad():
        close(reduced(KERNELS["xformers"].run, True)(q, k, v, bias, 0.0, None), expected(q, k, v, bias))
    assert "Tensor" not in OnCpu.seen


@pytest.mark.parametrize("shape", [(7, 11), (2, 1, 1, 11), (2, 4, 7, 11), (1, 1, 7, 1)])
def test_tensors_arrive_aligned(shape: tuple[int, ...]) -> None:
    q, k, v = tensors(7, 11, size=16)
    added = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    biases: tuple[Bias, ...] = (added, added > -1.5)
    for bias in biases:
        with torch.no_grad():
            close(KERNELS["xformers"].run(q, k, v, bias, 0.0, 0.2), dense(q, k, v, bias, 0.2))  # pyright: ignore
    assert OnCpu.seen == ["Tensor", "Tensor"]


def test_a_wheel_for_another_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.attention.kernels import xformers_operator as module

    assert built_for() == "2.10.0+cu128", "what the record of the wheel 0.0.35 says"
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert mismatch() == "xformers 0.0.35 is built for torch 2.10.0+cu128, and here is torch 2.11.0+cu130"

    def none_found(inp: Any, needs_gradient: bool) -> Any:
        raise NotImplementedError(
            "No operator found for `memory_efficient_attention_forward` with inputs:\n  query: ..."
        )

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, dtype: zeros(*shape, dtype=dtype))  # pyright: ignore
    monkeypatch.setattr(fmha.dispatch, "_dispatch_fw", none_found)
    module.no_operator.cache_clear()
    try:
        assert module.no_operator(torch.device("cuda"), torch.bfloat16) == Obstacle(
            "broken",
            "xformers 0.0.35 is built for torch 2.10.0+cu128, and here is torch 2.11.0+cu130: NotImplementedError: "
            "No operator found for `memory_efficient_attention_forward`",
        )
    finally:
        module.no_operator.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu128")
    assert mismatch() == ""
