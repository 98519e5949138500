"""Runs transformer blocks with one pass over the tokens between two products, from a declaration of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from hasten.compilation.fusing.attention import FusedAttention
from hasten.compilation.fusing.attention import obstacle as attention_obstacle
from hasten.compilation.fusing.block import FusedBlock
from hasten.compilation.fusing.feed_forward import FusedFeedForward
from hasten.compilation.fusing.modules import is_norm, part
from hasten.compilation.fusing.segments import SegmentedLinear, Segments, is_plain
from hasten.core.block import BlockPlan
from hasten.core.errors import HastenError, NotEngaged
from hasten.core.intercept import base_class
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.spec import Stack
from hasten.core.target import Denoiser, Target
from hasten.core.technique import Cost, Evidence, Stage, Technique
from hasten.core.workload import Workload
from hasten.kernels.serving import launches, obstacle


@dataclass(frozen=True, kw_only=True)
class FusedBlocks(Technique):
    """Computes what lies between two products of a transformer block in one pass over the tokens.

    Residual connection, norm and modulation; norm and rotation of queries and keys; the activation: each is one kernel
    (Triton, on NVIDIA GPUs), which reads a token once, computes in float32 and rounds once. Where the next layer is
    quantized to 8-bit floats, the same pass rounds its input. FLUX's single blocks do without their concatenations. On
    other devices the same sums are done by PyTorch, and nothing is gained. Blocks run from a declaration of what they
    compute, with the projections and attention calls that are there; a call that asks for more than is declared
    (IP-Adapters, masks) runs the block's own code.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    paper: ClassVar[str] = "https://arxiv.org/abs/2205.14135"

    def claims(self) -> tuple[str, ...]:
        """The code of the blocks."""
        return ("block.code",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs blocks that are declared, with nothing of other people's around their parts."""
        for denoiser in target.denoisers:
            yield from _problems(denoiser, target)

    def apply(self, target: Target, patch: Patch) -> None:
        """Intercept blocks, attention and feed-forwards; cut layers that take a concatenation."""
        state = patch.keep(_Fused())
        for denoiser in target.denoisers:
            for stack, block, plan in _blocks(denoiser):
                _fuse(stack, block, plan, patch, state)
            if state.cut and hasattr(denoiser.module, "save_pretrained"):
                patch.around(denoiser.module, _not_saved, "cannot be saved meanwhile", method="save_pretrained")

    def engaged(self, session: Session) -> Evidence:
        """Blocks have run from their declarations."""
        state = session.state(self, _Fused)
        ran, inside = sum(one.ran for one in state.blocks), sum(one.ran for one in state.inside)
        if not ran:
            raise NotEngaged("no block was run from its declaration.")
        cut = f"; {len(state.cut)} layers take their two inputs without a concatenation" if state.cut else ""
        return Evidence(
            summary=f"{ran} of {len(state.blocks)} blocks ran from their declarations, and inside of them {inside} of "
            f"{len(state.inside)} attention and feed-forward modules, {state.passes(session.target.device)}{cut}"
        )

    def cost(self, target: Target, workload: Workload) -> Cost:
        """What it saves is a matter of the device's bandwidth; memory does not grow."""
        return Cost(basis="measured")


class _Fused:
    """What has been intercepted in a session."""

    def __init__(self) -> None:
        self.blocks: list[FusedBlock] = []
        self.inside: list[FusedAttention | FusedFeedForward] = []
        self.cut: list[SegmentedLinear] = []
        self._before = launches.copy()

    def passes(self, device: torch.device) -> str:
        """What has computed between the products."""
        if made := (launches - self._before).total():
            return f"with {made} passes of Triton's kernels"
        return f"by PyTorch's operators, as {obstacle(device) or 'gradients were to be computed'}"


def _all_blocks(denoiser: Denoiser) -> Iterator[tuple[Stack, nn.Module]]:
    """Every block of a class that a stack declares, also those that refine a stream beforehand."""
    for stack in {stack.block: stack for stack in denoiser.spec.stacks if stack.plan}.values():
        yield from ((stack, block) for _, block in denoiser.of_class(stack.block))


def _blocks(denoiser: Denoiser) -> Iterator[tuple[Stack, nn.Module, BlockPlan]]:
    """The blocks whose variant is declared."""
    for stack, block in _all_blocks(denoiser):
        plan = stack.plan(block) if stack.plan else None
        if plan is not None:
            yield stack, block, plan


def _problems(denoiser: Denoiser, target: Target) -> Iterator[str]:
    title = denoiser.spec.model_class
    every = list(_all_blocks(denoiser))
    if not every:
        yield f"what the blocks of {title} compute is not declared, so they cannot be run fused."
        return
    declared = list(_blocks(denoiser))
    if not declared:
        yield f"the blocks of this {title} are of a variant that is not declared, so they cannot be run fused."
    reasons = {reason for _, block, plan in declared for reason in _obstacles(block, plan)}
    yield from (f"the blocks of {title} cannot be run fused: {reason}." for reason in sorted(reasons))
    if target.device.type != "meta" and any(_away(block) for _, block, _ in declared):
        yield f"the weights of {title} are offloaded; apply FusedBlocks before offloading."


def _obstacles(block: nn.Module, plan: BlockPlan) -> Iterator[str]:
    """What stands in the way of running a block from its declaration."""
    for module in block.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, "forward" in module.__dict__)
        if any(hooks) and not _is_layer(module):
            yield "other code (an offload or casting hook) stands around their parts; fuse them before that"
    for one in (one for sublayer in plan.sublayers for one in sublayer.residuals):
        norms = [part(block, path) for path in (one.norm, one.after) if path]
        yield from (f"{base_class(n).__name__} is no norm that is known" for n in norms if not is_norm(n))
    for attention in plan.attention:
        if reason := attention_obstacle(part(block, attention.module), attention):
            yield reason


