"""A pipeline that serves requests of every kind, and what must hold of each call whatever came before it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from torch import nn

from hasten.core.registry import specs
from hasten.core.spec import InputSize
from hasten.core.technique import Technique

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "multistep": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
}
Guidance = Literal["none", "batched", "named", "unnamed"]
LABELS = ("cond", "uncond")


@dataclass(frozen=True)
class Request:
    """One request, as a user, a pipeline and a server together make it."""

    steps: int = 4
    scheduler: str = "flow"
    guidance: Guidance = "none"
    """Not at all, in one batch, in calls of named contexts, or in calls that nothing names."""
    uncond_first: bool = False
    unguided: tuple[int, ...] = ()
    """Steps that go without guidance."""
    batch: int = 1
    size: int = 8
    begin: int = 0
    """Steps left out at the beginning, as image-to-image does."""
    lora: float = 0.0
    """Strength of the adapter; 0 switches it off."""
    lora_later: tuple[int, float] = (0, 0.0)
    """From which step on it has which other strength."""
    fails_at: int | None = None
    """In this step an exception is raised inside the denoiser."""
    prompt: int = 0

    def labels(self, step: int) -> tuple[str, ...]:
        """The denoiser calls of a step."""
        if self.guidance in ("none", "batched") or step in self.unguided:
            return ("cond",)
        return LABELS[::-1] if self.uncond_first else LABELS

    def strength(self, step: int) -> float:
        """Of the adapter, in a step."""
        begin, later = self.lora_later
        return later if begin and step >= begin else self.lora

    def calls_are_doubled(self, step: int) -> bool:
        """Does the only call of this step hold both guidance branches?"""
        return self.guidance == "batched" and step not in self.unguided


@dataclass(frozen=True)
class Call:
    """One denoiser call that has returned: for what, with which settings, and whether all was computed."""

    step: int
    label: str
    kind: object
    full: bool


@functools.cache
def _template(architecture: str, seed: int) -> Any:
    """A tiny denoiser with a LoRA adapter in it, switched off."""
    from peft import LoraConfig

    model: Any = specs()[architecture].build_tiny(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False), "style")
    model.disable_adapters()
    return model


class Service:
    """A pipeline of one denoiser and several schedulers, that notes how much of each call was computed."""

    def __init__(self, architecture: str, seed: int = 0) -> None:
        self.spec = specs()[architecture]
        self.denoiser: Any = copy.deepcopy(_template(architecture, seed))
        self._watch()
        self.renew()

    def renew(self) -> Service:
        """As good as new, which is quicker than making a new one: other schedulers, nothing served."""
        self.schedulers = {key: getattr(diffusers, name)(**given) for key, (name, given) in SCHEDULERS.items()}
        self.scheduler: Any = self.schedulers["flow"]
        self.components = {"unet" if self.spec.unet else "transformer": self.denoiser, "scheduler": self.scheduler}
        self.denoiser.disable_adapters()
        self.calls: list[Call] = []
        self.served = self._ran = 0
        self._failing = False
        return self

    def _watch(self) -> None:
        layers = _layers(self.denoiser)
        for layer in layers:
            layer.register_forward_hook(self._count)
        layers[len(layers) // 2].register_forward_pre_hook(self._fail)
        layers[-1].register_forward_pre_hook(self._fail)

    def _count(self, *_: object) -> None:
        self._ran += 1

    def _fail(self, *_: object) -> None:
        if self._failing:
            raise InterruptedError

    def run(self, request: Request) -> list[torch.Tensor]:
        """Serve a request; returns the outputs of all calls, also of one that fails."""
        return [output for outputs in self.steps(request) for output in outputs]

    def steps(self, request: Request) -> Generator[list[torch.Tensor]]:
        """Serve a request step by step."""
        self.calls = []
        self.scheduler = scheduler = self.schedulers[request.scheduler]
        noise = torch.Generator().manual_seed(request.prompt)
        scheduler.set_timesteps(request.steps)
        begin = request.begin * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        given = self._texts(request)
        picture = given["cond"][self.spec.latents]
        for step, timestep in enumerate(scheduler.timesteps[begin:]):
            self._adapt(request.strength(step))
            self._failing = step == request.fails_at
            try:
                outputs = self._step(request, step, given, _scaled(scheduler, picture, timestep), timestep)
            except InterruptedError:
                return
            yield outputs
            picture = self._advance(scheduler, outputs, timestep, picture, noise)

    def _texts(self, request: Request) -> dict[str, dict[str, Any]]:
        size = InputSize(batch=request.batch, height=request.size, width=request.size, text_tokens=4)
        one, other = (self.spec.example(self.spec.tiny, size, 2 * request.prompt + index) for index in range(2))
        same = other | {self.spec.latents: one[self.spec.latents]}
        return {"cond": one, "uncond": same}

    @torch.no_grad()
    def _step(
        self, request: Request, step: int, given: dict[str, Any], picture: torch.Tensor, timestep: torch.Tensor
    ) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        for label in request.labels(step):
            arguments = given[label] | {self.spec.latents: picture}
            if request.calls_are_doubled(step):
                arguments = {key: _doubled(key, value) for key, value in arguments.items()}
            like = arguments[self.spec.timestep]
            arguments[self.spec.timestep] = (
                (timestep / (1000 if like.is_floating_point() else 1)).to(like).expand(like.shape)
            )
            outputs.append(self._call(request, step, label, arguments))
        return outputs

    def _call(self, request: Request, step: int, label: str, arguments: dict[str, Any]) -> torch.Tensor:
        named = request.guidance == "named" and hasattr(self.denoiser, "cache_context")
        self._ran = 0
        with self.denoiser.cache_context(label) if named else nullcontext():
            output = self.denoiser(**arguments, return_dict=False)[0]
        self.served += 1
        kind = (arguments[self.spec.latents].shape, request.strength(step))
        self.calls.append(Call(step, label, kind, self._ran >= _layers_of(self.spec.name)))
        return output.clone()

    def _adapt(self, strength: float) -> None:
        if strength:
            self.denoiser.enable_adapters()
            self.denoiser.set_adapters(["style"], [strength])
        else:
            self.denoiser.disable_adapters()

    @torch.no_grad()
    def _advance(self, scheduler: Any, outputs: list[Any], timestep: Any, picture: Any, noise: Any) -> Any:
        guess = torch.stack(outputs).mean(0)[: picture.shape[0], : picture.shape[1]]
        extra = {"generator": noise} if isinstance(scheduler, diffusers.EulerAncestralDiscreteScheduler) else {}
        return scheduler.step(guess, timestep, picture, return_dict=False, **extra)[0]


def _scaled(scheduler: Any, picture: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What the scheduler feeds the denoiser."""
    return scheduler.scale_model_input(picture, timestep) if hasattr(scheduler, "scale_model_input") else picture


