"""Requests as a pipeline makes them: a scheduler of diffusers stepping around a tiny denoiser."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

from hasten.core.registry import specs
from hasten.core.spec import DenoiserSpec, InputSize

Arguments = dict[str, Any]


class Pipe:
    """A denoiser and its scheduler, as a pipeline's `components`."""

    def __init__(self, architecture: str, seed: int = 0) -> None:
        self.spec: DenoiserSpec = specs()[architecture]
        self.model: Any = self.spec.build_tiny(seed)
        flow = self.spec.name == "flux"
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler()
        self.components = {"unet" if self.spec.unet else "transformer": self.model, "scheduler": self.scheduler}

    @property
    def input(self) -> str:
        return "sample" if self.spec.unet else "hidden_states"

    def arguments(self, seed: int = 0, **size: int) -> Arguments:
        given = self.spec.example(self.spec.tiny, InputSize(**size), seed)
        if self.spec.name != "flux":
            # In no schedule used here, so that repeating it does not look like entering one half-way.
            given["timestep"] = torch.full_like(given["timestep"], 487)
        return given


@torch.no_grad()
def sample(pipe: Pipe, steps: int, *branches: Arguments, stop_after: int | None = None) -> list[torch.Tensor]:
    """One request: each step calls the denoiser once per guidance branch. Returns all outputs in order."""
    outputs: list[torch.Tensor] = []
    picture = branches[0][pipe.input]
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps[:stop_after]:
        results = [pipe.model(**_at(pipe, given, picture, timestep))[0] for given in branches]
        outputs += results
        noise = torch.stack(results).mean(0)[:, : picture.shape[1]]
        picture = pipe.scheduler.step(noise, timestep, picture, return_dict=False)[0]
    return outputs


def _at(pipe: Pipe, given: Arguments, picture: torch.Tensor, timestep: torch.Tensor) -> Arguments:
    like = given["timestep"]
    scale = 1000 if pipe.spec.name == "flux" else 1
    return given | {pipe.input: picture, "timestep": (timestep / scale).to(like.dtype).expand(like.shape)}


@torch.no_grad()
def repeat(pipe: Pipe, steps: int, *calls: Arguments, stop_after: int | None = None) -> list[torch.Tensor]:
    """One request that calls with the same arguments at every step; `calls` may name others for later steps."""
    outputs: list[torch.Tensor] = []
    pipe.scheduler.set_timesteps(steps)
    picture = torch.zeros(1, 4, 4, 4)
    made = in_one_place([*calls, *calls[-1:] * steps])
    for given, timestep in zip(made, pipe.scheduler.timesteps[:stop_after], strict=False):
        outputs.append(pipe.model(**given)[0])
        pipe.scheduler.step(picture, timestep, picture)
    return outputs


def in_one_place(calls: Iterable[Arguments]) -> Iterator[Arguments]:
    """With texts of one size in one memory, as a pipeline keeps its text: another memory would be another text."""
    places: dict[torch.Size, torch.Tensor] = {}
    for given in calls:
        text = given.get("encoder_hidden_states")
        if isinstance(text, torch.Tensor):
            place = places.setdefault(text.shape, text.clone())
            yield given | {"encoder_hidden_states": place.copy_(text)}
        else:
            yield given


def equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Bitwise equality, one by one."""
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@contextmanager
def executed(model: nn.Module, *kinds: type[nn.Module]) -> Generator[list[str]]:
    """Names of the sub-modules of these kinds that really run, in order."""
    names: list[str] = []

    def noting(name: str) -> Any:
        return lambda *_: names.append(name)

    found = [(name, part) for name, part in model.named_modules() if isinstance(part, kinds)]
    handles = [part.register_forward_hook(noting(name)) for name, part in found]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


class Graphs:
    """A compiler backend that compiles nothing and counts the graphs it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return graph.forward

    def compile_blocks(self, pipe: Pipe) -> None:
        for _, block in pipe.model.named_modules():
            if type(block).__name__ in pipe.spec.repeated_blocks:
                block.compile(backend=self, fullgraph=True)
