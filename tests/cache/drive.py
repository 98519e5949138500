"""Drives a rig's denoiser with given pictures at the steps of its scheduler, and notes which blocks run."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hasten.core.spec import InputSize
from tests.contract.rigs import Rig

Arguments = dict[str, Any]


@torch.no_grad()
def request(rig: Rig, calls: Sequence[Arguments]) -> list[torch.Tensor]:
    """One request: one call a step with these arguments, whatever came out before."""
    rig.scheduler.set_timesteps(len(calls))
    outputs: list[torch.Tensor] = []
    for given, timestep in zip(calls, rig.scheduler.timesteps, strict=True):
        outputs.append(rig.call(given))
        rig.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    return outputs


def example(rig: Rig, seed: int = 0, **size: int) -> Arguments:
    """Random arguments for one call."""
    return rig.spec.example(rig.denoiser.config, InputSize(**size), seed)  # pyright: ignore[reportArgumentType]


def frozen(rig: Rig, steps: int) -> list[torch.Tensor]:
    """The outputs of a request that calls with the same arguments at every step."""
    return request(rig, [example(rig)] * steps)


def drifting(rig: Rig, speeds: Sequence[float], **size: int) -> list[Arguments]:
    """Arguments whose picture moves from one to another, by so much from step to step."""
    start, end = example(rig, 0, **size), example(rig, 1, **size)
    name, way, calls = rig.spec.latents, 0.0, list[Arguments]()
    for speed in speeds:
        way += speed
        calls.append(start | {name: start[name] + way * end[name]})
    return calls


@contextmanager
def ran_of(rig: Rig, *paths: str) -> Generator[list[int]]:
    """For each denoiser call, how many members of these module lists ran."""
    counts: list[int] = []
    members: list[Any] = [part for path in paths for part in rig.denoiser.get_submodule(path)]  # pyright: ignore
    handles = [part.register_forward_hook(lambda *_: counts.__setitem__(-1, counts[-1] + 1)) for part in members]
    begin = rig.denoiser.register_forward_pre_hook(lambda *_: counts.append(0))
    try:
        yield counts
    finally:
        for handle in (*handles, begin):
            handle.remove()


def decisions(rig: Rig, technique: Any, calls: Sequence[Arguments]) -> tuple[bool, ...]:
    """For each step of a request whether it was computed in full."""
    with rig.accelerated(technique) as session:
        request(rig, calls)
        (steps,) = session.evidence()[technique].step_map.values()
    return steps
