"""Draws the prompts of the caching benchmark: writes prompts.json, the same on every run.

Names are the classes of emoji-dit (all of them were drawn in all styles that the other models were trained on); none
of the prompts that the models bring along is used. Calibration and evaluation share no name and no seed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.models import bundled

HERE = Path(__file__).parent
STYLES = ("noto", "blob", "twemoji", "emojione", "fluent", "flat")
CALIBRATION, EVALUATION = 8, 32


def names() -> list[str]:
    """All class names that are in no model's own workload."""
    index = cast("dict[str, Any]", read_json(bundled()["emoji-dit"] / "model_index.json"))
    taken = set(cast("dict[str, Any]", read_json(bundled()["emoji-dit"] / "workload.json"))["prompts"])
    return sorted(set(index["id2label"].values()) - taken)


def drawn() -> list[tuple[str, str]]:
    """Name and style of each prompt; the styles take turns."""
    chosen = random.Random(2312).sample(names(), CALIBRATION + EVALUATION)
    return [(name, STYLES[place % len(STYLES)]) for place, name in enumerate(chosen)]


def lists(captions: list[str]) -> dict[str, list[list[object]]]:
    """Calibration and evaluation pairs of prompt and seed."""
    numbered = list(enumerate(captions))
    return {
        "calibration": [[text, 9000 + place] for place, text in numbered[:CALIBRATION]],
        "evaluation": [[text, 100 + place] for place, text in numbered[CALIBRATION:]],
    }


def main() -> None:
    pairs = drawn()
    captions = lists([f"{name}, {style} style" for name, style in pairs])
    classes = lists([name for name, _ in pairs])
    models = {"emoji-flux": captions, "emoji-sd": captions, "emoji-dit": classes}
    atomic_write_text(HERE / "prompts.json", json_text({"schema": 1, "models": models}))


if __name__ == "__main__":
    main()
