"""Quantizers of other libraries, put into a copy of a denoiser at the same layers as ours.

Each is given at the settings that its library recommends for diffusers, as far as a CPU runs them; computed in the
type of the model. A library that cannot be imported, or does not run here, says why in its row.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.core.errors import HastenError
from hasten.core.intercept import base_class
from hasten.core.target import Target
from hasten.formats.converting import Order, convert
from hasten.quantize import WeightOnly
from hasten.quantize.engine.sites import sites


@dataclass(frozen=True)
class Made:
    """A denoiser with a library's layers in it."""

    denoiser: nn.Module
    layers: list[nn.Module]
    weights: int
    """Numbers that the layers' weights stand for."""

    def sizes(self) -> dict[str, Any]:
        """The same as of our rows: all that stands in place of the weights."""
        held = sum(held_bytes(layer) for layer in self.layers)
        return {
            "layers": len(self.layers),
            "weights": self.weights,
            "bytes": held,
            "bits": round(8 * held / self.weights, 3),
        }


Peer = Callable[[Any, Path], Made]
"""From a pipeline and the folder that it was loaded from to the quantized denoiser; the pipeline stays as it is."""


def linears(pipeline: Any) -> tuple[nn.Module, dict[str, nn.Linear]]:
    """The denoiser, and those of its layers that our quantizers take, without convolutions."""
    target = Target.of(pipeline)
    found = sites(target, WeightOnly().components, (), convolutions=False)
    layers = {site.path: site.layer for site in found if isinstance(site.layer, nn.Linear)}
    return target.denoisers[0].module, layers


def held_bytes(layer: nn.Module) -> int:
    """Bytes of all tensors that a layer keeps, its bias left out."""
    return sum(tensor_bytes(value) for name, value in layer.state_dict().items() if name != "bias")


def tensor_bytes(value: Any) -> int:
    """Bytes of a tensor, or of the tensors within one of a class of its own."""
    if not isinstance(value, torch.Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes


def replaced(pipeline: Any, change: Callable[[nn.Module, dict[str, nn.Linear]], None]) -> Made:
    """A copy of the denoiser after `change`, which is given the copy and its layers by path."""
    denoiser, layers = linears(pipeline)
    made = copy.deepcopy(denoiser).requires_grad_(False)
    change(made, {path: made.get_submodule(path) for path in layers})  # type: ignore[misc]
    count = sum(layer.weight.numel() for layer in layers.values())
    return Made(made, [made.get_submodule(path) for path in layers], count)


def torchao(config: Callable[[Any, int], Any]) -> Peer:
    """Its quantize_ with what `config` makes of its module and of the greatest common divisor of 64 and the inputs."""

    def change(made: nn.Module, layers: dict[str, nn.Linear]) -> None:
        import torchao.quantization as ao

        for size in sorted({math.gcd(layer.in_features, 64) for layer in layers.values()}):
            chosen = {path for path, layer in layers.items() if math.gcd(layer.in_features, 64) == size}
            ao.quantize_(made, config(ao, size), filter_fn=lambda _, path, chosen=chosen: path in chosen)

    return lambda pipeline, _: replaced(pipeline, change)


def bits_and_bytes(bits: int) -> Peer:
    """Its layers in the places of linear layers."""

    def layer(bnb: Any, plain: nn.Linear) -> nn.Module:
        weight, kind = plain.weight.data.clone(), plain.weight.dtype
        if bits == 8:
            made = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, has_fp16_weights=False, threshold=6.0)
            made.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
        else:
            made = bnb.nn.Linear4bit(plain.in_features, plain.out_features, compute_dtype=kind, quant_type="nf4")
            made.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, requires_grad=False)
        made.bias = plain.bias
        return made.to(plain.weight.device)

    def change(made: nn.Module, layers: dict[str, nn.Linear]) -> None:
        import bitsandbytes as bnb

        uneven = [path for path, one in layers.items() if one.in_features % 64 or one.out_features % 32]
        if bits == 4 and uneven and made.device.type == "cpu":
            raise HastenError(
                f"on a CPU its 4-bit layers need inputs that 64 and outputs that 32 divides (otherwise it takes scales "
                f"of other blocks, without a word), and {len(uneven)} of {len(layers)} layers have others."
            )
        for path, plain in layers.items():
            parent, _, name = path.rpartition(".")
            setattr(made.get_submodule(parent), name, layer(bnb, plain))

    return lambda pipeline, _: replaced(pipeline, change)


