"""Optional packages that bring kernels: are they there, new enough, and do they load?"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hasten.core.diagnosis import Obstacle, in_words
from hasten.core.packages import installed, numbers


@dataclass(frozen=True)
class Package:
    """A package and the modules that hold the kernel, in order of preference."""

    distribution: str
    modules: tuple[str, ...]
    install: str
    """The command that installs it."""
    function: str
    """The function that must be there; an older release may lack it."""
    least: str = ""
    """The oldest usable version."""


@functools.cache
def load(package: Package) -> ModuleType:
    """Import the first of the package's modules that is there; raises ImportError or whatever the module raises."""
    for name in package.modules:
        if _present(name):
            return importlib.import_module(name)
    raise ModuleNotFoundError(f"none of {', '.join(package.modules)} is installed")


def function(package: Package, name: str = "") -> Callable[..., Any]:
    """A function of the package, its main one unless named."""
    found: Callable[..., Any] = getattr(load(package), name or package.function)
    return found


@functools.cache
def package_obstacle(kernel: str, package: Package) -> Obstacle | None:
    """Say that the package is missing, too old or does not load, or None."""
    if not any(map(_present, package.modules)):
        return Obstacle("missing", f"the {kernel} kernel needs {package.distribution}; install it: {package.install}")
    found = installed(package.distribution)
    if found and package.least and numbers(found) < numbers(package.least):
        return Obstacle(
            "too old",
            f"the {kernel} kernel needs {package.distribution} {package.least} or newer, not {found}: "
            f"{package.install} --upgrade",
        )
    try:
        module = load(package)
    except BaseException as error:  # noqa: BLE001 - a foreign extension may raise anything while it loads
        return Obstacle("broken", f"{package.distribution} {found} does not load: {in_words(error)}")
    if not hasattr(module, package.function) and getattr(module, "__file__", None) is None:
        # A folder of the same name that another package brings (flash-attn-4 beside flash-attn).
        return Obstacle("missing", f"the {kernel} kernel needs {package.distribution}; install it: {package.install}")
    if not hasattr(module, package.function):
        return Obstacle(
            "too old", f"{package.distribution} {found} has no {package.function}: {package.install} --upgrade"
        )
    return None


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # noqa: BLE001 - looking for a part imports its parent, which may raise anything
        return False
