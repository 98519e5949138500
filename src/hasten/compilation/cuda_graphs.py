"""CUDA graphs for models that the host cannot feed fast enough: thousands of launches become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hasten.compilation.compiler import bound, call_block
from hasten.compilation.recording import CudaRecorder, RecordedCall, Recorder, Recordings
from hasten.core.errors import NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Seal, Stage, Technique, about
from hasten.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class CudaGraphs(Technique):
    """Records each denoiser's call once for every kind of input and replays it, so that the GPU never waits for Python.

    Static inputs are kept here: arguments are copied in, outputs out, other sizes are recorded as they come, and a
    change of weights, adapters or settings makes everything be recorded anew. The second replay of each recording
    is compared with a plain call. Works alone and with CompileBlocks or CompileWhole, whose kernels are recorded.
    Inputs, outputs and all intermediate results of one call stay allocated.
    """

    stage: ClassVar[Stage] = Stage.COMPILE
    seals: ClassVar[Seal] = "recorded"
    paper: ClassVar[str] = "https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs"

    max_graphs: int = field(
        default=4, metadata=about("kinds of calls (sizes, settings) that are recorded; others run plainly", ge=1)
    )

    def claims(self) -> tuple[str, ...]:
        """The recording, and the placement of the denoiser's weights, which must stay where they are."""
        return ("recording", *(f"residency:{name}" for name in ("transformer", "transformer_2", "unet", "prior")))

    def problems(self, target: Target) -> Iterable[str]:
        """Needs an NVIDIA GPU."""
        if target.device.type not in ("cuda", "meta"):
            yield (
                f"CUDA graphs need an NVIDIA GPU, and the model is on the {target.device.type}; "
                f"CompileBlocks and CompileWhole work here."
            )

    def apply(self, target: Target, patch: Patch) -> None:
        """Let a recording stand in for each denoiser's own call, inside all caches."""
        counts, recorder = patch.keep(Recordings()), self.recorder(target.device)
        for denoiser in target.denoisers:
            inner = denoiser.module._compiled_call_impl or bound(call_block, denoiser.module)
            call = RecordedCall(
                denoiser.module, inner, recorder, counts,
                limit=self.max_graphs, timestep=denoiser.spec.timestep, device=target.device,
            )  # fmt: skip
            patch.set(denoiser.module, "_compiled_call_impl", call, "its call is recorded and replayed")
            patch.undo(denoiser.module, "recordings are dropped", call.forget)

    def recorder(self, device: torch.device) -> Recorder:
        """What records on this device."""
        return CudaRecorder(device)

    def engaged(self, session: Session) -> Evidence:
        """Calls were replayed."""
        counts = session.state(self, Recordings)
        if not counts.replayed:
            why = next(iter(counts.plain), "the denoiser was not called")
            raise NotEngaged(f"no call was replayed: {why}.")
        return Evidence(summary=counts.in_words())

    def cost(self, target: Target, workload: Workload) -> Cost:
        """The gain is the time that the GPU waits for the host, which only a run can tell."""
        return Cost(replayed=True)