def _is_layer(module: nn.Module) -> bool:
    return base_class(module) is nn.Linear


def _away(block: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in block.parameters())


def _fuse(stack: Stack, block: nn.Module, plan: BlockPlan, patch: Patch, state: _Fused) -> None:
    inside: dict[str, FusedAttention | FusedFeedForward] = {}
    for attention in plan.attention:
        inside[attention.module] = FusedAttention(part(block, attention.module), attention)
    for feed_forward in plan.feed_forward:
        inside[feed_forward.module] = FusedFeedForward(part(block, feed_forward.module), feed_forward)
    for link in inside.values():
        patch.around(link.module, link, "runs with fused kernels", method="forward", innermost=True)
    for sublayer in plan.sublayers:
        if sublayer.beside is not None:
            _cut(block, sublayer.beside.leaves, sublayer.beside.enters, patch, state)
    fused = FusedBlock(block, plan, stack, inside)
    patch.around(block, fused, "runs from its declaration, with fused kernels", method="forward", innermost=True)
    state.blocks.append(fused)
    state.inside += inside.values()


def _cut(block: nn.Module, leaves: str, enters: str, patch: Patch, state: _Fused) -> None:
    """Cut a plain layer into the parts for its two inputs; one inside an adapter takes the concatenation as before."""
    layer = block._modules[leaves]
    if not is_plain(layer):
        return
    whole = cast(nn.Linear, layer)
    cut = SegmentedLinear(whole, whole.in_features - part(block, enters).out_features)
    segments = Segments(whole, cut)
    patch.undo(block, f"{leaves} takes its two inputs apart", segments.refill)
    patch.swap(block, leaves, cut, "holds the weight in two parts")
    if block._modules[leaves] is cut:
        segments.release()
    state.cut.append(cut)


def _not_saved(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise HastenError(
        "The denoiser cannot be saved while FusedBlocks is applied: weights of layers that take a concatenation have "
        "other names; leave the session first."
    )
