"""What a report says of the model and the machine."""

from __future__ import annotations

from hasten.core.target import Target
from hasten.measure.environment import precision
from hasten.quantize import Int8Linear
from tests.contract.rigs import make


def test_a_model_that_is_quantized_as_it_stands_is_told_from_a_plain_one() -> None:
    rig = make("flux")
    assert precision(Target.of(rig)) == "float32"
    with rig.accelerated(Int8Linear()):
        assert precision(Target.of(rig)) == "float32 with quantized weights"
