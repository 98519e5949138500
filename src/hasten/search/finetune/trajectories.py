"""What the plain model computes on its own way to pictures: the examples that a quantized one learns from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from hasten.core.intercept import intercept
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.measure.progress import Progress
from hasten.measure.rendering import arguments

FIRST_SEED = 5000
"""Seeds of training pictures begin here, apart from those of comparisons and of calibration."""


@dataclass(frozen=True)
class Example:
    """One call of a denoiser, and what the teacher returned; tensors in host memory."""

    denoiser: int
    call: int
    """Which call of a denoiser it is while the picture is made."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor

    def on(self, device: torch.device) -> Example:
        """The example on a device."""
        args, kwargs = (_map(given, lambda tensor: tensor.to(device)) for given in (self.args, self.kwargs))
        return Example(self.denoiser, self.call, args, kwargs, self.output.to(device))


class Recorder:
    """Notes the calls of one denoiser. What does not change from step to step is kept once."""

    def __init__(self, index: int, examples: list[Example]) -> None:
        self._index, self._examples, self._before = index, examples, len(examples)
        self._known: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A link around the denoiser."""
        given = cast("tuple[tuple[Any, ...], dict[str, Any]]", _map((args, kwargs), self._kept))
        result = call(*args, **kwargs)
        number = len(self._examples) - self._before
        self._examples.append(Example(self._index, number, *given, batch_of(result).detach().cpu().clone()))
        return result

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        # The tensor is kept as well, lest another one get its id; its version tells whether it was written to.
        known = self._known.get(id(tensor))
        if known is None or known[1] != tensor._version:
            known = self._known[id(tensor)] = (tensor, tensor._version, tensor.detach().cpu().clone())
        return known[2]


def record(pipeline: Any, workload: Workload, pictures: int, batch: int, progress: Progress) -> list[Example]:
    """Make pictures, so many at a time, with the prompts in turn, and return every call of the denoisers."""
    examples: list[Example] = []
    for start in range(0, pictures, batch):
        chosen = subjects(workload, start, min(start + batch, pictures))
        with recorded(Target.of(pipeline), examples), torch.no_grad():
            pipeline(**several(pipeline, workload, chosen) | {"output_type": "latent"})
        for _ in chosen:
            progress.advance()
    return examples


def subjects(workload: Workload, start: int, end: int) -> list[tuple[str, int]]:
    """Prompt and seed of some training pictures."""
    prompts = workload.prompts
    return [(prompts[number % len(prompts)], FIRST_SEED + number) for number in range(start, end)]


@contextmanager
def recorded(target: Target, examples: list[Example]) -> Generator[None]:
    """While it is open, every call of the denoisers is noted."""
    takers = [
        intercept(denoiser.module, "__call__", Recorder(index, examples))
        for index, denoiser in enumerate(target.denoisers)
    ]
    try:
        yield
    finally:
        for take_off in takers:
            take_off()


def batch_of(result: Any) -> torch.Tensor:
    """What a denoiser predicts, as one batch, from a tuple or an output object of diffusers."""
    value = result[0]
    return value if isinstance(value, torch.Tensor) else torch.stack(list(value))


def several(pipeline: Any, workload: Workload, chosen: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """The arguments of one call of a pipeline for several pictures, each a prompt and a seed."""
    each = [arguments(pipeline, workload, prompt, seed) for prompt, seed in chosen]
    found = each[0] | {"generator": [one["generator"] for one in each]}
    if "prompt" in found:
        found["prompt"] = [prompt for prompt, _ in chosen]
    else:
        found["class_labels"] = [one["class_labels"][0] for one in each]
    return found


@contextmanager
def reduced(device: torch.device, wanted: bool) -> Generator[None]:
    """Products in bfloat16, which takes half the time or less; that errs far less than codes of 4 bits do."""
    with torch.autocast(device.type, torch.bfloat16, enabled=wanted):
        yield


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        items = [_map(item, change) for item in cast("list[Any]", value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def parameters_of(modules: list[nn.Module]) -> Iterator[nn.Parameter]:
    """All parameters of some networks."""
    for module in modules:
        yield from module.parameters()
