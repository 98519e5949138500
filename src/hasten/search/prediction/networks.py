"""Networks on the meta device: made from a configuration, or copied from a live one; no weight is ever allocated."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from hasten.core.errors import HastenError
from hasten.core.intercept import base_class


def build(library: str, name: str, config: Mapping[str, Any], dtype: torch.dtype, device: str = "meta") -> nn.Module:
    """Make the network that `from_pretrained(torch_dtype=dtype)` would load: without weights, or with random ones.

    `library` and `name` are as in a pipeline's model_index.json. Weights that their class keeps in float32 are so
    here. Raises HastenError for classes that do not exist and for configurations that their class refuses.
    """
    cls = find_class(library, name)
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device(device), _made_in(dtype if device != "meta" else torch.float32):
            module = _made(cls, plain)
    except Exception as error:
        raise HastenError(f"The configuration of {name} cannot be used: {' '.join(str(error).split())}") from error
    return in_dtype(module.eval(), dtype)


def find_class(library: str, name: str) -> Any:
    """The class behind an entry of model_index.json; pipelines' own modules count as libraries."""
    import diffusers
    import transformers

    places = {"diffusers": diffusers, "transformers": transformers}
    place = places.get(library) or getattr(diffusers.pipelines, library, None)
    cls = getattr(place, name, None)
    if cls is None:
        raise HastenError(f"There is no class {name} in {library}, so its size cannot be planned.")
    return cls


def _made(cls: Any, config: dict[str, Any]) -> nn.Module:
    if hasattr(cls, "from_config") and hasattr(cls, "load_config"):
        return cls.from_config(config)
    return cls(cls.config_class.from_dict(config))


@contextmanager
def _made_in(dtype: torch.dtype) -> Generator[None]:
    """Let new weights have a type at once: those of the largest models do not fit in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give all floating-point weights a type, except those that their class keeps in float32."""
    kept = set(_kept(type(module), dtype))
    made: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for name, weight in owner.named_parameters(recurse=False):
            wanted = torch.float32 if kept & {*path.split("."), name} else dtype
            if id(weight) not in made:  # tied weights stay tied
                made[id(weight)] = nn.Parameter(_cast(weight, wanted), requires_grad=False)
            owner.register_parameter(name, made[id(weight)])
        for name, value in owner.named_buffers(recurse=False):
            owner._buffers[name] = _cast(value, dtype)
    return module


def _kept(cls: type, dtype: torch.dtype) -> Iterable[str]:
    """Names of parts that stay in float32: diffusers keeps its list in any type, transformers one only in float16."""
    names: Iterable[str] = getattr(cls, "_keep_in_fp32_modules", None) or ()
    strict: Iterable[str] = getattr(cls, "_keep_in_fp32_modules_strict", None) or ()
    always = hasattr(cls, "load_config") or dtype == torch.float16
    return (*(names if always else ()), *strict)


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.detach().to(dtype) if value.is_floating_point() else value.detach()


def meta_copy(module: nn.Module) -> nn.Module:
    """Copy a live network's structure, shapes and types to the meta device, without interceptions."""
    known: dict[int, Any] = {}
    for weight in module.parameters():
        known[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    for value in module.buffers():
        known[id(value)] = torch.empty_like(value, device="meta")
    for part in module.modules():
        if compiled := part.__dict__.get("_compiled_call_impl"):
            known[id(compiled)] = None
    made = copy.deepcopy(module, known)
    if base_class(made) is not base_class(module):
        raise HastenError(f"{type(module).__name__} cannot be copied.")
    return made


def weight_bytes(module: nn.Module) -> int:
    """Size of a network's parameters in bytes; tied ones count once."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def configuration(module: nn.Module) -> Mapping[str, Any]:
    """A network's configuration; transformers keep an object."""
    config: Any = getattr(module, "config", None)
    return cast("Mapping[str, Any]", config.to_dict() if hasattr(config, "to_dict") else config or {})
