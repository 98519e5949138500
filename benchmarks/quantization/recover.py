"""How much of what 4 bits lose does training win back, in a few minutes?

    python benchmarks/quantization/recover.py [MODEL...] [--methods lora qat] [--steps 600]

For each model: fidelity to the plain model (28 steps, same prompts and seeds) of 8-bit, of plain 4-bit and of trained
4-bit weights, on prompts and seeds that training has not seen. "Lost" is the mean squared error of the pictures, and
in decibels what lies between the 8-bit and the 4-bit row. Raw numbers go to results/recover-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hasten
from hasten.core.files import atomic_write_text, json_text
from hasten.core.recipe import Recipe
from hasten.core.workload import Workload
from hasten.measure.environment import environment
from hasten.measure.rendering import render
from hasten.models import bundled
from hasten.search.finetune import finetune
from hasten.search.finetune.recover import Method, Training

HERE = Path(__file__).parent
PROMPTS = HERE.parent / "caching" / "prompts.json"
HELD_OUT = 8
STYLES = ("noto", "blob", "twemoji", "emojione", "fluent", "flat")
FOUR, EIGHT = "WeightOnly(bits=4, group=64)", "Int8Linear()"


def pictures(pipeline: Any, recipe: Recipe | str, workload: Workload, held_out: list[Any]) -> list[np.ndarray]:
    """The held-out pictures with a recipe, [height, width, 3] in 0 to 255."""
    with hasten.accelerate(pipeline, recipe):
        drawn = [render(pipeline, workload, prompt, seed) for prompt, seed in held_out]
    return [np.asarray(picture, dtype=np.float64) for picture in drawn]


def row(name: str, found: list[np.ndarray], plain: list[np.ndarray]) -> dict[str, Any]:
    """PSNR of each picture, their mean, and the mean squared error over all, in units of the full range."""
    errors = [float(((a - b) ** 2).mean()) / 255**2 for a, b in zip(found, plain, strict=True)]
    decibels = [-10 * float(np.log10(max(error, 1e-10))) for error in errors]
    made = {"row": name, "psnr": round(float(np.mean(decibels)), 2), "mse": float(np.mean(errors))}
    print(f"{name:28} {made['psnr']:6.2f} dB   mse {made['mse']:.2e}", flush=True)
    return {**made, "psnr_each": [round(one, 2) for one in decibels]}


def recover(model: str, methods: list[Method], training: Training, folder: Path) -> dict[str, Any]:
    """All rows of one model."""
    loaded = hasten.load(model)
    pipeline, known = loaded.pipeline, json.loads(PROMPTS.read_text("utf-8"))["models"][model]["evaluation"]
    held_out = known[:HELD_OUT]
    taught = to_learn_from(model, {prompt.partition(",")[0] for prompt, _ in held_out})
    print(f"{model}: {len(taught)} prompts to train with, {len(held_out)} held out", flush=True)
    plain = pictures(pipeline, Recipe(), loaded.workload, held_out)
    rows = [row(name, pictures(pipeline, name, loaded.workload, held_out), plain) for name in (EIGHT, FOUR)]
    work = loaded.workload.replace(prompts=tuple(taught))
    for method in methods:
        began = time.process_time()
        made = finetune(
            pipeline, FOUR, folder / f"{model}-{method}.safetensors", method=method, workload=work, training=training
        )
        spent = time.process_time() - began
        before = {name: p.detach().clone() for name, p in denoiser(pipeline).named_parameters()}
        if method == "qat":
            made.install(pipeline)
        found = row(f"4 bits, {method}", pictures(pipeline, made.recipe, loaded.workload, held_out), plain)
        for name, parameter in denoiser(pipeline).named_parameters():
            parameter.data.copy_(before[name])
        rows.append(found | {"steps": len(made.losses), "cpu_seconds": round(spent, 1), "trained": made.trained,
                             "training_seconds": round(made.seconds, 1), "bytes": made.file.stat().st_size,
                             "loss_before": made.loss_before, "loss_after": made.loss_after,
                             **shares(rows[0], rows[1], found)})  # fmt: skip
        print({k: v for k, v in rows[-1].items() if k not in ("psnr_each",)}, flush=True)
    facts = environment(torch.device("cpu"))
    return {"model": model, "quantized": FOUR, "held_out": held_out, "training": vars(training), "environment": facts,
            "rows": rows}  # fmt: skip


def to_learn_from(model: str, held_out: set[str]) -> list[str]:
    """Prompts with names that are not held out, in an order that is the same on every run; styles take turns."""
    labels = json.loads((bundled()["emoji-dit"] / "model_index.json").read_text("utf-8"))["id2label"]
    names = sorted(set(labels.values()) - held_out)
    random.Random(1).shuffle(names)
    return (
        names if model == "emoji-dit" else [f"{name}, {STYLES[n % len(STYLES)]} style" for n, name in enumerate(names)]
    )


def shares(eight: dict[str, Any], four: dict[str, Any], tuned: dict[str, Any]) -> dict[str, float]:
    """What share of the loss came back: of the squared error, and of the decibels between 8 and 4 bits."""
    return {
        "recovered_mse": round(1 - tuned["mse"] / four["mse"], 3),
        "recovered_db": round((tuned["psnr"] - four["psnr"]) / (eight["psnr"] - four["psnr"]), 3),
    }


def denoiser(pipeline: Any) -> torch.nn.Module:
    """The pipeline's denoiser."""
    found = getattr(pipeline, "transformer", None)
    return pipeline.unet if found is None else found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["emoji-flux", "emoji-dit"])
    parser.add_argument("--methods", nargs="+", default=["lora", "qat"])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--folder", type=Path, default=HERE / "results", help="where trained files go")
    parser.add_argument("--json", type=Path, default=HERE / "results", help="where raw numbers go")
    given = parser.parse_args()
    how = Training(steps=given.steps, pictures=given.pictures, rank=given.rank, rate=given.rate)
    for one in given.models:
        found = recover(one, given.methods, how, given.folder)
        atomic_write_text(given.json / f"recover-{one}.json", json_text(found))
