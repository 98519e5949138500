"""What a reused step costs on a real architecture: `python benchmarks/caching/overhead.py --out overhead.json`.

Random weights (speed does not depend on them), bfloat16, one GPU. Each technique runs whole requests on a fresh
model object; every denoiser call is timed between two CUDA events, and the statistics of the cache say which calls
were reused. `reused_host_ms` is what Python spends in such a call, which hides behind a GPU that is still busy.
Beside each stands what its reused step has to compute anyway, timed on the same model with the other
blocks taken out. Peers run in the same process, on their own fresh objects.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.cache.engine.work import example_call
from hasten.core.expression import load_recipe
from hasten.core.files import atomic_write_text
from hasten.core.session import accelerate
from hasten.core.target import Denoiser, Target, find_released
from hasten.core.workload import Workload
from hasten.measure.environment import environment

RECIPES = (
    "",
    "OutputForecast(interval=3)",
    "StepMask(mask='100100100100')",
    "FirstBlockCache(threshold=10.0)",
    "FirstBlockCache(threshold=10.0, late=True)",
    "DBCache(front=8, threshold=10.0, warm_up=1)",
    "DBCache(front=8, threshold=10.0, warm_up=1, late=True)",
    "TeaCache(threshold=0.6, coefficients='FLUX.1-dev')",
    "FORA(interval=3)",
    "TaylorSeer(interval=3, warm_up=1)",
)
"""The empty recipe is the plain model."""


class Pipeline:
    """What a technique needs of a pipeline: the denoiser, and a scheduler that is stepped."""

    def __init__(self, denoiser: nn.Module, slot: str) -> None:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        self.denoiser = denoiser
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler() if slot == "transformer" else DDIMScheduler()
        self.components = {slot: denoiser, "scheduler": self.scheduler}


def build(name: str, device: str) -> tuple[Pipeline, dict[str, Any]]:
    """A pipeline of the released architecture with random weights, and the arguments of a call."""
    spec, released = find_released(name)
    torch.set_default_dtype(torch.bfloat16)
    denoiser = spec.build(released.config, device=device)
    torch.set_default_dtype(torch.float32)
    pipeline = Pipeline(denoiser, "unet" if spec.unet else "transformer")
    target = Target.of(pipeline)
    target.title = name
    shapes = example_call(Denoiser("denoiser", denoiser, spec), target, Workload(prompts=("a",)))
    generator = torch.Generator(device).manual_seed(0)
    return pipeline, {key: drawn(value, device, generator) for key, value in shapes.items()}


def drawn(value: Any, device: str, generator: torch.Generator) -> Any:
    """Random numbers of the shape and type of a tensor on the meta device."""
    if isinstance(value, list):
        return [drawn(item, device, generator) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_floating_point():
        return torch.ones(value.shape, dtype=value.dtype, device=device)
    return torch.randn(value.shape, device=device, generator=generator).to(value.dtype)


@dataclass(frozen=True)
class Call:
    """Milliseconds of one denoiser call: on the GPU, between two events, and of Python until it returned."""

    gpu: float
    host: float


@torch.no_grad()
def request(pipeline: Pipeline, arguments: dict[str, Any], steps: int) -> list[Call]:
    """One request as a pipeline makes it: the timesteps lie on the GPU, and nothing waits for it."""
    spec = Target.of(pipeline).denoisers[0].spec
    pipeline.scheduler.set_timesteps(steps, device="cuda")
    spans: list[tuple[Any, Any, float]] = []
    picture = torch.zeros(1, 4, device="cuda")
    torch.cuda.synchronize()
    for timestep in pipeline.scheduler.timesteps:
        like = arguments[spec.timestep]
        given = arguments | {spec.timestep: (timestep / 1000).to(like.dtype).expand(like.shape)}
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        began = time.perf_counter()
        pipeline.denoiser(**given, return_dict=False)
        host = time.perf_counter() - began
        last.record()
        spans.append((first, last, 1000 * host))
        pipeline.scheduler.step(picture, timestep, picture)
    torch.cuda.synchronize()
    return [Call(first.elapsed_time(last), host) for first, last, host in spans]


def typical(calls: list[Call]) -> float | None:
    """Median milliseconds on the GPU."""
    return statistics.median(call.gpu for call in calls) if calls else None


def measured(pipeline: Pipeline, arguments: dict[str, Any], recipe: str, steps: int, compiled: bool) -> dict[str, Any]:
    """Median milliseconds of computed and of reused calls over two requests after a warm-up."""
    parts = [part for part in (recipe, "CompileBlocks()" if compiled else "") if part]
    row: dict[str, Any] = {"recipe": recipe or "plain", "compiled": compiled}
    if not parts:
        calls = [call for _ in range(2) for call in request(pipeline, arguments, steps)]
        return row | {"computed_ms": typical(calls[1:])}
    with accelerate(pipeline, load_recipe(" | ".join(parts))) as session:
        request(pipeline, arguments, steps)
        request(pipeline, arguments, steps)
        computed: list[Call] = []
        reused: list[Call] = []
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            calls = request(pipeline, arguments, steps)
            (full, *_) = [*step_maps(session), (True,) * steps]
            for flag, call in zip(full, calls, strict=True):
                (computed if flag else reused).append(call)
        row |= {"evidence": [e.summary for e in session.evidence().values()]}
    row |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return row | {
        "computed_ms": typical(computed),
        "reused_ms": typical(reused),
        "reused_host_ms": statistics.median(call.host for call in reused) if reused else None,
        "reused_calls": len(reused),
    }


def step_maps(session: Any) -> Iterator[tuple[bool, ...]]:
    for evidence in session.evidence().values():
        yield from evidence.step_map.values()


@contextmanager
def only(pipeline: Pipeline, blocks: int) -> Iterator[None]:
    """The denoiser with its first blocks alone."""
    denoiser = Target.of(pipeline).denoisers[0]
    saved: list[tuple[Any, str, Any]] = []
    left = blocks
    for stack in denoiser.spec.stacks:
        modules = denoiser.stack(stack)
        saved.append((denoiser.module, stack.path, modules))
        setattr(denoiser.module, stack.path, nn.ModuleList(list(modules)[:left]))
        left = max(0, left - len(modules))
    try:
        yield
    finally:
        for module, path, modules in saved:
            setattr(module, path, modules)


def unavoidable(pipeline: Pipeline, arguments: dict[str, Any], blocks: int, compiled: bool) -> float | None:
    """Milliseconds of a call with the first blocks alone."""
    with only(pipeline, blocks), ExitStack() as stack:
        if compiled and blocks:
            stack.enter_context(accelerate(pipeline, load_recipe("CompileBlocks()")))
        request(pipeline, arguments, 4)
        return typical(request(pipeline, arguments, 12))


def peer_cache_dit(name: str, steps: int) -> dict[str, Any]:
    """cache-dit's DBCache F1B0 with every step after the first allowed to be reused, on a fresh model."""
    import cache_dit

    pipeline, arguments = build(name, "cuda")
    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            pipe=None,
            transformer=pipeline.denoiser,
            blocks=[pipeline.denoiser.transformer_blocks, pipeline.denoiser.single_transformer_blocks],
            forward_pattern=[cache_dit.ForwardPattern.Pattern_1, cache_dit.ForwardPattern.Pattern_1],
        ),
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=1,
            residual_diff_threshold=1.0,
            num_inference_steps=steps,
        ),
    )
    request(pipeline, arguments, steps)
    calls = request(pipeline, arguments, steps)[4:]
    host = statistics.median(call.host for call in calls)
    return {"recipe": "cache-dit DBCache F1B0", "compiled": False, "reused_ms": typical(calls), "reused_host_ms": host}


