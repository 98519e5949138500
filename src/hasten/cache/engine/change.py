"""How much something changed from step to step: the one measure all dynamic policies share.

The measure is the relative L1 distance mean|a - b| / mean|b|, per sample, summed in float32. Of large streams an
evenly spaced sample of positions is compared, which also keeps the anchor small. Ranks that share one picture sum
numerators and denominators over their group, so that all decide alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

POSITIONS = 1024
"""At most about twice so many tokens or pixels of a sample are compared."""

OverBatch = Literal["max", "mean"]


def sampled(stream: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """An evenly spaced sample of positions of `stream` [B, N, C] or [B, C, H, W], less `before` where given."""
    picked = _positions(stream)
    return picked.clone() if before is None else picked - _positions(before)


def _positions(stream: torch.Tensor) -> torch.Tensor:
    if stream.dim() < 3:
        return stream
    tokens = stream if stream.dim() == 3 else stream.flatten(2).transpose(1, 2)
    return tokens[:, :: max(1, tokens.shape[1] // POSITIONS)]


def relative_change(value: torch.Tensor, anchor: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Relative L1 distance per sample, shape [batch], float32: mean|value - anchor| / mean|anchor|."""
    change = (value - anchor).abs().flatten(1).sum(1, dtype=torch.float32)
    size = anchor.abs().flatten(1).sum(1, dtype=torch.float32)
    if group is not None:
        both = torch.stack([change, size])
        torch.distributed.all_reduce(both, group=group)
        change, size = both.unbind()
    return change / size.clamp_min(1e-12)


def over_batch(change: torch.Tensor, how: OverBatch) -> torch.Tensor:
    """One number for a batch, still on its device: that of the sample that changed most, or the mean."""
    return change.max() if how == "max" else change.mean()


class Reading:
    """A number on its way from the GPU to the host; it arrives without stalling the GPU when read a step later."""

    def __init__(self, number: torch.Tensor) -> None:
        self._number, self._arrived = number, None
        if number.is_cuda:
            self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def value(self) -> float:
        """The number; waits for it when it has not arrived yet."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number.item())


def group_of(module: nn.Module) -> ProcessGroup | None:
    """The ranks that work on parts of one picture, as diffusers' context parallelism notes them on the model."""
    config: Any = getattr(module, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    mesh = getattr(context, "_flattened_mesh", None)
    return cast("ProcessGroup", mesh.get_group()) if mesh is not None else None
