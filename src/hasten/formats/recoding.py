"""What a weight becomes in another format: the same where it can be held, coded anew where not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.core.errors import HastenError
from hasten.formats.format import Entry, Format
from hasten.formats.registry import formats
from hasten.formats.tensors import is_linear
from hasten.kernels.hadamard import rotate, rotation_group
from hasten.kernels.modules import Input, QuantizedLinear
from hasten.kernels.rounding import quantize_integer
from hasten.kernels.weight import QuantizedWeight

_PLAIN = "safetensors"
"""The format whose kinds are types of plain numbers."""


@dataclass(frozen=True)
class Recoding:
    """Turns entries of any format into such as `layout` holds; returns an entry that it leaves alone itself."""

    layout: Format
    kind: str | None
    """What to code as; None keeps what can be held."""
    rotated: bool
    already: bool
    """Are weights of the source in codes? Then plain ones are meant to be plain, unless a kind was asked for."""

    def __call__(self, name: str, entry: Entry) -> Entry:
        """The entry for the target. Raises HastenError if the target cannot hold what was asked for."""
        if self.rotated:
            return self._fitting(name, entry, rotated(entry) if self._turns(name, entry) else entry)
        if isinstance(entry.weight, torch.Tensor):
            return entry if self._stays_plain(entry) else self._quantized(name, entry)
        if self.kind is None and self.layout.accepts(entry):
            return entry
        made = self._quantized(name, entry)
        return entry if self.layout.accepts(entry) and _alike(entry, made) else made

    def _turns(self, name: str, entry: Entry) -> bool:
        weight = entry.weight
        if isinstance(weight, torch.Tensor):
            return not self.already and is_linear(name, weight)
        return len(weight.shape) == 2

    def _stays_plain(self, entry: Entry) -> bool:
        codes = bool(self.layout.kinds) and self.layout.name != _PLAIN
        meant = self.kind is None and (self.already or not codes)
        return meant and self.layout.accepts(entry)

    def _quantized(self, name: str, entry: Entry) -> Entry:
        if not self.layout.kinds:
            coding = [key for key, item in formats().items() if item.kinds]
            raise HastenError(
                f"{self.layout.name} does not hold {name!r} as it is, and hasten codes no weights for it. "
                f"It does for {', '.join(coding)}."
            )
        made = self.layout.quantize(name, effective(entry), self.kind or self.layout.kinds[0])
        same = isinstance(made.weight, torch.Tensor) and isinstance(entry.weight, torch.Tensor)
        if same and made.weight.dtype == entry.weight.dtype:  # pyright: ignore[reportAttributeAccessIssue]
            return entry
        return made

    def _fitting(self, name: str, entry: Entry, made: Entry) -> Entry:
        """What was made, or the same decoded if the target does not hold it in codes and was not asked to."""
        if self.layout.accepts(made):
            return made
        if made is entry:
            return self._quantized(name, entry)
        able = [key for key, item in formats().items() if item.accepts(made)]
        raise HastenError(
            f"{self.layout.name} does not hold weights that were rotated and rounded to 8 bits; "
            f"choose {' or '.join(able)}."
        )


def effective(entry: Entry) -> torch.Tensor:
    """The weight that a plain layer needs to compute the same: smoothing, rotation and side branch worked in."""
    if isinstance(entry.weight, torch.Tensor):
        return entry.weight
    return QuantizedLinear(entry.weight, given=entry.given, low_rank=entry.low_rank).effective()


def rotated(entry: Entry) -> Entry:
    """The weight as 8-bit integers by row behind a Hadamard rotation, for activations of 8 bits.

    The rotation spreads large input channels over the row, so that the rounding adds an error of 0.9 % whatever the
    weight is (ConvRot, https://arxiv.org/abs/2512.03673). Smoothing and the side branch stay as they are.
    """
    weight, given = entry.weight, entry.given
    matrix = weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()
    group = given.rotation if given.rotation > 1 else rotation_group(matrix.shape[1])
    turned = matrix if given.rotation > 1 else rotate(matrix, group)
    made = Input(given.smooth, group, "int8", compute=given.compute)
    return Entry(quantize_integer(turned, 8), made, entry.low_rank)


def _alike(entry: Entry, made: Entry) -> bool:
    """Are both in codes of one kind, so that coding anew would but lose?"""
    one, other = entry.weight, made.weight
    if not isinstance(one, QuantizedWeight) or not isinstance(other, QuantizedWeight):
        return False
    return _form(one) == _form(other)


def _form(weight: QuantizedWeight) -> tuple[object, ...]:
    tensors = {name: (t.dtype, t.shape[-1:]) for name, t in weight.tensors().items() if name != "codes"}
    return weight.number.name, weight.columns, tensors
