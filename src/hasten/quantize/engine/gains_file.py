"""How much the error of each layer's output matters for the output of the network, as measured on real calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.user_cache import user_cache

SCHEMA = 1


def usual_gains(weights: str) -> Path:
    """Where the gains of a model are kept, by the hash of its weights."""
    return user_cache() / "sensitivity" / f"{weights[:32]}.json"


def save_gains(file: Path, gains: Mapping[str, float], about: Mapping[str, Any]) -> Path:
    """Write gains by `component/path`, and what they are of."""
    return atomic_write_text(file, json_text({"schema": SCHEMA, **about, "gains": dict(gains)}))


def load_gains(file: Path, weights: str) -> dict[str, float]:
    """Read gains; raises HastenError for a file that holds none, or those of other weights."""
    data = read_json(file)
    table = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    gains = table.get("gains")
    if table.get("schema") != SCHEMA or not isinstance(gains, dict):
        raise HastenError(f"{file} holds no sensitivities; `hasten calibrate MODEL --for precision` measures them.")
    if table.get("weights_sha256") != weights:
        raise HastenError(f"{file} holds sensitivities of other weights; run `hasten calibrate MODEL --for precision`.")
    found = cast("dict[str, object]", gains)
    if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in found.values()):
        raise HastenError(f"{file} is damaged: a sensitivity is no number of at least 0.")
    return {name: float(cast(float, value)) for name, value in found.items()}
