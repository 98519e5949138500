"""Adapter files: all naming schemes (diffusers' converters are the oracle), alpha, saving, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.core.errors import HastenError
from hasten.core.target import Target
from hasten.formats.format import BadFile
from hasten.formats.lora import Names, read_adapter, save_adapter
from hasten.formats.lora.file import _parsed  # pyright: ignore[reportPrivateUsage]
from hasten.formats.lora.original_names import unet_names
from hasten.quantize import LoRA
from hasten.quantize.engine.adapter_layers import adaptable, layers_of
from tests.contract.rigs import make
from tests.quantize.lora_files import matrices, peft_file, with_peft

ORIGINAL = {
    "double_blocks_7_img_attn_qkv": (3072, 9216),
    "double_blocks_0_txt_mlp_2": (12288, 3072),
    "double_blocks_18_img_mod_lin": (3072, 18432),
    "single_blocks_30_linear1": (3072, 21504),
    "single_blocks_3_linear2": (15360, 3072),
}
"""Layers of FLUX.1 by their original names, with inputs and outputs."""


def product(pair: Any) -> torch.Tensor:
    """What is added to a few rows and columns of the weight."""
    down, up = pair.read()
    assert down.shape == (pair.rank, pair.inputs)
    assert up.shape == (pair.outputs, pair.rank)
    return pair.scaling * up[::97] @ down[:, ::53]


@pytest.mark.parametrize("style", ["kohya", "original"])
def test_original_names_of_flux_as_diffusers_converts_them(style: str, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_kohya_flux_lora_to_diffusers,  # pyright: ignore[reportPrivateUsage]
    )

    torch.manual_seed(0)
    kohya: dict[str, torch.Tensor] = {}
    for name, (inputs, outputs) in ORIGINAL.items():
        kohya[f"lora_unet_{name}.lora_down.weight"] = torch.randn(3, inputs)
        kohya[f"lora_unet_{name}.lora_up.weight"] = torch.randn(outputs, 3)
        kohya[f"lora_unet_{name}.alpha"] = torch.tensor(1.5)
    ours = {_dotted(key) if style == "original" else key: value for key, value in kohya.items()}
    save_file(ours, tmp_path / "kohya.safetensors")
    found = layers_of(str(tmp_path / "kohya.safetensors"), Target.planned("FLUX.1-dev"))
    expected = _convert_kohya_flux_lora_to_diffusers(dict(kohya))
    assert {f"transformer.{path}.lora_{side}.weight" for _, path in found for side in "AB"} == set(expected)
    for (_, path), pair in found.items():
        key = f"transformer.{path}.lora_"
        theirs = expected[f"{key}B.weight"][::97] @ expected[f"{key}A.weight"][:, ::53]
        torch.testing.assert_close(product(pair), theirs, atol=1e-5, rtol=1e-5)


def _dotted(key: str) -> str:
    """A name of kohya's as ComfyUI and BFL write it."""
    name, _, kind = key.removeprefix("lora_unet_").partition(".")
    for part in ("double_blocks_", "single_blocks_", "_img_", "_txt_"):
        name = name.replace(part, f".{part.strip('_')}{'_' if part[0] == '_' else '.'}")
    name = name.strip(".").replace("_qkv", ".qkv").replace("_mlp_2", "_mlp.2").replace("_lin", ".lin")
    return f"diffusion_model.{name}.{kind}".replace("_linear", ".linear")


@pytest.mark.parametrize("model", ["stable-diffusion-xl-base-1.0", "stable-diffusion-v1-5"])
def test_names_of_unets_as_diffusers_converts_them(model: str) -> None:
    from diffusers.loaders import lora_conversion_utils as theirs

    target = Target.planned(model)
    network: Any = target.denoisers[0].module
    paths = [path for _, path in adaptable(target)]
    names = Names({"denoiser": paths}, "denoiser")
    inside = [(path, original.name) for path, original in unet_names(paths) if "attentions" in path]
    assert len(inside) > 100
    state: dict[str, torch.Tensor] = {}
    for _, name in inside:
        for side in ("down", "up"):
            state[f"lora_unet_{name.replace('.', '_')}.lora_{side}.weight"] = torch.zeros(1, 1)
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(dict(state), network.config)  # pyright: ignore
    converted, _ = theirs._convert_non_diffusers_lora_to_diffusers(mapped)  # pyright: ignore
    found = {_parsed(Path("x"), key)[0].removeprefix("unet.") for key in converted}
    assert found == {names.find(f"lora_unet_{name.replace('.', '_')}")[0].path for _, name in inside}
    assert all(names.find(f"lora_unet_{path.replace('.', '_')}")[0].path == path for path in paths)


