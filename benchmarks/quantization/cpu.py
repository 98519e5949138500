"""One linear layer on the CPU, eager: 1024 tokens, 3072 inputs and outputs, bfloat16 in and out.

    python benchmarks/quantization/cpu.py --threads 2 --out benchmarks/quantization/results/cpu.json

Rows of ours name the kernel that was chosen. `error` is the distance from the product in float32 relative to its norm.
Rows are timed in three rounds, one after the other each time, so that what else the machine does meets all of them; the
round with the least median counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from timing import Row, Sizes, ours, peers, product, timed
from torch.nn import functional as F

from hasten.core.diagnosis import in_words
from hasten.core.files import atomic_write_text, json_text
from hasten.core.packages import installed
from hasten.kernels.product import choose
from hasten.measure.environment import environment

CPU = torch.device("cpu")
Run = Callable[[], torch.Tensor]


def candidates(sizes: Sizes, with_compiled: bool) -> tuple[torch.Tensor, dict[str, Run], list[Row]]:
    """The exact product, what is to be timed by name, and what cannot be made here."""
    x, weight, bias = sizes.tensors(CPU)
    exact = F.linear(x.float(), weight.float(), bias.float())
    wide = (x.float(), weight.float(), bias.float())
    found: dict[str, Run] = {
        "bf16 F.linear": lambda: F.linear(x, weight, bias),
        "fp32 F.linear": lambda: F.linear(*wide),
    }
    for name, layer in ours(weight, bias).items():
        found[f"hasten {name} [{choose(product(layer, x)).name}]"] = lambda layer=layer: layer(x)
    missing: list[Row] = []
    for name, make in peers(weight, bias):
        try:
            layer = make()
        except Exception as problem:  # noqa: BLE001 - peers fail in their own ways
            missing.append({"name": name, "problem": in_words(problem)})
            continue
        found[name] = lambda layer=layer: layer(x)
        if with_compiled and name.startswith("torchao"):
            compiled = torch.compile(layer)
            found[f"{name}, compiled"] = lambda compiled=compiled: compiled(x)
    return exact, found, missing


def best(rounds: list[list[Row]]) -> Iterator[Row]:
    """Of each row the round with the least median."""
    for same in zip(*rounds, strict=True):
        yield min(same, key=lambda row: row.get("median_ms", float("inf")))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--inputs", type=int, default=3072)
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also peers that need torch.compile")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = Sizes(given.tokens, given.inputs, given.outputs)
    exact, found, missing = candidates(sizes, given.compiled)
    rounds = [[timed(name, run, exact) for name, run in found.items()] for _ in range(given.rounds)]
    rows = list(best(rounds))
    plain = rows[0]
    for row in rows:
        if "median_ms" in row:
            row["times_bf16"] = round(plain["median_ms"] / row["median_ms"], 3)
            row["times_bf16_processor"] = round(plain["processor_ms"] / row["processor_ms"], 3)
        print({name: value for name, value in row.items() if name != "runs"})
    facts = environment(CPU) | {name: installed(name) for name in ("torchao", "bitsandbytes")}
    if given.out is not None:
        record = {"environment": facts, "sizes": asdict(sizes), "rows": [*rows, *missing]}
        atomic_write_text(given.out, json_text(record))


if __name__ == "__main__":
    main()
