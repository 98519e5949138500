"""Reads a whole file of weights and says what is in it, and what is wrong with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hasten.core.errors import HastenError
from hasten.formats.converting import Progress, checksum_file
from hasten.formats.format import BadFile, Entry
from hasten.formats.opening import open_file
from hasten.kernels.weight import QuantizedWeight


@dataclass
class Row:
    """Weights of one form."""

    weights: int = 0
    numbers: int = 0
    nbytes: int = 0

    @property
    def bits(self) -> float:
        """Bits that a number takes."""
        return 8 * self.nbytes / max(1, self.numbers)


@dataclass
class Verified:
    """What a file holds."""

    format: str
    rows: dict[str, Row] = field(default_factory=dict[str, Row])
    """By the form of the codes, such as "int4, groups of 64"."""
    problems: list[str] = field(default_factory=list[str])
    checksum: str = ""
    """What the SHA-256 was compared with; empty if there was nothing."""


def verify(path: Path, progress: Progress, *, sha256: str | None = None) -> Verified:
    """Read every weight of a file, look for numbers that are not finite, and compare the file's checksum.

    The checksum is `sha256`, or what the file beside it (`FILE.sha256`) says. Raises BadFile for files that cannot be
    read; what is wrong with single weights is listed.
    """
    with open_file(path) as opened:
        found = Verified(opened.format.name)
        names = opened.reader.names()
        progress.start(len(names))
        for name in names:
            try:
                _add(found, name, opened.reader.read(name))
            except BadFile as error:
                found.problems.append(str(error))
            progress.advance(name)
    _compare(path, sha256, found)
    return found


def _add(found: Verified, name: str, entry: Entry) -> None:
    row = found.rows.setdefault(form(entry), Row())
    row.weights += 1
    row.numbers += math.prod(entry.weight.shape)
    row.nbytes += entry.weight.nbytes + sum(tensor.nbytes for tensor in _beside(entry).values())
    found.problems += [f"{name}: {what} that are not finite" for what, tensor in _numbers(entry) if not _finite(tensor)]


def form(entry: Entry) -> str:
    """The kind of codes in words."""
    weight = entry.weight
    if isinstance(weight, torch.Tensor):
        return str(weight.dtype).removeprefix("torch.")
    group = weight.columns // weight.groups
    by = "whole tensor" if weight.scale.codes.numel() == 1 else "rows" if weight.groups == 1 else f"groups of {group}"
    notes = (
        f"rotated by {entry.given.rotation}" if entry.given.rotation > 1 else "",
        "low rank" if entry.low_rank else "",
    )
    return ", ".join(part for part in (weight.number.name, by, *notes) if part)


def _beside(entry: Entry) -> dict[str, torch.Tensor]:
    low = {"side branch": entry.low_rank.down, "side branch (up)": entry.low_rank.up} if entry.low_rank else {}
    given = {"smoothing factors": entry.given.smooth, "input scales": entry.given.scale}
    return low | {name: tensor for name, tensor in given.items() if tensor is not None}


def _numbers(entry: Entry) -> Iterator[tuple[str, torch.Tensor]]:
    weight = entry.weight
    yield from _beside(entry).items()
    if not isinstance(weight, QuantizedWeight):
        yield "numbers", weight
        return
    yield "scales", weight.scale.values()
    if weight.minimum is not None:
        yield "minimums", weight.minimum.values()
    if weight.number.kind == "float":
        yield "codes", weight.codes


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # 8-bit types know no isfinite.
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def _compare(path: Path, sha256: str | None, found: Verified) -> None:
    file = checksum_file(path)
    wanted = sha256.strip().lower() if sha256 else _recorded(file) if file.is_file() else None
    if wanted is None:
        return
    found.checksum = "the one given" if sha256 else file.name
    with path.open("rb") as handle:
        actual = hashlib.file_digest(handle, "sha256").hexdigest()
    if actual != wanted:
        found.problems.append(f"its SHA-256 is {actual}, and {found.checksum} says {wanted}")


def _recorded(file: Path) -> str:
    words = file.read_text("utf-8", errors="replace").split()
    if not words or len(words[0]) != 64:
        raise HastenError(f"{file} holds no SHA-256.")
    return words[0].lower()
