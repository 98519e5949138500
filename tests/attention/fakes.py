"""Stand-ins for GPU kernels on the CPU, at their lowest level: signature and meaning as their sources say."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from hasten.attention.bias import Bias, materialize
from hasten.attention.kernels import packages


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None, scale: float | None = None
) -> torch.Tensor:
    """Attention in float64 from a boolean or additive matrix, on [batch, heads, tokens, size]; blind rows give 0."""
    query, key, value = (part.double() for part in (query, key, value))
    times = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(times, 1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen.double()
    return scores.softmax(-1).nan_to_num(0.0) @ value


def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None) -> torch.Tensor:
    """The dense result for a description."""
    if bias is None or isinstance(bias, torch.Tensor):
        return dense(query, key, value, bias)
    return dense(query, key, value, materialize(bias, query.shape[2], key.shape[2], query.device))


def window(queries: int, keys: int, left: int, right: int, causal: bool) -> torch.Tensor:
    """What FlashAttention's queries see: aligned at the bottom right, negative means no limit."""
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen &= distance >= -left if left >= 0 else True
    return seen & (distance <= (0 if causal else right) if causal or right >= 0 else True)


class FlashPackage:
    """FlashAttention's two functions; remembers what it was called with, so that a test sees that it was used."""

    def __init__(self, version: int) -> None:
        self.version, self.seen = version, list[tuple[str, dict[str, Any]]]()
        self.__file__ = "a stand-in"

    def flash_attn_func(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int | None, int | None] = (-1, -1), **more: Any,
    ) -> Any:  # fmt: skip
        self._check(q, k, v, more)
        self.seen.append(("dense", {"causal": causal, "window": window_size, "dtype": q.dtype, **more}))
        left, right = (-1 if side is None else side for side in window_size)
        scales = [more.get(f"{name}_descale") for name in "qkv"]
        parts = [_scaled(p.transpose(1, 2), s) for p, s in zip((q, k, v), scales, strict=True)]
        found = dense(*parts, window(q.shape[1], k.shape[1], left, right, causal), softmax_scale)  # pyright: ignore
        return self._output(found.transpose(1, 2), q)

    def flash_attn_varlen_func(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None,
        **more: Any,
    ) -> Any:  # fmt: skip
        self._check(q, k, v, more)
        self.seen.append(("varlen", {"max": (max_seqlen_q, max_seqlen_k), "dtype": q.dtype, **more}))
        starts = {"q": cu_seqlens_q, "k": cu_seqlens_k, "v": cu_seqlens_k}
        scales = [more.get(f"{name}_descale") for name in "qkv"]
        parts = [_rows(p, s, starts[n]) for p, s, n in zip((q, k, v), scales, "qkv", strict=True)]
        return self._output(varlen(*parts, cu_seqlens_q, cu_seqlens_k, softmax_scale), q)  # pyright: ignore

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more: dict[str, Any]) -> None:
        allowed = {2: {"dropout_p"}, 3: {"q_descale", "k_descale", "v_descale"}, 4: set[str]()}[self.version]
        assert set(more) <= allowed, f"FlashAttention {self.version} has no {set(more) - allowed}"
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert q.shape[-1] % 8 == 0, "head sizes are multiples of 8"

    def _output(self, found: torch.Tensor, q: torch.Tensor) -> Any:
        found = found.to(torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype)
        return (found, None) if self.version == 4 else found


def _scaled(part: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return part
    assert part.dtype == torch.float8_e4m3fn
    times = part.shape[1] // scale.shape[1]
    return part.double() * scale.double().repeat_interleave(times, 1)[:, :, None, None]


def _rows(part: torch.Tensor, scale: torch.Tensor | None, starts: torch.Tensor) -> torch.Tensor:
    """Scale the rows of each sequence of [tokens, heads, size]; a scale a sequence and key head."""
    if scale is None:
        return part
    assert len(scale) == len(starts) - 1, "a row of scales for each sequence"
    each = scale.double().repeat_interleave(part.shape[1] // scale.shape[1], 1)
    return part.double() * each.repeat_interleave(starts.diff(), 0)[:, :, None]


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, key_starts: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attention sequence by sequence on [tokens, heads, size]."""
    assert starts.dtype == key_starts.dtype == torch.int32
    assert (int(starts[-1]), int(key_starts[-1])) == (len(q), len(k))
    parts: list[torch.Tensor] = []
    for index in range(len(starts) - 1):
        near, far = slice(starts[index], starts[index + 1]), slice(key_starts[index], key_starts[index + 1])
        one = [part[where].transpose(0, 1)[None] for part, where in ((q, near), (k, far), (v, far))]
        parts.append(dense(*one, None, scale)[0].transpose(0, 1))  # pyright: ignore
    return torch.cat(parts)


def provide(monkeypatch: pytest.MonkeyPatch, module: str, stand_in: object) -> None:
    """Make `stand_in` the module of that name, for as long as the test runs."""
    found = types.ModuleType(module)
    found.__file__ = "a stand-in"
    for name in dir(stand_in):
        if not name.startswith("__"):
            setattr(found, name, getattr(stand_in, name))
    packages.load.cache_clear()
    packages.package_obstacle.cache_clear()
    monkeypatch.setattr(packages, "_present", lambda name: name == module)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setitem(__import__("sys").modules, module, found)
