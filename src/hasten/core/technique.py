"""A technique: one reversible change, described by a frozen dataclass that is its own configuration."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

from hasten.core.errors import InvalidSetting, UnknownName, nearest

Seal = Literal["open", "compiled", "recorded"]
Decision = Literal["nothing", "beforehand", "within", "borders"]

if TYPE_CHECKING:
    import torch

    from hasten.core.patch import Patch
    from hasten.core.recipe import Recipe
    from hasten.core.session import Session
    from hasten.core.target import Target
    from hasten.core.workload import Workload


class Stage(IntEnum):
    """When a technique is applied relative to others; the order in which a user lists them never matters."""

    SAMPLING = 0
    STRUCTURE = 10
    WEIGHTS = 20
    ADAPTERS = 30
    PARALLEL = 40
    CACHE = 50
    RESIDENCY = 60
    LAYOUT = 70
    COMPILE = 80


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What shows that a technique took part: a sentence, and counted facts behind it."""

    summary: str
    full_steps: int | None = None
    """Denoiser calls that were computed completely (caches only)."""
    reused_steps: int | None = None
    """Denoiser calls that reused earlier results (caches only)."""
    step_map: Mapping[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict[str, tuple[bool, ...]])
    """For each branch of the last request: was the step computed in full?"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Predicted effect on one image."""

    time_factor: float | None = None
    """Denoising time relative to without the technique; None when only a measurement can tell."""
    extra_bytes: int = 0
    """Additional memory held while running, in bytes; negative when memory is freed."""
    basis: str = "formula"
    """Where the prediction comes from: formula, calibration or measured."""
    compiled: Literal["", "blocks", "whole"] = ""
    """What runs as fused kernels: the denoiser's repeated blocks, or all of it."""
    replayed: bool = False
    """Is the denoiser's call replayed (CUDA graphs), so that the host starts no kernel?"""
    in_turn: tuple[str, ...] = ()
    """Components whose weights are on the device only while they run; each is brought there once an image."""
    held: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int], hash=False)
    """Bytes of a component's weights on the device while it runs, where those are fewer than all."""
    moved: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int], hash=False)
    """Bytes of weights brought to the device in each call of a component, beside its computation."""
    brought: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int], hash=False)
    """Bytes of weights of a component that pass through the device once an image."""
    traffic: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int], hash=False)
    """Additional bytes read and written on the device in each call of a component (weights cast before use)."""
    activations: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float], hash=False)
    """Peak of a component's activations relative to without the technique (a VAE that decodes in tiles)."""

    @property
    def known(self) -> bool:
        """Does it say anything about time?"""
        weights = self.in_turn or self.held or self.moved or self.brought or self.traffic
        return self.time_factor is not None or bool(self.compiled or self.replayed or weights or self.activations)


def about(text: str, **limits: object) -> dict[str, object]:
    """Field metadata: its description and limits (`ge`, `gt`, `le`).

    `off=value` is the setting that means "do nothing"; `trial=value` one that surely takes effect on a test model.
    `budget` marks the parameter that decides how many steps are computed, and how: "count" is that very number,
    "interval" a whole number that makes them fewer, "threshold" a positive number that makes them fewer.
    """
    return {"about": text, **limits}