def test_text_encoders_and_old_names() -> None:
    layers = {"text_encoder": ["encoder.layers.0.self_attn.q_proj"], "text_encoder_2": ["a.layers.1.wi"],
              "unet": ["down_blocks.0.attentions.0.proj_in", "mid_block.attn1.to_out.0"]}  # fmt: skip
    names = Names(layers, "unet")
    for text, component in (
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder"),
        ("lora_te1_encoder_layers_0_self_attn_q_proj", "text_encoder"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder"),
        ("lora_te3_a_layers_1_wi", "text_encoder_2"),
        ("base_model.model.unet.down_blocks.0.attentions.0.proj_in", "unet"),
    ):
        (place,) = names.find(text)
        assert (place.component, place.path) == (component, layers[component][0])
    layer, side = _parsed(Path("x"), "unet.mid_block.attn1.processor.to_out_lora.down.weight")
    assert (names.find(layer)[0].path, side) == (layers["unet"][1], "down")
    assert names.find("lora_unet_nothing") == []


@pytest.mark.parametrize(("where", "rslora"), [("tensor", False), ("header", False), ("beside", True)])
def test_alpha(where: str, rslora: bool, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.ones(8, 4)}
    path, header = tmp_path / "adapter_model.safetensors", None
    if where == "tensor":
        tensors[f"{name}.alpha"] = torch.tensor(8.0)
    elif where == "header":
        tensors = {f"transformer.{key}": value for key, value in tensors.items()}
        header = {"lora_adapter_metadata": json.dumps(
            {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"attn.to_q": 8}})}  # fmt: skip
    else:
        text = json.dumps({"lora_alpha": 8, "use_rslora": rslora})
        (tmp_path / "adapter_config.json").write_text(text, "utf-8")
    save_file(tensors, path, header)
    (stored,) = read_adapter(tmp_path).layers.values()
    assert stored.scaling == (4.0 if rslora else 2.0)


def test_saved_adapters_are_read_by_diffusers_as_well(tmp_path: Path) -> None:
    rig, other = make("flux"), make("flux")
    pairs = matrices(rig)
    expected = with_peft(make("flux"), pairs).run()
    file = save_adapter(tmp_path / "x.safetensors", {("denoiser", path): pair for path, pair in pairs.items()})
    denoiser: Any = other.denoiser
    denoiser.load_lora_adapter(load_file(file), prefix="transformer")
    torch.testing.assert_close(other.run(), expected, atol=1e-4, rtol=1e-3)
    with rig.accelerated(LoRA(adapters=(str(file),))):
        torch.testing.assert_close(rig.run(), expected, atol=1e-4, rtol=1e-3)


def read_all(file: Path) -> None:
    opened = read_adapter(file)
    for name in opened.layers:
        opened.matrices(name)


def test_bad_files(tmp_path: Path) -> None:
    def refused(tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> str:
        save_file(tensors, tmp_path / "bad.safetensors", header)
        with pytest.raises(BadFile) as caught:
            read_all(tmp_path / "bad.safetensors")
        return str(caught.value)

    a, b = torch.ones(2, 8), torch.ones(8, 2)
    assert "only one of its two matrices" in refused({"x.lora_A.weight": a})
    assert "have shapes [2, 8] and [8, 3]" in refused({"x.lora_A.weight": a, "x.lora_B.weight": torch.ones(8, 3)})
    assert "NaN or infinite" in refused({"x.lora_A.weight": a / 0, "x.lora_B.weight": b})
    assert "alpha of the layer x is no finite" in refused(
        {"x.lora_A.weight": a, "x.lora_B.weight": b, "x.alpha": torch.tensor(torch.inf)})  # fmt: skip
    assert "holds a DoRA adapter" in refused({"x.lora_A.weight": a, "x.lora_B.weight": b, "x.dora_scale": a.clone()})
    assert "holds a LoKr adapter" in refused({"x.lokr_w1": a})
    assert "no part of a LoRA layer" in refused({"x.lora_B.bias": a})
    assert "holds no layers" in refused({"x.alpha": torch.tensor(1.0)})
    assert "not valid JSON" in refused(
        {"x.lora_A.weight": a, "x.lora_B.weight": b}, {"lora_adapter_metadata": "{" * 5000})  # fmt: skip
    (tmp_path / "x.bin").write_bytes(b"pickle")
    with pytest.raises(HastenError, match="no safetensors file"):
        read_adapter(tmp_path / "x.bin")
    with pytest.raises(HastenError, match="holds no adapter; expected"):
        read_adapter(tmp_path)


def test_damaged_bytes_are_an_error_and_no_crash(tmp_path: Path) -> None:
    good = Path(peft_file(tmp_path / "good.safetensors", matrices(make("flux"), only=("to_q",)))).read_bytes()
    generator, file = torch.Generator().manual_seed(0), tmp_path / "bad.safetensors"
    for place in torch.randint(0, 900, (60,), generator=generator).tolist():
        data = bytearray(good[: len(good) - (place % 7) * 1000])
        data[place] ^= 1 + place % 255
        file.write_bytes(bytes(data))
        try:
            read_all(file)
        except HastenError as error:
            assert str(file) in str(error)
