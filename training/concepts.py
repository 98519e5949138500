"""Which emoji concepts are trained on, and the everyday words that captions also use for them.

The models are small (about 3 million parameters each), so the lists in ``concepts.json`` favour things that are drawn
alike in all styles and that somebody would ask for. Left out: symbols, flags, clocks, letters, skin tones, gendered and
family variants of one person, and near-duplicates (six kinds of mailbox, eight phases of the moon, ...).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

_LISTS = json.loads((Path(__file__).parent / "concepts.json").read_text())
EXTRA = set(_LISTS["extra"])  # drawn in four of the six styles only, but asked for often
PEOPLE = set(_LISTS["people"])  # the only ones kept of "People & Body"
OUT = set(_LISTS["out"])  # near-duplicates
EVERYDAY: dict[str, str] = _LISTS["everyday"]  # "automobile" is also captioned "car"

MIN_STYLES = {"Animals & Nature": 3, "Food & Drink": 3}
MIN_STYLES_ELSEWHERE = 5
GROUPS_OUT = {"Symbols", "Flags", "Component"}
PATTERNS_OUT = re.compile(
    r"o'clock|-thirty|skin tone|^flag|moon face$|waxing|waning|quarter moon|^sun behind (large|small|rain)"
    r"|^(euro|pound|yen) banknote|mailbox|^(blue|green|orange) book$|^oncoming (automobile|bus)"
)


def keeps(name: str, group: str, styles: int) -> bool:
    """Whether a concept that `styles` of the six sets draw belongs in the training set."""
    if group in GROUPS_OUT or name in OUT or PATTERNS_OUT.search(name) or styles < 3:
        return False
    if name in EXTRA:
        return True
    if group == "People & Body":
        return name in PEOPLE
    return styles >= MIN_STYLES.get(group, MIN_STYLES_ELSEWHERE)
