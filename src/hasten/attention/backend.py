"""Chooses the kernel that computes attention, on every architecture, without process-wide settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hasten.attention.call import AttentionCall
from hasten.attention.choosing import CHOICES, known
from hasten.attention.kernels import KERNELS, LOSSLESS
from hasten.attention.redirect import Counted, redirect
from hasten.core.errors import NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload

Name = Literal[
    "auto", "math", "flash", "efficient", "cudnn", "flash2", "flash3", "flash4", "xformers", "flex"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttentionBackend(Technique):
    """Sends each attention call of the denoiser to one chosen kernel, or to the one that measures fastest.

    Works on the call of `scaled_dot_product_attention` inside each attention module, so it reaches U-Nets, SD3,
    DiT and PixArt as well, where diffusers' `set_attention_backend` does nothing, and leaves no process-wide state.
    A call that the kernel cannot take (a mask, a head size) raises an error that names it; nothing is switched
    silently. "auto" checks and times the usable kernels the first time each kind of call is met (self- and
    cross-attention may get different ones), and remembers the result in the user's cache folder for this device and
    these versions. Kernels with 8-bit numbers change the picture and belong to `EightBitAttention`.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    paper: ClassVar[str] = (
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html"
    )

    name: Name = field(
        default="auto",
        kw_only=False,
        metadata=about(f"the kernel: auto (the fastest, by measuring) or {', '.join(LOSSLESS)}", trial="math"),
    )

    def claims(self) -> tuple[str, ...]:
        """The attention kernel of the whole denoiser."""
        return ("attention.kernel",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a kernel for this device and type, and known attention modules."""
        if self.name != "auto":
            yield from unusable(self.name, target, LOSSLESS)
        yield from unknown_modules(target)

    def apply(self, target: Target, patch: Patch) -> None:
        """Redirect the attention call inside every attention module."""
        what = "the kernel that measures fastest" if self.name == "auto" else f"the {self.name} kernel"
        redirect(target, patch, self.name, f"attention is computed by {what}")

    def engaged(self, session: Session) -> Evidence:
        """Attention calls were counted where the kernel is called."""
        counted = session.state(self, Counted).of(self.name)
        if not counted:
            raise NotEngaged(f"no attention call reached the {self.name} kernel.")
        if self.name in CHOICES:
            return Evidence(summary=in_words(self.name, counted))
        return Evidence(summary=f"{counted.total()} attention calls went to the {self.name} kernel")

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Which kernel is fastest depends on shapes and device; memory does not grow."""
        return Cost(basis="measured")


def unusable(name: str, target: Target, among: Iterable[str]) -> Iterator[str]:
    """Say why a kernel cannot run on a target, and which could."""
    if problem := KERNELS[name].problem(target.device, target.dtype):
        usable = [n for n in among if KERNELS[n].problem(target.device, target.dtype) is None]
        yield f"{problem}; usable here: {', '.join(usable) or 'none'}."


def unknown_modules(target: Target) -> Iterator[str]:
    """Say which denoisers have attention modules that hasten does not know."""
    for denoiser in target.denoisers:
        if not denoiser.spec.attention:
            yield f"hasten does not know the attention modules of {denoiser.spec.model_class}."


def in_words(asked: str, counted: Counter[AttentionCall]) -> str:
    """For each kind of call: how many there were, the kernel chosen, and what was tried."""
    parts = [f"{counted.total()} attention calls went to the kernel that measured fastest"]
    parts += [f"{number} x {call.in_words()}: {_choice(asked, call)}" for call, number in counted.most_common()]
    return "; ".join(parts)


def _choice(asked: str, call: AttentionCall) -> str:
    choice = known(asked, call)
    if choice is None:
        return "forgotten"
    times = [(t.milliseconds, t.kernel) for t in choice.trials if t.milliseconds is not None]
    tried = ", ".join(f"{kernel} {ms:.3g} ms" for ms, kernel in sorted(times))
    failed = [f"{t.kernel} not, since {t.problem}" for t in choice.trials if t.problem and t.error is not None]
    tail = ", remembered" if choice.recalled else ""
    return f"{choice.kernel} ({', '.join(filter(None, [tried or 'not timed', *failed]))}{tail})"
