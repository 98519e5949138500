"""The loop of training: a step learns from a few calls of the plain model, most often from those that matter most."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hasten.core.errors import HastenError
from hasten.core.target import Target
from hasten.measure.progress import Progress
from hasten.quantize.training.trainable import Trainable
from hasten.search.finetune.effects import Effects, difference
from hasten.search.finetune.optimizer import optimizer
from hasten.search.finetune.trajectories import Example, batch_of, parameters_of, reduced

WARM_UP = 20
"""Steps in which the rate rises, a tenth of them at most."""
MOMENTS = (0.9, 0.99)
"""Memory of the optimiser, for a few hundred steps."""


@dataclass(frozen=True)
class Training:
    """How long and how a model is trained."""

    steps: int = 500
    minutes: float | None = None
    """Ends training earlier; the learning rate falls to 0 by then."""
    pictures: int = 512
    """Pictures of the plain model whose steps are learnt from. Few make the model good at these alone."""
    visits: int = 8
    """Sampling steps in which such a picture is made: fewer than usual, for what teaches most is another picture."""
    batch: int = 4
    """Pictures in one call of the model."""
    calls: int = 2
    """Calls that one step of training learns from."""
    rank: int = 16
    """Of adapters."""
    rate: float | None = None
    """Learning rate; None is what suits the method."""
    optimizer: str = "auto"
    """auto, adamw or adamw8bit (bitsandbytes)."""
    reduced: bool = True
    """Training computes products in bfloat16 (weights that are trained are in float32)."""
    seed: int = 0


class Lessons:
    """What the plain model did, by the call, and how each call is learnt from."""

    def __init__(self, target: Target, examples: list[Example], effects: Effects, guidance: float | None) -> None:
        self._target, self._effects, self._guidance = target, effects, guidance
        self._by_call: list[list[Example]] = [[] for _ in effects.errors]
        for example in examples:
            self._by_call[example.call].append(example)

    def drawn(self, steps: int, calls: int, seed: int) -> Iterator[list[Example]]:
        """Examples for each step: calls by chance, and pictures in turn, in a new order each time round."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self._effects.chances, steps * calls, True, generator=generator).tolist()
        pictures, rounds = len(self._by_call[0]), -(-steps * calls // len(self._by_call[0]))
        order = torch.cat([torch.randperm(pictures, generator=generator) for _ in range(rounds)]).tolist()
        for start in range(0, steps * calls, calls):
            yield [self._by_call[chosen[n]][order[n]] for n in range(start, start + calls)]

    def loss(self, example: Example) -> torch.Tensor:
        """The squared error of a call, where 1 is that before training."""
        denoiser = self._target.denoisers[example.denoiser]
        output = batch_of(denoiser.module(*example.args, **example.kwargs))
        error = difference(output, example.output, denoiser.spec, self._guidance)
        return error / max(self._effects.errors[example.call], 1e-12)


def learn(
    lessons: Lessons, trainable: Trainable, target: Target, how: Training, rate: float, told: Progress
) -> list[float]:
    """Train; returns the loss of each step. Interrupting (Ctrl-C) ends training early."""
    losses, began, device = list[float](), time.perf_counter(), target.device
    steps = optimizer(how.optimizer, trainable.parameters(), device, MOMENTS)
    networks = [denoiser.module for denoiser in target.denoisers]
    try:
        with _frozen(networks, trainable.parameters()), torch.enable_grad():
            for step, examples in enumerate(lessons.drawn(how.steps, how.calls, how.seed)):
                done = max(step / how.steps, _elapsed(began, how))
                if done >= 1:
                    break
                trainable.before_step()
                steps.zero_grad()
                losses.append(_backward(lessons, [example.on(device) for example in examples], how))
                rising = min(1.0, (step + 1) / min(WARM_UP, how.steps / 10))
                _step(steps, rate * rising * (1 + math.cos(math.pi * done)) / 2)
                told.advance()
    except KeyboardInterrupt:
        if not losses:
            raise
    trainable.before_step()
    return losses


def _elapsed(began: float, how: Training) -> float:
    return (time.perf_counter() - began) / (60 * how.minutes) if how.minutes else 0.0


def _backward(lessons: Lessons, examples: list[Example], how: Training) -> float:
    """Add the gradients of some examples, one after the other to save memory; returns their mean loss."""
    total = 0.0
    for example in examples:
        with reduced(example.output.device, how.reduced):
            loss = lessons.loss(example) / len(examples)
        if not loss.isfinite():
            raise HastenError("Training has run away (the loss is no finite number); use a smaller learning rate.")
        loss.backward()
        total += float(loss.detach())
    return total


def _step(steps: torch.optim.Optimizer, rate: float) -> None:
    for group in steps.param_groups:
        group["lr"] = rate
    steps.step()


@contextmanager
def _frozen(networks: list[torch.nn.Module], trained: list[torch.Tensor]) -> Generator[None]:
    """Only what is trained gets gradients."""
    chosen = {id(parameter) for parameter in trained}
    others = [one for one in parameters_of(networks) if one.requires_grad and id(one) not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_()
