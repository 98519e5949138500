"""Runs attention from its declaration: projections, norm and rotation of queries and keys in one pass, attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hasten.compilation.fusing.modules import by_name, coding_of, empty, parameters
from hasten.core.block import AttentionPlan
from hasten.core.intercept import base_class
from hasten.kernels.coded import Coded, Coding
from hasten.kernels.rotary import HeadNorm, Heads, Rotation, prepare

_FIRST, _SECOND = ("to_q", "to_k", "to_v", "norm_q", "norm_k"), (
    "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"
)  # fmt: skip
"""Diffusers' names of projections and norms of the two streams."""


class FusedAttention:
    """A link around an attention module's `forward`.

    The projections are called as the modules that are there, and attention the way the processor calls it, so that
    quantized layers, adapters, stacked projections and a chosen attention kernel take part.
    """

    def __init__(self, module: nn.Module, plan: AttentionPlan) -> None:
        self.module, self.plan = module, plan
        self.names = parameters(module)
        self.ran = False
        """Written, never read, where code is compiled."""

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output; what is not declared runs its own code."""
        given = by_name(self.names, args, kwargs)
        if not self._declared(given):
            return call(*args, **kwargs)
        self.ran = True
        module: Any = self.module
        inputs = [given["hidden_states"], *([given["encoder_hidden_states"]] if self.plan.second != "none" else [])]
        turns = self._turns(given, len(inputs))
        streams = [self._heads(i, x, turns[i]) for i, x in enumerate(inputs)]
        sizes = [one.query.shape[1] for one in streams]
        # Joined in the order in which attention sees the tokens; the streams count from the picture.
        order = [1, 0] if self.plan.second == "first" else list(range(len(streams)))
        query, key, value = prepare([streams[i] for i in order], self._norm())
        found = self._attend(query, key, value, given).flatten(2, 3)
        if len(streams) == 1:
            return self._leave(found)
        parts = dict(zip(order, found.split([sizes[i] for i in order], 1), strict=True))
        text = parts[1] if getattr(module, "to_add_out", None) is None else module.to_add_out(parts[1].contiguous())
        return self._leave(parts[0].contiguous()), text

    def coding(self, stream: int, device: torch.device, beside: Sequence[nn.Module] = ()) -> Coding | None:
        """How the input of a stream, which other layers may take beside, may be rounded beforehand."""
        layers = [getattr(self.module, name) for name in (_FIRST, _SECOND)[stream][:3]]
        return coding_of([*layers, *beside], device) if self._usual else None

    @property
    def _usual(self) -> bool:
        """Is the module as it was declared?"""
        module: Any = self.module
        processor = module.processor
        known = type(processor).__name__ == self.plan.processor
        fused = getattr(module, "fused_projections", False)
        return known and not fused and not module.training and getattr(processor, "_parallel_config", None) is None

    def _declared(self, given: Mapping[str, Any]) -> bool:
        """Do module and arguments say nothing that the declaration does not?"""
        known = (*self.names, self.plan.rotary, self.plan.mask)
        others = [name for name in given if name not in known] + list(self.plan.absent)
        two = given.get("encoder_hidden_states") is not None
        return self._usual and two == (self.plan.second != "none") and all(empty(given.get(name)) for name in others)

    def _norm(self) -> HeadNorm | None:
        norm: Any = self.module.norm_q
        return None if norm is None else HeadNorm(_eps(norm), self.plan.across_heads)

    def _heads(self, index: int, x: torch.Tensor | Coded, rotation: Rotation | None) -> Heads:
        module: Any = self.module
        names = (_FIRST, _SECOND)[index]
        query, key, value = (getattr(module, name)(x).unflatten(-1, (module.heads, -1)) for name in names[:3])
        norm_q, norm_k = (getattr(module, name, None) for name in names[3:])
        weights = (norm_q.weight, norm_k.weight) if norm_q is not None and norm_k is not None else (None, None)
        return Heads(query, key, value, *weights, rotation)

    def _turns(self, given: Mapping[str, Any], streams: int) -> list[Rotation | None]:
        """The rotation of each stream; a common one is cut where the streams meet."""
        rotary = given.get(self.plan.rotary) if self.plan.rotary else None
        if rotary is None or self.plan.rotations is None:
            return [None] * streams
        found = self.plan.rotations(rotary)
        if len(found) == streams or found[0] is None:
            return found
        text = _length(given["encoder_hidden_states"])
        cos, sin = found[0]
        text_turns, picture = (cos[:, :text], sin[:, :text]), (cos[:, text:], sin[:, text:])
        return [picture, text_turns]

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, given: Mapping[str, Any]
    ) -> torch.Tensor:
        """The attention call of the processor, on [batch, tokens, heads, size]."""
        processor: Any = self.module.processor  # pyright: ignore[reportAttributeAccessIssue]
        mask = given.get(self.plan.mask) if self.plan.mask else None
        mask = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
        if not hasattr(processor, "_attention_backend"):
            parts = (part.transpose(1, 2) for part in (query, key, value))
            return F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=processor._attention_backend)

    def _leave(self, found: torch.Tensor) -> torch.Tensor:
        """The projection of the output, if the module has one."""
        projection: Any = getattr(self.module, "to_out", None)
        return found if projection is None else projection[0](found)


def _eps(norm: Any) -> float:
    return norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps


def _length(x: torch.Tensor | Coded) -> int:
    return x.codes.shape[1] if isinstance(x, Coded) else x.shape[1]


def obstacle(module: nn.Module, plan: AttentionPlan) -> str | None:
    """Why a module cannot be run from its declaration, or None."""
    found: Any = module
    if type(found.processor).__name__ != plan.processor:
        return f"its attention runs {type(found.processor).__name__} instead of {plan.processor}"
    norms = [getattr(found, name, None) for name in (*_FIRST[3:], *_SECOND[3:])]
    odd = {base_class(norm).__name__ for norm in norms if norm is not None} - {"RMSNorm"}
    return f"its queries and keys are normalized by {' and '.join(sorted(odd))}" if odd else None
