"""What importances of inputs do for GGUF's types: the error of the denoiser's output in single steps.

    python benchmarks/quantization/importance.py --out benchmarks/quantization/results/importance.json

It hardly scatters, as pictures do; those of 24 prompts are in results/importance_pictures.json, made by
`fidelity.py --pictures 24 --recipes "GGUF(type='Q4_K')" "GGUF(type='Q4_K', importance='auto')"`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import hasten
from hasten.cli.common import quiet
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.target import Target
from hasten.core.weights import weights_hash
from hasten.measure.environment import environment
from hasten.quantize import GGUF
from hasten.quantize.engine.statistics_file import usual_file
from hasten.search.quantization.calls import record_calls
from hasten.search.quantization.collect import collect

MODELS = ("emoji-flux", "emoji-sd", "emoji-dit")
PROMPTS = Path(__file__).parent.parent / "caching" / "prompts.json"


def main() -> None:
    """Measure all models and types."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--types", nargs="+", default=("Q4_K", "Q4_0", "Q3_K"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    rows = [row for name in options.models for row in measured(name, options.types)]
    data = {"schema": 1, "environment": environment(Target.of(hasten.load("emoji-dit").pipeline).device), "rows": rows}
    atomic_write_text(options.out, json_text(data))


def measured(name: str, types: list[str]) -> list[dict[str, Any]]:
    """Decibels by which the output's error lies below the output, without and with importances."""
    model = hasten.load(name)
    if not usual_file(weights_hash(Target.of(model.pipeline).denoisers[0].module)).is_file():
        collect(model)
    # None that statistics are gathered from, neither here nor by fidelity.py.
    prompts: Any = read_json(PROMPTS)
    texts = tuple(text for text, _ in prompts["models"][name]["evaluation"][:4])
    workload = model.workload.replace(prompts=texts)
    calls = record_calls(model.pipeline, workload, pictures=4, steps=4)
    rows: list[dict[str, Any]] = []
    for kind in types:
        row: dict[str, Any] = {"model": name, "type": kind, "calls": len(calls)}
        for importance in ("even", "auto"):
            with hasten.accelerate(model.pipeline, GGUF(type=kind, importance=importance)):  # type: ignore[arg-type]
                row[importance] = round(-10 * math.log10(fmean(call.error() for call in calls)), 2)
        print(f"{name:11s} {kind}: {row['even']:6.2f} -> {row['auto']:6.2f} dB", flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
