"""Products with quantized weights as models start them, for `offline.py`: tensors without data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hasten.kernels import gpu
from hasten.kernels.activations import Activations
from hasten.kernels.call import Product
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.triton import launch
from hasten.kernels.triton.launch import Tile
from hasten.kernels.weight import QuantizedWeight, Scales

SIZES = {"ff up": (3072, 12288), "ff down": (12288, 3072)}
RANKS = 32


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weights(inputs: int, outputs: int) -> dict[str, QuantizedWeight]:
    """The kinds that differ for kernels, by name."""

    def by_group(group: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return meta(outputs, inputs // group, dtype=dtype)

    def made(number: str, scale: Scales, **more: Any) -> QuantizedWeight:
        bits, dtype = NUMBERS[number].bits, NUMBERS[number].dtype
        codes = meta(outputs, inputs * bits // 8, dtype=dtype)
        return QuantizedWeight((outputs, inputs), NUMBERS[number], inputs, codes, scale, **more)

    fine = Scales(by_group(32, torch.uint8), by_group(256, torch.float16))
    double = Scales(by_group(64, torch.uint8), by_group(256), meta(256, dtype=torch.float32), meta(dtype=torch.float32))
    table = meta(16, dtype=torch.float32)
    return {
        "int8 rows": made("int8", Scales(by_group(inputs))),
        "float8 rows": made("float8_e4m3fn", Scales(by_group(inputs))),
        "int4 of 64": made("int4", Scales(by_group(64))),
        "uint4 of 64, zero": made("uint4", Scales(by_group(64, torch.float16)), zero=by_group(64, torch.uint8)),
        "nf4": made("table4", Scales(by_group(64)), table=table),
        "nf4, double": made("table4", double, table=table),
        "Q4_K": made("uint4", fine, minimum=fine),
        "Q6_K": made("int6", Scales(by_group(16, torch.int8), by_group(256, torch.float16))),
    }


def product(weight: QuantizedWeight, tokens: int, activations: Activations, side: bool = False, **more: Any) -> Product:
    outputs, inputs = weight.shape
    pair = {"down": meta(RANKS, inputs), "up": meta(outputs, RANKS)} if side else {}
    return Product(meta(tokens, inputs), weight, meta(outputs), activations, **pair, **more)


def product_calls() -> Iterator[str]:
    """Start every kernel of products, and say what was started."""
    for shape, (inputs, outputs) in SIZES.items():
        kinds = weights(inputs, outputs)
        for name, weight in kinds.items():
            yield from _of_few(f"{shape}, {name}", weight)
            if shape == "ff up":
                # Elsewhere the same programs, with loops of other lengths.
                yield from _of_weight(f"{shape}, {name}", weight)
        for rotation in (1, 64, 256):
            for activations in ("int8", "float8"):
                launch.round_tokens(product(kinds["int8 rows"], 4608, activations, rotation=rotation))
                yield f"{shape}, tokens to {activations}, rotation {rotation}"


def _of_few(name: str, weight: QuantizedWeight) -> Iterator[str]:
    for tokens in (1, 2, 4) if weight.number.bits in (4, 8) else ():
        launch.few_tokens(product(weight, tokens, "none"))
        yield f"{name}, {tokens} tokens"
        launch.few_tokens(product(weight, tokens, "none", side=True))
        yield f"{name}, {tokens} tokens, side branch"


def _of_weight(name: str, weight: QuantizedWeight) -> Iterator[str]:
    inputs = weight.shape[1]
    for size in gpu.WIDENING:
        launch.widening(product(weight, size[0], "none", side=True), meta(size[0], inputs), None, Tile(*size))
        yield f"{name}, widened on the way {size[0]}x{size[1]}"
    launch.widened_weight(product(weight, 4608, "none"), torch.bfloat16)
    yield f"{name}, widened first"
    for activations, dtype in (("int8", torch.int8), ("float8", torch.float8_e4m3fn)):
        given = product(weight, 4608, activations, side=True)
        if weight.number.dtype == dtype:
            for size in gpu.ROWS:
                launch.by_rows(given, meta(4608, inputs, dtype=dtype), meta(4608, dtype=torch.float32), Tile(*size))
                yield f"{name}, rows {size[0]}x{size[1]}"
        else:
            launch.recoded(given)
            yield f"{name}, recoded to {activations}"
        if weight.number.kind == "integer" and weight.scale.codes.shape[1] <= inputs // 32 and activations == "int8":
            for size in gpu.GROUPS[: 1 if weight.minimum else 2]:
                launch.by_groups(given, meta(4608, inputs, dtype=dtype), meta(4608, dtype=torch.float32), Tile(*size))
                yield f"{name}, groups {size[0]}x{size[1]}"
