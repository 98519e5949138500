"""Which model a denoiser is: a stable hash of its configuration, and the names it goes by.

Data that belong to a model (coefficients, ratios, plans) are found by these. Weights are not looked at: a fine-tuned
model finds the data of the model it was made from.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from hasten.core.intercept import base_class
from hasten.core.target import Denoiser

LENGTH = 16
"""Hexadecimal digits of a hash: 64 bits."""


def config_of(denoiser: Denoiser) -> dict[str, Any]:
    """The denoiser's configuration as plain JSON data, without diffusers' own entries and without default values.

    Leaving defaults out keeps it the same when a later diffusers adds a setting.
    """
    config = cast("Mapping[str, Any]", getattr(denoiser.module, "config", {}))
    parameters = inspect.signature(base_class(denoiser.module).__init__).parameters
    defaults = {name: _plain(parameter.default) for name, parameter in parameters.items()}
    plain = {key: _plain(value) for key, value in config.items() if not key.startswith("_")}
    return {key: value for key, value in sorted(plain.items()) if key not in defaults or value != defaults[key]}


def config_hash(denoiser: Denoiser) -> str:
    """Hash of class and configuration, the same in every process, on every machine and for every weight format."""
    identity = [base_class(denoiser.module).__name__, config_of(denoiser)]
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def names_of(denoiser: Denoiser) -> tuple[str, ...]:
    """Names a denoiser goes by, from the place it was loaded from, the most specific last.

    Of `models--black-forest-labs--FLUX.1-dev/snapshots/...` or `Wan-AI/Wan2.1-T2V-14B-Diffusers` every part counts;
    the ending `-diffusers` is dropped.
    """
    config = cast("Mapping[str, Any]", getattr(denoiser.module, "config", {}))
    place = str(config.get("_name_or_path") or "")
    parts = (part for part in re.split(r"[/\\]|--", place) if part)
    return tuple(re.sub(r"-diffusers$", "", part, flags=re.IGNORECASE) for part in parts)


def released_as(denoiser: Denoiser) -> tuple[str, ...]:
    """Released models that have this denoiser's configuration; several may share one."""
    config = cast("Mapping[str, Any]", getattr(denoiser.module, "config", {}))
    return tuple(
        name
        for name, released in denoiser.spec.released.items()
        if all(_plain(config.get(key)) == _plain(value) for key, value in released.config.items())
    )


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them; what JSON cannot hold as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
