"""Fine-tuning after quantization: the quantized model learns to answer as the plain one does, on the plain one's paths.

No data are needed: prompts are enough, and the model is its own teacher (distillation, https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from hasten.core.errors import HastenError, Refused, UnknownName
from hasten.core.files import ensure_writable
from hasten.core.patch import Patch
from hasten.core.recipe import Recipe, as_recipe
from hasten.core.session import Session, accelerate
from hasten.core.target import Target
from hasten.core.technique import Stage, Technique
from hasten.core.workload import Workload
from hasten.kernels.modules import Quantized
from hasten.measure.progress import Progress, Silent
from hasten.models import GENERAL_PROMPTS
from hasten.quantize.engine.linear_quantizer import LinearQuantizer, Replaced
from hasten.quantize.lora import LoRA
from hasten.quantize.training.trainable import Quantizations, Trainable, TrainedAdapters, TrainedWeights
from hasten.search.finetune.optimizer import OPTIMIZERS, optimizer
from hasten.search.finetune.teacher import Teacher
from hasten.search.finetune.trajectories import Example, parameters_of, record

Method = Literal["lora", "qat"]
RATES = {"lora": 2e-3, "qat": 1e-4}
"""Learning rates that suit the methods."""
WARM_UP = 20
"""Steps in which the rate rises."""
SMOOTHED = 20
"""Steps whose mean loss is told as that of the beginning and of the end."""


@dataclass(frozen=True)
class Training:
    """How long and how a model is trained."""

    steps: int = 600
    minutes: float | None = None
    """Ends training earlier; the learning rate falls to 0 by then."""
    pictures: int = 64
    """Pictures of the plain model whose steps are learnt from. Few make the model good at these alone."""
    batch: int = 4
    """Pictures in one step of training."""
    rank: int = 16
    """Of adapters."""
    rate: float | None = None
    """Learning rate; None is what suits the method."""
    optimizer: str = "auto"
    """auto, adamw or adamw8bit (bitsandbytes)."""
    seed: int = 0


@dataclass
class FineTuned:
    """What training gave. `recipe` holds it for `hasten.accelerate`; tuned weights have to be put in first."""

    method: Method
    file: Path
    recipe: Recipe
    losses: list[float] = field(default_factory=list[float])
    """Mean squared difference to the teacher's output at each step, relative to the mean square of that output."""
    seconds: float = 0.0
    trained: int = 0
    """Numbers that were trained."""

    @property
    def loss_before(self) -> float:
        """The mean loss of the first steps."""
        return sum(self.losses[:SMOOTHED]) / len(self.losses[:SMOOTHED])

    @property
    def loss_after(self) -> float:
        """The mean loss of the last steps."""
        return sum(self.losses[-SMOOTHED:]) / len(self.losses[-SMOOTHED:])

    def install(self, pipeline: object) -> None:
        """Put tuned weights (method "qat") into a plain pipeline for good; quantizing it gives the trained codes."""
        if self.method != "qat":
            raise HastenError("Adapters are not installed: apply the recipe, or load the file as a LoRA.")
        install(pipeline, self.file)


def finetune(
    pipeline: object,
    recipe: Recipe | Technique | str,
    file: str | Path,
    *,
    method: Method = "lora",
    workload: Workload | None = None,
    training: Training | None = None,
    progress: Progress | None = None,
) -> FineTuned:
    """Train a quantized pipeline to give the plain one's outputs, and write what was learnt to `file` (safetensors).

    The pipeline is left as it came. Interrupting (Ctrl-C) ends training early and keeps what has been learnt.

    Args:
        pipeline: a plain diffusers pipeline.
        recipe: holds one quantizer or more; what comes after quantization (caches, compilation) is left out in
            training, and is in the recipe of the result.
        file: where adapters ("lora": a usual LoRA file) or tuned weights ("qat") go.
        method: "lora" trains adapters beside frozen codes; "qat" the weights themselves through the rounding.
        workload: prompts to train with, steps, size and guidance.
        training: how long and how.
        progress: is told of each picture and step.
    """
    if method not in RATES:
        raise UnknownName("method of fine-tuning", method, RATES)
    whole, how, told = as_recipe(recipe), training or Training(), progress or Silent()
    work = workload or Workload(prompts=GENERAL_PROMPTS)
    early = Recipe(tuple(_with_originals(item) for item in whole if item.stage <= Stage.WEIGHTS))
    if not any(isinstance(item, LinearQuantizer) for item in early):
        raise Refused([f"{whole} quantizes nothing, so that there is nothing to win back."])
    if how.optimizer not in OPTIMIZERS:
        raise UnknownName("optimizer", how.optimizer, OPTIMIZERS)
    path = Path(file)
    ensure_writable(path.parent)
    told.start(1, how.pictures + how.steps)
    told.row("the plain model draws")
    examples = record(pipeline, work, how.pictures, how.batch, told)
    names = {name: list(part.state_dict()) for name, part in Target.of(pipeline).modules.items()}
    result = FineTuned(method, path, whole)
    with accelerate(pipeline, early) as session, _changes() as patch:
        layers = list(quantized_layers(session))
        trainable = (
            TrainedAdapters(layers, how.rank, patch) if method == "lora" else TrainedWeights(layers, names, patch)
        )
        told.row("training")
        teacher = Teacher(session.target, [site for _, site, _ in layers])
        _train(teacher, trainable, examples, how, how.rate or RATES[method], result, told)
        trainable.save(path)
    if method == "lora":
        result.recipe = whole | LoRA(adapters=(str(path),))
    return result


