"""What each way to quantize does to the pictures of the bundled models, at which size.

    python benchmarks/quantization/fidelity.py --out benchmarks/quantization/results/fidelity.json
    python benchmarks/quantization/fidelity.py --models emoji-flux --recipes "GPTQ()" "SVDQuant(rank=8)" --pictures 8

Same prompts, seeds and 28 steps with and without a recipe; statistics are gathered from other prompts and seeds. Sizes
count everything that stands in place of the weights that were quantized: codes, scales, zero points, factors and side
branches. The file is written after each row, and rows that it holds already are left out.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import hasten
from hasten.cli.common import quiet
from hasten.core.errors import HastenError
from hasten.core.expression import load_recipe
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.recipe import Recipe
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Stage
from hasten.core.weights import weights_hash
from hasten.measure.environment import environment
from hasten.measure.quality import Fidelity, fidelities
from hasten.measure.rendering import render
from hasten.quantize.engine.gains_file import usual_gains
from hasten.quantize.engine.linear_quantizer import Replaced
from hasten.quantize.engine.statistics_file import usual_file
from hasten.search.quantization.collect import collect
from hasten.search.quantization.sensitivity import measure_gains

HERE = Path(__file__).parent
PROMPTS = HERE.parent / "caching" / "prompts.json"
NOTES = """# Fidelity of quantized bundled models

Made by `fidelity.py` from `fidelity.json`. 28 steps, same prompts and seeds against the plain model in float32, 8
pictures; ± is the standard error of the mean. All recipes make the same pictures, yet the standard error of the
difference of two recipes is still 0.6 to 2 dB: smaller differences mean nothing.

Bits count all that stands in place of the quantized weights. The models are narrow (48 to 128 channels), so a side
branch of rank 32 in 16 bits takes 16 * 32 * (N + K) / (N * K) bits a weight: 8 for a layer of 128 x 128, where FLUX.1
with 3072 x 3072 needs a third of a bit. At equal bytes on these models 8-bit codes are far better than any branch of
rank 32; a branch of rank 2 has about the share of the bytes here that one of rank 32 has there.
"""
CALIBRATED = 32
"""Pictures that statistics are gathered from; none of them is compared later."""
MODELS = ("emoji-flux", "emoji-sd", "emoji-dit")
RECIPES = (
    # 8 bits, weights and activations
    "Int8Linear()",
    "SmoothQuant() | Int8Linear()",
    "SmoothQuant(alpha='auto') | Int8Linear()",
    "HadamardRotation() | Int8Linear()",
    "Float8Linear()",
    # 4 bits without calibration
    "WeightOnly(bits=4)",
    "WeightOnly(bits=4, symmetric=True)",
    "BitsAndBytes(bits=4)",
    "GGUF(type='Q4_0')",
    "GGUF(type='Q4_K')",
    # 4 bits with calibration
    "AWQ()",
    "GPTQ()",
    "GPTQ(symmetric=True)",
    "SVDQuant(rank=32)",
    "SVDQuant(rank=32, gptq=True)",
    "SVDQuant(rank=32, activations=4)",
    "SVDQuant(rank=32, activations=4, smooth=False)",
    # a rank in proportion to the width, as 32 is to that of FLUX, and others of that size
    "AWQ(group=32)",
    "GPTQ(group=32)",
    "SVDQuant(rank=2, activations=16, gptq=True)",
    "SVDQuant(rank=2, activations=16, gptq=True, symmetric=False, smooth=False)",
    # as large as SVDQuant of rank 32 on layers as narrow as these
    "GPTQ(bits=8)",
    # bits by layer
    "WeightOnly(bits=5)",
    "MixedPrecision(bits=5, rounding='nearest')",
    "GPTQ(bits=5)",
    "MixedPrecision(bits=5)",
    "MixedPrecision(bits=5, alike=False)",
    "MixedPrecision(bits=4)",
)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fidelity.json")
    parser.add_argument("--table", action="store_true", help="only write the table of what was measured")
    options = parser.parse_args()
    quiet()
    for name in () if options.table else options.models:
        Rows(name, options.pictures, options.out, options.device).run(options.recipes)
    atomic_write_text(options.out.with_suffix(".md"), table(read_json(options.out)))


class Rows:
    """One model with its plain pictures, and the file that rows go to."""

    def __init__(self, name: str, pictures: int, file: Path, device: str | None) -> None:
        self.model = hasten.load(name, device=device)
        self.name, self.file, self.pictures = name, file, pictures
        prompts: Any = read_json(PROMPTS)
        self.prompts: dict[str, list[tuple[str, int]]] = prompts["models"][name]
        self.device = Target.of(self.model.pipeline).device
        self.images: list[Any] = []

    def run(self, recipes: list[str]) -> None:
        """The rows that the file lacks."""
        data: Any = read_json(self.file) if self.file.exists() else {"schema": 1, "rows": []}
        data["environment"] = environment(self.device)
        done = {(row["model"], row["recipe"], row["pictures"]) for row in data["rows"]}
        for text in recipes:
            if (self.name, text, self.pictures) not in done:
                data["rows"].append(self.row(text))
                atomic_write_text(self.file, json_text(data))

    def row(self, text: str) -> dict[str, Any]:
        """One recipe's row; also that it could not run."""
        facts: dict[str, Any] = {"model": self.name, "recipe": text, "pictures": self.pictures}
        try:
            facts |= self.measured(load_recipe(text))
            print(f"{self.name:11s} {facts['bits']:6.2f} bits {facts['psnr']:6.2f} dB  {text}", flush=True)
        except HastenError as error:
            facts["problem"] = str(error)
            print(f"{self.name:11s} {text}: {error}", flush=True)
        return facts

    def measured(self, recipe: Recipe) -> dict[str, Any]:
        """Apply a recipe, and compare its pictures with the plain ones."""
        self.prepare()
        began = time.perf_counter()
        with hasten.accelerate(self.model.pipeline, recipe) as session:
            seconds = time.perf_counter() - began
            images = self.rendered()
            session.evidence()
            size = sizes(session)
        found = fidelities(images, self.images)
        return {**size, "apply_seconds": round(seconds, 2), **summary(found)}

    def prepare(self) -> None:
        """Statistics and plain pictures, once."""
        weights = weights_hash(Target.of(self.model.pipeline).denoisers[0].module)
        file = usual_file(weights)
        spare = self.prompts["evaluation"][: -(CALIBRATED - len(self.prompts["calibration"])) - 1 : -1]
        texts = tuple(text for text, _ in (*self.prompts["calibration"], *spare))
        collect(self.model, self.model.workload.replace(prompts=texts), file=file)
        if not usual_gains(weights).is_file():
            measure_gains(self.model, self.model.workload.replace(prompts=texts[:2]))
        self.images = self.images or self.rendered()

    def rendered(self) -> list[Any]:
        """The pictures of the evaluation prompts."""
        chosen = self.prompts["evaluation"][: self.pictures]
        return [render(self.model.pipeline, self.model.workload, text, seed) for text, seed in chosen]


