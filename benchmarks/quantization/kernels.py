"""Every kernel of quantized products on one GPU, on the linear layers of FLUX and few to many tokens.

    python benchmarks/quantization/kernels.py --out benchmarks/quantization/results/kernels.json

Rows: bfloat16, `torch._scaled_mm` on rows of float8 that are there already, peers where they can be imported, and each
kernel that takes each of our layers, with which one is chosen without measuring. `tflops` counts the product alone.
Inputs are random; the second-level cache is emptied between calls. `--tune` also fills the table that later
choices use.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from timing import Row, Sizes, kernel_rows, ours, peers, product, timed
from torch.nn import functional as F

from hasten.core.diagnosis import in_words
from hasten.core.files import atomic_write_text, json_text
from hasten.core.packages import installed
from hasten.kernels.activations import float8_tokens
from hasten.kernels.product import choose, kernels, tune
from hasten.measure.environment import environment

SHAPES = {"FLUX ff up": (3072, 12288), "FLUX ff down": (12288, 3072), "FLUX to_out": (3072, 3072)}
SHAPES |= {"FLUX single proj_out": (15360, 3072), "FLUX fused qkv": (3072, 9216)}
TOKENS = (1, 16, 64, 512, 4608)


def plain_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, exact: torch.Tensor) -> Iterator[Row]:
    """What PyTorch itself has."""
    yield timed("bf16 F.linear", lambda: F.linear(x, weight, bias), exact)
    tokens, token_scales = float8_tokens(x)
    rows, row_scales = float8_tokens(weight)
    facts = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    given = (tokens, rows.t(), token_scales, row_scales.t())
    yield timed("torch._scaled_mm float8 rows, product alone", lambda: torch._scaled_mm(*given, **facts), exact)
    integers = (torch.randint(-127, 127, part.shape, dtype=torch.int8, device=x.device) for part in (x, weight))
    left, right = integers
    yield timed("torch._int_mm, product alone", lambda: torch._int_mm(left, right.t()).bfloat16(), exact)


def peer_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, exact: torch.Tensor) -> Iterator[Row]:
    """Layers of other libraries, eager."""
    for name, make in peers(weight, bias):
        try:
            layer = make()
        except Exception as problem:  # noqa: BLE001 - peers fail in their own ways
            yield {"name": name, "problem": in_words(problem)}
            continue
        yield timed(name, lambda layer=layer: layer(x), exact)


def our_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, exact: torch.Tensor, measured: bool
) -> Iterator[Row]:
    """Every kernel for every layer of ours, and the layer as it is called."""
    for name, layer in ours(weight, bias).items():
        yield from kernel_rows(f"hasten {name}", layer, x, exact, kernels(x.device))
        if measured:
            tune(product(layer, x))
        kernel = choose(product(layer, x)).name
        yield timed(f"hasten {name}, as called", lambda layer=layer: layer(x), exact, kernel=kernel)


def rows(sizes: Sizes, shape: str, device: torch.device, measured: bool) -> Iterator[Row]:
    """All rows of one layer at one number of tokens."""
    x, weight, bias = sizes.tensors(device)
    exact = F.linear(x.float(), weight.float(), bias.float())
    work = 2 * sizes.tokens * sizes.inputs * sizes.outputs
    for found in (plain_rows, peer_rows, lambda *given: our_rows(*given, measured)):
        for row in found(x, weight, bias, exact):
            speed = {"tflops": round(work / row["median_ms"] / 1e9, 1)} if "median_ms" in row else {}
            yield {"shape": shape, **asdict(sizes), **row, **speed}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small layers, to try the script out")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    device = torch.device(given.device)
    facts = environment(device) | {name: installed(name) for name in ("triton", "torchao", "bitsandbytes")}
    found: list[Row] = []
    for shape in given.shapes:
        inputs, outputs = (256, 512) if given.tiny else SHAPES[shape]
        for tokens in given.tokens:
            for row in rows(Sizes(tokens, inputs, outputs), shape, device, given.tune):
                print({name: value for name, value in row.items() if name not in ("runs", "least_ms")}, flush=True)
                found.append(row)
            if given.out is not None:
                # After each size, so that an interrupted run leaves what it has measured.
                atomic_write_text(given.out, json_text({"environment": facts, "rows": found}))


if __name__ == "__main__":
    main()