def quantized_layers(session: Session) -> Quantizations:
    """The layers that a session's quantizers have replaced, less those replaced once more."""
    for technique in session.recipe:
        if isinstance(technique, LinearQuantizer):
            for site, module in session.state(technique, Replaced).places:
                if isinstance(module, Quantized):  # not a layer of another library
                    yield technique, site, module


def install(pipeline: object, file: str | Path) -> None:
    """Put tuned weights from a file into the components of a plain pipeline, for good."""
    from safetensors.torch import load_file

    tensors, target = load_file(file), Target.of(pipeline)
    own = {f"{c}.{n}": weight for c, part in target.modules.items() for n, weight in part.named_parameters()}
    for name, tensor in tensors.items():
        if name not in own:
            raise UnknownName("weight", name, own)
        if own[name].shape != tensor.shape:
            raise HastenError(f"{file}: {name} has the shape {list(tensor.shape)}, not {list(own[name].shape)}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


@contextmanager
def _changes() -> Generator[Patch]:
    def no_clock() -> Any:
        raise AssertionError("training reads no clock")

    patch = Patch({}, no_clock)
    try:
        yield patch
    finally:
        patch.close()


def _with_originals(technique: Technique) -> Technique:
    """The teacher needs the original weights at hand."""
    return replace(technique, originals="keep") if isinstance(technique, LinearQuantizer) else technique


def _train(
    teacher: Teacher,
    trainable: Trainable,
    examples: list[Example],
    how: Training,
    rate: float,
    result: FineTuned,
    progress: Progress,
) -> None:
    networks, device = [denoiser.module for denoiser in teacher.target.denoisers], teacher.target.device
    parameters, began = trainable.parameters(), time.perf_counter()
    draws = _order(len(examples), how)
    result.trained = sum(parameter.numel() for parameter in parameters)
    steps = optimizer(how.optimizer, parameters, device)
    try:
        with _frozen(networks, parameters), torch.enable_grad():
            for step in range(how.steps):
                done = _done(step, how, time.perf_counter() - began)
                if done >= 1:
                    break
                trainable.before_step()
                output, inside = teacher.losses(examples[draws[step]].on(device))
                _step(
                    steps, output + inside, rate * min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
                )
                result.losses.append(float(output.detach()))
                progress.advance()
    except KeyboardInterrupt:
        if not result.losses:
            raise
    trainable.before_step()
    result.seconds = time.perf_counter() - began


def _order(examples: int, how: Training) -> list[int]:
    """Which example each step learns from: all of them in a new order, again and again."""
    generator, rounds = torch.Generator().manual_seed(how.seed), -(-how.steps // examples)
    return torch.cat([torch.randperm(examples, generator=generator) for _ in range(rounds)]).tolist()


def _done(step: int, how: Training, seconds: float) -> float:
    """The share of training that is over, by steps or by time."""
    return max(step / how.steps, seconds / (60 * how.minutes) if how.minutes else 0.0)


def _step(steps: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    if not loss.isfinite():
        raise HastenError("Training has run away (the loss is no finite number); use a smaller learning rate.")
    for group in steps.param_groups:
        group["lr"] = rate
    steps.zero_grad()
    loss.backward()
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
