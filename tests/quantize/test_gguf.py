"""GGUF as a technique: types, mixes, fallbacks, fidelity and size."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.formats.gguf import GGUFFormat
from hasten.formats.gguf.types import type_of
from hasten.kernels.modules import Quantized
from hasten.quantize import GGUF
from tests.contract.rigs import make

HALVES = {"F16", "BF16"}


def test_it_offers_all_types_of_the_format() -> None:
    given = get_type_hints(GGUF)["type"]
    assert get_args(given) == tuple(kind for kind in GGUFFormat.kinds if kind not in HALVES)
    assert {field.name for field in fields(GGUF)} > {"type", "skip", "components"}


def rig_outputs(technique: GGUF) -> tuple[torch.Tensor, str]:
    rig = make("flux")
    with rig.accelerated(technique) as session:
        output = rig.run()
        summary = technique.engaged(session).summary
    return output, summary


def test_more_bits_are_nearer() -> None:
    plain = make("flux").run()
    errors = [(rig_outputs(GGUF(type=kind))[0] - plain).norm().item() for kind in ("Q8_0", "Q6_K", "Q4_K", "Q2_K")]
    assert errors == sorted(errors)
    assert errors[0] > 0


def types_of(network: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, module in network.named_modules():
        if isinstance(module, Quantized):
            kind = type_of(module.quantized)
            assert kind is not None
            found[path] = kind.name
    return found


def test_the_evidence_names_types_and_fallbacks() -> None:
    rig = make("flux")
    technique = GGUF(type="Q4_K_M")
    with rig.accelerated(technique) as session:
        found = types_of(rig.denoiser)
        rig.run()
        summary = technique.engaged(session).summary
    assert {kind for path, kind in found.items() if path.endswith("to_v")} <= {"Q6_K", "Q8_0"}
    assert {kind for path, kind in found.items() if path.endswith("to_q")} <= {"Q4_K", "Q5_0"}
    for kind in set(found.values()):
        assert f"{list(found.values()).count(kind)} {kind}" in summary


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_1", "IQ4_XS", "MXFP4", "TQ1_0"])
def test_the_predicted_size_is_the_real_one(kind: Any) -> None:
    rig = make("flux")
    technique = GGUF(type=kind)
    expected = technique.cost(Target.of(rig), Workload()).held["transformer"]
    with accelerate(rig, technique):
        parts = (*rig.denoiser.parameters(), *rig.denoiser.buffers())
        assert sum(part.nbytes for part in parts) == expected
