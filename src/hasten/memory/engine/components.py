"""Brings a component's weights in when it is called: whole components take turns, blocks come one after another.

The interceptions stand innermost, around the very code of a module: what a cache leaves out, or computes by other
means, brings nothing in. They stay outside compiled code, so that blocks compile without additional graphs; what is
compiled as one piece is brought in as one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hasten.core.errors import HastenError
from hasten.core.foresight import will_run
from hasten.core.patch import Patch
from hasten.core.target import Target
from hasten.memory.engine.copies import Copies
from hasten.memory.engine.residency import Ledger, Residency
from hasten.memory.engine.units import Cut
from hasten.memory.engine.weights import Unit

ENTRIES = ("__call__", "encode", "decode", "get_text_features", "get_image_features")
"""The methods by which pipelines run a component."""


class Component:
    """One component whose weights come and go."""

    def __init__(self, parts: Cut, denoises: bool, copies: Copies, ledger: Ledger, ahead: int) -> None:
        self.cut, self.name, self.denoises = parts, parts.name, denoises
        self.residency = Residency(copies, ledger, ahead=ahead, forecast=self._expected)
        self._depth = 0

    def _expected(self, unit: Unit) -> bool | None:
        if not self.denoises:
            return True
        said = [will_run(self.cut.module, module) for module in unit.modules]
        return None if None in said and True not in said else True in said

    def goes_with(self, other: Component) -> bool:
        """Do both run in every step? A ControlNet and its like stay beside the denoiser."""
        return self.denoises != other.denoises and ("controlnet" in self.name or "controlnet" in other.name)

    def call(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an entry with the part that stays for the whole call."""
        self._depth += 1
        try:
            self.residency.hold(self.cut.rest)
            args, kwargs = on_device((args, kwargs), self.residency.copies.device)
            whole = self.cut.passing if is_compiled(self.cut.module) else ()
            return having(self.residency, whole, run, args, kwargs)
        finally:
            self._depth -= 1
            if not self._depth:
                self.residency.finish()

    def leave(self) -> None:
        """Let everything go."""
        if not self._depth:
            self.residency.finish()
            self.residency.drop(self.cut.rest)


class Turns:
    """The components of a pipeline: when one is called, the others leave."""

    def __init__(self, components: Iterable[Component]) -> None:
        self.components = tuple(components)

    def install(self, patch: Patch) -> None:
        """Intercept every component."""
        for component in self.components:
            module = component.cut.module
            for method in ENTRIES:
                if callable(getattr(module, method, None)):
                    patch.around(module, self._entry(component), "is brought in when called", method=method)
            attach(component, patch)

    def leave(self) -> None:
        """Let everything go."""
        for component in self.components:
            component.leave()

    def _entry(self, component: Component) -> Callable[..., Any]:
        def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return call(*args, **kwargs)
            for other in self.components:
                if other is not component and not other.goes_with(component):
                    other.leave()
            return component.call(call, args, kwargs)

        return run


def attach(component: Component, patch: Patch) -> None:
    """Intercept the blocks and, as parts of a network are also run from outside it, what holds weights itself."""
    parts, residency = component.cut, component.residency
    what = "weights are brought in for each call"
    if not parts.passing:
        for _, child in parts.module.named_children():
            patch.around(child, guarding(residency, parts.rest), what, innermost=True)
        return
    for module, units in parts.owners():
        for unit in units:
            patch.around(module, guarding(residency, unit), what, innermost=True)
    for module, units in parts.pieces():
        patch.around(module, guarding_piece(residency, module, units), what, innermost=True)


def guarding(residency: Residency, unit: Unit) -> Callable[..., Any]:
    """A link that has a unit on the device while the call runs."""

    def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or unit.uses:
            return call(*args, **kwargs)
        residency.enter(unit)
        try:
            return call(*args, **kwargs)
        finally:
            residency.leave(unit)

    return run


def guarding_piece(residency: Residency, module: nn.Module, units: list[Unit]) -> Callable[..., Any]:
    """A link that has all units of a module on the device where that is one group, or compiled code."""

    def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not (len(units) == 1 or is_compiled(module)):
            return call(*args, **kwargs)
        return having(residency, units, call, args, kwargs)

    return run


def having(residency: Residency, units: Iterable[Unit], call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Make a call with all these units on the device."""
    entered: list[Unit] = []
    try:
        for unit in units:
            residency.enter(unit)
            entered.append(unit)
        return call(*args, **kwargs)
    finally:
        for unit in entered:
            residency.leave(unit)


def is_compiled(module: nn.Module) -> bool:
    """Does a call of the module run compiled code, which no interception inside it can interrupt?"""
    return getattr(module, "_compiled_call_impl", None) is not None


def on_device(value: Any, device: torch.device) -> Any:
    """All tensors among the arguments on a device."""
    if device.type == "cpu":
        return value
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


class RunsElsewhere:
    """Says where a network runs whose weights are elsewhere between calls, in the form that diffusers looks for."""

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Called by code that would put its own offloading in place."""
        raise HastenError("hasten moves these weights; leave its session before other code is to move them.")


def say_where(target: Target, names: Iterable[str], device: torch.device, patch: Patch) -> None:
    """Let the pipeline make its tensors on the device of execution."""
    if device.type != "cpu":
        for name in names:
            patch.set(target.modules[name], "_hf_hook", RunsElsewhere(device), f"runs on {device}")
