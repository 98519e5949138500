"""One rank of a sequence-parallel group: half of the tokens of a picture go through blocks that mix no tokens.

Run as `python -m tests.cache.ranks RANK WORLD STORE TECHNIQUE...`. When coupled, the model says, as diffusers' context
parallelism does, that all ranks share one picture.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

from hasten.core.expression import parse
from hasten.core.session import accelerate
from hasten.core.spec import Config, DenoiserSpec, InputSize, Stack
from hasten.core.target import Denoiser, Target

TOKENS, CHANNELS, STEPS = 64, 8, 14


class Block(nn.Module):
    """Changes each token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states))


class Model(nn.Module):
    """A chain of such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.config: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def _no_inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    return {}


SPEC = DenoiserSpec(
    name="chain",
    model_class="Model",
    tiny={},
    inputs=_no_inputs,
    stacks=(
        Stack(
            path="blocks",
            block="Block",
            takes=("hidden_states",),
            returns=("hidden_states",),
            denoised="hidden_states",
        ),
    ),
)


def pictures() -> list[torch.Tensor]:
    """Tokens [1, TOKENS, CHANNELS] at each step; the second half moves, the first nearly stands still."""
    start, way = torch.randn(2, 1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    speed = torch.cat([torch.full((TOKENS // 2, 1), 0.005), torch.full((TOKENS // 2, 1), 0.06)])
    return [start + step * speed * way for step in range(STEPS)]


def computed_steps(technique: str, half: str, group: Any = None) -> list[int]:
    """Which steps a rank with this half of the tokens computes."""
    torch.manual_seed(0)
    model = Model()
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    if group is not None:
        mesh = SimpleNamespace(get_group=lambda: group)
        model._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(_flattened_mesh=mesh))  # pyright: ignore
    pipeline: Any = SimpleNamespace(components={"scheduler": scheduler}, scheduler=scheduler)
    (cache,) = parse(technique)
    with torch.no_grad(), accelerate(Target(pipeline, (Denoiser("model", model, SPEC),), "chain"), cache) as session:
        scheduler.set_timesteps(STEPS)
        for picture, timestep in zip(pictures(), scheduler.timesteps, strict=True):
            model(picture if half == "both" else picture.chunk(2, dim=1)[int(half)], timestep)
            scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        (steps,) = session.evidence()[cache].step_map.values()
    return [step for step, full in enumerate(steps) if full]


def main(rank: str, world: str, store: str, *techniques: str) -> None:
    """Join the other ranks and print the computed steps of every technique, coupled and alone, as JSON."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world), timeout=timedelta(seconds=150)
    )
    try:
        group: Any = torch.distributed.group.WORLD
        together = [computed_steps(technique, rank, group) for technique in techniques]
        alone = [computed_steps(technique, rank) for technique in techniques]
        print(json.dumps({"together": together, "alone": alone}))
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
