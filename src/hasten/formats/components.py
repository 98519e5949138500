"""Networks with weights from files: built empty, then filled weight by weight, with coded layers in their places."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from hasten.core.errors import HastenError, nearest
from hasten.core.intercept import base_class
from hasten.formats.format import Entry, Reader
from hasten.kernels.activations import Activations
from hasten.kernels.joining import reshaped
from hasten.kernels.modules import Input, LowRank, Quantized, QuantizedConv2d, QuantizedLinear
from hasten.kernels.weight import QuantizedWeight

_SHOWN = 3


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, without memory for its weights; buffers that are computed, not stored, are there."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build().eval()


@dataclass(frozen=True)
class Filling:
    """What was done when a network was filled."""

    coded: int
    """Layers that keep their weight in codes."""
    decoded: int
    """Weights in codes that had to be decoded, since they do not belong to a linear layer or a convolution."""


def fill(model: nn.Module, reader: Reader, dtype: torch.dtype | None = None) -> Filling:
    """Give an empty network its weights. Plain ones are cast to `dtype`, or keep their types if it is None.

    Raises HastenError for weights that are missing, that have no place, or whose shape is another.
    """
    wanted = stored_names(model)
    places = _places(reader.names(), wanted)
    _check_names(places.values(), wanted)
    kinds = [_put(model, place, reader.read(name), dtype) for name, place in places.items()]
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    return Filling(kinds.count("coded"), kinds.count("decoded"))


def stored_names(model: nn.Module) -> list[str]:
    """Names of the weights that a file has to hold: all of the state, less those that are others' twins."""
    twins = cast("dict[str, str] | None", getattr(model, "all_tied_weights_keys", None)) or {}
    return [name for name in model.state_dict() if name not in twins]


def entries(model: nn.Module) -> Iterator[tuple[str, Entry]]:
    """Names and entries of all weights of a network, coded or plain, in the order of its state."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Quantized)}
    for name, tensor in _plain_state(model, layers).items():
        yield name, Entry(tensor.detach().cpu())
    for path, layer in layers.items():
        yield f"{path}.weight", entry_of(layer)


def entry_of(layer: Quantized) -> Entry:
    """The weight of a quantized layer with all that belongs to it, in host memory."""
    given = Input(
        _cpu(layer.smooth), layer.rotation, cast(Activations, layer.activations), _cpu(layer.input_scale),
        layer.threshold, layer.compute,
    )  # fmt: skip
    low = None if layer.down is None or layer.up is None else LowRank(layer.down.cpu(), layer.up.cpu())
    return Entry(layer.quantized.map(torch.Tensor.cpu), given, low)


def _plain_state(model: nn.Module, layers: Collection[str]) -> dict[str, torch.Tensor]:
    state = cast("dict[str, torch.Tensor]", model.state_dict())
    coded = {f"{path}.{name}" for path in layers for name in model.get_submodule(path)._buffers}
    names = set(stored_names(model)) - coded
    return {name: tensor for name, tensor in state.items() if name in names}


def _cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().cpu()


def _places(names: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Where each weight of a file goes. Text encoders of transformers 5 have lost an outermost level of names."""
    known = set(wanted)
    inner = {name: name.removeprefix("text_model.") for name in names}
    outer = {name: f"text_model.{name}" for name in names}
    choices = ({name: name for name in names}, inner, outer)
    return max(choices, key=lambda choice: len(known.intersection(choice.values())))


def _check_names(given: Collection[str], wanted: Collection[str]) -> None:
    missing, unexpected = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if unexpected:
        name = unexpected[0]
        raise HastenError(
            f"The file holds {_some(unexpected)}, which the network does not have. {nearest(name, sorted(wanted))}"
        )
    if missing:
        raise HastenError(f"The file lacks {_some(missing)}. {nearest(missing[0], sorted(given))}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more weights" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


def _put(model: nn.Module, name: str, entry: Entry, dtype: torch.dtype | None) -> str:
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    empty_one = _present(parent, leaf)
    entry = _fitting(name, entry, tuple(empty_one.shape))
    wide = set(cast("Collection[str]", getattr(model, "_keep_in_fp32_modules", None) or ())).intersection(
        path.split(".")
    )
    dtype = torch.float32 if dtype is not None and wide else dtype
    if isinstance(entry.weight, torch.Tensor):
        _set_plain(parent, leaf, entry.weight, dtype)
        return "plain"
    if leaf == "weight" and (layer := coded_layer(parent, entry)) is not None:
        home = model.get_submodule(path.rpartition(".")[0])
        setattr(home, path.rpartition(".")[2], layer if dtype is None else layer.to(dtype))
        return "coded"
    if entry.given != Input() or entry.low_rank is not None:
        raise HastenError(f"{name!r} belongs to no linear layer, and the file asks for its input to be changed.")
    _set_plain(parent, leaf, entry.weight.dequantize(), dtype or torch.get_default_dtype())
    return "decoded"


def _present(parent: nn.Module, leaf: str) -> torch.Tensor:
    found = parent._parameters.get(leaf)
    found = parent._buffers.get(leaf) if found is None else found
    assert found is not None
    return found


def _fitting(name: str, entry: Entry, shape: tuple[int, ...]) -> Entry:
    """The entry in the shape of its place: a 1 x 1 convolution and a linear layer are the same."""
    found = tuple(entry.weight.shape)
    if found == shape:
        return entry
    ones = (1,) * abs(len(found) - len(shape))
    if (*found, *ones) != shape and (*shape, *ones) != found:
        raise HastenError(f"{name!r} has shape {list(found)} in the file, and {list(shape)} in the network.")
    weight = entry.weight
    if isinstance(weight, torch.Tensor):
        return Entry(weight.reshape(shape), entry.given, entry.low_rank)
    return Entry(reshaped(weight, shape), entry.given, entry.low_rank)


def _set_plain(parent: nn.Module, leaf: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> None:
    # A copy, since tensors of a reader are views of the file.
    value = tensor.to(dtype, copy=True) if dtype is not None and tensor.is_floating_point() else tensor.clone()
    if leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        parent._buffers[leaf] = value


def coded_layer(layer: nn.Module, entry: Entry) -> Quantized | None:
    """The quantized layer that takes the place of `layer`; None if this is neither linear nor a usual convolution."""
    weight = entry.weight
    assert isinstance(weight, QuantizedWeight)
    kind = base_class(layer)
    own = {"weight": weight.map(torch.clone), "bias": layer._parameters.get("bias")}
    extra: dict[str, Any] = {"given": _own_input(entry.given), "low_rank": _own_branch(entry.low_rank)}
    if kind is nn.Linear:
        return QuantizedLinear(**own, **extra)
    if kind is nn.Conv2d and _usual(conv := cast(nn.Conv2d, layer)):
        return QuantizedConv2d(**own, **extra, stride=_pair(conv.stride), padding=_pair(conv.padding))
    return None


def _usual(layer: nn.Conv2d) -> bool:
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return plain and not isinstance(layer.padding, str)


def _pair(values: object) -> tuple[int, int]:
    return cast("tuple[int, int]", values)


def _own_input(given: Input) -> Input:
    return replace(given, smooth=_clone(given.smooth), scale=_clone(given.scale))


def _own_branch(low: LowRank | None) -> LowRank | None:
    return None if low is None else LowRank(low.down.clone(), low.up.clone())


def _clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()
