"""Kernels by what they do, told by their names."""

from __future__ import annotations

from collections.abc import Mapping

KINDS = (
    ("attention", ("flash", "fmha", "attention", "sdpa", "cudnn_generated_fort", "sage", "attn")),
    ("products", ("gemm", "cutlass", "nvjet", "cublas", "matmul", "scaled_mm", "rows_product", "widening_product",
                  "grouped_product", "few_tokens_product", "recode_rows", "widen_weight", "gemv", "splitk", "s16816",
                  "xmma")),
    ("fused", ("token_kernel", "activation_kernel", "heads_kernel", "round_rows")),
    ("copies", ("memcpy", "memset", "copy_", "cat", "elementwise_kernel_with_index")),
)  # fmt: skip


def by_kind(times: Mapping[str, float]) -> dict[str, float]:
    """The sum of each kind; what no name gives away is "rest"."""
    sums = dict.fromkeys([kind for kind, _ in KINDS] + ["rest"], 0.0)
    for name, value in times.items():
        sums[kind_of(name)] += value
    return sums


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "rest")
