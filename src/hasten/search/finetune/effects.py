"""Where rounding hurts: how much the error of each call of the denoiser changes the picture in the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hasten.core.intercept import intercept
from hasten.core.spec import DenoiserSpec
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.quantize.engine.sites import Site
from hasten.search.finetune.trajectories import Example, batch_of, several

LEAST = 0.02
"""Share of the mean chance that every call has, for the few pictures that tell may understate one."""


@dataclass(frozen=True)
class Effects:
    """What the error of each call of the denoisers does, by the number of the call."""

    errors: tuple[float, ...]
    """Mean squared error of what the sampler goes on with, before training."""
    damages: tuple[float, ...]
    """Mean squared change of pictures (0 to 1) for which this call alone is made with the quantized model."""

    @property
    def chances(self) -> torch.Tensor:
        """How often a call should be learnt from: in proportion to its damage. [calls], with the sum 1."""
        found = torch.tensor(self.damages, dtype=torch.float64)
        if not found.sum() > 0:
            return torch.full_like(found, 1 / len(found))
        found = found + LEAST * found.mean()
        return found / found.sum()


class OneCall:
    """A link around the denoisers, that has one call made by the quantized model and all others by the plain one."""

    def __init__(self, target: Target, sites: Sequence[Site], workload: Workload, examples: list[Example]) -> None:
        self._target, self._sites, self._workload, self._examples = target, sites, workload, examples
        self._chosen, self._calls, self.error = -1, 0, 0.0

    def picture(self, chosen: int, subjects: list[tuple[str, int]]) -> np.ndarray:
        """The pictures with that call quantized; -1 for none."""
        self._chosen, self._calls, pipeline = chosen, 0, self._target.pipeline
        takers = [intercept(denoiser.module, "__call__", self) for denoiser in self._target.denoisers]
        try:
            output: Any = pipeline(**several(pipeline, self._workload, subjects))  # pyright: ignore
        finally:
            for take_off in takers:
                take_off()
        frames = getattr(output, "frames", None)
        return np.asarray(output.images if frames is None else frames, dtype=np.float64)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One call of a denoiser."""
        number, self._calls = self._calls, self._calls + 1
        if number != self._chosen:
            with plain(self._sites):
                return call(*args, **kwargs)
        result, example = call(*args, **kwargs), self._examples[number]
        spec = self._target.denoisers[example.denoiser].spec
        self.error = float(difference(batch_of(result).cpu(), example.output, spec, self._workload.guidance))
        return result


def measure(
    target: Target, sites: Sequence[Site], workload: Workload, examples: list[Example], subjects: list[tuple[str, int]]
) -> Effects:
    """Make some pictures again and again, each time with another call quantized.

    Args:
        target: of a pipeline whose layers are quantized.
        sites: the layers as they were.
        workload: settings of the pictures.
        examples: the calls of the plain model for these pictures.
        subjects: prompts and seeds of the pictures.
    """
    one, errors, damages = OneCall(target, sites, workload, examples), list[float](), list[float]()
    with torch.no_grad():
        right = one.picture(-1, subjects)
        for call in range(len(examples)):
            damages.append(float(((one.picture(call, subjects) - right) ** 2).mean()))
            errors.append(one.error)
    return Effects(tuple(errors), tuple(damages))


@contextmanager
def plain(sites: Sequence[Site]) -> Generator[None]:
    """While it is open, the layers as they were stand in their places."""
    present = [site.parent._modules[site.name] for site in sites]
    for site in sites:
        site.parent._modules[site.name] = site.present
    try:
        yield
    finally:
        for site, module in zip(sites, present, strict=True):
            site.parent._modules[site.name] = module


def difference(found: torch.Tensor, wanted: torch.Tensor, spec: DenoiserSpec, guidance: float | None) -> torch.Tensor:
    """The mean squared error of what a step is made with, []."""
    return (guided(found.float(), spec, guidance) - guided(wanted.float(), spec, guidance)).square().mean()


def guided(output: torch.Tensor, spec: DenoiserSpec, guidance: float | None) -> torch.Tensor:
    """What a step is made with: where guidance is done in one batch, the sum of its halves, in which errors grow."""
    if spec.guidance != "batched" or guidance is None or guidance <= 1 or len(output) % 2:
        return output
    one, other = output.chunk(2)
    with_text, without = (one, other) if spec.conditional == "first" else (other, one)
    return without + guidance * (with_text - without)
