"""LoRA adapters are swapped and scaled without compiling anew, and come back as they were."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch

from hasten.compilation import CompileBlocks, CompileWhole
from hasten.compilation.compiler import CompileCounter
from hasten.core.errors import HastenError
from hasten.core.target import Target
from tests.contract.rigs import Rig, make

peft = pytest.importorskip("peft")
from peft.utils.hotswap import hotswap_adapter_from_state_dict  # noqa: E402

KINDS = [CompileBlocks, CompileWhole]


@pytest.fixture(autouse=True)
def fresh() -> Generator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def config(rank: int, alpha: int = 4) -> Any:
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q", "to_v"], init_lora_weights=False)


def adapted(rank: int, seed: int) -> Rig:
    """A small FLUX with a random adapter."""
    rig = make("flux")
    add(rig, rank, seed)
    return rig


def add(rig: Rig, rank: int, seed: int) -> None:
    denoiser: Any = rig.denoiser
    torch.manual_seed(seed)
    denoiser.add_adapter(config(rank))
    for layer in layers(rig):
        layer.lora_B["default"].weight.data.normal_(0, 0.2)


def layers(rig: Rig) -> list[Any]:
    return [module for module in rig.denoiser.modules() if hasattr(module, "lora_A")]


def weights(rig: Rig) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in rig.denoiser.named_parameters() if "lora_" in n}


def swap_in(rig: Rig, other: Rig, rank: int) -> None:
    hotswap_adapter_from_state_dict(rig.denoiser, weights(other), "default", config(rank))


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_and_scaling_need_no_other_graph(kind: type[Any]) -> None:
    rig, other, technique = adapted(2, 1), adapted(4, 2), kind(backend="eager", lora_rank=8)
    first, second = rig.run(), other.run()
    for layer in layers(other):
        layer.set_scale("default", 0.3)
    weaker = other.run()
    with rig.accelerated(technique) as session:
        torch.testing.assert_close(rig.run(), first, atol=1e-4, rtol=1e-3)
        counter = session.state(technique, CompileCounter)
        graphs = counter.graphs
        swap_in(rig, other, 4)
        torch.testing.assert_close(rig.run(), second, atol=1e-4, rtol=1e-3)
        for layer in layers(rig):
            layer.r["default"] = 4
            layer.set_scale("default", 0.3)
        torch.testing.assert_close(rig.run(), weaker, atol=1e-4, rtol=1e-3)
        assert counter.graphs == graphs
    assert not torch.allclose(first, second, atol=1e-3)


def test_without_it_a_swap_compiles_anew() -> None:
    rig, technique = adapted(2, 1), CompileBlocks(backend="eager")
    with rig.accelerated(technique) as session:
        rig.run(steps=1)
        graphs = session.state(technique, CompileCounter).graphs
        for layer in layers(rig):
            layer.set_scale("default", 0.3)
        rig.run(steps=1)
        assert session.state(technique, CompileCounter).graphs > graphs


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_loaded_inside_is_prepared_too(kind: type[Any]) -> None:
    rig, other, technique = make("flux"), adapted(4, 2), kind(backend="eager", lora_rank=8)
    expected = other.run()
    with rig.accelerated(technique) as session:
        rig.run(steps=1)
        add(rig, 2, 1)
        rig.run(steps=1)
        graphs = session.state(technique, CompileCounter).graphs
        swap_in(rig, other, 4)
        torch.testing.assert_close(rig.run(), expected, atol=1e-4, rtol=1e-3)
        assert session.state(technique, CompileCounter).graphs == graphs


def test_leaving_gives_the_adapter_back_bit_for_bit() -> None:
    rig = adapted(2, 1)
    plain, before = rig.run(), weights(rig)
    scales = [dict(layer.scaling) for layer in layers(rig)]
    with rig.accelerated(CompileBlocks(backend="eager", lora_rank=8)):
        rig.run(steps=1)
        assert {w.shape[0] for name, w in weights(rig).items() if "lora_A" in name} == {8}
    after: Any = weights(rig)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [dict(layer.scaling) for layer in layers(rig)] == scales
    assert rig.denoiser.peft_config["default"].r == 2  # pyright: ignore
    assert torch.equal(rig.run(), plain)


def test_an_adapter_swapped_in_stays() -> None:
    rig, other = adapted(2, 1), adapted(4, 2)
    expected = other.run()
    with rig.accelerated(CompileBlocks(backend="eager", lora_rank=8)):
        rig.run(steps=1)
        swap_in(rig, other, 4)
    torch.testing.assert_close(rig.run(), expected, atol=1e-4, rtol=1e-3)


def test_too_large_an_adapter_is_named() -> None:
    (reason,) = CompileBlocks(backend="eager", lora_rank=4).problems(Target.of(adapted(8, 1)))
    assert reason == "the LoRA adapter 'default' has rank 8, more than lora_rank=4; set it higher."
    rig = make("flux")
    with rig.accelerated(CompileBlocks(backend="eager", lora_rank=4)):
        add(rig, 8, 1)
        with pytest.raises(HastenError, match="rank 8, more than lora_rank=4"):
            rig.run(steps=1)
