"""Traces a call on the meta device: every operation with its work, and the peak of memory that is alive at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

Kind = Literal["product", "attention", "pass", "view"]
Access = tuple[int, int]
"""A storage's number and the bytes that are read or written of it."""

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_convolution", "linear", "convolution_overrideable")
_LOOKUPS = ("embedding", "index_select", "index", "gather")
_ROUNDED_TO = 512
"""Bytes to which PyTorch's allocator for GPUs rounds up."""


@dataclass(frozen=True)
class Operation:
    """One operation: what it reads and writes, and the work it does.

    `product` is a matrix product or convolution (`shape` is batch, rows, columns, inner size), `attention` a fused
    kernel (`shape` is heads, queries, keys, head size), `pass` any other kernel, `view` no kernel at all.
    """

    kind: Kind
    name: str
    dtype: torch.dtype
    flops: int
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    inside: bool = False
    """Is it done by a block that repeats, the unit of regional compilation?"""

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(size for _, size in (*self.reads, *self.writes))


@dataclass
class Trace:
    """What one call does: its operations in order, and peak and rest of the memory that it takes."""

    operations: list[Operation] = field(default_factory=list[Operation])
    peak_bytes: int = 0
    """Most bytes alive at one time, without weights and arguments."""
    output_bytes: int = 0
    modules: int = 0
    """Calls of modules, which cost the host time."""

    @property
    def flops(self) -> int:
        """Multiply-adds, counted twice as usual."""
        return sum(item.flops for item in self.operations)


def trace(run: Callable[[], Any], module: nn.Module, repeated: Sequence[str] = ()) -> Trace:
    """Trace a call on the meta device. `repeated` names the classes of the blocks that regional compilation takes.

    Attention through `scaled_dot_product_attention` counts as one fused kernel, as on a GPU: the matrix of scores
    is never held in memory.
    """
    found = Trace()
    recorder = _Recorder(found)
    with torch.no_grad(), _watching(module, repeated, recorder), recorder, _FusedAttention(recorder):
        output = run()
        found.output_bytes = sum(_size(value) for value in _tensors(_plain(output)))
    del output
    return found


def _plain(output: Any) -> Any:
    return tuple(output.values()) if isinstance(output, dict) else output


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]


def _size(value: torch.Tensor) -> int:
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


class _Recorder(TorchDispatchMode):
    """Writes down each operation, and follows storages from their first use to their end."""

    def __init__(self, into: Trace) -> None:
        super().__init__()
        self.trace, self.depth, self.quiet = into, 0, False
        self._alive: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._count = self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(output)
        if not self.quiet:
            self.trace.operations.append(self._operation(func, args, kwargs or {}, inputs, outputs, output))
        self._hold(outputs, inputs)
        return output

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        """Write down one fused attention kernel."""
        *batch, queries, width = query.shape
        heads, keys = int(torch.Size(batch).numel()), key.shape[-2]
        self._hold([output], [query, key, value])
        self.trace.operations.append(
            Operation(
                "attention",
                "attention",
                query.dtype,
                2 * heads * queries * keys * (width + value.shape[-1]),
                self._accesses([query, key, value]),
                self._accesses([output]),
                (heads, queries, keys, width),
                self.depth > 0,
            )
        )

    def _operation(
        self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], output: Any
    ) -> Operation:
        name = func._overloadpacket.__name__
        kind = _kind(func, name, inputs, outputs)
        dtype = (outputs or inputs or [torch.empty(0, device="meta")])[0].dtype
        flops, shape = 0, (0, 0, 0, 0)
        if kind == "product":
            dtype, shape = inputs[-1].dtype, _product_shape(name, inputs, outputs[0])
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=output) if count else 2 * int(torch.Size(shape).numel())
            if name.endswith("convolution") and shape[1]:
                shape = (1, shape[1], shape[2], flops // (2 * shape[1] * shape[2]))
        reads = self._accesses(inputs)
        if name in _LOOKUPS and outputs:
            reads = tuple((number, min(size, _size(outputs[0]))) for number, size in reads)
        return Operation(kind, name, dtype, flops, reads, self._accesses(outputs), shape, self.depth > 0)

    def _accesses(self, values: Iterable[torch.Tensor]) -> tuple[Access, ...]:
        return tuple((self._number(value.untyped_storage()), _size(value)) for value in values)

    def _number(self, storage: torch.UntypedStorage) -> int:
        """A number that stays with a storage; Python's own identities are used again."""
        key = storage._cdata
        if key not in self._numbers:
            self._count += 1
            self._numbers[key] = self._count
            weakref.finalize(storage, self._numbers.pop, key, None)
        return self._numbers[key]

    def _hold(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        known = {value.untyped_storage()._cdata for value in inputs}
        for value in outputs:
            storage = value.untyped_storage()
            if storage._cdata in known or storage._cdata in self._alive:
                continue
            self._alive[storage._cdata] = size = -(-storage.nbytes() // _ROUNDED_TO) * _ROUNDED_TO
            self._bytes += size
            self.trace.peak_bytes = max(self.trace.peak_bytes, self._bytes)
            weakref.finalize(storage, self._end, storage._cdata)

    def _end(self, key: int) -> None:
        self._bytes -= self._alive.pop(key, 0)


def _kind(func: Any, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> Kind:
    if name in _PRODUCTS:
        return "product"
    known = {value.untyped_storage()._cdata for value in inputs}
    same = all(value.untyped_storage()._cdata in known for value in outputs)
    if not func._schema.is_mutable and (same or name.startswith("empty")):
        return "view"
    return "pass"


def _product_shape(name: str, inputs: list[torch.Tensor], output: torch.Tensor) -> tuple[int, int, int, int]:
    """Batch, rows, columns and inner size of a product; a convolution's inner size is filled in from its work."""
    if name.endswith("convolution"):
        rows = output.numel() // max(output.shape[1], 1)
        return 1, rows, int(output.shape[1]), 0
    left = inputs[0] if name in ("mm", "bmm", "linear") else inputs[1]
    batch = int(output.shape[0]) if output.dim() == 3 and name != "linear" else 1
    columns = int(output.shape[-1])
    return batch, output.numel() // max(batch * columns, 1), columns, int(left.shape[-1])


class _FusedAttention(TorchFunctionMode):
    """Counts attention as one kernel that holds no scores; its output lies as flash kernels lay it."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = _attended(*args, **(kwargs or {}))
        *batch, heads, queries, _ = query.shape
        self._recorder.quiet = True
        try:
            shape = (*batch, queries, heads, value.shape[-1])
            output = torch.empty(shape, dtype=query.dtype, device=query.device).transpose(-3, -2)
        finally:
            self._recorder.quiet = False
        self._recorder.attention(query, key, value, output)
        return output


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    return query, key, value


@contextmanager
def _watching(module: nn.Module, repeated: Sequence[str], recorder: _Recorder) -> Generator[None]:
    """Count module calls, and know whether one of the repeated blocks is running."""

    def entered(part: nn.Module, *_: object) -> None:
        recorder.trace.modules += 1
        recorder.depth += type(part).__name__ in repeated

    def left(part: nn.Module, *_: object) -> None:
        recorder.depth -= type(part).__name__ in repeated

    handles = [
        handle
        for part in module.modules()
        for handle in (part.register_forward_pre_hook(entered), part.register_forward_hook(cast(Any, left)))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
