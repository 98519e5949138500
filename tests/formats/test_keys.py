"""Names of weights: diffusers' own conversions of single files are the oracle, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as oracle
from torch import nn

from hasten.core.errors import HastenError, UnknownName
from hasten.core.registry import specs
from hasten.formats.format import Entry, Reader
from hasten.formats.keys import NAMINGS, in_scheme, recognized
from tests.formats.held import Held

Tensors = dict[str, torch.Tensor]


def plain(reader: Reader) -> Tensors:
    found: Tensors = {}
    for name in reader.names():
        weight = reader.read(name).weight
        assert isinstance(weight, torch.Tensor)
        assert weight.shape == reader.shape(name)
        found[name] = weight
    return found


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tensors(model: nn.Module) -> Tensors:
    """The model's weights, drawn anew, so that none is zero or one throughout."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in model.state_dict().items()}


def tiny(architecture: str, **changes: Any) -> Tensors:
    spec = specs()[architecture]
    return tensors(spec.build({**spec.tiny, **changes}))


def flux() -> Tensors:
    """Of the width that diffusers' conversion insists on, with one input a layer."""
    spec = specs()["flux"]
    wide = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
    model = spec.build({**spec.tiny, **wide, "num_layers": 2, "num_single_layers": 2}, device="meta")
    generator = torch.Generator().manual_seed(0)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    return {
        name: torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator) for name, shape in shapes.items()
    }


CASES: dict[str, tuple[Callable[[], Tensors], Callable[[Tensors], Tensors]]] = {
    "flux": (flux, oracle.convert_flux_transformer_checkpoint_to_diffusers),
    "sd3": (lambda: tiny("sd3"), oracle.convert_sd3_transformer_checkpoint_to_diffusers),
    "wan": (lambda: tiny("wan"), oracle.convert_wan_transformer_to_diffusers),
    "wan, from a picture": (
        lambda: tiny("wan", image_dim=8, added_kv_proj_dim=32),
        oracle.convert_wan_transformer_to_diffusers,
    ),
    "z_image": (lambda: tiny("z_image"), oracle.convert_z_image_transformer_checkpoint_to_diffusers),
    "stable_diffusion": (lambda: tiny("stable_diffusion"), lambda found: ldm("stable_diffusion", found)),
    "sdxl": (lambda: tiny("sdxl"), lambda found: ldm("sdxl", found)),
}


def ldm(architecture: str, found: Tensors) -> Tensors:
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in found.items()}
    return oracle.convert_ldm_unet_checkpoint(prefixed, specs()[architecture].tiny)


@pytest.mark.parametrize("case", CASES)
def test_names_go_there_and_back_as_diffusers_takes_them(case: str) -> None:
    make, convert = CASES[case]
    ours = make()
    theirs = plain(in_scheme(Held(ours), "original"))
    assert theirs.keys() != ours.keys()
    assert same(convert(dict(theirs)), ours)
    found = recognized(theirs.keys())
    assert (found.naming.architecture, found.naming.scheme) == (case.split(",")[0], "original")
    prefixed: Tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in theirs.items()}
    assert same(plain(in_scheme(Held({**prefixed, "first_stage_model.x": torch.ones(1)}), "diffusers")), ours)


def test_every_denoiser_is_recognized_by_the_names_of_diffusers() -> None:
    for name, spec in specs().items():
        found = recognized(spec.build(spec.tiny, device="meta").state_dict().keys())
        assert (found.naming.architecture, found.naming.scheme) == (name, "diffusers")


def test_names_of_the_vae() -> None:
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16), "norm_num_groups": 4, "layers_per_block": 2,
    }  # fmt: skip
    model = diffusers.AutoencoderKL(**settings)
    ours = tensors(model)
    theirs = plain(in_scheme(Held(ours), "original"))
    assert theirs["decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    back = oracle.convert_ldm_vae_checkpoint(dict(theirs), model.config)
    assert same(back, ours)
    assert same(plain(in_scheme(Held(theirs), "diffusers")), ours)


def open_clip(width: int) -> Tensors:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=20, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=7, projection_dim=width, eos_token_id=2,
    )  # fmt: skip
    return tensors(CLIPTextModelWithProjection(config))


