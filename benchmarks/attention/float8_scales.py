"""What a scale that is too large costs float8 attention: scales from bounds against scales of the largest numbers.

    python benchmarks/attention/float8_scales.py --out float8_scales.json

Two tables, on any device. First, attention on random heads of FLUX's size, normalized and rotated, whose queries and
keys are rounded with scales 1 to 1000 times those of their largest numbers: the error against exact attention. Second,
for each attention call of a bundled, trained model: how much larger than needed are the scales from bounds, and the
errors of the two.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.attention import heads as attention_heads
from hasten.core.files import atomic_write_text, json_text
from hasten.kernels.coded_heads import LARGEST, CodedHeads, code_heads
from hasten.kernels.rotary import HeadNorm, Heads, reference
from hasten.measure.environment import environment
from hasten.measure.rendering import render

Row = dict[str, Any]
FACTORS = (1, 2, 3, 5, 10, 30, 100, 300, 1000)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """By plain products: a call of PyTorch's attention would be redirected to 8 bits here as the model's own are."""
    near, far, values = (part.transpose(1, 2).double() for part in (query, key, value))
    return (near @ far.transpose(2, 3) / math.sqrt(near.shape[3])).softmax(-1) @ values


def error(coded: CodedHeads, exact: Sequence[torch.Tensor]) -> float:
    """Of attention on codes, relative to the norm of the exact result."""
    wanted = attention(*exact)
    return float((attention(*coded.values()) - wanted).norm() / wanted.norm())


def enlarged(exact: Sequence[torch.Tensor], factor: float) -> CodedHeads:
    """Queries and keys with scales `factor` times those of their largest numbers."""
    query, key, value = exact
    coded = code_heads([Heads(query, key, value)])
    scales = coded.scales * torch.tensor([factor, factor, 1.0], device=coded.scales.device)[:, None, None]
    query, key, value = (
        (part / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        for part, scale in zip(exact, scales, strict=True)
    )
    return CodedHeads(query, key, value, scales, coded.dtype)


def random_heads(tokens: int, device: torch.device) -> Heads:
    query, key, value = torch.randn(3, 1, tokens, 4, 128, device=device)
    angles = torch.rand(1, tokens, 64, device=device)
    of_query, of_key = torch.rand(2, 128, device=device) + 0.5
    return Heads(query, key, value, of_query, of_key, (angles.cos(), angles.sin()))


def factors(tokens: int, device: torch.device) -> Iterator[Row]:
    one = random_heads(tokens, device)
    exact = reference([one], HeadNorm(1e-6), torch.float32)
    yield {"scales": "from bounds", **compared([one], HeadNorm(1e-6))}
    for factor in FACTORS:
        yield {"scales": f"{factor} x largest", "error": error(enlarged(exact, factor), exact)}


def compared(streams: Sequence[Heads], norm: HeadNorm | None) -> Row:
    """Both ways to find scales, on one call."""
    exact = reference(streams, norm, torch.float32)
    bounded, searched = code_heads(streams, norm), code_heads([Heads(*exact)])
    ratio = (bounded.scales / searched.scales)[:2]
    return {"times_too_large": [float(ratio.min()), float(ratio.median()), float(ratio.max())],
            "error": error(bounded, exact), "error_searched": error(searched, exact)}  # fmt: skip


def trained(name: str, steps: int, device: torch.device) -> list[Row]:
    """Every attention call of a short run of a bundled model."""
    rows: list[Row] = []

    def recorded(streams: Sequence[Heads], norm: HeadNorm | None) -> CodedHeads:
        rows.append(compared(streams, norm))
        return code_heads(streams, norm)

    model = hasten.load(name)
    workload = model.workload.replace(steps=steps)
    pipeline: Any = model.pipeline.to(device)
    attention_heads.code_heads = recorded
    with hasten.accelerate(pipeline, "FusedBlocks() | EightBitAttention(kernel='float8_reference', least_keys=0)"):
        render(pipeline, workload, workload.prompts[0], 0)
    attention_heads.code_heads = code_heads
    return rows


def total(rows: Sequence[Row]) -> Row:
    """Over all calls: the range of what scales are too large by, and mean errors."""
    ratios = [ratio for row in rows for ratio in row["times_too_large"]]
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("error", "error_searched")}
    return {"calls": len(rows), "times_too_large": [min(ratios), max(ratios)], **means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = list(factors(asked.tokens, device))
        calls = trained(asked.model, asked.steps, device)
    for row in (*rows, total(calls)):
        print({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    facts = {"environment": environment(device), "tokens": asked.tokens, "model": asked.model, "steps": asked.steps}
    if str(asked.out) != "/dev/null":
        atomic_write_text(asked.out, json_text({**facts, "random": rows, "trained": total(calls), "calls": calls}))


if __name__ == "__main__":
    main()
