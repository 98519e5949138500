"""Reads adapters from safetensors files; the header first, matrices when they are asked for."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from hasten.core.errors import HastenError
from hasten.formats.format import BadFile

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the file in a folder."""
_KEY = re.compile(
    r"(?P<layer>.+?)(?:\.processor)?[._](?P<side>lora_A|lora_B|lora_down|lora_up|lora[._]down|lora[._]up)"
    r"(?:\.(?!weight$)[^.]+)?\.weight"
)
_OLD = re.compile(r"(?P<layer>.+)\.processor\.(?P<name>to_[qkv]|to_out)_lora\.(?P<side>down|up)\.weight")
_FOREIGN = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT",
    "lora_mid": "Tucker (lora_mid)", "lora_embedding": "embedding",
}  # fmt: skip
"""Parts of names by which other kinds of adapters are known."""
LARGEST_RANK = 4096


@dataclass(frozen=True)
class Stored:
    """One layer of a file."""

    down: str
    up: str
    rank: int
    inputs: int
    outputs: int
    scaling: float
    """The factor that belongs to the matrices: alpha / rank."""


@dataclass(frozen=True)
class LayerPart:
    """What an adapter adds to the weight of one layer: `scaling * up @ down`."""

    rank: int
    inputs: int
    outputs: int
    scaling: float
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]] = field(compare=False)
    """Gives down, [rank, inputs], and up, [outputs, rank]; a convolution's inputs count channels and window."""


