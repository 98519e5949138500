"""How much of what 4 bits lose does training win back, in a few minutes?

    python benchmarks/quantization/recover.py [MODEL...] [--methods lora qat]                # minutes of a CPU
    python benchmarks/quantization/recover.py --device cuda --batch 32 --minutes 0.75    # one of a GPU

For each model: fidelity to the plain model (28 steps, same prompts and seeds) of 8-bit, of plain 4-bit and of trained
4-bit weights, on prompts and seeds that training has not seen. Lost is the mean squared error of the pictures of 4 bits
(values 0 to 1, mean over all pictures), recovered is 1 - trained / untrained: half is 3 dB. Processor seconds count the
whole of fine-tuning: the plain model's pictures, the effect of each call, and training. Raw numbers go to
results/recover-MODEL.json (recover-MODEL-cuda.json), in which rows with other names stay.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hasten
from hasten.core.files import atomic_write_text, json_text
from hasten.core.recipe import Recipe
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.measure.environment import environment
from hasten.models import bundled
from hasten.quantize import WeightOnly
from hasten.search.finetune import FineTuned, Training, finetune
from hasten.search.finetune.recover import RATES, Method
from hasten.search.finetune.trajectories import several

HERE = Path(__file__).parent
PROMPTS = HERE.parent / "caching" / "prompts.json"
HELD_OUT, AT_ONCE = 32, 8
STYLES = ("noto", "blob", "twemoji", "emojione", "fluent", "flat")
FOUR, EIGHT = "WeightOnly(bits=4, group=64)", "Int8Linear()"


def pictures(pipeline: Any, recipe: Recipe | str, workload: Workload, held_out: list[Any]) -> np.ndarray:
    """The held-out pictures with a recipe, [pictures, height, width, 3] in 0 to 1."""
    drawn: list[np.ndarray] = []
    with hasten.accelerate(pipeline, recipe), torch.no_grad():
        for start in range(0, len(held_out), AT_ONCE):
            drawn.extend(pipeline(**several(pipeline, workload, held_out[start : start + AT_ONCE])).images)
    return np.stack(drawn).astype(np.float64)


def row(name: str, found: np.ndarray, plain: np.ndarray) -> dict[str, Any]:
    """PSNR of each picture, their mean, and the mean squared error over all, in units of the full range."""
    errors = ((found - plain) ** 2).mean((1, 2, 3))
    decibels = -10 * np.log10(np.maximum(errors, 1e-10))
    mse = float(errors.mean())
    made = {"row": name, "psnr": round(float(decibels.mean()), 2), "mse": mse}
    print(f"{name:28} {made['psnr']:6.2f} dB   mse {mse:.2e}", flush=True)
    return {**made, "psnr_each": [round(float(one), 2) for one in decibels]}


def recover(model: str, methods: list[Method], training: Training, device: str, folder: Path, file: Path) -> None:
    """Measure the rows of one model, and write them to `file` after each method."""
    loaded = hasten.load(model, device=device, dtype="float32")
    pipeline, known = loaded.pipeline, json.loads(PROMPTS.read_text("utf-8"))["models"][model]["evaluation"]
    held_out = known[:HELD_OUT]
    taught = to_learn_from(model, {prompt.partition(",")[0] for prompt, _ in held_out})
    print(f"{model}: {len(taught)} prompts to train with, {len(held_out)} held out", flush=True)
    plain = pictures(pipeline, Recipe(), loaded.workload, held_out)
    rows = [row(name, pictures(pipeline, name, loaded.workload, held_out), plain) for name in (EIGHT, FOUR)]
    work, facts = loaded.workload.replace(prompts=tuple(taught)), environment(torch.device(device))
    for method in methods:
        wall, spent = time.perf_counter(), time.process_time()
        made = finetune(
            pipeline, FOUR, folder / f"{model}-{method}.safetensors", method=method, workload=work, training=training
        )
        cost = {"wall_seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - spent}
        name = f"4 bits, {method}" + (f" of rank {training.rank}" if method == "lora" else "")
        with tuned(pipeline, made):
            found = row(name, pictures(pipeline, made.recipe, loaded.workload, held_out), plain)
        rows.append(
            found
            | shares(rows[0], rows[1], found)
            | learnt(pipeline, made, cost)
            | {"training": vars(training) | {"rate": training.rate or RATES[method]}}
        )
        print({key: value for key, value in rows[-1].items() if key != "psnr_each"}, flush=True)
        told = {"model": model, "quantized": FOUR, "held_out": held_out, "environment": facts}
        atomic_write_text(file, json_text({**told, "rows": [*rows, *others(file, rows)]}))


def others(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of earlier runs, with other settings, that stay in a file."""
    known, names = json.loads(file.read_text("utf-8"))["rows"] if file.is_file() else [], {one["row"] for one in rows}
    return [one for one in known if one["row"] not in names]


@contextmanager
def tuned(pipeline: Any, made: FineTuned) -> Generator[None]:
    """While it is open, tuned weights are in the pipeline; adapters are in the recipe already."""
    parameters = dict(Target.of(pipeline).denoisers[0].module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    if made.method == "qat":
        made.install(pipeline)
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(before[name])


def learnt(pipeline: Any, made: FineTuned, cost: dict[str, float]) -> dict[str, Any]:
    """What training took, what it did to its own loss, and the bits that 16-bit adapters add to each weight."""
    weights = sum(site.weight.numel() for site in WeightOnly().takes(Target.of(pipeline)))
    assert made.effects is not None
    return {name: round(value, 1) for name, value in cost.items()} | {
        "training_seconds": round(made.seconds, 1),
        "steps": len(made.losses),
        "trained": made.trained,
        "added_bits": round(16 * made.trained / weights, 2) if made.method == "lora" else 0.0,
        "bytes": made.file.stat().st_size,
        "loss_before": round(made.loss_before, 4),
        "loss_after": round(made.loss_after, 4),
        "damage_by_call": [round(one, 6) for one in made.effects.damages],
    }


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["emoji-dit", "emoji-flux"])
    parser.add_argument("--methods", nargs="+", default=["lora", "qat"])
    for name in ("steps", "pictures", "visits", "batch", "calls", "rank"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Training, name))
    for name in ("rate", "minutes"):
        parser.add_argument(f"--{name}", type=float, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where trained files go")
    parser.add_argument("--json", type=Path, default=HERE / "results", help="where raw numbers go")
    given = parser.parse_args()
    named = ("steps", "pictures", "visits", "batch", "calls", "rank", "rate", "minutes")
    how = Training(**{name: getattr(given, name) for name in named})
    for one in given.models:
        kind = "" if given.device == "cpu" else f"-{given.device}"
        recover(one, given.methods, how, given.device, given.folder, given.json / f"recover-{one}{kind}.json")
