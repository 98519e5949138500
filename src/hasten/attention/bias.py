"""Which keys a query may see, as small descriptions instead of matrices of numbers.

The semantics are those of xFormers' `attn_bias` classes. A query that sees no key gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from hasten.core.errors import HastenError


@dataclass(frozen=True)
class LowerTriangular:
    """Query i sees the keys 0 to i, also where there are more or fewer keys than queries."""

    def seen(self, rows: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
        """Boolean [rows, keys]: does the query of each index in `rows` see the key?"""
        return torch.arange(keys, device=rows.device) <= rows[:, None]


@dataclass(frozen=True)
class LowerTriangularFromBottomRight:
    """The last query sees all keys, the one before all but the last, and so on."""

    def seen(self, rows: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
        """Boolean [rows, keys]: does the query of each index in `rows` see the key?"""
        return torch.arange(keys, device=rows.device) <= rows[:, None] + (keys - queries)


@dataclass(frozen=True)
class LocalFromBottomRight:
    """A query sees the keys from `window_left` before its own place to `window_right` after it.

    The last query's place is the last key. Raises HastenError for negative windows.
    """

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        if min(self.window_left, self.window_right) < 0:
            raise HastenError(f"{self}: a window is 0 or more keys wide.")

    def seen(self, rows: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
        """Boolean [rows, keys]: does the query of each index in `rows` see the key?"""
        distance = torch.arange(keys, device=rows.device) - (rows[:, None] + (keys - queries))
        return (distance >= -self.window_left) & (distance <= self.window_right)


@dataclass(frozen=True)
class BlockDiagonal:
    """Several sequences one after the other; the queries of each see the keys of the same one alone.

    `lengths` are those of the queries; `key_lengths` those of the keys where they differ. All samples of a batch are
    divided alike. Raises HastenError for empty sequences or different numbers of them.
    """

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...] = ()

    def __init__(self, lengths: Iterable[int], key_lengths: Iterable[int] | None = None) -> None:
        object.__setattr__(self, "lengths", tuple(lengths))
        object.__setattr__(self, "key_lengths", tuple(key_lengths or ()) or self.lengths)
        if len(self.lengths) != len(self.key_lengths):
            raise HastenError(
                f"BlockDiagonal: {len(self.lengths)} lengths of queries, {len(self.key_lengths)} of keys."
            )
        if not self.lengths or min(*self.lengths, *self.key_lengths) < 1:
            raise HastenError("BlockDiagonal: every sequence needs a query and a key.")

    def seen(self, rows: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
        """Boolean [rows, keys]: does the query of each index in `rows` see the key?"""
        blocks = [torch.arange(len(sizes), device=rows.device).repeat_interleave(
            torch.tensor(sizes, device=rows.device)) for sizes in (self.lengths, self.key_lengths)]  # fmt: skip
        return blocks[0][rows][:, None] == blocks[1]


Described = LowerTriangular | LowerTriangularFromBottomRight | LocalFromBottomRight | BlockDiagonal
Bias = Described | torch.Tensor
"""A description, or a tensor that broadcasts to [batch, heads, queries, keys]: added to the scores, or true = seen."""


def materialize(bias: Described, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """The description as a boolean matrix [queries, keys], true where the key is seen."""
    return bias.seen(torch.arange(queries, device=device), queries, keys)


def encoded(bias: Described | None) -> tuple[str, list[int]]:
    """A description as a name and whole numbers, which an operator can take."""
    if bias is None:
        return "", []
    numbers: dict[type, list[int]] = {
        LocalFromBottomRight: [getattr(bias, name, 0) for name in ("window_left", "window_right")],
        BlockDiagonal: [*getattr(bias, "lengths", ()), *getattr(bias, "key_lengths", ())],
    }
    return type(bias).__name__, numbers.get(type(bias), [])


def decoded(kind: str, numbers: list[int]) -> Described | None:
    """The inverse of `encoded`."""
    if not kind:
        return None
    half = len(numbers) // 2
    made: dict[str, Callable[[], Described]] = {
        "LowerTriangular": LowerTriangular,
        "LowerTriangularFromBottomRight": LowerTriangularFromBottomRight,
        "LocalFromBottomRight": lambda: LocalFromBottomRight(*numbers),
        "BlockDiagonal": lambda: BlockDiagonal(numbers[:half], numbers[half:]),
    }
    return made[kind]()


def check_sizes(bias: Bias | None, queries: int, keys: int) -> None:
    """Raise HastenError when a description or tensor does not fit this many queries and keys."""
    if isinstance(bias, BlockDiagonal) and (sum(bias.lengths), sum(bias.key_lengths)) != (queries, keys):
        raise HastenError(
            f"BlockDiagonal describes {sum(bias.lengths)} queries and {sum(bias.key_lengths)} keys, "
            f"but there are {queries} and {keys}."
        )
    if isinstance(bias, torch.Tensor) and not _broadcasts(bias.shape, queries, keys):
        raise HastenError(
            f"The bias has shape {list(bias.shape)}; it must broadcast to [batch, heads, {queries}, {keys}]."
        )


def _broadcasts(shape: torch.Size, queries: int, keys: int) -> bool:
    wanted = (queries, keys)[2 - min(len(shape), 2) :]
    return 1 <= len(shape) <= 4 and all(size in (1, want) for size, want in zip(shape[-2:], wanted, strict=True))
