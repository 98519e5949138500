"""Attention on 8-bit numbers: faster on cards that multiply them faster, at the price of a changed picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hasten.attention.backend import in_words, unknown_modules, unusable
from hasten.attention.choosing import CHOICES
from hasten.attention.heads import TAKEN, FromHeads, may_take_codes
from hasten.attention.kernels import KERNELS, LOSSY
from hasten.attention.operator import PLAIN
from hasten.attention.redirect import Counted, redirect
from hasten.core.errors import NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload
from hasten.kernels.coded_heads import CARRIED

_AUTO = "auto_8bit"


@dataclass(frozen=True, kw_only=True)
class EightBitAttention(Technique):
    """Computes attention on 8-bit numbers with a scale per head (FlashAttention 3 on float8, SageAttention).

    The picture changes. Calls that no 8-bit kernel takes (with a mask, say) or with fewer keys than `least_keys`
    stay as they are and are counted as such. The float8 reference computes the same with plain operations on any
    device, slowly: it shows what 8 bits do to a picture before there is a card that gains from them. Where
    `FusedBlocks` norms and rotates queries and keys, the same pass rounds them for the float8 kernels.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossy: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.08608"

    kernel: Literal["auto", "flash3_float8", "sage", "float8_reference"] = field(
        default="auto", metadata=about("the kernel, or auto: the fastest, by measuring", trial="float8_reference")
    )
    least_keys: int = field(
        default=512, metadata=about("attention to fewer keys stays as it is: it takes little time", ge=0, trial=0)
    )

    def claims(self) -> tuple[str, ...]:
        """The attention kernel of the whole denoiser."""
        return ("attention.kernel",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs an 8-bit kernel for this device and type, and known attention modules."""
        if self.kernel == "auto":
            yield from _none_usable(target)
        else:
            yield from unusable(self.kernel, target, LOSSY)
        yield from unknown_modules(target)

    def apply(self, target: Target, patch: Patch) -> None:
        """Redirect the attention calls that an 8-bit kernel takes."""
        counted = redirect(target, patch, self._asked, "attention is computed on 8-bit numbers", self.least_keys)
        if may_take_codes(self._asked, target.device, target.dtype):
            from_heads = FromHeads(self._asked, self.least_keys, counted.eager)
            for denoiser in target.denoisers:
                for _, module in denoiser.of_class(*denoiser.spec.attention):
                    patch.set(module, CARRIED, from_heads, "takes 8-bit numbers from the pass before, if that is fused")

    @property
    def _asked(self) -> str:
        return _AUTO if self.kernel == "auto" else self.kernel

    def engaged(self, session: Session) -> Evidence:
        """Attention calls were counted where the kernel is called."""
        state = session.state(self, Counted)
        counted, left = state.of(self._asked), state.of(PLAIN).total()
        if not counted:
            raise NotEngaged(f"no attention call was computed on 8-bit numbers ({left} stayed as they were).")
        done = f"{counted.total()} attention calls went to the {self.kernel} kernel"
        words = [in_words(_AUTO, counted) if self.kernel == "auto" else done]
        if taken := state.of(TAKEN).total():
            words.append(f"{taken} of them took {TAKEN}")
        return Evidence(summary="; ".join([*words, f"{left} stayed as they were"]))

    def cost(self, target: Target, workload: Workload) -> Cost:
        """The gain depends on shapes and device; memory does not grow."""
        return Cost(basis="measured")


def _none_usable(target: Target) -> Iterator[str]:
    problems = [KERNELS[name].problem(target.device, target.dtype) for name in CHOICES[_AUTO].names]
    if all(problems):
        reasons = "; ".join(filter(None, problems))
        yield f"no 8-bit attention kernel runs here: {reasons}. To see its effect, use kernel='float8_reference'."
