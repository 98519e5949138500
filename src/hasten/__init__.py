"""hasten accelerates diffusion-model inference and proves what each change did to time, memory and the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hasten.attention import AttentionBackend
from hasten.cache import FORA, DeepCache, FirstBlockCache
from hasten.compilation import ChannelsLast, CompileBlocks
from hasten.core.errors import HastenError, NoEffect, NotEngaged, Refused
from hasten.core.expression import load_recipe
from hasten.core.recipe import Recipe
from hasten.core.resolve import Plan, resolve
from hasten.core.session import Session, accelerate, apply_permanently
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique
from hasten.core.workload import Workload

if TYPE_CHECKING:
    from hasten.measure.compare import compare
    from hasten.measure.comparison import Comparison
    from hasten.models import load

__version__ = "0.1.0"

_LATER = {"compare": "hasten.measure.compare", "Comparison": "hasten.measure.comparison", "load": "hasten.models"}


def __getattr__(name: str) -> Any:
    # Measuring needs packages that are slow to import; they load when first used.
    if name not in _LATER:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)


__all__ = [
    "FORA",
    "AttentionBackend",
    "ChannelsLast",
    "Comparison",
    "CompileBlocks",
    "Cost",
    "DeepCache",
    "Evidence",
    "FirstBlockCache",
    "HastenError",
    "NoEffect",
    "NotEngaged",
    "Plan",
    "Recipe",
    "Refused",
    "Session",
    "Stage",
    "Target",
    "Technique",
    "Workload",
    "accelerate",
    "apply_permanently",
    "compare",
    "load",
    "load_recipe",
    "resolve",
]
