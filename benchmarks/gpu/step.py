"""The denoising step of one GPU, plain, compiled, with the peers' best settings and with ours, in one process.

    python -m benchmarks.gpu.step flux --out benchmarks/gpu/results/flux.json
    python -m benchmarks.gpu.step flux --rows "torchao PerRow" "ours, 8 bits" --size 2048 --out flux_2048.json
    python -m benchmarks.gpu.step flux --full 10 --steps 28 --out benchmarks/gpu/results/flux_images.json
    python -m benchmarks.gpu.step z-image --out benchmarks/gpu/results/z_image.json
    python -m benchmarks.gpu.step flux --tiny --device cpu --out /dev/null      # tries the script itself

Real architectures with random weights (speed does not depend on them) in diffusers' own pipelines, from given prompt
embeddings to latents. Each row has a model of its own, made from the same seed, and runs three images; calls of the
denoiser are timed by CUDA events in the second and the third, back to back as they come (sustained; random data). With
each row: set-up until the first image, memory, the distance of the latents from the plain model's, kernels by kind from
the profiler, and what nvidia-smi says of clocks and power meanwhile. Rows that cannot run say why. With `--full`,
compiled rows compute so many steps of an image in full, cache-dit's and ours the same ones, and reuse in the others.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.kinds import by_kind

import hasten
from hasten.core.diagnosis import in_words
from hasten.core.files import atomic_write_text, json_text
from hasten.core.intercept import intercept
from hasten.core.packages import installed
from hasten.core.target import find_released
from hasten.measure.environment import environment

Row = dict[str, Any]
MODELS = {"flux": "FLUX.1-dev", "z-image": "Z-Image-Turbo"}


@dataclass
class Bench:
    """What is run, where and how large."""

    model: str
    device: torch.device
    dtype: torch.dtype
    tiny: bool
    size: int
    batch: int
    steps: int
    full: int = 0
    """Steps of an image that are computed in full; 0 for all."""

    def prepare(self, name: str, pipeline: Any) -> hasten.Session | None:
        """Do to a pipeline what a row's name says."""
        steps = mask(self.steps, self.full) if self.full else ""
        if name in OURS:
            return hasten.accelerate(pipeline, OURS[name] + (f" | StepMask(mask='{steps}')" if steps else ""))
        if steps and name != "plain":
            with_cache_dit(pipeline, steps)
        PEERS[name](pipeline)
        return None

    def transformer(self) -> Any:
        """The denoiser with random weights, the same each time."""
        spec, released = find_released(MODELS[self.model])
        config = spec.tiny if self.tiny else released.config
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        try:
            model = spec.build(config, device=self.device)
        finally:
            torch.set_default_dtype(torch.float32)
        return model.requires_grad_(False)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        """A pipeline around it, and the arguments of a call."""
        model = self.transformer()
        pipeline, given = (flux if self.model == "flux" else z_image)(self, model)
        pipeline.set_progress_bar_config(disable=True)
        shape = {"height": self.size, "width": self.size, "num_inference_steps": self.steps}
        return pipeline, {**given, **shape, "output_type": "latent", "return_dict": False}

    def randn(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in time on the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def flux(bench: Bench, model: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=model, **nothing)
    tokens = 16 if bench.tiny else 512
    config = model.config
    return pipeline, {
        "prompt_embeds": bench.randn(bench.batch, tokens, config.joint_attention_dim),
        "pooled_prompt_embeds": bench.randn(bench.batch, config.pooled_projection_dim),
    }


def z_image(bench: Bench, model: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipeline = ZImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=model, **nothing)
    embeds = [bench.randn(32, model.config.cap_feat_dim) for _ in range(bench.batch)]
    return pipeline, {"prompt_embeds": embeds, "guidance_scale": 0.0}


def regional(pipeline: Any, **options: Any) -> None:
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, **options)


