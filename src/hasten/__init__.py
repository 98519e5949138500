"""hasten accelerates diffusion-model inference and proves what each change did to time, memory and the picture.

Names load when first used, so that `import hasten` is instant; every technique is available under its own name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.attention import *  # noqa: F403
    from hasten.cache import *  # noqa: F403
    from hasten.compilation import *  # noqa: F403
    from hasten.core.errors import HastenError as HastenError
    from hasten.core.errors import NoEffect as NoEffect
    from hasten.core.errors import NotEngaged as NotEngaged
    from hasten.core.errors import Refused as Refused
    from hasten.core.expression import load_recipe as load_recipe
    from hasten.core.recipe import Recipe as Recipe
    from hasten.core.resolve import Plan as Plan
    from hasten.core.resolve import resolve as resolve
    from hasten.core.session import Session as Session
    from hasten.core.session import accelerate as accelerate
    from hasten.core.session import apply_permanently as apply_permanently
    from hasten.core.target import Target as Target
    from hasten.core.technique import Cost as Cost
    from hasten.core.technique import Evidence as Evidence
    from hasten.core.technique import Stage as Stage
    from hasten.core.technique import Technique as Technique
    from hasten.core.workload import Workload as Workload
    from hasten.formats.loading import load as load
    from hasten.formats.saving import save as save
    from hasten.measure.compare import compare as compare
    from hasten.measure.comparison import Comparison as Comparison
    from hasten.quantize import *  # noqa: F403
    from hasten.quantize.lora import adapters as adapters
    from hasten.search.finetune import finetune as finetune

__version__ = "0.1.0"

_HOMES = {
    "compilation.warm_up": ("warm_up",),
    "core.errors": ("HastenError", "NoEffect", "NotEngaged", "Refused"),
    "core.expression": ("load_recipe",),
    "core.recipe": ("Recipe",),
    "core.resolve": ("Plan", "resolve"),
    "core.session": ("Session", "accelerate", "apply_permanently"),
    "core.target": ("Target",),
    "core.technique": ("Cost", "Evidence", "Stage", "Technique"),
    "core.workload": ("Workload",),
    "formats.loading": ("load",),
    "formats.saving": ("save",),
    "measure.compare": ("compare",),
    "measure.comparison": ("Comparison",),
    "quantize.lora": ("adapters",),
    "search.finetune": ("finetune",),
}
_HOME_OF = {name: f"hasten.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    if not name.startswith("_"):
        registry = import_module("hasten.core.registry")
        # Our own first: a plug-in that imports one of them is not loaded completely yet.
        for techniques in (registry.own_techniques, registry.techniques):
            if name in techniques():
                return techniques()[name]
    raise AttributeError(f"module 'hasten' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOME_OF, *import_module("hasten.core.registry").techniques(), "__version__"])
