"""How the weights of one naming make those of another: the same, joined, cut, swapped or reshaped; always exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hasten.core.errors import HastenError
from hasten.formats.format import Entry
from hasten.kernels.joining import CannotJoin, join_inputs, join_outputs, reshaped, split_inputs
from hasten.kernels.modules import Input, LowRank
from hasten.kernels.weight import QuantizedWeight


class Join(ABC):
    """A relation between one whole weight and its parts; both directions are exact, and one undoes the other."""

    @abstractmethod
    def split(self, whole: Entry, count: int) -> list[Entry]:
        """The parts of a whole."""

    @abstractmethod
    def join(self, parts: Sequence[Entry]) -> Entry:
        """The whole of parts."""


class Same(Join):
    """One name for another."""

    def split(self, whole: Entry, count: int) -> list[Entry]:
        """Itself."""
        return [whole]

    def join(self, parts: Sequence[Entry]) -> Entry:
        """Itself."""
        return parts[0]


@dataclass(frozen=True)
class Outputs(Join):
    """Parts lie one after the other along the outputs, as in fused query, key and value."""

    shares: tuple[int, ...] = ()
    """How the outputs are divided; equal parts if empty."""

    def split(self, whole: Entry, count: int) -> list[Entry]:
        """Cut along the outputs; a side branch keeps what it does to the input and is cut as well."""
        sizes = _sizes(whole.weight.shape[0], self.shares or (1,) * count)
        weights = split_outputs(whole.weight, sizes)
        low = whole.low_rank
        branches = [None] * len(sizes) if low is None else [LowRank(low.down, up) for up in low.up.split(sizes)]
        return [Entry(weight, whole.given, branch) for weight, branch in zip(weights, branches, strict=True)]

    def join(self, parts: Sequence[Entry]) -> Entry:
        """Put one below the other. Raises CannotJoin if the parts do different things to their input."""
        for part in parts[1:]:
            _same_input(parts[0].given, part.given)
        return Entry(_stacked([part.weight for part in parts]), parts[0].given, _branches_below(parts))


@dataclass(frozen=True)
class Inputs(Join):
    """Parts lie beside each other along the inputs; the output, and its bias, is the sum of theirs."""

    shares: tuple[int, ...]
    """How the inputs are divided."""

    def split(self, whole: Entry, count: int) -> list[Entry]:
        """Cut along the inputs; of a bias the last part gets all, and the others zeros."""
        weight = whole.weight
        if len(weight.shape) == 1:
            assert isinstance(weight, torch.Tensor)
            return [*[Entry(torch.zeros_like(weight))] * (len(self.shares) - 1), Entry(weight)]
        sizes = _sizes(weight.shape[1], self.shares)
        parts = weight.split(sizes, 1) if isinstance(weight, torch.Tensor) else split_inputs(weight, sizes)
        given = _cut_input(whole.given, sizes)
        low = [None] * len(sizes) if whole.low_rank is None else _cut_branch(whole.low_rank, sizes)
        return [Entry(*items) for items in zip(parts, given, low, strict=True)]

    def join(self, parts: Sequence[Entry]) -> Entry:
        """Put one beside the other."""
        weights = [part.weight for part in parts]
        tensors = [weight for weight in weights if isinstance(weight, torch.Tensor)]
        if len(tensors) == len(weights) and tensors[0].dim() == 1:
            return Entry(torch.stack(tensors).sum(0))
        if 0 < len(tensors) < len(weights):
            raise CannotJoin("A weight in codes and a plain one cannot be joined.")
        quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        joined = torch.cat(tensors, 1) if tensors else join_inputs(quantized)
        return Entry(joined, _joined_input(parts), _branches_beside(parts))


class Halves(Join):
    """The same with the first and the second half of the outputs exchanged, as scale and shift of a last layer."""

    def split(self, whole: Entry, count: int) -> list[Entry]:
        """Exchange the halves."""
        first, second = Outputs().split(whole, 2)
        return [Outputs().join([second, first])]

    def join(self, parts: Sequence[Entry]) -> Entry:
        """Exchange the halves."""
        return self.split(parts[0], 1)[0]


class Pointwise(Join):
    """The whole is a 1 x 1 convolution, its one part the linear layer that does the same."""

    def split(self, whole: Entry, count: int) -> list[Entry]:
        """[outputs, inputs, 1, 1] to [outputs, inputs]; what has other dimensions stays."""
        return [_shaped(whole, whole.weight.shape[:2]) if len(whole.weight.shape) == 4 else whole]

    def join(self, parts: Sequence[Entry]) -> Entry:
        """[outputs, inputs] to [outputs, inputs, 1, 1]."""
        shape = parts[0].weight.shape
        return _shaped(parts[0], (*shape, 1, 1)) if len(shape) == 2 else parts[0]


class Transposed(Join):
    """The same matrix with rows for columns."""

    def split(self, whole: Entry, count: int) -> list[Entry]:
        """Transpose; codes cannot be."""
        if not isinstance(whole.weight, torch.Tensor):
            raise CannotJoin("A weight in codes cannot be transposed.")
        return [replace(whole, weight=whole.weight.T.contiguous())]

    def join(self, parts: Sequence[Entry]) -> Entry:
        """Transpose."""
        return self.split(parts[0], 1)[0]


def split_outputs(
    weight: QuantizedWeight | torch.Tensor, sizes: Sequence[int]
) -> Sequence[QuantizedWeight | torch.Tensor]:
    """Cut a weight along its outputs. Raises CannotJoin where groups cross a cut."""
    if isinstance(weight, torch.Tensor):
        return weight.split(list(sizes))
    try:
        return weight.split(sizes)
    except ValueError as error:
        raise CannotJoin(f"A fused weight cannot be cut: {error}") from None


def _sizes(total: int, shares: Sequence[int]) -> list[int]:
    if total % sum(shares):
        raise HastenError(f"{total} rows or columns cannot be divided in the proportions {list(shares)}.")
    return [total // sum(shares) * share for share in shares]


def _shaped(entry: Entry, shape: Sequence[int]) -> Entry:
    weight = entry.weight
    found = weight.reshape(tuple(shape)) if isinstance(weight, torch.Tensor) else reshaped(weight, shape)
    return replace(entry, weight=found)


def _stacked(weights: Sequence[QuantizedWeight | torch.Tensor]) -> QuantizedWeight | torch.Tensor:
    tensors = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if tensors and len(tensors) < len(weights):
        raise CannotJoin("A weight in codes and a plain one cannot be joined.")
    if tensors and len({tensor.dtype for tensor in tensors}) > 1:
        raise CannotJoin(f"Weights of the types {sorted({str(t.dtype) for t in tensors})} cannot be joined.")
    return torch.cat(tensors) if tensors else join_outputs([w for w in weights if isinstance(w, QuantizedWeight)])


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (
        one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)
    )


def _same_input(one: Input, other: Input) -> None:
    bare = [replace(given, smooth=None, scale=None) for given in (one, other)]
    if not (bare[0] == bare[1] and _equal(one.smooth, other.smooth) and _equal(one.scale, other.scale)):
        raise CannotJoin("Weights that expect differently smoothed, rotated or rounded inputs cannot be joined.")


def _branches_below(parts: Sequence[Entry]) -> LowRank | None:
    """The side branches of parts with one input: a common first matrix stays common."""
    low = [part.low_rank for part in parts]
    found = [item for item in low if item is not None]
    if not found:
        return None
    if len(found) == len(low) and all(_equal(found[0].down, item.down) for item in found):
        return LowRank(found[0].down, torch.cat([item.up for item in found]))
    like = found[0].up
    ups = [like.new_zeros(part.weight.shape[0], 0) if part.low_rank is None else part.low_rank.up for part in parts]
    return LowRank(torch.cat([item.down for item in found]), torch.block_diag(*ups))


def _branches_beside(parts: Sequence[Entry]) -> LowRank | None:
    """The side branches of parts with one output: the ranks of each see its inputs alone."""
    found = [part.low_rank for part in parts if part.low_rank is not None]
    if not found:
        return None
    like = found[0].down
    downs = [like.new_zeros(0, part.weight.shape[1]) if part.low_rank is None else part.low_rank.down for part in parts]
    return LowRank(torch.block_diag(*downs), torch.cat([item.up for item in found], 1))


def _joined_input(parts: Sequence[Entry]) -> Input:
    first = parts[0].given
    for part in parts[1:]:
        _same_input(replace(first, smooth=None), replace(part.given, smooth=None))
    if all(part.given.smooth is None for part in parts):
        return first
    like = next(part.given.smooth for part in parts if part.given.smooth is not None)
    smooth = [like.new_ones(p.weight.shape[1]) if p.given.smooth is None else p.given.smooth for p in parts]
    return replace(first, smooth=torch.cat(smooth))


def _cut_input(given: Input, sizes: Sequence[int]) -> list[Input]:
    if any(size % given.rotation for size in sizes):
        raise CannotJoin(f"Channels that are rotated together, {given.rotation}, cross a cut between {list(sizes)}.")
    smooth = [None] * len(sizes) if given.smooth is None else given.smooth.split(list(sizes))
    return [replace(given, smooth=part) for part in smooth]


def _cut_branch(low: LowRank, sizes: Sequence[int]) -> list[LowRank]:
    return [LowRank(down, low.up) for down in low.down.split(list(sizes), 1)]
