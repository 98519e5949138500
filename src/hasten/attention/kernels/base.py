"""One way to compute attention: what it can take, said as facts, and the call that refuses everything else by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from hasten.attention.bias import Bias, check_sizes
from hasten.attention.call import MASK, AttentionCall
from hasten.attention.kernels.packages import Package, package_obstacle
from hasten.attention.kernels.reduction import reduced
from hasten.core.diagnosis import Obstacle
from hasten.core.errors import Refused
from hasten.kernels.coded_heads import CodedHeads

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bias | None, float, float | None], torch.Tensor]
"""(query, key, value [batch, heads, tokens, head size], bias, dropout, scale) -> like query."""

RunCodes = Callable[[CodedHeads, float | None], torch.Tensor]
"""(8-bit query, key and value, scale) -> [batch, tokens, heads, head size]."""
HALF = (torch.float16, torch.bfloat16)
MASKS = Literal["yes", "no", "on the CPU"]


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """Facts about a kernel, and how to run it. Adding one is an entry in `kernels/__init__.py`."""

    name: str
    about: str
    run: Run
    devices: tuple[str, ...] = ("cuda",)
    """Device types it runs on."""
    dtypes: tuple[torch.dtype, ...] = ()
    """On a GPU, the types it takes; empty for any floating-point type."""
    capability: tuple[int, ...] = ()
    """Major compute capabilities of the NVIDIA GPUs it runs on; empty for any."""
    largest_head: int | None = None
    other_value_size: bool = False
    """May the values' size differ from the queries'?"""
    masks: MASKS = "no"
    """Does it take a tensor as bias, and so every description as a matrix?"""
    biases: frozenset[str] = frozenset()
    """Descriptions that it takes without a matrix on a GPU; `BlockDiagonal` is taken block by block by all."""
    grouped: bool = True
    """Does it take fewer key heads than query heads? Otherwise the keys are repeated for it."""
    dropout: bool = False
    gradients: bool = False
    lossy: bool = False
    """Does the result differ by more than rounding?"""
    codes: RunCodes | None = None
    """Computes on 8-bit numbers as the pass before attention writes them, if it can; without a bias."""
    codes_size: int = 1
    """Head sizes that it takes so are multiples of this."""
    package: Package | None = None
    probe: Callable[[torch.device, torch.dtype], Obstacle | None] | None = None
    """A closer look at device and package, beyond these facts."""
    lacks: Callable[[AttentionCall], str | None] | None = None
    """What the installed release cannot do of a call, beyond these facts; a sentence without its end."""
    measured: bool = True
    """Is it worth timing where the kernel is chosen by measurement?"""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None = None,
        dropout: float = 0.0, scale: float | None = None, call: AttentionCall | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Compute attention on tensors [batch, heads, tokens, head size]; raises Refused for what it cannot take.

        `call` is the description of these arguments, where the caller has it already.
        """
        check_sizes(bias, query.shape[2], key.shape[2])
        if problem := self.refuses(call or AttentionCall.of(query, key, value, bias, dropout)):
            raise Refused((f"{problem}.",))
        if not self.grouped and key.shape[1] != query.shape[1]:
            key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
        if bias is None:
            return self.run(query, key, value, None, dropout, scale)
        if isinstance(bias, torch.Tensor) and bias.dim() in (1, 3):  # PyTorch's kernels take 2 or 4 dimensions
            bias = bias[(None,) * (4 - bias.dim())]
        return reduced(self.run, "BlockDiagonal" in self.native(query.device))(query, key, value, bias, dropout, scale)

    def native(self, device: torch.device) -> frozenset[str]:
        """The descriptions taken without a matrix on a device."""
        return self.biases if device.type == "cuda" else frozenset()

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> Obstacle | None:
        """Say what keeps it from running on a device with a type, or None."""
        if sentence := self._unfit(device, dtype):
            return Obstacle("unfit", sentence)
        if device.type == "meta":
            return None
        found = package_obstacle(self.name, self.package) if self.package else None
        return found or (self.probe(device, dtype) if self.probe else None)

    def problem(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """The sentence of `obstacle`, or None."""
        found = self.obstacle(device, dtype)
        return found.sentence if found else None

    def refuses(self, call: AttentionCall) -> str | None:
        """Say why this call cannot be served, naming what is asked, or None."""
        return refusal(self, call)

    def _unfit(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type not in (*self.devices, "meta"):
            return f"the {self.name} kernel runs on {' and '.join(self.devices)}, not on {device.type}"
        if device.type != "cuda":
            return None
        if self.dtypes and dtype not in self.dtypes:
            wanted = " or ".join(str(one).removeprefix("torch.") for one in self.dtypes)
            return f"the {self.name} kernel needs {wanted} on a GPU, not {str(dtype).removeprefix('torch.')}"
        major = torch.cuda.get_device_capability(device)[0] if self.capability else 0
        if self.capability and major not in self.capability:
            wanted = " or ".join(f"{one}.x" for one in self.capability)
            return f"the {self.name} kernel needs a GPU of compute capability {wanted}, not {major}.x"
        return None

    def takes_codes(self, call: AttentionCall) -> bool:
        """Can the pass before attention round for it?"""
        return self.codes is not None and not call.bias and call.head_size % self.codes_size == 0

    def unmet(self, call: AttentionCall) -> Iterator[str]:
        """What is asked of it that it does not have, whatever the device."""
        masked = self.masks == "yes" or (self.masks == "on the CPU" and call.device.type == "cpu")
        if call.heads % call.key_heads:
            yield f"{call.heads} query heads cannot share {call.key_heads} key heads evenly"
        if call.bias == MASK and not masked:
            yield f"the {self.name} kernel takes no mask, and attention of {call.in_words()} is asked for"
        elif call.bias not in ("", "BlockDiagonal") and not masked and not self._describes(call):
            yield f"the {self.name} kernel takes no {call.bias} of {call.queries} queries and {call.keys} keys"
        if self.largest_head and max(call.head_size, call.value_size) > self.largest_head:
            yield f"the {self.name} kernel takes head sizes up to {self.largest_head}, not {call.head_size}"
        if call.value_size != call.head_size and not self.other_value_size:
            yield f"the {self.name} kernel needs values of the queries' size {call.head_size}, not {call.value_size}"
        if call.dropout and not self.dropout:
            yield f"the {self.name} kernel has no dropout"
        if call.gradients and not self.gradients:
            yield f"the {self.name} kernel computes no gradients"

    def _describes(self, call: AttentionCall) -> bool:
        """A triangle of as many queries as keys, to which every `LowerTriangular` comes down, may be all it takes."""
        if call.bias == "LowerTriangularFromBottomRight" and call.queries >= call.keys:
            return "LowerTriangular" in self.native(call.device)
        return call.bias in self.native(call.device)


@functools.lru_cache(maxsize=4096)
def refusal(kernel: AttentionKernel, call: AttentionCall) -> str | None:
    """Why a kernel cannot serve a call, or None; remembered, since it is asked at every call."""
    found = kernel.problem(call.device, call.dtype) or next(kernel.unmet(call), None)
    return found or (kernel.lacks(call) if kernel.lacks and call.device.type == "cuda" else None)
