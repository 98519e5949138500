"""Decodes the pictures of a batch one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from hasten.core.errors import NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique
from hasten.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class VaeSlicing(Technique):
    """Has the VAE decode the pictures of a batch one by one: the memory of one picture, whatever the batch.

    Only rounding can differ. A single picture is decoded as before; `VaeTiling` is for pictures that are too large.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    paper: ClassVar[str] = "https://huggingface.co/docs/diffusers/optimization/memory"

    def claims(self) -> tuple[str, ...]:
        """How the VAE cuts batches."""
        return ("vae.slices",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a VAE that can slice."""
        if not hasattr(type(target.vae), "enable_slicing"):
            found = (
                f"its {type(target.vae).__name__} cannot decode slices" if target.vae is not None else "it has no VAE"
            )
            yield f"{target.title}: {found}."

    def apply(self, target: Target, patch: Patch) -> None:
        """Set the VAE's own switch, and count what it decodes."""
        seen = patch.keep(_Batches())
        patch.set(target.vae, "use_slicing", True, "pictures of a batch are decoded one by one")
        patch.around(target.vae, seen.decode, "decoded batches are counted", method="decode")
        patch.around(target.vae, seen.part, "decoded slices are counted", method="_decode")

    def engaged(self, session: Session) -> Evidence:
        """A batch came, and was decoded in parts."""
        seen = session.state(self, _Batches)
        if not seen.sliced:
            raise NotEngaged("no batch of several pictures came." if seen.batches else "nothing was decoded.")
        return Evidence(summary=f"{seen.sliced} of {seen.batches} batches were decoded one picture at a time")

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Decoding holds the activations of one picture; a batch of one stays as it is."""
        return Cost()


class _Batches:
    """Calls of the VAE: batches, those decoded in several parts, and the parts of the current one."""

    def __init__(self) -> None:
        self.batches = self.sliced = self._parts = 0

    def decode(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._parts = 0
        result = call(*args, **kwargs)
        self.batches += 1
        self.sliced += self._parts > 1
        return result

    def part(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._parts += 1
        return call(*args, **kwargs)