def torchao(pipeline: Any, *, fused: bool) -> None:
    """The peers' best: 8-bit floats by row. Its own inductor settings take minutes and gain nothing."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    if fused and hasattr(pipeline.transformer, "fuse_qkv_projections"):
        pipeline.transformer.fuse_qkv_projections()
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)

    def in_blocks(module: Any, path: str) -> bool:
        wide = isinstance(module, torch.nn.Linear) and min(module.weight.shape) % 16 == 0
        return wide and any(part.isdigit() for part in path.split("."))

    quantize_(pipeline.transformer, config, filter_fn=in_blocks)
    regional(pipeline)


PEERS: dict[str, Callable[[Any], None]] = {
    "plain": lambda pipeline: None,
    "diffusers compile_repeated_blocks": regional,
    "torchao PerRow, fused QKV, compiled": lambda pipeline: torchao(pipeline, fused=True),
}
"""Peers by name: what is done to a pipeline."""
OURS = {
    "ours, 16 bits, compiled": "CompileBlocks()",
    "ours, 16 bits, fused": "FusedBlocks() | FusedQKV()",
    "ours, 16 bits, fused, compiled": "FusedBlocks() | FusedQKV() | CompileBlocks()",
    "ours, 16 bits, fused, compiled, table": "FusedBlocks() | FusedQKV() | ModulationTable() | CompileBlocks()",
    "ours, 16 bits, fused, graphs, table": (
        "FusedBlocks() | FusedQKV() | ModulationTable() | CompileBlocks() | CudaGraphs()"
    ),
    "ours, 8 bits, compiled": "Float8Linear() | FusedQKV() | CompileBlocks()",
    "ours, 8 bits, fused, compiled": "Float8Linear() | FusedBlocks() | FusedQKV() | CompileBlocks()",
    "ours, 8 bits, fused, compiled, table": (
        "Float8Linear() | FusedBlocks() | FusedQKV() | ModulationTable() | CompileBlocks()"
    ),
    "ours, 8 bits, fused, graphs, table": (
        "Float8Linear() | FusedBlocks() | FusedQKV() | ModulationTable() | CompileBlocks() | CudaGraphs()"
    ),
    "ours, 8 bits and attention, fused, compiled, table": (
        "Float8Linear() | FusedBlocks() | FusedQKV() | ModulationTable() | EightBitAttention() | CompileBlocks()"
    ),
    "ours, 8 bits and attention, fused, graphs, table": (
        "Float8Linear() | FusedBlocks() | FusedQKV() | ModulationTable() | EightBitAttention() | CompileBlocks() | "
        "CudaGraphs()"
    ),
    "ours, integers, fused, compiled": "Int8Linear() | FusedBlocks() | FusedQKV() | CompileBlocks()",
}
"""Recipes by name."""


def mask(steps: int, full: int) -> str:
    """Which steps are computed: a third of them at the beginning, the others evenly to the last."""
    warm = max(1, full // 3)
    later = {warm - 1 + round((place + 1) * (steps - warm) / (full - warm)) for place in range(full - warm)}
    return "".join("1" if step < warm or step in later else "0" for step in range(steps))


def without_cache_dit(pipeline: Any) -> None:
    """Or it would hold the model in memory while the next row runs."""
    if getattr(pipeline, "_is_cached", False):
        import cache_dit

        cache_dit.disable_cache(pipeline)


def with_cache_dit(pipeline: Any, steps: str) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        num_inference_steps=len(steps), Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0,
        steps_computation_mask=[int(step) for step in steps], steps_computation_policy="static",
    )  # fmt: skip
    cache_dit.enable_cache(pipeline, cache_config=config)


def measured(bench: Bench, name: str, plain: torch.Tensor | None) -> tuple[Row, torch.Tensor | None]:
    """One row, and the latents it made."""
    release()
    torch._dynamo.reset()
    pipeline, given = bench.pipeline()
    session, remover, began = None, lambda: None, time.perf_counter()
    try:
        session = bench.prepare(name, pipeline)
        times: list[tuple[Any, Any]] = []
        remover = intercept(pipeline.transformer, "__call__", timing(bench, times), outermost=True)
        image = run(bench, pipeline, given)
        first = time.perf_counter() - began
        row: Row = {"row": name, "recipe": OURS.get(name, ""), "first_image_s": first}
        row |= timed(bench, pipeline, given, times)
        row |= {"distance": distance(image, plain), **kernels(bench, pipeline, given)}
        row["evidence"] = {type(t).__name__: e.summary for t, e in session.evidence().items()} if session else {}
        return row, image
    except Exception as error:  # noqa: BLE001 - a row that fails is a result
        return {"row": name, "recipe": OURS.get(name, ""), "failed": in_words(error, 600)}, None
    finally:
        remover()
        if session is not None:
            session.close()
        elif bench.full and name in PEERS:
            without_cache_dit(pipeline)


def timing(bench: Bench, times: list[tuple[Any, Any]]) -> Callable[..., Any]:
    def link(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = bench.mark()
        found = call(*args, **kwargs)
        times.append((start, bench.mark()))
        return found

    return link


def run(bench: Bench, pipeline: Any, given: dict[str, Any]) -> torch.Tensor:
    """One image, the same each time, to latents."""
    latents = pipeline(**given, generator=torch.Generator(bench.device).manual_seed(0))[0]
    bench.wait()
    return torch.as_tensor(latents)


def timed(bench: Bench, pipeline: Any, given: dict[str, Any], times: list[tuple[Any, Any]]) -> Row:
    """Two more images: denoiser calls, images, memory, clocks."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times.clear()
    watch, began = Clocks(), time.perf_counter()
    for _ in range(2):
        run(bench, pipeline, given)
    seconds = (time.perf_counter() - began) / 2
    found = [1000 * (b - a) if isinstance(a, float) else a.elapsed_time(b) for a, b in times]
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None
    return {"ms": statistics.median(found), "ms_least": min(found), "ms_most": max(found), "calls_ms": found,
            "image_s": seconds, "peak_gib": peak, "clocks": watch.stop()}  # fmt: skip


