"""The plain model inside the quantized one: it answers the same calls, and shows what its blocks compute."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from hasten.core.target import Denoiser, Target
from hasten.quantize.engine.sites import Site
from hasten.search.finetune.trajectories import Example, batch_of


class Teacher:
    """Compares a quantized model with the plain one that it was made from, whose layers are kept beside it.

    Outputs alone teach the training pictures by heart: at high noise they hold little else than the picture. What the
    blocks compute in between carries over to other prompts (feature distillation, https://arxiv.org/abs/1412.6550).
    """

    def __init__(self, target: Target, sites: Sequence[Site]) -> None:
        self.target, self._sites = target, sites

    def losses(self, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
        """The difference of outputs, and the mean one of blocks: squared, relative to the teacher's values."""
        denoiser = self.target.denoisers[example.denoiser]
        with self._plain(), torch.no_grad():
            wanted, right = _watched(denoiser, example)
        output, found = _watched(denoiser, example)
        inside = [_relative(one, other) for one, other in zip(found, right, strict=True)]
        return _relative(output, wanted), torch.stack(inside).mean() if inside else output.new_zeros(())

    @contextmanager
    def _plain(self) -> Generator[None]:
        """While it is open, the original layers stand in their places."""
        present = [site.parent._modules[site.name] for site in self._sites]
        for site in self._sites:
            site.parent._modules[site.name] = site.layer
        try:
            yield
        finally:
            for site, module in zip(self._sites, present, strict=True):
                site.parent._modules[site.name] = module


def _watched(denoiser: Denoiser, example: Example) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A call's output, and the outputs of the repeated blocks."""
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.extend(_tensors(output))

    blocks = [block for _, block in denoiser.of_class(*denoiser.spec.repeated_blocks)]
    hooks = [block.register_forward_hook(note) for block in blocks]
    try:
        return batch_of(denoiser.module(*example.args, **example.kwargs)), seen
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    for item in cast("list[Any]", output if isinstance(output, tuple | list) else [output]):
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            yield item


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    exact = wanted.float()
    return (found.float() - exact).square().mean() / exact.square().mean().clamp_min(1e-12)