def guarded(work: Callable[[], dict[str, Any]], label: str) -> dict[str, Any]:
    """A row, or why there is none."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - a row that failed says so, the others still run
        return {"recipe": label, "error": f"{type(error).__name__}: {str(error)[:300]}"}


class Rows:
    """Finished rows; each is printed and the file written anew at once, so that a time limit loses nothing."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        self.head = {"model": model, "environment": environment(torch.device("cuda"))}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        atomic_write_text(self.path, json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")


def measure_all(options: argparse.Namespace, compiled: bool, rows: Rows) -> None:
    """Every recipe, then the blocks alone, on one fresh model."""
    pipeline, arguments = build(options.model, "cuda")
    for recipe in options.recipes if not compiled else options.compiled_recipes:
        rows.add(guarded(lambda r=recipe: measured(pipeline, arguments, r, options.steps, compiled), recipe or "plain"))
    for blocks in (0, 1, 8):
        with suppress(Exception):
            spent = unavoidable(pipeline, arguments, blocks, compiled)
            rows.add({"recipe": f"first {blocks} blocks alone", "compiled": compiled, "computed_ms": spent})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="FLUX.1-dev")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--compiled-recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("overhead.json"))
    options = parser.parse_args()
    rows = Rows(options.out, options.model)
    measure_all(options, False, rows)
    gc.collect()
    torch.cuda.empty_cache()
    if options.peers:
        rows.add(guarded(lambda: peer_cache_dit(options.model, options.steps), "cache-dit DBCache F1B0"))
        gc.collect()
        torch.cuda.empty_cache()
    if not options.no_compile:
        measure_all(options, True, rows)


if __name__ == "__main__":
    main()
