"""The modulated input that each architecture declares, against what its blocks hand to their attention."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from hasten.core.registry import specs
from hasten.core.spec import InputSize

ATTENTION = {
    "dit": "attn1",
    "flux": "attn",
    "pixart": "attn1",
    "qwen_image": "attn",
    "sd3": "attn",
    "z_image": "attention",
}
STACKS = [(name, index) for name in ATTENTION for index in range(len(specs()[name].stacks))]
Call = tuple[dict[str, Any], torch.Tensor]


def calls(name: str, index: int) -> list[tuple[Any, Call]]:
    """For each block of a stack: its arguments by name, and the picture as its attention saw it."""
    spec = specs()[name]
    stack, model = spec.stacks[index], spec.build_tiny()
    blocks: list[Any] = list(model.get_submodule(stack.path))  # pyright: ignore
    found: list[dict[str, Any]] = []
    seen: list[torch.Tensor] = []
    parameters = list(inspect.signature(blocks[0].forward).parameters)

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(dict(zip(parameters, args, strict=False)) | kwargs)

    def attend(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    for block in blocks:
        block.register_forward_pre_hook(enter, with_kwargs=True)
        getattr(block, ATTENTION[name]).register_forward_pre_hook(attend, with_kwargs=True)
    with torch.no_grad():
        model(**spec.example(spec.tiny, InputSize(batch=2, text_tokens=12)))
    return list(zip(blocks, zip(found, seen, strict=True), strict=True))


@pytest.mark.parametrize(("name", "index"), STACKS)
def test_it_is_what_the_attention_sees_of_the_picture(name: str, index: int) -> None:
    stack = specs()[name].stacks[index]
    assert stack.indicator is not None
    for block, (given, seen) in calls(name, index):
        with torch.no_grad():
            declared = stack.indicator(block, given)
        assert declared.shape == given[stack.denoised].shape
        torch.testing.assert_close(declared, seen[:, -declared.shape[1] :], rtol=1e-6, atol=1e-6)


def test_wan_declares_the_projected_time_embedding() -> None:
    spec = specs()["wan"]
    model: Any = spec.build_tiny()
    indicator = spec.stacks[0].indicator
    assert indicator is not None
    projected: list[torch.Tensor] = []
    declared: list[torch.Tensor] = []
    parameters = list(inspect.signature(model.blocks[0].forward).parameters)

    def enter(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        declared.append(indicator(block, dict(zip(parameters, args, strict=False)) | kwargs))

    model.condition_embedder.time_proj.register_forward_hook(lambda *call: projected.append(call[2]))
    model.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    with torch.no_grad():
        for seed in (0, 1):
            model(**spec.example(spec.tiny, InputSize(batch=2), seed))
    assert torch.equal(declared[0], projected[0].unflatten(1, (6, -1)))
    assert torch.equal(declared[0], declared[1]), "neither picture nor prompt matter"


def test_every_transformer_declares_one() -> None:
    assert all(stack.indicator is not None for spec in specs().values() for stack in spec.stacks)
    assert sorted(ATTENTION) == sorted(name for name, spec in specs().items() if spec.stacks and name != "wan")