def _doubled(name: str, value: Any) -> Any:
    shared = name.endswith("_ids") and isinstance(value, torch.Tensor) and value.dim() == 2
    single = shared or not isinstance(value, torch.Tensor) or not value.dim()
    return value if single else torch.cat([value, value])


def _layers(denoiser: nn.Module) -> list[nn.Module]:
    kinds = nn.Linear | nn.Conv2d | nn.Conv3d
    return [part for name, part in denoiser.named_modules() if isinstance(part, kinds) and "lora" not in name]


@functools.cache
def _layers_of(architecture: str) -> int:
    """How many layers run in a call that is computed. Looking at the front may run one twice."""
    spec, ran = specs()[architecture], list[object]()
    model = copy.deepcopy(_template(architecture, 0))
    for layer in _layers(model):
        layer.register_forward_hook(lambda module, *_: ran.append(module))
    model(**spec.example(spec.tiny))
    return len(ran)


def check(calls: list[Call]) -> None:
    """What holds of every request: nothing is reused that belongs to another branch, another kind of call or an
    older computed step, and one decision holds for all branches of a step."""
    led = {call.step: call for call in reversed(calls)}
    for index, call in enumerate(calls):
        leader = led[call.step]
        assert call.full or not leader.full, f"{call} beside a computed {leader}"
        if not call.full:
            own = [c.step for c in calls[:index] if c.full and (c.label, c.kind) == (call.label, call.kind)]
            assert own, f"{call} reuses what belongs to another branch or kind of call"
            latest = max((step for step, first in led.items() if step < call.step and first.full), default=-1)
            assert own[-1] >= latest, f"{call} reuses step {own[-1]} though step {latest} was computed"


@functools.cache
def pipeline(architecture: str, seed: int, role: str) -> Service:
    """A pipeline for each role: copying one takes longer than many requests."""
    return Service(architecture, seed)


@functools.lru_cache(maxsize=128)
def served_afresh(architecture: str, seed: int, technique: Technique | None, request: Request) -> list[torch.Tensor]:
    """The outputs of a request that nothing came before, on a pipeline with the technique, or an untouched one."""
    from hasten.core.session import accelerate

    service = pipeline(architecture, seed, "short-lived").renew()
    if technique is None:
        return service.run(request)
    with accelerate(service, technique):
        return service.run(request)