class AdapterFile:
    """An adapter file whose names and shapes have been read and checked."""

    def __init__(self, path: Path, layers: Mapping[str, Stored]) -> None:
        self.path, self.layers = path, layers

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(stored.rank for stored in self.layers.values())

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Down, [rank, inputs], and up, [outputs, rank], as they are stored. Raises BadFile for NaN and infinity."""
        from safetensors import safe_open

        stored = self.layers[name]
        with safe_open(self.path, framework="pt") as opened:
            down, up = (cast(torch.Tensor, opened.get_tensor(key)).flatten(1) for key in (stored.down, stored.up))
        if not (down.isfinite().all() and up.isfinite().all()):
            raise BadFile(f"{self.path}: the layer {name} contains NaN or infinite values.")
        return down, up

    def part(self, name: str, rows: slice | None = None, *, halves_swapped: bool = False) -> LayerPart:
        """A layer, or some of its outputs."""
        stored = self.layers[name]
        outputs = stored.outputs if rows is None else rows.stop - rows.start
        return LayerPart(stored.rank, stored.inputs, outputs, stored.scaling,
                         functools.partial(self._rows, name, rows, halves_swapped))  # fmt: skip

    def _rows(self, name: str, rows: slice | None, halves_swapped: bool) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = self.matrices(name)
        up = up if rows is None else up[rows]
        return down, torch.cat(up.chunk(2)[::-1]) if halves_swapped else up


def read_adapter(path: str | Path) -> AdapterFile:
    """Open a safetensors file with an adapter, or a folder that holds one under its usual name.

    Raises HastenError where there is none, and BadFile for a damaged file, incomplete layers, and kinds of adapters
    that are no sum of products of two matrices.
    """
    from safetensors import safe_open

    from hasten.models import check_safetensors

    file = _located(Path(path).expanduser())
    check_safetensors(file)
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(cast("list[str]", opened.keys()))
            shapes = {key: tuple(cast("list[int]", opened.get_slice(key).get_shape())) for key in keys}
            alphas = {key: float(opened.get_tensor(key)) for key in keys if key.endswith(".alpha")}
            metadata = dict(cast("dict[str, str] | None", opened.metadata()) or {})
    except Exception as error:
        raise BadFile(f"{file} cannot be read as an adapter: {error}.") from error
    return AdapterFile(file, _layers(file, shapes, alphas, _settings(file, metadata)))


def _located(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise HastenError(f"The folder {path} holds no adapter; expected {' or '.join(FILES)}.")
        return found
    if not path.is_file():
        raise HastenError(f"There is no adapter file {path}.")
    if path.suffix != ".safetensors":
        raise HastenError(f"{path} is no safetensors file, the one kind of adapter file that executes nothing.")
    return path


def _layers(
    file: Path, shapes: dict[str, tuple[int, ...]], alphas: dict[str, float], settings: Mapping[str, Any]
) -> dict[str, Stored]:
    pairs: dict[str, dict[str, str]] = {}
    for key in shapes:
        layer, side = _parsed(file, key)
        if side:
            pairs.setdefault(layer, {})[side] = key
    if not pairs:
        raise BadFile(f"{file} holds no layers of an adapter (LoRA).")
    return {layer: _stored(file, layer, sides, shapes, alphas, settings) for layer, sides in pairs.items()}


def _parsed(file: Path, key: str) -> tuple[str, str]:
    """The layer that a tensor belongs to, and its side: down, up, or neither for a number such as alpha."""
    if foreign := next((kind for part, kind in _FOREIGN.items() if part in key), None):
        raise BadFile(f"{file} holds a {foreign} adapter ({key}); hasten takes plain LoRA.")
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), ""
    if old := _OLD.fullmatch(key):
        name = "to_out.0" if old["name"] == "to_out" else old["name"]
        return f"{old['layer']}.{name}", old["side"]
    match = _KEY.fullmatch(key)
    if match is None:
        raise BadFile(f"{file} holds {key}, which is no part of a LoRA layer.")
    return match["layer"], "down" if match["side"].endswith(("A", "down")) else "up"


def _stored(
    file: Path,
    layer: str,
    sides: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    alphas: dict[str, float],
    settings: Mapping[str, Any],
) -> Stored:
    if sides.keys() != {"down", "up"}:
        raise BadFile(f"{file}: the layer {layer} has only one of its two matrices.")
    down, up = shapes[sides["down"]], shapes[sides["up"]]
    if len(down) not in (2, 4) or len(up) not in (2, 4) or not 0 < down[0] == up[1] <= LARGEST_RANK or 0 in down + up:
        raise BadFile(f"{file}: the matrices of {layer} have shapes {list(down)} and {list(up)}.")
    if math.prod(up[2:]) != 1:
        raise BadFile(f"{file}: the upper matrix of {layer} has a window of {list(up[2:])}; expected 1 x 1.")
    scaling = _scaling(layer, down[0], alphas, settings)
    if not math.isfinite(scaling):
        raise BadFile(f"{file}: alpha of the layer {layer} is no finite number.")
    return Stored(sides["down"], sides["up"], down[0], math.prod(down[1:]), up[0], scaling)


def _scaling(layer: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]) -> float:
    """alpha / rank: alpha is stored beside the matrices, or in PEFT's settings; otherwise it is the rank."""
    if f"{layer}.alpha" in alphas:
        return alphas[f"{layer}.alpha"] / rank
    component, _, _ = layer.removeprefix("base_model.model.").partition(".")
    prefix = f"{component}." if f"{component}.lora_alpha" in settings else ""
    alpha: Any = settings.get(f"{prefix}lora_alpha")
    pattern: Any = settings.get(f"{prefix}alpha_pattern") or {}
    for name, value in pattern.items() if isinstance(pattern, dict) else ():
        if f".{layer}".endswith(f".{name}"):
            alpha = value
    if not isinstance(alpha, int | float):
        return 1.0
    return alpha / (math.sqrt(rank) if settings.get(f"{prefix}use_rslora") is True else rank)


def _settings(file: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """PEFT's settings: in the file's header (diffusers) or in the file beside it (PEFT)."""
    from hasten.core.files import read_json

    beside = file.parent / "adapter_config.json"
    found: object = {}
    if text := metadata.get("lora_adapter_metadata"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise BadFile(f"{file}: lora_adapter_metadata in its header is not valid JSON.") from None
    elif file.name == FILES[1] and beside.is_file():
        found = read_json(beside)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
