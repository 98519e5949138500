"""Compiles the kernels of products and those between them for cards that are not here; prints registers and spills.

    python benchmarks/gpu/offline.py --out offline.json
    python benchmarks/gpu/offline.py --of products --out products.json

Needs Triton (with its own ptxas), but no GPU: the launches that the shapes of real models lead to are recorded with
tensors without data, and each is compiled for every architecture.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from product_calls import product_calls
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from hasten.core.files import atomic_write_text, json_text
from hasten.kernels.coded import Coding
from hasten.kernels.residual import Added, Norm, Normalizing
from hasten.kernels.rotary import HeadNorm, Heads
from hasten.kernels.triton.activate import activate
from hasten.kernels.triton.coded_heads import code
from hasten.kernels.triton.heads import prepare_heads
from hasten.kernels.triton.tokens import residual_norm

ARCHITECTURES = (80, 86, 89, 90, 120)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8"}
POINTERS |= {torch.uint8: "*u8", torch.int32: "*i32", torch.float8_e4m3fn: "*fp8e4nv"}
WIDTHS = {"FLUX": (3072, 12288), "Z-Image": (3840, 10240), "Wan 14B": (5120, 13824), "DiT-XL": (1152, 4608)}
HEADS = {"FLUX": (24, 128), "Z-Image": (30, 128), "SD3.5 large": (38, 64)}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(calls: Callable[[], Iterator[str]]) -> Iterator[tuple[str, JITFunction, tuple[Any, ...], dict[str, Any]]]:
    """What real shapes start: a name, the kernel and its arguments."""
    record: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: JITFunction) -> None:
            self._kernel = kernel

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            record.append((self._kernel, args, kwargs))

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda self, grid: Recorder(self)
    try:
        for name in calls():
            yield from ((name, *one) for one in record)
            record.clear()
    finally:
        JITFunction.__getitem__ = original


def calls() -> Iterator[str]:
    """Start every kernel as models do."""
    for model, (width, inner) in WIDTHS.items():
        x, six = meta(1, 4096, width), meta(1, 6 * width)
        shift, scale, gate = six.split(width, 1)[:3]
        layer = Normalizing(Norm("layer", 1e-6), shift, scale)
        coded = {kind: Normalizing(layer.norm, shift, scale, Coding(kind)) for kind in ("int8", "float8")}
        turned = Normalizing(layer.norm, shift, scale, Coding("int8", meta(width), width & -width))
        residual_norm(x, meta(1, 512, width), None, layer)
        yield f"{model} norm, joined"
        for kind, how in {"": layer, **coded, "rotated int8": turned}.items():
            residual_norm(x, None, Added(x, gate), how)
            yield f"{model} residual, norm {kind}"
        residual_norm(x, None, Added(x, gate, Norm("rms", 1e-5, meta(width))), None)
        yield f"{model} norm after, residual"
        residual_norm(
            x, None, Added(x, gate, Norm("rms", 1e-5, meta(width))), Normalizing(Norm("rms", 1e-5, meta(width)))
        )
        yield f"{model} norm after, residual, norm"
        h = meta(1, 4096, inner)
        for kind in (None, Coding("int8"), Coding("float8"), Coding("int8", None, min(inner & -inner, 256))):
            words = f"{kind.kind} {kind.rotation}" if kind else ""
            activate(h, "swiglu" if model == "Z-Image" else "gelu_tanh", h if model == "Z-Image" else None, kind)
            yield f"{model} activation {words}"
    for model, (count, size) in HEADS.items():
        q, k, v = (
            part.unflatten(-1, (count, size)) for part in meta(1, 4096, 3 * count * size).split(count * size, -1)
        )
        turns = meta(4096, size, dtype=torch.float32)[None, :, ::2]
        heads = Heads(q, k, v, meta(size), meta(size), None if model.startswith("SD3") else (turns, turns))
        prepare_heads([heads, heads], HeadNorm(1e-6))
        yield f"{model} heads"
        code([heads, heads], HeadNorm(1e-6))
        yield f"{model} heads, float8"
        code([Heads(*(part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k, v)))], None)
        yield f"{model} heads, float8, no norm"
    q = meta(1, 4096, 40, 128)
    turns = meta(1, 4096, 1, 128, dtype=torch.float32)[:, :, 0, ::2]
    heads, across = Heads(q, q, q, meta(5120), meta(5120), (turns, turns)), HeadNorm(1e-6, across=True)
    prepare_heads([heads], across)
    yield "Wan 14B heads"
    code([heads], across)
    yield "Wan 14B heads, float8"


def source(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """The program that Triton would make of these arguments, and its options."""
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    named = dict(zip(kernel.arg_names, args, strict=False)) | {n: v for n, v in kwargs.items() if n not in options}
    signature, constants, attributes = dict[str, str](), dict[str, Any](), dict[tuple[int, ...], Any]()
    for place, name in enumerate(kernel.arg_names):
        value = named[name]
        signature[name] = kind(value, kernel.params[place].is_constexpr)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def kind(value: Any, constant: bool) -> str:
    if constant or value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"


def usage(ptx: str, architecture: int) -> dict[str, int]:
    """What ptxas says of a program."""
    import triton.backends.nvidia

    tool = "ptxas-blackwell" if architecture >= 100 else "ptxas"
    ptxas = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    name = re.search(r"^\.target (\S+?),?$", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "kernel.ptx").write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={name[1].rstrip(',') if name else ''}", str(file), "-o", "/dev/null"]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {key: int(match[1]) for key, pattern in PATTERNS.items() if (match := re.search(pattern, words))}
    return {"registers": found.get("registers", 0), "spilled_bytes": found.get("spilled", 0)}


PATTERNS = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kernel and architecture: programs, the one with most registers, and all that spill."""
    found: list[dict[str, Any]] = []
    for key in sorted({(row["kernel"], row["sm"]) for row in rows}):
        those = [row for row in rows if (row["kernel"], row["sm"]) == key]
        largest = max(those, key=lambda row: row["registers"])
        spills = {row["name"]: row["spilled_bytes"] for row in those if row["spilled_bytes"]}
        found.append({"kernel": key[0], "sm": key[1], "programs": len(those), "largest": largest, "spills": spills})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--of", choices=("between", "products"), default="between")
    asked = parser.parse_args()
    rows, done = list[dict[str, Any]](), dict[Any, dict[str, int]]()
    for name, kernel, args, kwargs in list(launches(product_calls if asked.of == "products" else calls)):
        program, options = source(kernel, args, kwargs)
        for architecture in asked.architectures:
            if architecture < 89 and "*fp8e4nv" in program.signature.values():
                continue
            key = (program.hash(), architecture, str(options))
            if key not in done:
                made = triton.compile(program, target=GPUTarget("cuda", architecture, 32), options=options)
                done[key] = usage(made.asm["ptx"], architecture) | {"shared_bytes": made.metadata.shared}
                words = f"sm_{architecture} {done[key]['registers']} registers {done[key]['spilled_bytes']} spilled"
                words += f" {done[key]['shared_bytes']} shared"
                print(f"{name:40} {kernel.__name__:18} {options.get('num_warps', 4):2} warps {words}", flush=True)
                rows.append({"name": name, "kernel": kernel.__name__, "sm": architecture, **options, **done[key]})
    if asked.out:
        atomic_write_text(asked.out, json_text({"triton": triton.__version__, "rows": summary(rows)}))


if __name__ == "__main__":
    main()
