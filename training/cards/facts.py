"""What a model card states and where each number comes from: files, logs, results."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

TRAINING = Path(__file__).resolve().parent.parent
MODELS = TRAINING.parent / "src" / "hasten" / "models"
LOGS = TRAINING / "logs"
# The runs that went into a model; every model has its own copy of the autoencoder.
RUNS = {
    "emoji-flux": ("vae", "emoji-flux", "emoji-flux-distilled"),
    "emoji-sd": ("vae", "emoji-sd"),
    "emoji-dit": ("vae", "emoji-dit"),
}


@dataclass(frozen=True)
class Run:
    """One logged training run."""

    name: str
    steps: int
    minutes: float
    loss: float


def results() -> dict[str, Any]:
    """What `python -m score` measured."""
    return json.loads((TRAINING / "score" / "results.json").read_text())


def runs(model: str) -> list[Run]:
    """Steps, minutes and last loss of each run of a model."""
    found: list[Run] = []
    for name in RUNS[model]:
        with (LOGS / f"{name}.csv").open() as handle:
            last = list(csv.DictReader(handle))[-1]
        found.append(Run(name, int(last["step"]) + 1, float(last["seconds"]) / 60, float(last["loss"])))
    return found


def parameters(folder: Path) -> dict[str, int]:
    """Numbers stored for each component of a pipeline folder."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
        counts[path.parent.name] = sum(product(shape) for shape in shapes)
    return counts


def product(shape: list[int]) -> int:
    """Elements of a tensor of this shape."""
    total = 1
    for side in shape:
        total *= side
    return total


def megabytes(folder: Path) -> float:
    """Size of what the pipeline loads, in 10^6 bytes: everything but the card and its picture."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("README.md", "samples.webp")]
    return sum(path.stat().st_size for path in files) / 1e6


def read_json(path: Path) -> Any:
    """One JSON file."""
    return json.loads(path.read_text())
