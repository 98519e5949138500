"""What the plain model computes on its own way to pictures: the examples that a quantized one learns from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
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
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor

    def on(self, device: torch.device) -> Example:
        """The example on a device."""
        return Example(self.denoiser, _map(self.args, lambda t: t.to(device)),
                       _map(self.kwargs, lambda t: t.to(device)), self.output.to(device))  # fmt: skip


class Recorder:
    """Notes the calls of one denoiser. What does not change from step to step is kept once."""

    def __init__(self, index: int, examples: list[Example]) -> None:
        self._index, self._examples = index, examples
        self._known: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A link around the denoiser."""
        given = cast("tuple[tuple[Any, ...], dict[str, Any]]", _map((args, kwargs), self._kept))
        result = call(*args, **kwargs)
        self._examples.append(Example(self._index, *given, batch_of(result).detach().cpu().clone()))
        return result

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        # The tensor is kept as well, lest another one get its id; its version tells whether it was written to.
        known = self._known.get(id(tensor))
        if known is None or known[1] != tensor._version:
            known = self._known[id(tensor)] = (tensor, tensor._version, tensor.detach().cpu().clone())
        return known[2]


def record(
    pipeline: Any,
    workload: Workload,
    pictures: int,
    batch: int,
    progress: Progress,
    *,
    first_seed: int = FIRST_SEED,
) -> list[Example]:
    """Make pictures, so many at a time, with the prompts in turn, and return every call of the denoisers."""
    examples: list[Example] = []
    for start in range(0, pictures, batch):
        numbers = range(start, min(start + batch, pictures))
        with recorded(Target.of(pipeline), examples), torch.no_grad():
            pipeline(**_arguments(pipeline, workload, numbers, first_seed))
        for _ in numbers:
            progress.advance()
    return examples


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


def _arguments(pipeline: Any, workload: Workload, numbers: range, first_seed: int) -> dict[str, Any]:
    """The call's arguments for several pictures at once."""
    prompts = [workload.prompts[number % len(workload.prompts)] for number in numbers]
    each = [arguments(pipeline, workload, prompt, first_seed + n) for prompt, n in zip(prompts, numbers, strict=True)]
    found = each[0] | {"generator": [one["generator"] for one in each], "output_type": "latent"}
    if "prompt" in found:
        found["prompt"] = prompts
    else:
        found["class_labels"] = [one["class_labels"][0] for one in each]
    return found


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
