"""LoRA adapters of one rank and with scales kept in tensors, so that another adapter or scale needs no other code.

The idea is PEFT's hot-swapping (huggingface.co/docs/peft, "Hotswapping adapters"): smaller adapters are padded with
zeros, which changes nothing. Here it also holds for adapters loaded later and for scales set by `set_adapters`,
and it is taken back.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hasten.core.errors import HastenError


@dataclass
class _Padded:
    """One adapter's two matrices in one layer, before and after padding."""

    layer: Any
    adapter: str
    before: tuple[nn.Module, nn.Module]
    after: tuple[nn.Module, nn.Module]

    def unchanged(self) -> bool:
        """Do the padded matrices still hold what the original ones hold?"""
        return all(_same(a, b) for a, b in zip(self.before, self.after, strict=True))

    def in_place(self) -> bool:
        """Are the padded matrices still the layer's?"""
        layer, name = self.layer, self.adapter
        return name in layer.lora_A and (layer.lora_A[name], layer.lora_B[name]) == self.after

    def restore(self) -> None:
        self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter] = self.before


class EqualRank:
    """Keeps the adapters of one network at one rank; `restore` gives back those whose values have not been changed."""

    def __init__(self, module: nn.Module, rank: int) -> None:
        self._module, self._rank = module, rank
        self._known: dict[str, int] = {}
        self._layers: list[Any] = []
        self._padded: list[_Padded] = []
        self._ranks: list[tuple[Any, int, dict[str, int]]] = []
        self._scales: dict[tuple[int, str], tuple[torch.Tensor, float]] = {}
        self.adapters = 0

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the network's call: see to adapters and scales that are new."""
        self.prepare()
        return call(*args, **kwargs)

    def prepare(self) -> None:
        """Pad adapters that have been loaded, and put scales into tensors."""
        configs: dict[str, Any] = dict(getattr(self._module, "peft_config", None) or {})
        if (known := {name: id(config) for name, config in configs.items()}) != self._known:
            self._known, self._layers = known, [m for m in self._module.modules() if _is_lora(m)]
            self.adapters = len(known)
            self._pad(configs)
        for layer in self._layers:
            self._keep_scales(layer)

    def _pad(self, configs: dict[str, Any]) -> None:
        self._check(configs)
        before = {(id(layer), n): (layer.lora_A[n], layer.lora_B[n]) for layer in self._layers for n in layer.lora_A}
        for layer in self._layers:
            self._keep_scales(layer)
        if not before:
            return
        from peft.utils.hotswap import prepare_model_for_compiled_hotswap

        self._ranks += [(c, c.r, dict(c.rank_pattern)) for c in configs.values() if c.r != self._rank]
        prepare_model_for_compiled_hotswap(
            self._module, target_rank=self._rank, config=configs, check_compiled="ignore"
        )
        for layer in self._layers:
            for name in layer.lora_A:
                after = (layer.lora_A[name], layer.lora_B[name])
                if after != before[id(layer), name]:
                    self._padded.append(_Padded(layer, name, before[id(layer), name], after))

    def _check(self, configs: dict[str, Any]) -> None:
        largest = max((max([c.r, *c.rank_pattern.values()]) for c in configs.values()), default=0)
        if largest > self._rank:
            raise HastenError(f"A LoRA adapter has rank {largest}, more than lora_rank={self._rank}; set it higher.")

    def _keep_scales(self, layer: Any) -> None:
        """A scale is written into the tensor that compiled code reads."""
        for name, value in layer.scaling.items():
            if isinstance(value, torch.Tensor):
                continue
            key = (id(layer), name)
            if key in self._scales:
                tensor = self._scales[key][0].fill_(value)
            else:
                tensor = torch.tensor(float(value), device=layer.weight.device)
            self._scales[key] = (tensor, float(value))
            layer.scaling[name] = tensor

    def restore(self) -> None:
        """Give unchanged adapters their own matrices, and scales their numbers; adapters swapped in stay."""
        swapped = {item.adapter for item in self._padded if item.in_place() and not item.unchanged()}
        for item in self._padded:
            if item.adapter not in swapped and item.in_place():
                item.restore()
        for config, rank, pattern in self._ranks:
            names = [n for n, c in getattr(self._module, "peft_config", {}).items() if c is config]
            if not swapped & set(names):
                config.r, config.rank_pattern = rank, pattern
        for layer in self._layers:
            for name, value in list(layer.scaling.items()):
                if isinstance(value, torch.Tensor):
                    layer.scaling[name] = self._number(layer, name, value)

    def _number(self, layer: Any, name: str, value: torch.Tensor) -> float:
        known = self._scales.get((id(layer), name))
        present = float(value)
        # The tensor is float32; what was put into it comes back exactly.
        if known is not None and float(torch.tensor(known[1])) == present:
            return known[1]
        return present


def lora_problems(modules: Iterator[nn.Module], rank: int) -> Iterator[str]:
    """Say what adapters of this rank need: PEFT, and none that is larger."""
    if importlib.util.find_spec("peft") is None:
        yield "adapters are prepared with PEFT, which is not installed; run: pip install peft."
    for module in modules:
        for name, config in (getattr(module, "peft_config", None) or {}).items():
            if config.r > rank:
                yield f"the LoRA adapter {name!r} has rank {config.r}, more than lora_rank={rank}; set it higher."


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "scaling")


def _same(original: nn.Module, padded: nn.Module) -> bool:
    """Does the padded matrix hold the original one, and zeros?"""
    small, large = original.get_parameter("weight"), padded.get_parameter("weight")
    part = large[tuple(slice(size) for size in small.shape)]
    return torch.equal(part, small) and int(large.count_nonzero()) == int(small.count_nonzero())