def test_names_of_openclip() -> None:
    ours = open_clip(8)
    theirs: Tensors = {"conditioner.embedders.1.model.logit_scale": torch.ones(())}
    for name, tensor in plain(in_scheme(Held(ours), "original", "open_clip")).items():
        theirs[f"conditioner.embedders.1.model.{name}"] = tensor
    prefix = "conditioner.embedders.1.model."
    assert torch.equal(theirs[f"{prefix}text_projection"], ours["text_projection.weight"].T)
    fused = theirs[f"{prefix}transformer.resblocks.1.attn.in_proj_weight"]
    layer = "text_model.encoder.layers.1.self_attn"
    assert torch.equal(fused, torch.cat([ours[f"{layer}.{part}_proj.weight"] for part in "qkv"]))
    assert same(plain(in_scheme(Held(theirs), "diffusers")), ours)


def test_names_of_t5_in_gguf_files() -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=10, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    ours = tensors(T5EncoderModel(config))
    ours.pop("encoder.embed_tokens.weight", None)
    theirs = plain(in_scheme(Held(ours), "original"))
    assert {"token_embd.weight", "enc.blk.1.ffn_gate.weight", "enc.blk.0.attn_rel_b.weight"} <= theirs.keys()
    assert same(plain(in_scheme(Held(theirs), "diffusers")), ours)


def test_nunchakus_flux_puts_the_last_layer_of_single_blocks_together() -> None:
    ours = tiny("flux")
    theirs = plain(in_scheme(Held(ours), "nunchaku"))
    block = "single_transformer_blocks.2"
    assert theirs[f"{block}.out_proj.weight"].shape == (32, 32)
    assert theirs[f"{block}.mlp_fc2.weight"].shape == (32, 128)
    assert f"{block}.proj_out.weight" not in theirs
    # Files have no bias for the first half.
    del theirs[f"{block}.out_proj.bias"]
    back = plain(in_scheme(Held(theirs), "diffusers"))
    assert same(back, ours)


def test_a_fused_weight_is_read_once() -> None:
    held = Held(plain(in_scheme(Held(tiny("sd3")), "original")))
    reader = in_scheme(held, "diffusers")
    for name in reader.names():
        reader.read(name)
    assert sorted(held.reads) == sorted(held.names())


def test_what_is_no_weight_of_the_architecture_is_named_with_its_neighbour() -> None:
    theirs = plain(in_scheme(Held(tiny("wan")), "original"))
    with pytest.raises(HastenError, match=r"'blocks.0.self_attn.qq.weight' is no weight of wan.*self_attn"):
        in_scheme(Held({**theirs, "blocks.0.self_attn.qq.weight": torch.ones(1)}), "diffusers")
    incomplete = {name: tensor for name, tensor in flux().items() if not name.endswith("1.attn.to_k.weight")}
    with pytest.raises(HastenError, match=r"'.*to_k.weight' is missing beside"):
        in_scheme(Held(incomplete), "original")


def test_unknown_architectures_and_namings() -> None:
    with pytest.raises(HastenError, match=r"No architecture is known.*a.weight.*flux"):
        recognized(["a.weight"])
    with pytest.raises(UnknownName, match="Did you mean flux"):
        recognized(["a.weight"], "flx")
    with pytest.raises(HastenError, match="no weights of wan"):
        recognized(flux().keys(), "wan")
    with pytest.raises(UnknownName, match="original"):
        in_scheme(Held(tiny("wan")), "nunchaku")


def test_architectures_are_those_of_the_denoisers_and_their_companions() -> None:
    known = {naming.architecture for naming in NAMINGS}
    assert known - set(specs()) == {"t5", "open_clip", "clip", "vae"}
    assert set(specs()) <= known


def test_entries_keep_what_is_done_to_the_input() -> None:
    from hasten.kernels.modules import Input, LowRank

    ours = tiny("z_image")
    theirs = plain(in_scheme(Held(ours), "original"))
    name = "layers.0.attention.qkv.weight"
    given = Input(smooth=torch.rand(32), activations="int8")
    low = LowRank(torch.randn(4, 32), torch.randn(96, 4))
    entries = {**{key: Entry(tensor) for key, tensor in theirs.items()}, name: Entry(theirs[name], given, low)}
    found = in_scheme(Held(entries), "diffusers").read("layers.0.attention.to_k.weight")
    assert found.given is given
    assert found.low_rank is not None
    assert torch.equal(found.low_rank.up, low.up[32:64])
    assert torch.equal(found.low_rank.down, low.down)