class Clocks:
    """nvidia-smi, four times a second, while something runs."""

    QUERY = "clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.sw_power_cap"

    def __init__(self) -> None:
        command = ["nvidia-smi", f"--query-gpu={self.QUERY}", "--format=csv,noheader,nounits", "-lms", "250"]
        have = shutil.which("nvidia-smi") is not None
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if have else None

    def stop(self) -> Row:
        """Medians, and the share of samples in which power was the limit."""
        if self._process is None:
            return {}
        self._process.terminate()
        lines = [line.split(", ") for line in self._process.communicate()[0].splitlines()]
        lines = [line for line in lines if len(line) == len(self.QUERY.split(","))]
        if not lines:
            return {}
        clocks, power, heat = (statistics.median(float(line[i]) for line in lines) for i in range(3))
        capped = sum(line[3] == "Active" for line in lines) / len(lines)
        return {"sm_mhz": clocks, "watts": power, "celsius": heat, "power_capped": capped}


def kernels(bench: Bench, pipeline: Any, given: dict[str, Any]) -> Row:
    """Milliseconds of kernels a denoiser call, by kind and by name."""
    if bench.device.type != "cuda":
        return {}
    few = {**given, "num_inference_steps": 2}
    run(bench, pipeline, few)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(bench, pipeline, few)
    found = {event.key: event.self_device_time_total / 2000 for event in profile.key_averages()}
    names = {name[:100]: round(ms, 3) for name, ms in sorted(found.items(), key=lambda item: -item[1])[:16]}
    return {"kinds_ms": by_kind(found), "kernels_ms": names}


def distance(found: torch.Tensor, plain: torch.Tensor | None) -> float | None:
    """Of the latents from those of the plain model, relative to their norm."""
    return None if plain is None else float((found.float() - plain.float()).norm() / plain.float().norm())


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(row: Row) -> None:
    if "failed" in row:
        print(f"{row['row']:52} failed: {row['failed'][:160]}", flush=True)
        return
    kinds = "  ".join(f"{kind} {ms:.1f}" for kind, ms in row.get("kinds_ms", {}).items())
    memory = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] else ""
    apart = f"{row['distance']:.2g}" if row["distance"] is not None else ""
    print(
        f"{row['row']:52} {row['ms']:8.2f} ms {memory} first {row['first_image_s']:.1f} s {apart} {kinds}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", help="parts of names; without it all rows")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--full", type=int, default=0, help="steps of an image that are computed in full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size, steps = (128, max(2, 2 * asked.full)) if asked.tiny else (asked.size, asked.steps)
    bench = Bench(asked.model, device, dtype, asked.tiny, size, asked.batch, steps, asked.full)
    names = [n for n in (*PEERS, *OURS) if not asked.rows or n == "plain" or any(part in n for part in asked.rows)]
    rows, plain = list[Row](), None
    what = {name: getattr(bench, name) for name in ("model", "size", "batch", "steps", "full", "tiny")}
    packages = {name: installed(name) for name in ("triton", "torchao", "cache-dit", "fa3-fwd")}
    facts = {**environment(device), **{name: version for name, version in packages.items() if version}}
    for name in names:
        row, image = measured(bench, name, plain)
        plain = image if name == "plain" else plain
        show(row)
        rows.append(row)
        if str(asked.out) != "/dev/null":
            atomic_write_text(asked.out, json_text({"environment": facts, **what, "rows": rows}))


if __name__ == "__main__":
    main()
