"""All attention kernels by name. A new one is an entry here."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from hasten.attention.kernels import builtin
from hasten.attention.kernels import flash_attention as flash
from hasten.attention.kernels.base import HALF, AttentionKernel
from hasten.attention.kernels.flex_attention import flex
from hasten.attention.kernels.float8 import float8_reference, reference_codes
from hasten.attention.kernels.sage_attention import SAGE, first_lacks, sage
from hasten.attention.kernels.xformers_operator import XFORMERS, no_operator, xformers
from hasten.core.errors import UnknownName

__all__ = ["HALF", "KERNELS", "LOSSLESS", "LOSSY", "AttentionKernel", "kernel"]

_DESCRIBED = flash.DESCRIBED

KERNELS: dict[str, AttentionKernel] = {
    entry.name: entry
    for entry in (
        AttentionKernel(
            name="math",
            about="plain matrix products; the reference",
            run=builtin.sdpa(SDPBackend.MATH),
            devices=("cpu", "cuda", "mps", "xpu"),
            other_value_size=True,
            masks="yes",
            dropout=True,
            gradients=True,
            measured=False,
        ),
        AttentionKernel(
            name="flash",
            about="FlashAttention as built into PyTorch (CPU: its blocked CPU kernel)",
            run=builtin.flash,
            devices=("cpu", "cuda", "xpu"),
            dtypes=HALF,
            largest_head=256,
            masks="on the CPU",
            biases=_DESCRIBED,
            gradients=True,
        ),
        AttentionKernel(
            name="efficient",
            about="memory-efficient attention (the xFormers kernel built into PyTorch)",
            run=builtin.efficient,
            other_value_size=True,
            masks="yes",
            biases=_DESCRIBED,
            grouped=False,
            dropout=True,
            gradients=True,
        ),
        AttentionKernel(
            name="cudnn",
            about="cuDNN's fused attention",
            run=builtin.sdpa(SDPBackend.CUDNN_ATTENTION),
            dtypes=HALF,
            capability=(8, 9, 10, 12),
            masks="yes",
            biases=frozenset({"LowerTriangular"}),
            gradients=True,
            probe=builtin.no_cudnn,
        ),
        AttentionKernel(
            name="flash2",
            about="FlashAttention 2 of the package flash-attn",
            run=flash.flash(flash.FLASH2, dropout=True),
            dtypes=HALF,
            capability=(8, 9, 10, 12),
            largest_head=256,
            biases=_DESCRIBED,
            dropout=True,
            gradients=True,
            package=flash.FLASH2,
        ),
        AttentionKernel(
            name="flash3",
            about="FlashAttention 3 for Hopper GPUs (packages fa3-fwd or flash_attn_interface)",
            run=flash.flash(flash.FLASH3),
            dtypes=HALF,
            capability=(9,),
            largest_head=256,
            biases=_DESCRIBED,
            package=flash.FLASH3,
            lacks=flash.wheel_lacks_half,
        ),
        AttentionKernel(
            name="flash4",
            about="FlashAttention 4 for Hopper and Blackwell GPUs (package flash-attn-4)",
            run=flash.flash(flash.FLASH4, open_window=None),
            dtypes=HALF,
            capability=(8, 9, 10, 11, 12),
            largest_head=128,
            biases=_DESCRIBED,
            package=flash.FLASH4,
        ),
        AttentionKernel(
            name="xformers",
            about="xFormers' memory_efficient_attention",
            run=xformers,
            masks="yes",
            biases=_DESCRIBED,
            grouped=False,
            dropout=True,
            gradients=True,
            package=XFORMERS,
            probe=no_operator,
        ),
        AttentionKernel(
            name="flex",
            about="PyTorch's FlexAttention, compiled for each description",
            run=flex,
            devices=("cpu", "cuda"),
            other_value_size=True,
            masks="yes",
            biases=_DESCRIBED,
            gradients=True,
            measured=False,
        ),
        AttentionKernel(
            name="flash3_float8",
            about="FlashAttention 3 on float8 numbers, a scale per head, for Hopper GPUs (package fa3-fwd)",
            run=flash.flash3_float8,
            codes=flash.flash3_codes,
            codes_size=flash.FLOAT8_SIZE,
            dtypes=HALF,
            capability=(9,),
            largest_head=256,
            biases=_DESCRIBED,
            lossy=True,
            package=flash.FLASH3,
            lacks=flash.wheel_lacks,
        ),
        AttentionKernel(
            name="sage",
            about="SageAttention 1 or 2, whichever is installed: int8 scores, a scale per block of a head",
            run=sage,
            dtypes=HALF,
            capability=(8, 9, 10, 12),
            largest_head=128,
            biases=frozenset({"LowerTriangular"}),
            lossy=True,
            package=SAGE,
            lacks=first_lacks,
        ),
        AttentionKernel(
            name="float8_reference",
            about="what float8 attention with a scale per head computes, rendered plainly on any device, slowly",
            run=float8_reference,
            codes=reference_codes,
            devices=("cpu", "cuda", "mps", "xpu"),
            other_value_size=True,
            masks="yes",
            lossy=True,
            measured=False,
        ),
    )
}

LOSSLESS = tuple(name for name, entry in KERNELS.items() if not entry.lossy)
LOSSY = tuple(name for name, entry in KERNELS.items() if entry.lossy)


def kernel(name: str) -> AttentionKernel:
    """Look a kernel up by name; an unknown one suggests neighbours."""
    if name not in KERNELS:
        raise UnknownName("attention kernel", name, KERNELS)
    return KERNELS[name]
