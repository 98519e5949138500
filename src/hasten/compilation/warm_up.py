"""Compiles before the first picture: runs a session's declared sizes once."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils._pytree import tree_map

from hasten.compilation.artifacts import ArtifactStore
from hasten.compilation.compile import Compile
from hasten.compilation.compiler import CompileCounter
from hasten.compilation.sizes import input_size, parse_size
from hasten.core.errors import HastenError
from hasten.core.session import Session
from hasten.core.target import Denoiser

_USUAL: dict[str, object] = {"prompt": "a red fox in the snow", "class_labels": [0]}
"""Stand-ins for arguments that a pipeline cannot go without."""


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up run did: seconds and newly compiled graphs for each size."""

    seconds: dict[str, float]
    graphs: dict[str, int]

    def __str__(self) -> str:
        return "; ".join(f"{size}: {self.graphs[size]} graphs, {self.seconds[size]:.1f} s" for size in self.seconds)


def warm_up(session: Session, *sizes: str, steps: int = 2, **arguments: Any) -> WarmUp:
    """Run the pipeline once for each size, so that pictures of these sizes need no compilation afterwards.

    Without `sizes` those that the recipe declares are run (`buckets`), and without these the pipeline's usual one.
    `arguments` are given to the pipeline, say a prompt of the usual length; `steps` must be enough that a cache of
    the recipe reuses one. A bare denoiser is called once with random inputs. What was compiled is written to the
    cache on disk. Raises HastenError for a recipe that compiles nothing.
    """
    technique = next((item for item in session.recipe if isinstance(item, Compile)), None)
    if technique is None:
        raise HastenError("There is nothing to warm up: add CompileBlocks() or CompileWhole() to the recipe.")
    counter = session.state(technique, CompileCounter)
    seconds, graphs = dict[str, float](), dict[str, int]()
    for size in sizes or technique.buckets or ("",):
        began, before = time.perf_counter(), counter.graphs
        _run(session, size, steps, arguments)
        name = size or "usual size"
        seconds[name], graphs[name] = time.perf_counter() - began, counter.graphs - before
    _save(session, technique, counter)
    return WarmUp(seconds, graphs)


def _save(session: Session, technique: Compile, counter: CompileCounter) -> None:
    if technique.keeps_code:
        session.state(technique, ArtifactStore).save(counter.graphs, counter.cached)


@torch.no_grad()
def _run(session: Session, size: str, steps: int, arguments: dict[str, Any]) -> None:
    target = session.target
    if callable(target.pipeline):
        target.pipeline(**_pipeline_arguments(target.pipeline, size, steps, arguments))
    else:
        for denoiser in target.denoisers:
            denoiser.module(**_example(session, denoiser, size))
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)


def _pipeline_arguments(pipeline: object, size: str, steps: int, given: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(cast(Any, pipeline).__call__).parameters
    width, height = parse_size(size) if size else (None, None)
    wanted = {"width": width, "height": height, "num_inference_steps": steps}
    wanted |= {name: _USUAL[name] for name in _missing(parameters, given)}
    return {name: value for name, value in wanted.items() if name in parameters and value is not None} | given


def _missing(parameters: Any, given: dict[str, Any]) -> Iterator[str]:
    """Arguments that must be given, and the prompt, unless it comes in another form."""
    for name, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in (2, 4)
        if name in given or not (needed or (name == "prompt" and "prompt_embeds" not in given)):
            continue
        if name not in _USUAL:
            raise HastenError(f"The pipeline cannot be run without {name!r}; give it to warm_up.")
        yield name


def _example(session: Session, denoiser: Denoiser, size: str) -> dict[str, Any]:
    batch = 2 if denoiser.spec.guidance == "batched" else 1
    config = cast("dict[str, Any]", dict(getattr(denoiser.module, "config", {})))
    target = session.target
    given = denoiser.spec.example(config, input_size(size, target, batch) if size else None)
    return tree_map(lambda value: _placed(value, target.device, target.dtype), given)


def _placed(value: object, device: torch.device, dtype: torch.dtype) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() and value.dim() > 1 else value.dtype)
