"""Predicted against measured: weights, peak memory and step time of FLUX, SDXL and Z-Image, eager and compiled.

    python benchmarks/plan/check.py --out benchmarks/plan/results/h200.json

Real architectures with random weights (speed and memory do not depend on them), at 1024 x 1024 in bfloat16. Bounds:
weights exact, peak memory within 10 %, step time within 20 %.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.core.files import atomic_write_text, json_text
from hasten.core.recipe import Recipe
from hasten.core.registry import techniques
from hasten.core.target import Target
from hasten.measure.environment import environment
from hasten.search.predict import Profile, predict, profile
from hasten.search.prediction.calls import Call, calls
from hasten.search.prediction.devices import Device
from hasten.search.prediction.here import device_here, measure_device
from hasten.search.prediction.model import planned_model
from hasten.search.prediction.networks import weight_bytes

MODELS = ("FLUX.1-dev", "stable-diffusion-xl-base-1.0", "Z-Image-Turbo")
BOUNDS = {"weights": 0.0, "memory": 0.10, "step": 0.20}
GPU = "cuda"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--here", action="store_true", help="measure the device instead of looking it up")
    parser.add_argument("--whole", action="store_true", help="also compile SDXL's U-Net whole (minutes)")
    given = parser.parse_args()
    device = measure_device(torch.device(GPU)) if given.here else device_here(torch.device(GPU))
    if device is None:
        raise SystemExit(f"{torch.cuda.get_device_name()} is not in the table of devices; add --here.")
    rows: list[dict[str, Any]] = []
    for name in given.models:
        began = time.perf_counter()
        rows += check(name, device, whole=given.whole and name.startswith("stable"))
        print(f"{name}: {time.perf_counter() - began:.0f} s")
        report = {"environment": environment(torch.device(GPU)), "device": device.name, "basis": device.basis}
        atomic_write_text(given.out, json_text(report | {"rows": rows}))
    for row in rows:
        print("{model:30} {what:34} {predicted:>14} {measured:>14} {off:+7.1%} {verdict}".format(**row))
    raise SystemExit(any(row["verdict"] == "MISSED" for row in rows))


def check(name: str, device: Device, *, whole: bool) -> list[dict[str, Any]]:
    """All rows of one model; its parts are on the GPU together, as in a plain pipeline."""
    planned = profile(planned_model(name))
    torch.manual_seed(0)
    live = planned_model(name, device=GPU)
    rows = [
        row(name, f"weights of {part}", planned.parts[part].weights, weight_bytes(module), "weights")
        for part, module in live.target.modules.items()
    ]
    plain = predict(planned, device)
    work = {call.part: call for call in calls(live, live.workload)}
    with torch.no_grad():
        for part, call in work.items():
            peak, seconds = measured(call)
            rows.append(row(name, f"peak while {part} runs", plain.peaks[part], peak, "memory"))
            kind = "step" if part == planned.denoiser else "other"
            rows.append(row(name, f"{part} (ms)", each(planned, plain.phases[part], part), 1e3 * seconds, kind))
        for recipe, wanted in (("CompileBlocks()", True), ("CompileWhole()", whole)):
            if wanted and recipe.partition("(")[0] in techniques():
                rows += compiled(name, recipe, planned, device, live.target, work[planned.denoiser])
    del live, work
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
    return rows


def compiled(
    name: str, text: str, planned: Profile, device: Device, target: Target, call: Call
) -> list[dict[str, Any]]:
    """Step time and peak of one compiled recipe, with the seconds that the first call took."""
    recipe: Recipe = hasten.load_recipe(text)
    expected = predict(planned, device, recipe)
    # The denoiser alone is handed over: the stand-in for a pipeline cannot be called.
    with hasten.accelerate(target.denoisers[0].module, recipe) as session:
        began = time.perf_counter()
        call.run()
        torch.cuda.synchronize()
        print(f"{name}: {text} took {time.perf_counter() - began:.0f} s to set up")
        peak, seconds = measured(call)
        print(session.describe())
    step = each(planned, expected.phases[planned.denoiser], planned.denoiser)
    return [
        row(name, f"{text} peak", expected.peaks[planned.denoiser], peak, "memory"),
        row(name, f"{text} step (ms)", step, 1e3 * seconds, "step"),
    ]


def each(planned: Profile, seconds: float, part: str) -> float:
    """Milliseconds of one call, from the seconds of all calls for a picture."""
    steps = planned.workload.steps if part == planned.denoiser else 1
    return 1e3 * seconds / steps / planned.parts[part].times


def measured(call: Call, runs: int = 8) -> tuple[int, float]:
    """Peak bytes allocated and median seconds of a call, warm-up apart."""
    for _ in range(3):
        call.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found = [timed(call.run) for _ in range(runs)]
    return torch.cuda.max_memory_allocated(), statistics.median(found)


def timed(work: Callable[[], object]) -> float:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


def row(model: str, what: str, predicted: float, found: float, kind: str) -> dict[str, Any]:
    off = predicted / found - 1
    bound = BOUNDS.get(kind)
    verdict = "" if bound is None else "ok" if abs(off) <= bound else "MISSED"
    return {
        "model": model, "what": what, "predicted": round(predicted, 2), "measured": round(found, 2), "off": off,
        "bound": bound, "verdict": verdict,
    }  # fmt: skip


if __name__ == "__main__":
    main()
