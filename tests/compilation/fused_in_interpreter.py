"""Test models run with FusedBlocks, all kernels in Triton's interpreter, against the plain ones; prints JSON.

Run as a module with TRITON_INTERPRET=1. The kernels stand in the places of the operators' references.
"""

from __future__ import annotations

import json

import torch

from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from hasten.kernels import gated, residual, rotary


def through_kernels() -> None:
    """Let the operators run the kernels on the CPU."""
    from hasten.kernels.triton.activate import activate
    from hasten.kernels.triton.heads import prepare_heads
    from hasten.kernels.triton.tokens import residual_norm

    residual.eager, gated.eager, rotary.eager = residual_norm, activate, prepare_heads
    for module in (residual, gated, rotary):
        module.__dict__["served"] = lambda *tensors: True


@torch.no_grad()
def difference(name: str) -> float:
    """The largest difference of outputs, in one call of a small picture."""
    spec = specs()[name]
    model = spec.build_tiny()
    side = 16 if name == "dit" else 4
    given = spec.example(spec.tiny, InputSize(height=side, width=side, text_tokens=4))

    def output() -> torch.Tensor:
        found = model(**given, return_dict=False)[0]
        return torch.stack(list(found)) if isinstance(found, list) else found

    plain = output()
    with accelerate(model, "FusedBlocks()"):
        return float((output() - plain).abs().max())


if __name__ == "__main__":
    through_kernels()
    declared = [name for name, spec in specs().items() if any(stack.plan for stack in spec.stacks)]
    print(json.dumps({name: difference(name) for name in declared}))
