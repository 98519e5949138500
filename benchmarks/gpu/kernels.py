"""The kernels between products, timed beside PyTorch's operators and what inductor makes of them.

    python -m benchmarks.gpu.kernels --out benchmarks/gpu/results/kernels.json
    python -m benchmarks.gpu.kernels --tiny --device cpu --out /dev/null     # tries the script itself

Shapes of FLUX.1-dev at 1024 x 1024, and of Z-Image and Wan 2.1 14B. With each row: time, bytes that have to be moved
once by the time in TB/s beside the ceiling of a plain copy in the same run, and the distance from the reference, which
computes in float32 (codes count as what they stand for).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hasten.core.diagnosis import in_words
from hasten.core.files import atomic_write_text, json_text
from hasten.core.packages import installed
from hasten.kernels import gated, residual, rotary
from hasten.kernels.coded import Coded, Coding
from hasten.kernels.residual import Added, Norm, Normalizing
from hasten.kernels.rotary import HeadNorm, Heads
from hasten.measure.environment import environment

Row = dict[str, Any]
WIDTHS = {"FLUX": (4096, 3072, 12288), "Z-Image": (4128, 3840, 10240), "Wan 14B": (32760, 5120, 13824)}
HEADS = {"FLUX joint": ((512, 4096), 24, 128), "Z-Image": ((4128,), 30, 128)}


@dataclass(frozen=True)
class Case:
    """One pass: what is computed by the kernels, and by PyTorch."""

    name: str
    kernel: Callable[[], Any]
    reference: Callable[[], Any]
    given: tuple[torch.Tensor, ...]


@dataclass
class Bench:
    """Where and how large."""

    device: torch.device
    tiny: bool

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Median of single calls, with the cache filled by other data before each as in a model."""
        flush = torch.empty(256 << (0 if self.tiny else 20), dtype=torch.int8, device=self.device)
        for _ in range(3):
            run()
        return statistics.median(self._once(run, flush) for _ in range(3 if self.tiny else 30))

    def _once(self, run: Callable[[], object], flush: torch.Tensor) -> float:
        flush.zero_()
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def row_cases(bench: Bench) -> Iterator[Case]:
    for model, (tokens, width, inner) in WIDTHS.items():
        tokens, width, inner = (tokens // 512, width // 32, inner // 32) if bench.tiny else (tokens, width, inner)
        x, y, six = bench.randn(1, tokens, width), bench.randn(1, tokens, width), bench.randn(1, 6 * width)
        shift, scale, gate = six.chunk(6, -1)[:3]
        added, layer = Added(y, gate), Norm("layer", 1e-6)
        yield _case(f"{model} gate, residual", partial(residual.add, x, added), (x, y))
        codings = {"": None, "float8": Coding("float8"), "int8": Coding("int8"),
                   "rotated int8": Coding("int8", None, min(width & -width, 256))}  # fmt: skip
        for kind, coding in codings.items():
            how = Normalizing(layer, shift, scale, coding)
            yield _case(f"{model} norm, modulation {kind}", partial(residual.normalize, [x], how), (x,))
            both = f"{model} gate, residual, norm, modulation {kind}"
            yield _case(both, partial(residual.add_and_normalize, x, added, how), (x, y))
        h, other = bench.randn(1, tokens, inner), bench.randn(1, tokens, inner)
        for kind, coding in (("", None), ("float8", Coding("float8")), ("int8", Coding("int8"))):
            if model == "Z-Image":
                name = f"{model} SwiGLU {kind}"
                yield _case(name, partial(gated.activate, h, "swiglu", other, coding), (h, other))
            else:
                name = f"{model} GELU {kind}"
                yield _case(name, partial(gated.activate, h, "gelu_tanh", None, coding), (h,))


def head_cases(bench: Bench) -> Iterator[Case]:
    for model, (streams, count, size) in HEADS.items():
        made = []
        for tokens in streams:
            tokens = tokens // 128 if bench.tiny else tokens
            parts = bench.randn(1, tokens, 3 * count * size).chunk(3, -1)
            angles = torch.rand(1, tokens, size // 2, device=bench.device)
            query, key, value = (part.unflatten(-1, (count, size)) for part in parts)
            weight = bench.randn(size)
            made.append(Heads(query, key, value, weight, weight, (angles.cos(), angles.sin())))
        moved = tuple(part for one in made for part in (one.query, one.key, *([one.value] if len(made) > 1 else [])))
        yield _case(f"{model} heads", partial(rotary.prepare, made, HeadNorm(1e-6)), moved)


def _case(name: str, run: Callable[[], Any], given: tuple[torch.Tensor, ...]) -> Case:
    def by_reference() -> Any:
        # With gradients enabled the kernels do not serve, and the reference computes.
        with torch.enable_grad():
            return run()

    return Case(name, run, by_reference, given)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """What a pass puts out."""
    if isinstance(value, Coded):
        yield from (value.codes, value.scales)
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)
    else:
        yield value


def values(outcome: Any) -> torch.Tensor:
    """All numbers of it, float32, codes as what they stand for."""
    parts = outcome if isinstance(outcome, tuple) else (outcome,)
    return torch.cat([(part.values() if isinstance(part, Coded) else part.float()).flatten() for part in parts])


def measured(bench: Bench, case: Case) -> Row:
    found = case.kernel()
    moved = sum(part.nbytes for part in (*case.given, *tensors(found)))
    row: Row = {"case": case.name, "bytes": moved}
    wanted = values(case.reference())
    row["distance"] = float((values(found) - wanted).norm() / wanted.norm())
    compiled = torch.compile(case.reference) if not bench.tiny else case.reference
    for name, run in (("kernel", case.kernel), ("pytorch", case.reference), ("inductor", compiled)):
        try:
            row[f"{name}_ms"] = bench.milliseconds(run)
        except Exception as error:  # noqa: BLE001 - what fails is a result
            row[f"{name}_failed"] = in_words(error, 300)
    row["kernel_tb_per_s"] = moved / row["kernel_ms"] / 1e9 if "kernel_ms" in row else None
    return row


def ceiling(bench: Bench) -> float:
    """TB/s, read and written, of a copy of half a gigabyte."""
    source = torch.empty(2**16 if bench.tiny else 2**28, dtype=torch.int16, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench.milliseconds(lambda: target.copy_(source)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    bench = Bench(torch.device(asked.device), asked.tiny)
    torch.manual_seed(0)
    rows = list[Row]()
    with torch.no_grad():
        copy = ceiling(bench)
        print(f"copy: {copy:.3g} TB/s")
        for case in itertools.chain(row_cases(bench), head_cases(bench)):
            rows.append(row := measured(bench, case))
            times = "  ".join(f"{key} {row[key]:.4f}" for key in row if key.endswith("_ms"))
            print(f"{row['case']:52} {times}  {row['kernel_tb_per_s']:.3g} TB/s  {row['distance']:.2g}", flush=True)
    facts = environment(bench.device) | {"triton": installed("triton")}
    if str(asked.out) != "/dev/null":
        atomic_write_text(asked.out, json_text({"environment": facts, "copy_tb_per_s": copy, "rows": rows}))


if __name__ == "__main__":
    main()