def sizes(session: Session) -> dict[str, Any]:
    """Bits a weight, of all that stands in place of the quantized weights."""
    technique = next(item for item in session.recipe if item.stage == Stage.WEIGHTS)
    places = session.state(technique, Replaced).places
    held = sum(buffer.nbytes for _, module in places for buffer in module.buffers())
    count = sum(int(torch.Size(site.layer.weight.shape).numel()) for site, _ in places)
    return {"layers": len(places), "weights": count, "bytes": held, "bits": round(8 * held / count, 3)}


def summary(found: list[Fidelity]) -> dict[str, Any]:
    """Means and the PSNR of each picture."""
    values = [one.psnr for one in found]
    return {
        "psnr": round(fmean(values), 3),
        "psnr_deviation": round(stdev(values), 3) if len(values) > 1 else None,
        "ssim": round(fmean(one.ssim for one in found), 5),
        "lpips": round(fmean(one.lpips for one in found), 5),
        "each": [{key: round(value, 4) for key, value in asdict(one).items()} for one in found],
    }


def table(data: Any) -> str:
    """The rows as Markdown: bits a weight, and PSNR with its standard error over pictures."""
    rows = {(row["model"], row["recipe"]): row for row in data["rows"]}
    models = list(dict.fromkeys(model for model, _ in rows))
    head = " | ".join(f"{model}: bits | PSNR, dB | LPIPS" for model in models)
    lines = [NOTES, f"| Recipe | {head} |", "|---" * (1 + 3 * len(models)) + "|"]
    for recipe in dict.fromkeys((*RECIPES, *(recipe for _, recipe in rows))):
        cells = [cell for model in models for cell in _cells(rows.get((model, recipe)))]
        lines.append(f"| `{recipe.replace('|', chr(92) + '|')}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any] | None) -> tuple[str, str, str]:
    if row is None or "psnr" not in row:
        return "-", "-", "-"
    error = row["psnr_deviation"] / row["pictures"] ** 0.5
    return f"{row['bits']:.2f}", f"{row['psnr']:.2f} ± {error:.1f}", f"{row['lpips']:.4f}"


if __name__ == "__main__":
    main()
