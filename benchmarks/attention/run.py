"""Attention kernels, descriptions, FusedQKV and 8-bit attention, timed side by side on one device.

    python benchmarks/attention/run.py kernels --out kernels.json
    python benchmarks/attention/run.py biases --out biases.json
    python benchmarks/attention/run.py models --out models.json     # denoiser calls, eager
    python benchmarks/attention/run.py compiled --out compiled.json # the same with CompileBlocks

Real architectures with random weights: speed does not depend on them. `--tiny` runs everything small, to try it out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.attention import BlockDiagonal, LocalFromBottomRight, LowerTriangular, LowerTriangularFromBottomRight
from hasten.attention.bias import Bias
from hasten.attention.call import AttentionCall
from hasten.attention.kernels import KERNELS
from hasten.attention.rows import reference_error
from hasten.core.diagnosis import in_words
from hasten.core.files import atomic_write_text, json_text
from hasten.core.packages import installed
from hasten.core.spec import InputSize
from hasten.core.target import find_released
from hasten.measure.environment import environment

Row = dict[str, Any]
SHAPES = {
    "FLUX 1024x1024": (1, 24, 4608, 4608, 128),
    "Z-Image 1024x1024": (1, 30, 4128, 4128, 128),
    "SDXL self, outer": (2, 10, 4096, 4096, 64),
    "SDXL self, inner": (2, 20, 1024, 1024, 64),
    "SDXL cross, outer": (2, 10, 4096, 77, 64),
    "SD 1.5 self, outer": (2, 8, 4096, 4096, 40),
    "DiT-XL 256x256": (2, 16, 256, 256, 72),
    "Wan 480p, 33 frames": (1, 12, 14040, 14040, 128),
}
TINY = {"small self": (1, 2, 130, 130, 64), "small cross": (1, 2, 130, 77, 40)}
MOST_SCORES = 2**31
"""The math kernel and the float8 reference are left out where the scores would not fit."""


@dataclass
class Bench:
    """Where and how large."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool

    def milliseconds(self, run: Callable[[], object], least: int = 5, seconds: float = 0.3) -> list[float]:
        """Times of single calls after two for warming up."""
        for _ in range(2):
            run()
        times: list[float] = []
        while len(times) < least or (sum(times) < 1000 * seconds and len(times) < 50):
            times.append(self.once(run))
        return times

    def once(self, run: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return 1000 * (time.perf_counter() - began)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that a call needs beyond what is there already."""
        if self.device.type != "cuda":
            return 0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def tensors(self, batch: int, heads: int, queries: int, keys: int, size: int) -> list[torch.Tensor]:
        """Random query, key, value as views of token-major memory, as models make them."""
        torch.manual_seed(0)
        shapes = ((queries, heads), (keys, heads), (keys, heads))
        made = [torch.randn(batch, n, h, size, device=self.device, dtype=self.dtype) for n, h in shapes]
        return [part.transpose(1, 2) for part in made]


def measured(bench: Bench, name: str, given: list[torch.Tensor], bias: Bias | None, flops: float) -> Row:
    """One kernel on one call: time, rate, error and memory, or why not."""
    q, k, v = given
    call = AttentionCall.of(q, k, v, bias, 0.0)
    scores = call.batch * call.heads * call.queries * call.keys
    if problem := KERNELS[name].refuses(call):
        return {"kernel": name, "refused": problem}
    if name in ("math", "float8_reference") and scores > MOST_SCORES:
        return {"kernel": name, "refused": "left out: too many scores for a plain rendering"}
    try:
        error = reference_error(q, k, v, bias, None, KERNELS[name](q, k, v, bias))
        peak = bench.peak(lambda: KERNELS[name](q, k, v, bias))
        times = bench.milliseconds(lambda: KERNELS[name](q, k, v, bias))
    except Exception as problem:  # noqa: BLE001 - a kernel that fails is a row
        return {"kernel": name, "failed": in_words(problem)}
    middle = statistics.median(times)
    return {"kernel": name, "ms": middle, "ms_least": min(times), "tflops": flops / middle / 1e9,
            "error": error if error == error else "NaN", "peak_bytes": peak}  # fmt: skip


def kernels(bench: Bench) -> list[Row]:
    """Every kernel on the shapes of real models."""
    rows: list[Row] = []
    for shape, (batch, heads, queries, keys, size) in (TINY if bench.tiny else SHAPES).items():
        given = bench.tensors(batch, heads, queries, keys, size)
        flops = 4.0 * batch * heads * queries * keys * size
        for name in KERNELS:
            rows.append({"shape": shape, **measured(bench, name, given, None, flops)})
            show(rows[-1])
        del given
        release()
    return rows


def biases(bench: Bench) -> list[Row]:
    """Every kernel on every description; the memory shows whether a matrix was made."""
    tokens = 130 if bench.tiny else 4608
    parts = [tokens // 3, tokens // 4, tokens - tokens // 3 - tokens // 4]
    cases: dict[str, tuple[Bias | None, int, int]] = {
        "none": (None, tokens, tokens),
        "triangle": (LowerTriangular(), tokens, tokens),
        "triangle from bottom right": (LowerTriangularFromBottomRight(), tokens // 2 + 1, tokens),
        "window of 513": (LocalFromBottomRight(256, 256), tokens, tokens),
        "3 sequences": (BlockDiagonal(parts), tokens, tokens),
        "tensor": (torch.randn(tokens, tokens, device=bench.device, dtype=bench.dtype), tokens, tokens),
    }
    rows: list[Row] = []
    for case, (bias, queries, keys) in cases.items():
        given = bench.tensors(1, 24 if not bench.tiny else 2, queries, keys, 128)
        flops = 4.0 * given[0].shape[1] * queries * keys * 128  # of all scores, seen or not
        for name in KERNELS:
            rows.append({"bias": case, **measured(bench, name, given, bias, flops)})
            show(rows[-1])
    return rows


RECIPES = (
    "",
    "AttentionBackend(name='auto')",
    "AttentionBackend(name='flash')",
    "AttentionBackend(name='cudnn')",
    "AttentionBackend(name='flash3')",
    "FusedQKV()",
    "AttentionBackend(name='auto') | FusedQKV()",
    "EightBitAttention()",
    "EightBitAttention(kernel='flash3_float8') | FusedQKV()",
    "AttentionBackend(name='auto') | FusedBlocks()",
    "EightBitAttention(kernel='flash3_float8') | FusedBlocks()",
    "EightBitAttention(kernel='sage')",
)
COMPILED = ("", "AttentionBackend(name='auto')", "AttentionBackend(name='auto') | FusedQKV()",
            "EightBitAttention(kernel='flash3_float8') | FusedQKV()",
            "EightBitAttention(kernel='flash3_float8') | FusedBlocks()")  # fmt: skip
MODELS = ("FLUX.1-dev", "stable-diffusion-xl-base-1.0", "Z-Image-Turbo")


def models(bench: Bench, recipes: tuple[str, ...] = RECIPES, suffix: str = "") -> list[Row]:
    """One denoiser call under each recipe, against the plain one."""
    rows: list[Row] = []
    for name in MODELS:
        model, given = build(bench, name)
        with torch.no_grad():
            plain = model(**given, return_dict=False)[0]
            for recipe in recipes:
                text = " | ".join(filter(None, (recipe, suffix)))
                rows.append({"model": name, "recipe": text or "plain", **step(bench, model, given, text, plain)})
                show(rows[-1])
        del model, given, plain
        release()
    return rows


def step(bench: Bench, model: Any, given: dict[str, Any], text: str, plain: Any) -> Row:
    """Time, memory, distance and evidence of a recipe."""
    torch._dynamo.reset()
    try:
        session = hasten.accelerate(model, text) if text else None
    except hasten.HastenError as error:
        return {"refused": str(error)}
    try:
        began = time.perf_counter()
        found = model(**given, return_dict=False)[0]
        bench.wait()
        first = time.perf_counter() - began
        peak = bench.peak(lambda: model(**given, return_dict=False))
        times = bench.milliseconds(lambda: model(**given, return_dict=False), least=6, seconds=1.0)
        evidence = {type(t).__name__: e.summary for t, e in session.evidence().items()} if session else {}
        return {"ms": statistics.median(times), "ms_least": min(times), "ms_most": max(times), "first_call_s": first,
                "peak_bytes": peak, "distance": distance(found, plain), "evidence": evidence}  # fmt: skip
    except Exception as error:  # noqa: BLE001 - a recipe that fails is a row
        return {"failed": in_words(error, 1000)}
    finally:
        if session:
            session.close()


def distance(found: Any, plain: Any) -> float:
    """Of the outputs, relative to the plain one's norm."""
    one, other = (torch.stack(list(x)) if isinstance(x, list) else x for x in (found, plain))
    return float((one.float() - other.float()).norm() / other.float().norm())


def build(bench: Bench, name: str) -> tuple[Any, dict[str, Any]]:
    """The architecture with random weights, and arguments for one call at its usual size."""
    spec, released = find_released(name)
    config = spec.tiny if bench.tiny else released.config
    batch = 2 if spec.guidance == "batched" else 1
    size = InputSize(batch=batch, height=released.height // 8, width=released.width // 8,
                     text_tokens=released.text_tokens)  # fmt: skip
    torch.set_default_dtype(bench.dtype)
    try:
        model = spec.build(config, device=bench.device)
    finally:
        torch.set_default_dtype(torch.float32)
    given = spec.example(config, InputSize(batch=batch) if bench.tiny else size)
    return model.to(bench.dtype), {key: moved(value, bench) for key, value in given.items()}


def moved(value: Any, bench: Bench) -> Any:
    """Arguments on the device and, except timesteps and positions, in its type."""
    if isinstance(value, torch.Tensor):
        return value.to(bench.device, bench.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: moved(item, bench) for key, item in value.items()}
    return [moved(item, bench) for item in value] if isinstance(value, list) else value


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(row: Row) -> None:
    words = [str(row.get(key)) for key in ("shape", "bias", "model", "recipe", "kernel") if key in row]
    if "ms" in row:
        words.append(f"{row['ms']:.3f} ms")
    words += [f"{row[key]:.2g}" for key in ("error", "distance") if isinstance(row.get(key), float)]
    words += [row[key] for key in ("refused", "failed") if key in row]
    print("  ".join(words), flush=True)


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "kernels": kernels,
    "biases": biases,
    "models": models,
    "compiled": lambda bench: models(bench, COMPILED, "CompileBlocks()"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    bench = Bench(device, torch.bfloat16 if device.type == "cuda" else torch.float32, asked.tiny)
    rows = PARTS[asked.part](bench)
    packages = {name: installed(name) for name in ("triton", "fa3-fwd", "flash-attn", "sageattention", "xformers")}
    facts = {**environment(device), **{name: version for name, version in packages.items() if version}}
    atomic_write_text(asked.out, json_text({"environment": facts, "part": asked.part, "rows": rows}))


if __name__ == "__main__":
    main()
