"""What compiling, CUDA graphs and layout do to one denoising step, and what a second process saves.

Real architectures with random weights, as speed does not depend on them; one guided call as pipelines make it.

    python -m benchmarks.compilation.run unets --out unets.json     # SD1.5 and SDXL: layout, graphs, blocks
    python -m benchmarks.compilation.run whole --out whole.json     # SDXL compiled whole (minutes of set-up)
    python -m benchmarks.compilation.run transformers --out t.json  # FLUX and Z-Image
    python -m benchmarks.compilation.run warm --out warm.json       # the same recipe in two processes
    ... --tiny runs the small test models on whatever device there is: a check of the script itself
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.core.errors import HastenError, Refused
from hasten.core.expression import parse
from hasten.core.files import atomic_write_text, json_text
from hasten.core.recipe import Recipe
from hasten.core.session import Session, accelerate
from hasten.core.spec import InputSize
from hasten.core.target import find_released
from hasten.measure.environment import environment

GRAPHS = ("CudaGraphs()", "ChannelsLast()", "ChannelsLast() | CudaGraphs()")
BLOCKS = ("CompileBlocks()", "CompileBlocks() | CudaGraphs()", "ChannelsLast() | CompileBlocks() | CudaGraphs()")
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "unets": {"stable-diffusion-v1-5": (*GRAPHS, *BLOCKS), "stable-diffusion-xl-base-1.0": (*GRAPHS, *BLOCKS)},
    "whole": {"stable-diffusion-xl-base-1.0": ("CompileWhole()", "ChannelsLast() | CompileWhole() | CudaGraphs()")},
    "transformers": {"FLUX.1-dev": BLOCKS[:2], "Z-Image": ("CudaGraphs()", *BLOCKS[:2])},
}
CALLS = 10


@dataclass
class Row:
    """One recipe on one model. Milliseconds of a call on the GPU's clock (host's on a CPU), median of ten."""

    model: str
    recipe: str
    milliseconds: float | None = None
    least: float | None = None
    most: float | None = None
    host_milliseconds: float | None = None
    """Time until the call returns to Python: where it equals the above, the GPU waits for the host."""
    setup_seconds: float | None = None
    peak_gib: float | None = None
    relative_difference: float | None = None
    """Norm of the difference to the plain output, relative."""
    engaged: tuple[str, ...] = ()
    problem: str = ""


def main() -> None:
    """Run one part and write its rows."""
    options = _options()
    if options.part == "child":
        print(json.dumps(_child(options)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = _warm(options) if options.part == "warm" else _rows(options, device)
    result = {"part": options.part, "tiny": options.tiny, "environment": environment(device), "rows": rows}
    atomic_write_text(options.out, json_text(result))
    for row in rows:
        print(row)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "warm", "child"])
    parser.add_argument("--out", type=Path, default=Path("compilation.json"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model", default="stable-diffusion-v1-5")
    parser.add_argument("--recipe", default="CompileBlocks(parts=('denoiser',))")
    return parser.parse_args()


def _rows(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, recipes in PARTS[options.part].items():
        case = Case(name, device, tiny=options.tiny)
        for recipe in ("", *recipes):
            row = case.measure(recipe)
            print(f"{row.model:30} {row.recipe or 'plain':50} {row.milliseconds} ms {row.problem}", file=sys.stderr)
            found.append(asdict(row))
        del case
    return found


class Case:
    """A denoiser on a device with the arguments of one call."""

    def __init__(self, name: str, device: torch.device, *, tiny: bool) -> None:
        spec, released = find_released(name)
        self.name, self.device = name, device
        dtype = torch.float32 if device.type == "cpu" else torch.float16 if spec.unet else torch.bfloat16
        config: Any = spec.tiny if tiny else released.config
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.model: Any = spec.build(config, device=device)
        finally:
            torch.set_default_dtype(before)
        batch = 2 if spec.guidance == "batched" else 1
        real = InputSize(
            batch=batch, height=released.height // 8, width=released.width // 8, text_tokens=released.text_tokens
        )
        given = spec.example(config, InputSize(batch=batch) if tiny else real)
        self.given = {key: _placed(value, device, dtype) for key, value in given.items()}
        self.plain: torch.Tensor | None = None

    def call(self) -> torch.Tensor:
        """One call; a model that returns a list of pictures gives them stacked."""
        output = self.model(**self.given, return_dict=False)[0]
        return torch.stack(output) if isinstance(output, list) else output

    @torch.no_grad()
    def measure(self, recipe: str) -> Row:
        """Apply a recipe (none when empty), time its first calls as set-up, then ten calls."""
        row = Row(self.name, recipe)
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with accelerate(self.model, parse(recipe) if recipe else Recipe(())) as session:
                self._fill(row, session)
        except (Refused, HastenError, RuntimeError) as error:
            row.problem = " ".join(str(error).split())[:300]
        return row

    def _fill(self, row: Row, session: Session) -> None:
        began = time.perf_counter()
        for _ in range(2):
            self.call()
        output = self.call()
        self._wait()
        row.setup_seconds = time.perf_counter() - began
        timed = [self._timed(self.call) for _ in range(CALLS)]
        row.milliseconds, row.least, row.most = _summary([device for device, _ in timed])
        row.host_milliseconds = statistics.median(host for _, host in timed)
        row.peak_gib = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
        if self.plain is None:
            self.plain = output
        row.relative_difference = float((output - self.plain).float().norm() / self.plain.float().norm())
        row.engaged = tuple(evidence.summary for evidence in session.evidence().values())

    def _timed(self, run: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds on the device and on the host."""
        self._wait()
        began = time.perf_counter()
        if self.device.type != "cuda":
            run()
            taken = (time.perf_counter() - began) * 1e3
            return taken, taken
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        host = (time.perf_counter() - began) * 1e3
        last.record()
        last.synchronize()
        return first.elapsed_time(last), host

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _summary(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_placed(item, device, dtype) for item in value]
    if isinstance(value, dict):
        return {key: _placed(item, device, dtype) for key, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def _warm(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same recipe in three processes with one cache folder of ours, and an empty one of PyTorch's each time."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "second process", "third process"):
            own = {"HASTEN_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, f"of-{len(found)}"))}
            own["TRITON_CACHE_DIR"] = str(Path(folder, f"triton-{len(found)}"))
            command = [sys.executable, "-m", "benchmarks.compilation.run", "child", "--model", options.model]
            command += ["--recipe", options.recipe, *(["--tiny"] if options.tiny else [])]
            done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=True)
            found.append({"process": name} | json.loads(done.stdout.splitlines()[-1]))
    return found


def _child(options: argparse.Namespace) -> dict[str, Any]:
    from hasten.compilation.compile import Compile
    from hasten.compilation.compiler import CompileCounter

    case = Case(options.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"), tiny=options.tiny)
    recipe = parse(options.recipe)
    technique = next(item for item in recipe if isinstance(item, Compile))
    began = time.perf_counter()
    with torch.no_grad(), accelerate(case.model, recipe) as session:
        case.call()
        first = time.perf_counter() - began
        counter = session.state(technique, CompileCounter)
        return {"model": options.model, "recipe": options.recipe, "first_call_seconds": first} | asdict(counter)


if __name__ == "__main__":
    main()
