"""Real calls of a denoiser, recorded from a few pictures, to compare outputs on without making pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.core.intercept import base_class
from hasten.core.patch import Patch
from hasten.core.session import Session, accelerate
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload
from hasten.measure.rendering import render
from hasten.search.quantization.collect import FIRST_SEED, spread_steps


@dataclass
class Call:
    """One call of a denoiser, and what it returned."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor

    @torch.no_grad()
    def error(self) -> float:
        """The squared error of the output as the denoiser is now, relative to the mean square of the recorded one."""
        # Not the instance's own call: a session's clock is not to see it.
        now = tensor_of(base_class(self.module).forward(self.module, *self.args, **self.kwargs)).float()
        whole = self.output.float().square().mean()
        return float((now - self.output.float()).square().mean() / whole.clamp(min=1e-12))


@dataclass(frozen=True, kw_only=True)
class RecordingCalls(Technique):
    """Keeps some of the denoiser's calls. It is no technique for users."""

    stage: ClassVar[Stage] = Stage.CACHE
    steps: int = field(default=2, metadata=about("steps of each picture whose calls are kept", ge=1))

    def problems(self, target: Target) -> Iterable[str]:
        """Works with every denoiser."""
        return ()

    def apply(self, target: Target, patch: Patch) -> None:
        """Watch each denoiser."""
        state = patch.keep(Kept())
        for denoiser in target.denoisers:
            patch.around(denoiser.module, _Keeping(state, denoiser.module, patch, self.steps), "some calls are kept")

    def engaged(self, session: Session) -> Evidence:
        """Calls were kept."""
        return Evidence(summary=f"{len(session.state(self, Kept).calls)} calls were kept")

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Memory of the kept inputs and outputs."""
        return Cost(basis="measured")


@dataclass
class Kept:
    """The calls of a session."""

    calls: list[Call] = field(default_factory=list[Call])


class _Keeping:
    """A link around a denoiser that keeps calls of some steps."""

    def __init__(self, state: Kept, module: nn.Module, patch: Patch, steps: int) -> None:
        self._state, self._module, self._steps = state, module, steps
        self._clock = patch.clock

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        moment = self._clock.now
        result = call(*args, **kwargs)
        if moment.steps is None or moment.step in spread_steps(moment.steps, self._steps):
            output = tensor_of(result).detach().clone()
            self._state.calls.append(Call(self._module, copied(args), copied(kwargs), output))
        return result


def record_calls(pipeline: Any, workload: Workload, *, pictures: int = 2, steps: int = 3) -> list[Call]:
    """Make a few pictures, and keep the denoiser's calls of some of their steps."""
    recipe = RecordingCalls(steps=steps)
    with accelerate(pipeline, recipe) as session:
        for number, prompt in enumerate(workload.prompts[:pictures]):
            render(pipeline, workload, prompt, FIRST_SEED + number)
        return session.state(recipe, Kept).calls


def copied(value: Any) -> Any:
    """Arguments whose tensors are copies: pipelines write into theirs."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}  # pyright: ignore
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)  # pyright: ignore
    return value


def tensor_of(output: Any) -> torch.Tensor:
    """What a denoiser returns, as one tensor."""
    value = output[0]
    return value if isinstance(value, torch.Tensor) else torch.stack(list(value))
