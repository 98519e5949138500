"""FusedQKV: fewer and equal products on every architecture, no weight held twice, adapters and quantizers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hasten.attention import AttentionBackend, FusedQKV
from hasten.attention.projections import ProjectionPart
from hasten.compilation import CompileBlocks
from hasten.compilation.compiler import CompileCounter
from hasten.core.errors import HastenError, NotEngaged, Refused
from hasten.core.patch import Patch
from hasten.core.session import accelerate, apply_permanently
from hasten.core.spec import InputSize
from hasten.core.target import Target
from tests.attention.test_backend import arguments, output
from tests.contract.rigs import ARCHITECTURES, Rig, fingerprint, make

GROUPS = {
    "dit": {"to_qkv": 4}, "flux": {"to_qkv": 6, "to_added_qkv": 3}, "pixart": {"to_qkv": 4, "to_kv": 4},
    "qwen_image": {"to_qkv": 4, "to_added_qkv": 4}, "sd3": {"to_qkv": 6, "to_added_qkv": 4},
    "z_image": {"to_qkv": 8},
}  # fmt: skip


class Products(TorchFunctionMode):
    """Counts linear products wherever they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is F.linear
        return func(*args, **(kwargs or {}))


def stacks(rig: Rig) -> dict[str, int]:
    """How many stacked layers there are of each name."""
    names = [path.rpartition(".")[2] for path, module in rig.denoiser.named_modules() if isinstance(module, nn.Linear)]
    return {name: names.count(name) for name in ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv") if name in names}


def weights(rig: Rig) -> int:
    return sum(p.untyped_storage().nbytes() for p in rig.denoiser.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fewer_products_with_the_same_result(architecture: str) -> None:
    rig = make(architecture)
    given = arguments(rig)
    with Products() as separate:
        expected = output(rig, given)
    before, size, state = fingerprint(rig), weights(rig), list(rig.denoiser.state_dict())
    originals = {path: module for path, module in rig.denoiser.named_modules() if path.endswith("to_k")}
    with accelerate(rig, FusedQKV()) as session:
        with Products() as fused:
            found = output(rig, given)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        made = stacks(rig)
        saved = sum((1 if name.endswith("to_kv") or name == "to_added_kv" else 2) * n for name, n in made.items())
        assert separate.calls - fused.calls == saved > 0
        assert made == GROUPS.get(architecture, made)
        assert weights(rig) == size, "the weights are there once"
        assert not any(p.numel() for module in originals.values() for p in module.parameters())
        said = session.evidence()[session.plan.techniques[0]].summary
        count = sum(made.values())
        assert said == f"{saved + count} projections were computed as {count} (of {count} stacked)"
    assert fingerprint(rig) == before
    assert list(rig.denoiser.state_dict()) == state
    assert torch.equal(output(rig, given), expected)


def test_pictures_as_condition_have_keys_and_values_alone() -> None:
    """Wan's picture-to-video models attend to a picture beside the text."""
    from hasten.core.registry import specs

    spec = specs()["wan"]
    rig = make("wan")
    config = {**spec.tiny, "added_kv_proj_dim": 32, "image_dim": 16}
    model = spec.build(config)
    picture = {"encoder_hidden_states_image": torch.randn(1, 5, 16)}
    given = spec.example(config, InputSize(text_tokens=512)) | picture  # the model takes 512 from the end as text
    rig = Rig(spec, model, rig.vae)
    expected = output(rig, given)
    with accelerate(model, FusedQKV()):
        torch.testing.assert_close(output(rig, given), expected, atol=2e-6, rtol=1e-5)
        blocks = len(model.blocks)  # pyright: ignore
        assert stacks(rig) == {"to_qkv": blocks, "to_kv": blocks, "to_added_kv": blocks}
    assert torch.equal(output(rig, given), expected)


def lora(rig: Rig) -> None:
    """Put adapters that matter around queries and values."""
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(1)
    rig.denoiser.add_adapter(config)  # pyright: ignore
    rig.denoiser.eval()


@pytest.mark.parametrize("architecture", ["flux", "z_image", "stable_diffusion", "sd3"])
@pytest.mark.parametrize("later", [False, True])
def test_adapters_loaded_before_or_later_keep_working(architecture: str, later: bool) -> None:
    rig, plain = make(architecture), make(architecture)
    given = arguments(rig)
    bare = output(plain, given)
    lora(plain)
    expected = output(plain, given)
    assert (expected - bare).abs().max() > 1e-3
    if not later:
        lora(rig)
    with accelerate(rig, FusedQKV()):
        if later:
            lora(rig)
        torch.testing.assert_close(output(rig, given), expected, atol=2e-5, rtol=1e-4)
        rig.denoiser.disable_adapters()  # pyright: ignore
        torch.testing.assert_close(output(rig, given), bare, atol=2e-5, rtol=1e-4)
        rig.denoiser.enable_adapters()  # pyright: ignore
    assert torch.equal(output(rig, given), expected), "the adapters stay when the session is left"
    rig.denoiser.delete_adapters("default")  # pyright: ignore
    assert not any(isinstance(module, ProjectionPart) for module in rig.denoiser.modules())


def test_adapters_can_be_merged_into_the_stack() -> None:
    rig, plain = make("flux"), make("flux")
    given = arguments(rig)
    lora(plain)
    expected = output(plain, given)
    with accelerate(rig, FusedQKV()):
        lora(rig)
        rig.denoiser.fuse_lora()  # pyright: ignore
        torch.testing.assert_close(output(rig, given), expected, atol=2e-5, rtol=1e-4)
        rig.denoiser.unfuse_lora()  # pyright: ignore


class Coarse(nn.Module):
    """Stands for a quantized layer: weights in whole steps."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("steps", (layer.weight.data * 50).round().to(torch.int8))
        self.register_buffer("bias", layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.steps.float() / 50, self.bias)  # pyright: ignore


@pytest.mark.parametrize("architecture", ["flux", "stable_diffusion"])
def test_a_quantizer_finds_one_large_layer(architecture: str) -> None:
    rig = make(architecture)
    given = arguments(rig)
    expected = output(rig, given)
    with accelerate(rig, FusedQKV()):
        patch = Patch({}, lambda: None)  # pyright: ignore
        for module in list(rig.denoiser.modules()):
            for name in ("to_qkv", "to_kv", "to_added_qkv"):
                if layer := module._modules.get(name):
                    patch.swap(module, name, Coarse(layer), "quantized")  # pyright: ignore
        coarse = output(rig, given)
        assert 1e-6 < (coarse - expected).norm() / expected.norm() < 0.3, "the quantized layer is the one that runs"
        patch.close()
        torch.testing.assert_close(output(rig, given), expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(output(rig, given), expected)


def test_a_part_given_another_tensor_computes_anew() -> None:
    rig = make("dit")
    with accelerate(rig, FusedQKV()):
        block = rig.denoiser.transformer_blocks[0].attn1  # pyright: ignore
        one, other = torch.randn(1, 3, block.to_q.in_features), torch.randn(1, 3, block.to_q.in_features)
        query, key, value = block.to_q(one), block.to_k(other), block.to_v(one)
        parts = ((query, one, block.to_q), (key, other, block.to_k), (value, one, block.to_v))
        for found, given, part in parts:
            torch.testing.assert_close(found, F.linear(given, part.weight, part.bias))


# The contract counts them for a U-Net and for DiT, whose blocks are those of PixArt.
@pytest.mark.parametrize("architecture", ["flux", "pixart", "qwen_image", "sd3", "wan", "z_image"])
def test_compiled_blocks_get_no_more_graphs(architecture: str) -> None:
    graphs: list[int] = []
    for technique in (None, FusedQKV()):
        torch._dynamo.reset()
        rig, compiled = make(architecture), CompileBlocks(backend="eager")
        given = arguments(rig)
        expected = output(rig, given)
        recipe = AttentionBackend("math") | compiled
        with accelerate(rig, recipe | technique if technique else recipe) as session:
            for _ in range(2):
                torch.testing.assert_close(output(rig, given), expected, atol=2e-5, rtol=1e-4)
                session.evidence()
            graphs.append(session.state(compiled, CompileCounter).graphs)
    assert graphs[0] == graphs[1]


def test_moving_the_model_moves_the_weights_back_too() -> None:
    rig = make("flux")
    state = {name: value.clone() for name, value in rig.denoiser.state_dict().items()}
    with accelerate(rig, FusedQKV()):
        rig.denoiser.to(torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in rig.denoiser.parameters())
    assert all(torch.equal(value.float(), state[name]) for name, value in rig.denoiser.state_dict().items())


def test_saving_is_refused_while_names_differ(tmp_path: Path) -> None:
    rig = make("flux")
    with accelerate(rig, FusedQKV()), pytest.raises(HastenError, match="cannot be saved while FusedQKV is applied"):
        rig.denoiser.save_pretrained(tmp_path)  # pyright: ignore
    rig.denoiser.save_pretrained(tmp_path)  # pyright: ignore
    again = type(make("flux").denoiser).from_pretrained(tmp_path)  # pyright: ignore
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), rig.denoiser.parameters(), strict=True))


def test_it_can_stay_for_good() -> None:
    rig = make("z_image")
    given = arguments(rig)
    expected = output(rig, given)
    apply_permanently(rig, FusedQKV()).close()
    torch.testing.assert_close(output(rig, given), expected, atol=2e-6, rtol=1e-5)
    assert stacks(rig)


def test_refusals_say_what_to_do() -> None:
    fused = make("flux")
    fused.denoiser.fuse_qkv_projections()  # pyright: ignore
    hooked = make("dit")
    hooked.denoiser.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *_: None)  # pyright: ignore
    quantized = make("dit")
    quantized.denoiser.transformer_blocks[0].attn1.to_k = Coarse(nn.Linear(4, 4))  # pyright: ignore
    cases: dict[str, Any] = {
        "the projections of FluxTransformer2DModel are fused by diffusers; call unfuse_qkv_projections() first.": fused,
        "DiTTransformer2DModel cannot be fused: other code (an offload or casting hook) stands around its": hooked,
        "DiTTransformer2DModel cannot be fused: its projections are Coarse, not plain linear layers.": quantized,
        "hasten finds no query, key and value projections in the attention modules of Linear.": nn.Linear(2, 2),
    }
    for sentence, subject in cases.items():
        with pytest.raises(Refused) as caught:
            accelerate(subject, FusedQKV())
        assert sentence in str(caught.value)


def test_offloaded_weights_are_refused() -> None:
    rig = make("dit")
    target = Target.of(rig)
    assert target.device.type == "cpu"
    rig.denoiser.to("meta")
    assert "the weights of DiTTransformer2DModel are offloaded" in next(iter(FusedQKV().problems(target)))


def test_a_released_model_can_be_planned() -> None:
    assert not list(FusedQKV().problems(Target.planned("FLUX.1-dev")))


def test_parts_that_are_never_called_are_noticed() -> None:
    rig = make("dit")
    with accelerate(rig, FusedQKV()) as session:
        for block in rig.denoiser.transformer_blocks:  # pyright: ignore
            block.attn1.forward = lambda hidden_states, **_: hidden_states
        output(rig, arguments(rig))
        with pytest.raises(NotEngaged):
            session.evidence()
        for block in rig.denoiser.transformer_blocks:  # pyright: ignore
            del block.attn1.forward
