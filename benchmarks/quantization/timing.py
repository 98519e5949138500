"""What the benchmarks of single layers share: layers of ours and of peers, and how they are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hasten.core.diagnosis import in_words
from hasten.kernels.activations import Activations
from hasten.kernels.call import Kernel, Product
from hasten.kernels.hadamard import rotate
from hasten.kernels.modules import Input, LowRank, QuantizedLinear
from hasten.kernels.rounding import quantize_float8, quantize_integer, quantize_table

Row = dict[str, Any]
NF4 = (-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0, 0.07958, 0.16093, 0.24611, 0.33792, 0.44071,
       0.56262, 0.72296, 1)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of one linear layer."""

    tokens: int
    inputs: int
    outputs: int

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input, weight and bias in bfloat16: random numbers, since zeros run faster than real data."""
        torch.manual_seed(0)
        x = torch.randn(self.tokens, self.inputs)
        weight = torch.randn(self.outputs, self.inputs) / self.inputs**0.5
        return tuple(part.to(device, torch.bfloat16) for part in (x, weight, torch.randn(self.outputs)))  # type: ignore[return-value]


def milliseconds(run: Callable[[], object], device: torch.device, seconds: float = 1.0) -> Row:
    """Median and least time of calls after three for warming up: by events on a GPU, else by the wall clock.

    `processor_ms` is the time that the threads of the process were computing: what the call needs on a machine that
    does other things as well.
    """
    for _ in range(3):
        run()
    times: list[float] = []
    worked: list[float] = []
    while len(times) < 10 or (sum(times) < 1000 * seconds and len(times) < 200):
        began = time.process_time()
        times.append(_gpu_time(run) if device.type == "cuda" else _cpu_time(run))
        worked.append(1000 * (time.process_time() - began))
    row: Row = {"median_ms": round(statistics.median(times), 4), "least_ms": round(min(times), 4), "runs": len(times)}
    return row if device.type == "cuda" else row | {"processor_ms": round(statistics.median(worked), 3)}


def _cpu_time(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def _gpu_time(run: Callable[[], object]) -> float:
    # A large write between calls empties the second-level cache of weights that a step would not find there either.
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance relative to the norm."""
    return float((found.float() - exact).norm() / exact.norm())


def ours(weight: torch.Tensor, bias: torch.Tensor) -> dict[str, QuantizedLinear]:
    """Our layers by name."""
    table = torch.tensor(NF4, device=weight.device)
    rank = {"down": weight[:32] * 0.01, "up": weight.new_zeros(weight.shape[0], 32)}
    rotated = rotate(weight.float(), 256)

    def layer(made: Any, activations: Activations = "none", **more: Any) -> QuantizedLinear:
        side = LowRank(**rank) if more.pop("side", False) else None
        return QuantizedLinear(made, bias, given=Input(activations=activations, **more), low_rank=side)

    return {
        "W8A8 int8": layer(quantize_integer(weight, 8), "int8"),
        "W8A8 int8, rotated by 256": layer(quantize_integer(rotated, 8), "int8", rotation=256),
        "W8A8 int8, rank 32": layer(quantize_integer(weight, 8), "int8", side=True),
        "W8A8 float8 rows": layer(quantize_float8(weight), "float8"),
        "W4A8 groups of 64": layer(quantize_integer(weight, 4, 64), "int8"),
        "W4A8 groups of 64, rank 32": layer(quantize_integer(weight, 4, 64), "int8", side=True),
        "W8A16": layer(quantize_integer(weight, 8)),
        "W4A16 groups of 64": layer(quantize_integer(weight, 4, 64, symmetric=False, scales=torch.float16)),
        "W4A16 nf4": layer(quantize_table(weight, table, 4, 64)),
    }


def product(layer: QuantizedLinear, x: torch.Tensor) -> Product:
    """The product that a layer computes."""
    names = ("input_scale", "smooth", "down", "up", "rank_scale")
    parts = {name: layer._buffers[name] for name in names}
    return Product(x, layer.quantized, layer.bias, layer.activations, rotation=layer.rotation, **parts)  # type: ignore[arg-type]


def timed(name: str, run: Callable[[], torch.Tensor], exact: torch.Tensor, **facts: Any) -> Row:
    """One row: times and error, or why it does not run here."""
    try:
        with torch.no_grad():
            return {"name": name, **facts, **milliseconds(run, exact.device), "error": round(error(run(), exact), 6)}
    except Exception as problem:  # noqa: BLE001 - a candidate may fail in any way; the others go on
        return {"name": name, **facts, "problem": in_words(problem)}


def kernel_rows(
    name: str, layer: QuantizedLinear, x: torch.Tensor, exact: torch.Tensor, able: list[Kernel]
) -> Iterator[Row]:
    """A row for each kernel that takes the layer."""
    given = product(layer, x)
    for kernel in able:
        if kernel.takes(given):
            yield timed(name, lambda kernel=kernel: kernel.run(given), exact, kernel=kernel.name)


def peers(weight: torch.Tensor, bias: torch.Tensor) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Layers of other libraries, each made when asked for: an import or a type may be missing here."""
    outputs, inputs = weight.shape

    def linear() -> nn.Linear:
        found = nn.Linear(inputs, outputs, device=weight.device, dtype=weight.dtype)
        found.weight.data.copy_(weight)
        found.bias.data.copy_(bias)
        return found.requires_grad_(False)

    def ao(config: str, **settings: Any) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            import torchao.quantization as quantization

            layer = nn.Sequential(linear())
            quantization.quantize_(layer, getattr(quantization, config)(**settings))
            return layer

        return make

    def bits_and_bytes(bits: int) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            import bitsandbytes as bnb

            plain = linear()
            if bits == 8:
                layer = bnb.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, threshold=6.0)
                layer.weight = bnb.nn.Int8Params(plain.weight.data.cpu(), has_fp16_weights=False, requires_grad=False)
            else:
                layer = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=torch.bfloat16, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(plain.weight.data.cpu(), quant_type="nf4", requires_grad=False)
            layer.bias = plain.bias
            return layer.to(weight.device)

        return make

    yield "torchao Int8DynamicActivationInt8Weight", ao("Int8DynamicActivationInt8WeightConfig")
    yield "torchao Int8WeightOnly", ao("Int8WeightOnlyConfig")
    yield "torchao Float8DynamicActivationFloat8Weight PerTensor", ao("Float8DynamicActivationFloat8WeightConfig")
    yield "bitsandbytes nf4", bits_and_bytes(4)
    yield "bitsandbytes LLM.int8()", bits_and_bytes(8)