def quanto(kind: str) -> Peer:
    """Its quantize with weights of a type, and activations as they are."""

    def change(made: nn.Module, layers: dict[str, nn.Linear]) -> None:
        from optimum import quanto as library

        library.quantize(made, weights=getattr(library, kind), include=list(layers))
        library.freeze(made)

    return lambda pipeline, _: replaced(pipeline, change)


def diffusers_gguf(kind: str) -> Peer:
    """The GGUF quantizer of diffusers on a file that `hasten convert` writes."""

    def make(pipeline: Any, folder: Path) -> Made:
        from diffusers import GGUFQuantizationConfig
        from diffusers.quantizers.gguf.utils import GGUFLinear

        denoiser = linears(pipeline)[0]
        kind_of, part = base_class(denoiser), next(n for n, one in pipeline.components.items() if one is denoiser)
        given = GGUFQuantizationConfig(compute_dtype=denoiser.dtype)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "denoiser.gguf"
            source = folder / part / "diffusion_pytorch_model.safetensors"
            convert(Order(source=source, target=file, format="gguf", kind=kind), Quiet())
            read: Any = getattr(kind_of, "from_single_file")  # noqa: B009 - not all networks have it
            made = read(
                str(file), config=str(folder), subfolder=part, quantization_config=given, dtype=denoiser.dtype
            )  # fmt: skip
        layers = {path: one for path, one in made.named_modules() if isinstance(one, GGUFLinear)}
        layers = {path: one for path, one in layers.items() if one.weight.dtype == torch.uint8}
        return Made(made, list(layers.values()), sum(denoiser.get_submodule(path).weight.numel() for path in layers))  # type: ignore[union-attr]

    return make


class Quiet:
    """Shows no progress."""

    def start(self, weights: int) -> None:
        """Say nothing."""

    def advance(self, name: str) -> None:
        """Say nothing."""


PEERS: Mapping[str, Peer] = {
    "torchao Int8DynamicActivationInt8Weight": torchao(lambda ao, _: ao.Int8DynamicActivationInt8WeightConfig()),
    "torchao Float8DynamicActivationFloat8Weight PerRow": torchao(
        lambda ao, _: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    ),
    "torchao Float8WeightOnly": torchao(lambda ao, _: ao.Float8WeightOnlyConfig()),
    "torchao Int4WeightOnly": torchao(lambda ao, size: ao.Int4WeightOnlyConfig(group_size=size)),
    "torchao IntxWeightOnly int4": torchao(
        lambda ao, size: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(size))
    ),
    "torchao Int8DynamicActivationIntxWeight int4": torchao(
        lambda ao, size: ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=ao.PerGroup(size)
        )
    ),
    "bitsandbytes nf4": bits_and_bytes(4),
    "bitsandbytes LLM.int8()": bits_and_bytes(8),
    "diffusers GGUF Q8_0": diffusers_gguf("Q8_0"),
    "diffusers GGUF Q4_0": diffusers_gguf("Q4_0"),
    "diffusers GGUF Q4_K": diffusers_gguf("Q4_K"),
    "optimum-quanto qint8": quanto("qint8"),
    "optimum-quanto qint4": quanto("qint4"),
    "optimum-quanto qfloat8": quanto("qfloat8"),
}
"""Rows of the table of fidelity, by name."""
