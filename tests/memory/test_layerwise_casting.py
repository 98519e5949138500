"""Weights in 8 bits: really smaller, cast in each call, and back bit for bit."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from hasten.attention import FusedQKV
from hasten.cache import FirstBlockCache
from hasten.compilation import CompileBlocks
from hasten.core.errors import NotEngaged, Refused
from hasten.core.session import accelerate, apply_permanently
from hasten.core.target import Target
from hasten.core.technique import Technique
from hasten.core.workload import Workload
from hasten.memory import LayerwiseCasting, ModulationTable, Offload
from hasten.memory.engine.moving import Moved
from tests.contract.rigs import Rig, make

WORKLOAD = Workload(prompts=("a",), steps=8)


def weights(rig: Rig) -> dict[str, torch.Tensor]:
    return {name: tensor.data.clone() for name, tensor in rig.denoiser.state_dict().items()}


def weight_of(rig: Rig, path: str) -> torch.Tensor:
    return cast(torch.Tensor, rig.denoiser.get_submodule(path).weight)


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_weights_of_blocks_take_one_byte(name: Any, dtype: torch.dtype) -> None:
    rig = make("flux")
    technique = LayerwiseCasting(storage=name)
    with rig.accelerated(technique) as session:
        stored = weight_of(rig, "transformer_blocks.0.attn.to_q")
        assert stored.dtype == dtype
        assert stored.untyped_storage().nbytes() == stored.numel()
        with pytest.raises(NotEngaged, match="called"):
            technique.engaged(session)
        rig.run()
        assert f"({name})" in technique.engaged(session).summary
        assert "stored in" in session.describe()


def test_the_output_is_that_of_rounded_weights() -> None:
    rig, reference = make("stable_diffusion"), make("stable_diffusion")
    with rig.accelerated(LayerwiseCasting()):
        cast_names = {name for name, p in rig.denoiser.named_parameters() if p.dtype == torch.float8_e4m3fn}
        output = rig.run()
    for name, parameter in reference.denoiser.named_parameters():
        if name in cast_names:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(torch.float32)
    assert any("conv" in name for name in cast_names)
    assert any("to_q" in name for name in cast_names)
    assert torch.equal(output, reference.run())


def test_norms_embeddings_and_outer_projections_keep_their_type() -> None:
    rig = make("flux")
    with rig.accelerated(LayerwiseCasting()):
        kinds = {name: parameter.dtype for name, parameter in rig.denoiser.named_parameters()}
    with rig.accelerated(LayerwiseCasting(skip=("*norm*", "*attn*"))):
        assert weight_of(rig, "transformer_blocks.0.attn.to_q").dtype == torch.float32
        assert weight_of(rig, "transformer_blocks.0.ff.net.2").dtype == torch.float8_e4m3fn
    wide = {name for name, kind in kinds.items() if kind == torch.float32 and name.endswith("weight")}
    for name in ("x_embedder.weight", "proj_out.weight", "transformer_blocks.0.norm1.linear.weight"):
        assert name in wide
    assert kinds["single_transformer_blocks.0.proj_out.weight"] == torch.float8_e4m3fn


def test_numbers_beyond_the_range_become_the_largest() -> None:
    rig = make("dit")
    layer = cast(nn.Linear, rig.denoiser.get_submodule("transformer_blocks.0.attn1.to_q"))
    layer.weight.data[0, 0] = 1e6
    with rig.accelerated(LayerwiseCasting()):
        assert layer.weight.data[0, 0].float() == 448
        assert rig.run().isfinite().all()
    assert layer.weight.data[0, 0] == 1e6


def test_weights_come_back_bit_for_bit() -> None:
    rig = make("sdxl")
    rig.denoiser.to(torch.bfloat16)
    before = weights(rig)
    with rig.accelerated(LayerwiseCasting()):
        assert any(p.dtype == torch.float8_e4m3fn for p in rig.denoiser.parameters())
    after = weights(rig)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)


def test_dropped_originals_cannot_be_taken_back() -> None:
    rig, technique = make("dit"), LayerwiseCasting(originals="drop")
    with pytest.raises(Refused, match="cannot be taken back; use hasten.apply_permanently"):
        rig.accelerated(technique)
    assert weight_of(rig, "transformer_blocks.0.attn1.to_q").dtype == torch.float32
    session = apply_permanently(rig, technique)
    rig.run()
    session.close()
    assert "stored in" in technique.engaged(session).summary
    assert weight_of(rig, "transformer_blocks.0.attn1.to_q").dtype == torch.float8_e4m3fn


class Failing(LayerwiseCasting):
    """Fails after the weights of the first were dropped."""

    def claims(self) -> tuple[str, ...]:
        return ()

    def problems(self, target: Target) -> tuple[str, ...]:
        return ()

    def apply(self, target: Target, patch: Any) -> None:
        raise InterruptedError


def test_a_failure_leaves_dropped_weights_in_their_type() -> None:
    rig = make("dit")
    with pytest.raises(InterruptedError):
        apply_permanently(rig, LayerwiseCasting(originals="drop", storage="e5m2") | Failing(skip=("z",)))
    assert weight_of(rig, "transformer_blocks.0.attn1.to_q").dtype == torch.float32
    assert rig.run().isfinite().all()


PARTNERS: tuple[Technique, ...] = (
    Offload(kind="blocks", device="cpu"),
    Offload(kind="leaf", device="cpu"),
    FusedQKV(),
    ModulationTable(),
    CompileBlocks(backend="eager"),
    FirstBlockCache(threshold=0.0),
)


@pytest.mark.parametrize("partner", PARTNERS, ids=str)
def test_others_change_nothing_about_the_result(partner: Technique) -> None:
    rig = make("flux")
    with rig.accelerated(LayerwiseCasting()):
        alone = rig.run()
    before = weights(rig)
    with rig.accelerated(LayerwiseCasting(), partner) as session:
        output = rig.run()
        assert len(session.evidence()) == 2
    assert torch.allclose(output, alone, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in weights(rig).items())


def test_offload_moves_the_smaller_weights() -> None:
    moved: list[int] = []
    offload = Offload(kind="blocks", device="cpu")
    for recipe in ((offload,), (offload, LayerwiseCasting())):
        rig = make("flux")
        with rig.accelerated(*recipe) as session:
            rig.run()
            moved.append(session.state(offload, Moved).ledger.moved)
    assert moved[1] < 0.6 * moved[0]


def lora(rig: Rig) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    rig.denoiser.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"]))  # pyright: ignore


def test_adapters_may_come_before_or_later() -> None:
    pytest.importorskip("peft")
    outputs: list[torch.Tensor] = []
    before, later, plain = make("flux"), make("flux"), make("flux")
    lora(before)
    with before.accelerated(LayerwiseCasting()):
        assert weight_of(before, "transformer_blocks.0.attn.to_q.base_layer").dtype == torch.float8_e4m3fn
        outputs.append(before.run())
    with later.accelerated(LayerwiseCasting()):
        lora(later)
        adapter = later.denoiser.get_submodule("transformer_blocks.0.attn.to_q.lora_A.default")
        assert cast(nn.Linear, adapter).weight.dtype == torch.float32
        outputs.append(later.run())
    with plain.accelerated(LayerwiseCasting()):
        without = plain.run()
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], without, atol=1e-5)


def test_the_cost_counts_bytes() -> None:
    rig = make("dit")
    cost = LayerwiseCasting().cost(Target.of(rig), WORKLOAD)
    size = sum(p.numel() * 4 for p in rig.denoiser.parameters()) + sum(b.numel() * 4 for b in rig.denoiser.buffers())
    with rig.accelerated(LayerwiseCasting()):
        numbers = sum(p.numel() for p in rig.denoiser.parameters() if p.element_size() == 1)
    assert cost.held["transformer"] == size - 3 * numbers
    assert cost.traffic["transformer"] == 5 * numbers


def test_what_cannot_be_cast_is_refused() -> None:
    rig = make("dit")
    with pytest.raises(Refused, match=r"transformer has no linear layers or convolutions"):
        rig.accelerated(LayerwiseCasting(skip=("*",)))
    with pytest.raises(Refused, match="no component is called nowhere"):
        rig.accelerated(LayerwiseCasting(components=("nowhere",)))
    rig.denoiser.get_submodule("transformer_blocks.0.attn1.to_q").to(torch.float64)
    with pytest.raises(Refused, match="float64"):
        rig.accelerated(LayerwiseCasting())


def test_a_weight_that_others_replace_is_noticed() -> None:
    rig, technique = make("dit"), LayerwiseCasting()
    with rig.accelerated(technique) as session:
        rig.run()
        layer = rig.denoiser.get_submodule("transformer_blocks.0.attn1.to_q")
        stored = layer.weight
        layer.weight = nn.Parameter(torch.zeros(1))
        with pytest.raises(NotEngaged, match="not stored in e4m3 any more"):
            technique.engaged(session)
        layer.weight = stored


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_fewer_bytes() -> None:
    from hasten.core.registry import specs

    spec = specs()["flux"]
    config = {**spec.tiny, "num_attention_heads": 16, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}
    model = spec.build(config).to("cuda", torch.bfloat16)
    before, originals = torch.cuda.memory_allocated(), {n: p.clone().cpu() for n, p in model.named_parameters()}
    with accelerate(model, LayerwiseCasting()) as session:
        freed = before - torch.cuda.memory_allocated()
        weights = [p for p in model.parameters() if p.element_size() == 1]
        assert freed > 0.9 * sum(p.numel() for p in weights)
        call = {k: v.to("cuda") for k, v in spec.example(config).items()}
        floats = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in call.items()}
        assert model(**floats, return_dict=False)[0].isfinite().all()
        session.evidence()
    assert all(torch.equal(p.cpu(), originals[n]) and p.is_cuda for n, p in model.named_parameters())
