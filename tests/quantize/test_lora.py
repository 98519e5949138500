"""Adapters on plain and quantized layers: as PEFT computes, exchanged without compiling, and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.attention import FusedQKV
from hasten.compilation import CompileBlocks
from hasten.compilation.compiler import CompileCounter
from hasten.core.errors import HastenError, NotEngaged, Refused, UnknownName
from hasten.core.technique import Technique
from hasten.kernels.modules import LowRank, Quantized, QuantizedLinear
from hasten.kernels.rounding import quantize_float8, quantize_integer, quantize_table
from hasten.kernels.weight import QuantizedWeight
from hasten.memory import Offload
from hasten.quantize import Int8Linear, LoRA, WeightOnly
from tests.contract.rigs import Rig, make, plain_output
from tests.quantize.lora_files import matrices, peft_file, with_peft


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.fixture(autouse=True)
def fresh() -> Generator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def dequantized(architecture: str, quantizer: Technique) -> Rig:
    """A plain model with the weights that a quantizer leaves."""
    rig, plain = make(architecture), make(architecture)
    with rig.accelerated(quantizer):
        for path, module in rig.denoiser.named_modules():
            if isinstance(module, Quantized):
                layer: Any = plain.denoiser.get_submodule(path)
                layer.weight.data.copy_(module.effective())
    return plain


@pytest.mark.parametrize("architecture", ["flux", "stable_diffusion", "dit"])
def test_on_plain_layers_as_peft_computes(architecture: str, tmp_path: Path) -> None:
    rig = make(architecture)
    prefix = "unet." if architecture == "stable_diffusion" else "transformer."
    one, two = matrices(rig, rank=4), matrices(rig, rank=7, seed=1)
    files = (peft_file(tmp_path / "one.safetensors", one, prefix=prefix),
             peft_file(tmp_path / "two.safetensors", two, prefix=prefix))  # fmt: skip
    expected = with_peft(with_peft(make(architecture), one, 0.7), two, -0.4, "second").run()
    technique = LoRA(adapters=files, scales=(0.7, -0.4))
    with rig.accelerated(technique) as session:
        close(rig.run(), expected)
        words = technique.engaged(session).summary
    assert words.startswith("one (rank 4, scale 0.7) and two (rank 7, scale -0.4) in 11 of 16 ranks")
    assert not torch.allclose(expected, plain_output(architecture), atol=1e-2)
    assert torch.equal(rig.run(), plain_output(architecture))


@pytest.mark.parametrize("quantizer", [WeightOnly(bits=4), Int8Linear(activations="none")], ids=repr)
@pytest.mark.parametrize("architecture", ["flux", "stable_diffusion"])
def test_on_quantized_layers(architecture: str, quantizer: Technique, tmp_path: Path) -> None:
    rig = make(architecture)
    pairs = matrices(rig)
    prefix = "unet." if architecture == "stable_diffusion" else "transformer."
    file = peft_file(tmp_path / "style.safetensors", pairs, prefix=prefix, alpha=2.0)
    expected = with_peft(dequantized(architecture, quantizer), pairs, 0.5).run()
    with rig.accelerated(quantizer, LoRA(adapters=(file,))) as session:
        close(rig.run(), expected)
        session.evidence()
    assert torch.equal(rig.run(), plain_output(architecture))


@pytest.mark.parametrize("quantizer", [WeightOnly(), None], ids=repr)
def test_changes_while_the_session_is_open_compile_nothing(quantizer: Technique | None, tmp_path: Path) -> None:
    rig = make("flux")
    one = matrices(rig, rank=4)
    two = matrices(rig, rank=9, seed=1, only=("to_q", "ff.net.2"))  # other layers, another rank
    first, second = (peft_file(tmp_path / f"{n}.safetensors", p) for n, p in (("one", one), ("two", two)))
    base = dequantized("flux", quantizer) if quantizer else make("flux")
    recipe = [CompileBlocks(backend="eager"), *([quantizer] if quantizer else [])]

    def peft(pairs: dict[str, Any], scale: float) -> torch.Tensor:
        fresh = make("flux")
        fresh.denoiser.load_state_dict(base.denoiser.state_dict())
        return with_peft(fresh, pairs, scale).run(steps=2)

    lora = LoRA(adapters=(first,), ranks=30, layers=("transformer.*.ff.net.2",))
    with rig.accelerated(*recipe, lora) as session:
        found = hasten.adapters(session)
        close(rig.run(steps=2), peft(one, 1.0))
        counter = session.state(recipe[0], CompileCounter)
        graphs = counter.graphs
        found.set_scale("one", 0.3)
        close(rig.run(steps=2), peft(one, 0.3))
        found.swap("one", second, scale=1.0)
        close(rig.run(steps=2), peft(two, 1.0))
        found.unload("one")
        without = rig.run(steps=2)
        close(without, base.run(steps=2))
        assert found.load(first) == "one"
        assert found.load(first, scale=-1.0) == "one-2"
        close(rig.run(steps=2), without)
        assert (found.names, found.free) == (("one", "one-2"), 32 - 8)
        assert counter.graphs == graphs


KINDS: dict[str, Callable[[torch.Tensor], QuantizedWeight]] = {
    "int4": lambda weight: quantize_integer(weight, 4, 8),
    "int8": lambda weight: quantize_integer(weight, 8),
    "float8": quantize_float8,
    "table": lambda weight: quantize_table(weight, torch.linspace(-1, 1, 16), 4, 8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_own_low_rank_of_a_layer_stays_in_front(kind: str) -> None:
    from hasten.core.patch import Patch
    from hasten.quantize.engine.ranks import make_room

    torch.manual_seed(0)
    own = LowRank(torch.randn(3, 16), torch.randn(24, 3))
    layer = QuantizedLinear(KINDS[kind](torch.randn(24, 16)), torch.randn(24), low_rank=own)
    parent, x = torch.nn.Sequential(layer), torch.randn(5, 16)
    plain, patch = parent(x), Patch({}, lambda: pytest.fail("no clock"))
    room = make_room(parent, "0", 16, torch.float32, patch)
    close(parent(x), plain)
    down, up = torch.randn(2, 16), torch.randn(24, 2)
    room.write(torch.tensor([1, 5]), down, up, 0.5)
    close(parent(x), plain + 0.5 * x @ down.T @ up.T)
    close(x @ layer.effective().T + torch.as_tensor(layer.bias), parent(x))
    assert torch.equal(layer.down[:3], own.down)  # pyright: ignore
    patch.close()
    assert layer.down is own.down
    assert layer.up is own.up
    assert layer.rank_scale is None
    assert torch.equal(parent(x), plain)


def test_factors_of_ranks_survive_casts_and_state_dicts() -> None:
    from hasten.kernels.modules import build

    torch.manual_seed(0)
    low_rank = LowRank(torch.randn(3, 16), torch.randn(24, 3), torch.tensor([0.1, 0.0, 1.7]))
    layer = QuantizedLinear(quantize_integer(torch.randn(24, 16), 8), low_rank=low_rank)
    again = build(layer.describe(), layer.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(layer.to(torch.bfloat16).rank_scale, torch.tensor([0.1, 0.0, 1.7]))  # pyright: ignore


def test_with_fused_projections_and_peft_and_offloading(tmp_path: Path) -> None:
    rig = make("flux")
    pairs, more = matrices(rig), matrices(rig, seed=3, only=("to_q",))
    file = peft_file(tmp_path / "style.safetensors", pairs)
    expected = with_peft(with_peft(make("flux"), pairs), more, 1.0, "second").run()
    with_peft(rig, more, 1.0, "second")
    alone = rig.run()
    with rig.accelerated(LoRA(adapters=(file,)), FusedQKV(), Offload(device="cpu")):
        close(rig.run(), expected)
    close(rig.run(), alone)


def test_scales_are_set_while_weights_are_away(tmp_path: Path) -> None:
    rig = make("flux")
    pairs = matrices(rig)
    file = peft_file(tmp_path / "style.safetensors", pairs)
    expected = with_peft(make("flux"), pairs, 0.25).run()
    with rig.accelerated(LoRA(adapters=(file,)), Offload(device="cpu")) as session:
        rig.run(steps=1)
        hasten.adapters(session).set_scale("style", 0.25)
        close(rig.run(), expected)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    rig = make("flux")
    good = peft_file(tmp_path / "good.safetensors", matrices(rig))
    large = peft_file(tmp_path / "large.safetensors", matrices(rig, rank=20))
    elsewhere = peft_file(tmp_path / "elsewhere.safetensors", matrices(rig, only=("ff.net.2",)))
    with pytest.raises(Refused, match="20 ranks together, more than ranks=16"):
        rig.accelerated(LoRA(adapters=(large,), ranks=16))
    with rig.accelerated(LoRA(adapters=(good,))) as session:
        found = hasten.adapters(session)
        before = rig.run()
        with pytest.raises(HastenError, match=r"rank 20, and 16 of 16 ranks are free; .*LoRA\(ranks=20\)"):
            found.swap("good", large)
        with pytest.raises(HastenError, match="where no room was made"):
            found.load(elsewhere)
        with pytest.raises(UnknownName, match="Did you mean good"):
            found.set_scale("goood", 1.0)
        with pytest.raises(HastenError, match="loaded already"):
            found.load(good, name="good")
        with pytest.raises(HastenError, match="cannot be saved"):
            rig.denoiser.save_pretrained(tmp_path)  # pyright: ignore
        assert torch.equal(rig.run(), before)
    with pytest.raises(HastenError, match="has no adapters"):
        hasten.adapters(rig.accelerated(Int8Linear()))


def test_another_models_adapter_is_refused(tmp_path: Path) -> None:
    file = peft_file(tmp_path / "x.safetensors", matrices(make("stable_diffusion")), prefix="unet.")
    with pytest.raises(Refused, match=r"the transformer of Rig has no layer unet\."):
        make("flux").accelerated(LoRA(adapters=(file,)))
    pairs = {"transformer_blocks.0.attn.to_q": (torch.ones(2, 8), torch.ones(8, 2))}
    file = peft_file(tmp_path / "y.safetensors", pairs)
    with pytest.raises(Refused, match="8 inputs and 8 outputs, and this model's layer has 32 and 32"):
        make("flux").accelerated(LoRA(adapters=(file,)))
    file = peft_file(tmp_path / "z.safetensors", pairs, prefix="text_encoder.")
    with pytest.raises(Refused, match="weights for a text_encoder, and Rig has none"):
        make("flux").accelerated(LoRA(adapters=(file,)))


def test_a_layer_taken_out_is_noticed(tmp_path: Path) -> None:
    rig = make("flux")
    technique = LoRA(adapters=(peft_file(tmp_path / "style.safetensors", matrices(rig)),))
    with rig.accelerated(technique) as session:
        rig.run(steps=1)
        block: Any = rig.denoiser.transformer_blocks[0]  # pyright: ignore
        adapted = block.attn.to_q
        block.attn.to_q = adapted.base_layer
        with pytest.raises(NotEngaged, match="1 of"):
            technique.engaged(session)
        block.attn.to_q = adapted


def test_settings_are_checked() -> None:
    with pytest.raises(HastenError, match="1 adapters and 2 scales"):
        LoRA(adapters=("a.safetensors",), scales=(1.0, 2.0))
    with pytest.raises(Refused, match="name files in adapters"):
        make("flux").accelerated(LoRA())
    with pytest.raises(Refused, match="There is no adapter file nowhere.safetensors"):
        make("flux").accelerated(LoRA(adapters=("nowhere.safetensors",)))
