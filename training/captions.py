"""Caption augmentation: many wordings of one (concept, style) pair, so that free prompts work a little."""

from __future__ import annotations

import random

from concepts import EVERYDAY
from emoji import EmojiSet, caption

VARIANTS = 16
# the first template is the canonical wording (see emoji.caption); the number is its weight
TEMPLATES = {
    "{name}, {style} style": 8.0,
    "{name}": 1.0,
    "{article} {name}": 1.0,
    "{style} style {name}": 1.0,
    "{article} {name} in {style} style": 1.0,
    "{name} emoji, {style} style": 1.0,
    "{article} {name}, {style} style": 1.0,
    "an emoji of {article} {name}": 0.5,
    "{style} {name} emoji": 0.5,
}


def article(name: str) -> str:
    """The indefinite article, by the first letter."""
    return "an" if name[0] in "aeiou" else "a"


def variants(name: str, style: str, rng: random.Random) -> list[str]:
    """`VARIANTS` wordings of one pair; the canonical one comes first."""
    wordings = [caption(name, style)]
    for template in rng.choices(list(TEMPLATES), list(TEMPLATES.values()), k=VARIANTS - 1):
        word = EVERYDAY[name] if name in EVERYDAY and rng.random() < 0.4 else name
        wordings.append(template.format(name=word, style=style, article=article(word)))
    return wordings


def all_variants(emoji: EmojiSet, seed: int = 0) -> list[list[str]]:
    """Per image its wordings, the same on every run."""
    rng = random.Random(seed)
    return [variants(name, style, rng) for name, style in zip(emoji.names, emoji.styles, strict=True)]


def corpus(emoji: EmojiSet) -> list[str]:
    """Every distinct wording: what the tokenizers are trained on."""
    return sorted({text for wordings in all_variants(emoji) for text in wordings})
