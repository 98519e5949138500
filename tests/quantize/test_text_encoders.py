"""Text encoders as components: CLIP and T5 of a bundled pipeline."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

import hasten
from hasten.kernels.modules import Quantized
from hasten.quantize import BitsAndBytes, Float8Linear, HadamardRotation, Int8Linear
from hasten.quantize.engine.linear_quantizer import LinearQuantizer

BOTH = ("text_encoder*",)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return hasten.load("emoji-flux").pipeline


def encoded(pipeline: Any) -> torch.Tensor:
    """What both encoders make of a prompt, one after the other."""
    with torch.no_grad():
        parts = pipeline.encode_prompt("a smiling cat", None, max_sequence_length=32)[:2]
    return torch.cat([part.float().flatten() for part in parts])


@pytest.mark.parametrize("technique", [Int8Linear(components=BOTH), Float8Linear(components=BOTH)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_and_t5(pipeline: Any, technique: LinearQuantizer, dtype: torch.dtype) -> None:
    encoders = cast("list[nn.Module]", [pipeline.text_encoder, pipeline.text_encoder_2])
    before = [parameter.clone() for encoder in encoders for parameter in encoder.parameters()]
    for encoder in encoders:
        nn.Module.to(encoder, dtype)
    plain = encoded(pipeline)
    with hasten.accelerate(pipeline, technique) as session:
        found = encoded(pipeline)
        assert "took part in 2 calls" in session.describe()
        paths = [path for e in encoders for path, module in e.named_modules() if isinstance(module, Quantized)]
    assert any(path.endswith("SelfAttention.q") for path in paths)
    assert any(path.endswith("q_proj") for path in paths)
    assert not [path for path in paths if path.endswith(".wo")], "T5 wants these in float32"
    assert 1e-4 < (found - plain).norm() / plain.norm() < 0.1
    assert torch.equal(encoded(pipeline), plain)
    parameters = [parameter for encoder in encoders for parameter in encoder.parameters()]
    for parameter, value in zip(parameters, before, strict=True):
        parameter.data = value


def test_encoders_and_denoiser_each_in_their_own_way(pipeline: Any) -> None:
    recipe = BitsAndBytes(components=BOTH) | Int8Linear() | HadamardRotation(components=("transformer", *BOTH))
    plain = encoded(pipeline)
    with hasten.accelerate(pipeline, recipe):
        kinds = [
            {module.number for module in network.modules() if isinstance(module, Quantized)}
            for network in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer)
        ]
        assert kinds == [{"table4"}, {"table4"}, {"int8"}]
        found = encoded(pipeline)
    assert 1e-3 < (found - plain).norm() / plain.norm() < 0.3
