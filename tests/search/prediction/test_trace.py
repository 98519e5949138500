"""Traces: work, bytes and peaks of small calls whose answers are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from hasten.core.registry import specs
from hasten.search.prediction.trace import Operation, Trace, trace

KIB = 1024


class Doing(nn.Module):
    """A module around a function."""

    def __init__(self, work: object) -> None:
        super().__init__()
        self.work = work

    def forward(self, *args: torch.Tensor) -> object:
        return self.work(*args)  # type: ignore[operator]


def traced(work: object, *shapes: tuple[int, ...], repeated: tuple[str, ...] = ()) -> Trace:
    module, values = Doing(work), [torch.zeros(shape, device="meta") for shape in shapes]
    return trace(lambda: module(*values), module, repeated)


def on(device: str, given: Any) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, given)


def kernels(found: Trace) -> list[Operation]:
    return [item for item in found.operations if item.kind != "view"]


def test_a_product_counts_its_work_and_shape() -> None:
    found = traced(lambda a, b: a @ b, (64, 128), (128, 32))
    (product,) = kernels(found)
    assert (product.kind, product.flops, product.shape) == ("product", 2 * 64 * 128 * 32, (1, 64, 32, 128))
    assert product.bytes == 4 * (64 * 128 + 128 * 32 + 64 * 32)


def test_a_convolution_counts_as_the_product_it_is() -> None:
    weight = torch.zeros(16, 8, 3, 3, device="meta")
    found = traced(lambda x: nn.functional.conv2d(x, weight, padding=1), (2, 8, 10, 10))
    assert kernels(found)[0].shape == (1, 2 * 10 * 10, 16, 8 * 9)


def test_peak_is_what_is_alive_at_one_time() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        one = x + 1  # 4 KiB
        two = one * 2  # 8 KiB alive
        del one
        return two.exp()  # 8 KiB again, not 12

    found = traced(work, (KIB,))
    assert found.peak_bytes == 8 * KIB
    assert found.output_bytes == 4 * KIB


def test_views_and_changes_in_place_take_no_memory() -> None:
    found = traced(lambda x: (x + 1).view(32, 32).transpose(0, 1).mul_(2), (KIB,))
    assert found.peak_bytes == 4 * KIB
    assert [item.kind for item in found.operations] == ["pass", "view", "view", "pass"]


def test_attention_is_one_kernel_that_holds_no_scores() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)

    found = traced(work, (1, 4, 2048, 64))
    (kernel,) = found.operations
    assert (kernel.kind, kernel.flops, kernel.shape) == ("attention", 4 * 4 * 2048**2 * 64, (4, 2048, 2048, 64))
    assert found.peak_bytes == 4 * 4 * 2048 * 64  # scores would be 64 MiB


def test_operations_know_the_block_they_are_in() -> None:
    inner = nn.Linear(8, 8, device="meta")

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return inner(x)

    block, outer = Block(), Doing(lambda x: block(x + 1) * 2)
    outer.block = block
    value = torch.zeros(4, 8, device="meta")
    found = trace(lambda: outer(value), outer, ("Block",))
    assert [item.inside for item in kernels(found)] == [False, True, False]
    assert found.modules == 2
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


@pytest.mark.parametrize("name", sorted(specs()))
def test_every_architecture_can_be_traced(name: str) -> None:
    spec = specs()[name]
    model = spec.build(spec.tiny, device="meta")
    given = on("meta", spec.example(spec.tiny))
    found = trace(lambda: model(**given), model, spec.repeated_blocks)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**given)
    assert found.flops == counter.get_total_flops()
    assert found.peak_bytes > found.output_bytes > 0
    assert any(item.inside for item in found.operations) == bool(spec.repeated_blocks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["flux", "sdxl", "z_image", "dit"])
def test_peak_agrees_with_the_allocator(name: str) -> None:
    from hasten.core.spec import InputSize

    spec = specs()[name]
    size = InputSize(height=128, width=128, text_tokens=64)
    given = spec.example(spec.tiny, size)
    model = spec.build(spec.tiny, device="cuda")
    copy = spec.build(spec.tiny, device="meta")
    found = trace(lambda: copy(**on("meta", given)), copy)
    real = on("cuda", given)
    with torch.no_grad():
        model(**real)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(**real)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(found.peak_bytes, rel=0.1, abs=2**21)
