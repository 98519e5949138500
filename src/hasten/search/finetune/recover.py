"""Fine-tuning after quantization: the quantized model learns to answer as the plain one does, on the plain one's paths.

No data are needed: prompts are enough, and the model is its own teacher (distillation, https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

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
from hasten.quantize.engine.sites import Site
from hasten.quantize.lora import LoRA
from hasten.quantize.training.trainable import Quantizations, TrainedAdapters, TrainedWeights
from hasten.search.finetune.effects import Effects, measure
from hasten.search.finetune.learning import Lessons, Training, learn
from hasten.search.finetune.optimizer import OPTIMIZERS
from hasten.search.finetune.trajectories import Example, record, reduced, subjects

Method = Literal["lora", "qat"]
RATES = {"lora": 1e-3, "qat": 1e-4}
"""Learning rates that suit the methods."""
SMOOTHED = 20
"""Steps whose mean loss is told as that of the beginning and of the end."""


@dataclass
class FineTuned:
    """What training gave. `recipe` holds it for `hasten.accelerate`; tuned weights have to be put in first."""

    method: Method
    file: Path
    recipe: Recipe
    losses: list[float] = field(default_factory=list[float])
    """Mean squared error of calls at each step, relative to that of such calls before training."""
    effects: Effects | None = None
    """What the error of each call did to pictures before training."""
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
    whole, how, told, path = as_recipe(recipe), training or Training(), progress or Silent(), Path(file)
    work = workload or Workload(prompts=GENERAL_PROMPTS)
    early = _checked(whole, method, how)
    ensure_writable(path.parent)
    told.start(1, how.pictures + how.steps)
    told.row("the plain model draws")
    short = work.replace(steps=min(how.visits, work.steps))
    with reduced(Target.of(pipeline).device, how.reduced):
        examples = record(pipeline, short, how.pictures, how.batch, told)
    names = {name: list(part.state_dict()) for name, part in Target.of(pipeline).modules.items()}
    result = FineTuned(method, path, whole)
    with accelerate(pipeline, early) as session, _changes() as patch:
        layers = list(quantized_layers(session))
        told.row("what the error of each call does")
        result.effects = _effects(session.target, [site for _, site, _ in layers], short, examples, how)
        trainable = (
            TrainedAdapters(layers, how.rank, patch) if method == "lora" else TrainedWeights(layers, names, patch)
        )
        told.row("training")
        result.trained, began = sum(one.numel() for one in trainable.parameters()), time.perf_counter()
        lessons = Lessons(session.target, examples, result.effects, work.guidance)
        result.losses = learn(lessons, trainable, session.target, how, how.rate or RATES[method], told)
        result.seconds = time.perf_counter() - began
        trainable.save(path)
    if method == "lora":
        result.recipe = whole | LoRA(adapters=(str(path),))
    return result


def _checked(whole: Recipe, method: str, how: Training) -> Recipe:
    """What is applied in training: all up to quantization, with the original weights kept at hand."""
    if method not in RATES:
        raise UnknownName("method of fine-tuning", method, RATES)
    early = Recipe(tuple(_with_originals(item) for item in whole if item.stage <= Stage.WEIGHTS))
    if not any(isinstance(item, LinearQuantizer) for item in early):
        raise Refused([f"{whole} quantizes nothing, so that there is nothing to win back."])
    if how.optimizer not in OPTIMIZERS:
        raise UnknownName("optimizer", how.optimizer, OPTIMIZERS)
    return early


def _effects(target: Target, sites: list[Site], workload: Workload, examples: list[Example], how: Training) -> Effects:
    """Measured with the pictures of the first call of the pipeline."""
    first, calls = subjects(workload, 0, min(how.batch, how.pictures)), 1 + max(one.call for one in examples)
    with reduced(target.device, how.reduced):
        return measure(target, sites, workload, examples[:calls], first)


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