@dataclass(frozen=True, kw_only=True)
class Technique:
    """Base of all techniques. A subclass states class facts and implements the four methods; nothing else."""

    stage: ClassVar[Stage]
    lossy: ClassVar[bool] = False
    """True when the picture may change by more than rounding."""
    paper: ClassVar[str] = ""
    """Publication or specification the technique follows."""
    syncs: ClassVar[bool] = False
    """True when a decision waits for the GPU at each step; `waits` says it for given settings."""
    cuts_blocks: ClassVar[bool] = False
    """True when it decides inside a block, so that compiled blocks need up to twice as many graphs."""
    seals: ClassVar[Seal] = "open"
    """What it makes of the denoiser's call: "compiled" into one graph, in whose middle nothing can be decided, or
    "recorded", so that every call runs the same kernels. Both are checked against what others decide."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            _check(self, item, hints[item.name])

    def claims(self) -> tuple[str, ...]:
        """Resources taken for oneself, such as `attention.kernel` or `stack.compute:*`; see `core.resolve`."""
        return ()

    def waits(self) -> bool:
        """Does a decision wait for the GPU at each step, with these settings?"""
        return self.syncs

    def irreversible(self) -> bool:
        """Is something given up for good, with these settings? Then only `apply_permanently` takes it."""
        return False

    def decides(self, target: Target) -> Decision:
        """What is left out inside the denoiser's call: "nothing"; parts decided "beforehand"; or "within" the call.

        "borders" leaves out nothing, but moves tensors between devices in the middle of the call.
        """
        return "nothing"

    def runs_on(self, target: Target) -> torch.device | None:
        """Where the denoiser computes with this technique, if not where its weights are now."""
        return None

    def problems(self, target: Target) -> Iterable[str]:
        """Yield one plain sentence for each reason why this cannot run on `target`."""
        raise NotImplementedError

    def apply(self, target: Target, patch: Patch) -> None:
        """Change the target through `patch` alone; run-time state goes to `patch.keep`."""
        raise NotImplementedError

    def engaged(self, session: Session) -> Evidence:
        """Return the evidence that the technique took part in the runs so far, or raise NotEngaged."""
        raise NotImplementedError

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Predict time and memory for one image."""
        raise NotImplementedError

    def __or__(self, other: Technique | Recipe) -> Recipe:
        from hasten.core.recipe import Recipe

        return Recipe((self,)) | other

    @classmethod
    def settings(cls) -> dict[str, dataclasses.Field[Any]]:
        """The parameters by name, in order of declaration."""
        return {item.name: item for item in dataclasses.fields(cls)}

    @classmethod
    def build(cls, values: Mapping[str, object]) -> Technique:
        """Create from named values as read from text; unknown names suggest neighbours."""
        for name in values:
            if name not in cls.settings():
                raise UnknownName(f"parameter of {cls.__name__}", name, cls.settings())
        missing = [n for n, f in cls.settings().items() if _required(f) and n not in values]
        if missing:
            raise InvalidSetting(f"{cls.__name__} needs a value for {' and '.join(missing)}.")
        return cls(**values)

    def inert(self) -> Technique | None:
        """The same technique with the setting that means "do nothing", or None if it has no such setting."""
        off = {name: f.metadata["off"] for name, f in self.settings().items() if "off" in f.metadata}
        return dataclasses.replace(self, **off) if off else None

    @classmethod
    def trial(cls) -> Technique:
        """The technique with settings that surely take effect on the small test models."""
        return cls(**{n: f.metadata["trial"] for n, f in cls.settings().items() if "trial" in f.metadata})


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _check(technique: Technique, item: dataclasses.Field[Any], hint: object) -> None:
    value = getattr(technique, item.name)
    where = f"{type(technique).__name__}({item.name}={value!r})"
    converted = _convert(value, hint)
    if converted is _MISFIT:
        _refuse_type(where, value, hint)
    object.__setattr__(technique, item.name, converted)
    _check_limits(where, converted, item.metadata)


def _refuse_type(where: str, value: object, hint: object) -> None:
    choices = [str(c) for c in _literal_choices(hint)]
    if choices and isinstance(value, str):
        raise InvalidSetting(f"{where}: {value!r} is not a choice. {nearest(value, choices)}")
    raise InvalidSetting(f"{where}: expected {describe_type(hint)}, got {type(value).__name__}.")


def _check_limits(where: str, value: object, limits: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidSetting(f"{where}: must be a finite number.")
    if value is None or isinstance(value, str | bool | tuple):
        return
    number = cast(float, value)
    if "ge" in limits and number < limits["ge"]:
        raise InvalidSetting(f"{where}: must be at least {limits['ge']}.")
    if "gt" in limits and number <= limits["gt"]:
        raise InvalidSetting(f"{where}: must be greater than {limits['gt']}.")
    if "le" in limits and number > limits["le"]:
        raise InvalidSetting(f"{where}: must be at most {limits['le']}.")


_MISFIT = object()


def _convert(value: object, hint: object) -> object:
    """Return `value` as the annotated type (int to float, list to tuple), or _MISFIT."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return next((c for a in arguments if (c := _convert(value, a)) is not _MISFIT), _MISFIT)
    if origin is Literal:
        return value if value in arguments and type(value) in {type(a) for a in arguments} else _MISFIT
    if origin is tuple:
        return _convert_tuple(value, arguments)
    if hint is type(None):
        return None if value is None else _MISFIT
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1023 else math.inf
    return value if isinstance(hint, type) and type(value) is hint else _MISFIT


def _convert_tuple(value: object, arguments: tuple[object, ...]) -> object:
    if isinstance(value, Mapping):  # as pairs, so that the technique can be hashed
        value = tuple(cast("Mapping[object, object]", value).items())
    if not isinstance(value, tuple | list):
        return _MISFIT
    items = tuple(_convert(element, arguments[0]) for element in cast("tuple[object, ...]", value))
    return _MISFIT if any(item is _MISFIT for item in items) else items


def _literal_choices(hint: object) -> tuple[object, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for argument in get_args(hint) for choice in _literal_choices(argument))


def describe_type(hint: object) -> str:
    """Name a parameter's type in words a user types: `int`, `one of 'a', 'b'`, `float or None`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        return f"tuple of {describe_type(arguments[0])}"
    return "None" if hint is type(None) else str(getattr(hint, "__name__", hint))
