"""FusedBlocks beyond the contract: every architecture, adapters, quantized layers, and what is not declared."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hasten.attention import FusedQKV
from hasten.compilation import FusedBlocks
from hasten.compilation.fusing import modules
from hasten.compilation.fusing.segments import SegmentedLinear, Segments
from hasten.core.errors import HastenError, Refused
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from hasten.core.target import Target
from hasten.kernels import coded, gated, residual, rotary
from hasten.kernels.coded import Coded
from hasten.kernels.modules import QuantizedLinear
from hasten.quantize import Int8Linear, LoRA
from tests.contract.rigs import make, moved
from tests.quantize.lora_files import matrices, peft_file

DECLARED = [name for name, spec in specs().items() if any(stack.plan for stack in spec.stacks)]


def model_of(name: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    spec = specs()[name]
    config = {**spec.tiny, **changes}
    return spec.build(config), spec.example(config, InputSize(batch=2))


@torch.no_grad()
def output(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    found = model(**given, return_dict=False)[0]
    return torch.stack(list(found)) if isinstance(found, list) else found


def test_what_is_declared() -> None:
    assert set(DECLARED) == {"dit", "flux", "pixart", "qwen_image", "sd3", "wan", "z_image"}


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in DECLARED),
    ("sd3", {"qk_norm": None, "dual_attention_layers": ()}),
    ("wan", {"cross_attn_norm": True}),
    ("flux", {"guidance_embeds": False, "num_attention_heads": 3, "axes_dims_rope": (4, 6, 6)}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_it_computes_the_same_in_every_block(name: str, changes: dict[str, Any]) -> None:
    model, given = model_of(name, **changes)
    plain = output(model, given)
    technique = FusedBlocks()
    with accelerate(model, technique) as session:
        assert torch.allclose(output(model, given), plain, atol=1e-5)
        words = technique.engaged(session).summary
        first, _, every = words.split(" ")[:3]
        assert first == every, words
    assert torch.equal(output(model, given), plain)


@pytest.mark.parametrize("name", ["flux", "z_image", "wan"])
def test_it_rounds_no_more_than_the_plain_model(name: str) -> None:
    model, given = model_of(name)
    exact = output(model, given)
    half = moved(given, torch.device("cpu"))
    kept = specs()[name].timestep
    half = {key: value if key == kept else in_half(value) for key, value in half.items()}
    model.to(torch.bfloat16)
    plain = (output(model, half).float() - exact).norm()
    with accelerate(model, "FusedBlocks()"):
        fused = (output(model, half).float() - exact).norm()
    assert fused < 1.1 * plain


def in_half(value: Any) -> Any:
    if isinstance(value, list):
        return [in_half(item) for item in value]
    return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_what_is_not_declared_runs_the_blocks_own_code() -> None:
    model, given = model_of("flux")
    plain = output(model, given)
    technique = FusedBlocks()
    with accelerate(model, technique) as session:
        block: Any = model.transformer_blocks[0]  # pyright: ignore[reportIndexIssue]
        seen: list[bool] = []
        block.norm2.register_forward_hook(lambda *_: seen.append(True))
        mask = {"joint_attention_kwargs": {"attention_mask": torch.zeros(1, 1, 1, 1)}}
        assert torch.allclose(output(model, {**given, **mask}), plain, atol=1e-5)
        assert seen
        with pytest.raises(HastenError):
            technique.engaged(session)


def test_a_feed_forward_in_chunks_runs_the_blocks_own_code() -> None:
    model, given = model_of("dit")
    plain = output(model, given)
    for block in model.transformer_blocks[:3]:  # pyright: ignore[reportIndexIssue]
        block.set_chunk_feed_forward(8, 1)  # pyright: ignore
    technique = FusedBlocks()
    with accelerate(model, technique) as session:
        assert torch.allclose(output(model, given), plain, atol=1e-5)
        assert technique.engaged(session).summary.startswith("1 of 4")


def test_every_token_may_have_its_own_timestep() -> None:
    model, given = model_of("wan")
    tokens = given["hidden_states"][0, 0].numel() // 4
    given["timestep"] = torch.arange(2 * tokens).reshape(2, tokens)
    plain = output(model, given)
    with accelerate(model, "FusedBlocks()") as session:
        assert torch.allclose(output(model, given), plain, atol=1e-5)
        assert session.evidence()


def test_prompts_of_different_lengths_are_masked() -> None:
    model, given = model_of("z_image")
    given["cap_feats"] = [given["cap_feats"][0], torch.randn(40, 16)]
    plain = output(model, given)
    with accelerate(model, "FusedBlocks()") as session:
        assert torch.allclose(output(model, given), plain, atol=1e-5)
        assert session.evidence()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_whole_models_in_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.compilation.fused_in_interpreter"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found: dict[str, float] = json.loads(made.splitlines()[-1])
    assert set(found) == set(DECLARED)
    assert max(found.values()) < 1e-4


def test_adapters_take_part_whether_they_come_before_or_after() -> None:
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_out.0", "proj_out", "net.2", "proj_mlp"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model, given = model_of("flux")
    torch.manual_seed(0)
    with accelerate(model, "FusedBlocks()"):
        model.add_adapter(config)  # pyright: ignore
        after = output(model, given)
    plain = output(model, given)
    assert torch.allclose(after, plain, atol=1e-5)
    with accelerate(model, "FusedBlocks()"):
        assert torch.allclose(output(model, given), plain, atol=1e-5)
    model.disable_adapters()  # pyright: ignore
    assert (output(model, given) - plain).abs().max() > 1e-3


def test_adapter_files_reach_the_layers_that_were_cut(tmp_path: Path) -> None:
    rig = make("flux")
    pairs = matrices(rig, only=("to_q", "proj_out"))
    file = peft_file(tmp_path / "adapter.safetensors", pairs)
    with rig.accelerated(LoRA(adapters=(file,), scales=(0.7,))):
        expected = rig.run()
    with rig.accelerated(LoRA(adapters=(file,), scales=(0.7,)), FusedBlocks()):
        assert torch.allclose(rig.run(), expected, atol=1e-5)
    assert (rig.run() - expected).abs().max() > 0.1


def test_a_layer_in_two_parts() -> None:
    layer = nn.Linear(12, 6)
    whole, x = layer.weight.detach().clone(), torch.randn(2, 3, 12)
    plain = layer(x)
    cut = SegmentedLinear(layer, 4)
    segments = Segments(layer, cut)
    segments.release()
    assert layer.weight.numel() == 0
    assert torch.equal(cut.weight, whole)
    assert torch.allclose(cut(x), plain, atol=1e-6)
    assert torch.allclose(cut(x[..., :4], x[..., 4:]), plain, atol=1e-6)
    cut.double()
    segments.refill()
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight.float(), whole)


def test_quantizers_take_the_parts_by_themselves() -> None:
    model, given = model_of("flux")
    with accelerate(model, "FusedBlocks() | Int8Linear()") as session:
        last: Any = model.single_transformer_blocks[0].proj_out  # pyright: ignore
        assert isinstance(last, SegmentedLinear)
        assert isinstance(last.first, QuantizedLinear)
        assert isinstance(last.second, QuantizedLinear)
        assert last.second.bias is None
        assert last.second.shape == (32, 128)
        assert output(model, given).isfinite().all()
        assert session.evidence()
    assert isinstance(model.single_transformer_blocks[0].proj_out, nn.Linear)  # pyright: ignore


@pytest.mark.parametrize("more", [(), (FusedQKV(),)])
def test_the_pass_before_a_quantized_layer_rounds_its_input(
    more: tuple[FusedQKV, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.core.recipe import Recipe

    model, given = model_of("flux")
    recipe = Recipe((FusedBlocks(), Int8Linear(), *more))
    with accelerate(model, recipe):
        apart = output(model, given)
    taken: list[tuple[int, ...]] = []
    product = coded.operate

    def watched(x: Coded, *rest: Any) -> torch.Tensor:
        taken.append(tuple(x.codes.shape))
        return product(x, *rest)

    monkeypatch.setattr(modules, "gains", lambda kind, device: True)
    monkeypatch.setattr(coded, "operate", watched)
    with accelerate(model, recipe):
        together = output(model, given)
    # A block: the input of attention (of two streams), of the feed-forwards, and of their second layers.
    double, single = (6 + 4 if not more else 2 + 4), (3 + 1 + 1 if not more else 1 + 1 + 1)
    assert len(taken) == 3 * double + 3 * single
    assert (together - apart).norm() < 0.01 * apart.norm()


def test_the_model_cannot_be_saved_with_other_names(tmp_path: Any) -> None:
    model, _ = model_of("flux")
    with accelerate(model, "FusedBlocks()"), pytest.raises(HastenError, match="cannot be saved"):
        model.save_pretrained(tmp_path)  # pyright: ignore


def test_training_runs_the_blocks_own_code() -> None:
    model, given = model_of("dit")
    technique = FusedBlocks()
    model.train()
    with accelerate(model, technique) as session:
        output(model, given)
        with pytest.raises(HastenError):
            technique.engaged(session)


def test_refusals_name_the_reason() -> None:
    assert "not declared" in " ".join(FusedBlocks().problems(Target.of(make("sdxl"))))
    model, _ = model_of("flux")
    block: Any = model.transformer_blocks[0]  # pyright: ignore[reportIndexIssue]
    block.attn.processor = type("Other", (), {})()
    with pytest.raises(Refused, match="runs Other instead of FluxAttnProcessor"):
        accelerate(model, "FusedBlocks()")
    model, _ = model_of("flux")
    model.transformer_blocks[0].attn.register_forward_hook(lambda *_: None)  # pyright: ignore
    with pytest.raises(Refused, match="other code"):
        accelerate(model, "FusedBlocks()")


@pytest.fixture
def through_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators compute, as on a GPU; on the CPU they call the references."""
    for module in (residual, gated, rotary):
        monkeypatch.setattr(module, "served", lambda *_: True)
    monkeypatch.setattr(residual, "_codes", lambda *_: True)


@pytest.mark.usefixtures("through_operators")
@pytest.mark.parametrize("name", DECLARED)
def test_the_operators_compute_the_same(name: str) -> None:
    model, given = model_of(name)
    plain = output(model, given)
    with accelerate(model, "FusedBlocks()"):
        assert torch.allclose(output(model, given), plain, atol=1e-5)


@pytest.mark.usefixtures("through_operators")
def test_the_operators_stand_in_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, given = model_of("flux")
    with accelerate(model, "CompileBlocks(backend='aot_eager')"):
        plain = output(model, given)
    torch._dynamo.reset()
    monkeypatch.setattr(modules, "gains", lambda kind, device: True)
    with accelerate(model, "FusedBlocks() | CompileBlocks(backend='aot_eager')") as session:
        assert torch.allclose(output(model, given), plain, atol=1e-5)
        assert session.evidence()
    torch._dynamo.reset()
    with accelerate(model, "FusedBlocks() | Int8Linear() | CompileBlocks(backend='aot_eager')"):
        compiled = output(model, given)
    with accelerate(model, "FusedBlocks() | Int8Linear()"):
        assert torch.allclose(output(model, given), compiled, atol=1e-4)
