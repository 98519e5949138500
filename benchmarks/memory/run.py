"""What it costs to need less memory: step time, peak and bytes moved, of FLUX.1-dev and Z-Image on one GPU.

    python benchmarks/memory/run.py --out memory.json
    python benchmarks/memory/run.py --out memory.json --models FLUX.1-dev --limit 220    # one model, with more time
    ... --tiny --device cpu runs the small test models: a check of the script itself

Real architectures with random weights, as speed does not depend on them; denoiser and VAE, without text encoders. The
weights begin and end on the device, so that every row sends them home, and gets them back, itself. Results are
written after each row; rows that would begin after `--limit` seconds are left out, and listed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.core.diagnosis import in_words
from hasten.core.files import atomic_write_text, json_text
from hasten.core.session import Session
from hasten.core.spec import InputSize
from hasten.core.target import find_released
from hasten.measure.environment import environment
from hasten.memory import ModulationTable
from hasten.memory.engine.moving import Moved
from hasten.memory.modulation_table import _Tables  # pyright: ignore[reportPrivateUsage]

Row = dict[str, Any]
MODELS = ("FLUX.1-dev", "Z-Image-Turbo")
RECIPES = (
    "",
    "ModulationTable()",
    "OneAtATime({})",
    "Offload(kind='blocks', {})",
    "CompileBlocks()",
    "Offload(kind='blocks', {}) | CompileBlocks()",
    "ModulationTable() | CompileBlocks()",
    "Offload(kind='blocks', {}) | ModulationTable()",
    "Offload(kind='leaf', {})",
    "Offload(kind='model', {})",
    "OneAtATime({}) | CompileBlocks()",
    "Offload(kind='model', {}) | CompileBlocks()",
    "Offload(kind='leaf', {}) | CompileBlocks()",
)
"""What matters most comes first."""
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TINY_VAE: dict[str, Any] = {"block_out_channels": (32,), "norm_num_groups": 8, "latent_channels": 4}
STEPS = 6


@dataclass
class Bench:
    """Where and how large, and until when."""

    device: torch.device
    tiny: bool
    deadline: float

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


class Pipeline:
    """A denoiser, a VAE and a scheduler, driven as a pipeline drives them; every image has a pooled text of its own."""

    def __init__(self, bench: Bench, name: str) -> None:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

        self.bench, (self.spec, released) = bench, find_released(name)
        config: Any = self.spec.tiny if bench.tiny else released.config
        vae = TINY_VAE if bench.tiny else VAE
        torch.manual_seed(0)
        torch.set_default_dtype(bench.dtype)
        try:
            denoiser = self.spec.build(config, device=bench.device)
            with bench.device:
                self.vae: Any = AutoencoderKL(**vae).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        self.denoiser: Any = denoiser.to(bench.dtype)
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler()
        self.components = {"transformer": self.denoiser, "vae": self.vae, "scheduler": self.scheduler}
        size = InputSize(height=released.height // 8, width=released.width // 8, text_tokens=released.text_tokens)
        given = self.spec.example(config, InputSize() if bench.tiny else size)
        self.images = 0
        self.given = {key: placed(value, bench) for key, value in given.items()}
        side = 8 if bench.tiny else released.height // 8
        self.latents = torch.zeros(1, vae["latent_channels"], side, side, device=bench.device, dtype=bench.dtype)

    @torch.no_grad()
    def image(self, steps: int, seen: list[float] | None = None) -> torch.Tensor:
        """One image; `seen` receives the milliseconds of each step. Returns the last output of the denoiser."""
        self.scheduler.set_timesteps(steps, device=self.bench.device)
        given = {**self.given}
        if "pooled_projections" in given:
            given["pooled_projections"] = given["pooled_projections"] + self.images
        self.images += 1
        small = torch.zeros(1, device=self.bench.device)
        output = small
        for timestep in self.scheduler.timesteps:
            self.bench.wait()
            began = time.perf_counter()
            output = self._step(given, timestep)
            self.bench.wait()
            if seen is not None:
                seen.append(1000 * (time.perf_counter() - began))
            self.scheduler.step(small, timestep, small)
        self.vae.decode(self.latents, return_dict=False)
        self.bench.wait()
        return output

    def _step(self, given: Row, timestep: torch.Tensor) -> torch.Tensor:
        name = self.spec.timestep
        stamp = (timestep.to(self.bench.dtype) / 1000).expand_as(given[name])
        output = self.denoiser(**{**given, name: stamp}, return_dict=False)[0]
        return torch.stack(output) if isinstance(output, list) else output


def placed(value: Any, bench: Bench) -> Any:
    """Arguments on the device and, where they are floating-point numbers, in its type."""
    if isinstance(value, torch.Tensor):
        return value.to(bench.device, bench.dtype if value.is_floating_point() else value.dtype)
    return [placed(item, bench) for item in value] if isinstance(value, list) else value


def moved(session: Session | None) -> int:
    """Bytes brought to the device so far, as counted by the techniques of the session."""
    total = 0
    for technique in session.recipe if session else ():
        if isinstance(technique, ModulationTable):
            total += sum(table.ledger.moved for table in session.state(technique, _Tables).tables) if session else 0
        elif hasattr(technique, "pinned"):
            total += session.state(technique, Moved).ledger.moved if session else 0
    return total


def measure(pipe: Pipeline, recipe: str, plain: torch.Tensor | None) -> tuple[Row, torch.Tensor | None]:
    """Apply a recipe, make one image for warming up and one that counts."""
    bench, pipe.images = pipe.bench, 0
    torch._dynamo.reset()
    release()
    began = time.perf_counter()
    try:
        session = hasten.accelerate(pipe, recipe) if recipe else None
    except hasten.HastenError as error:
        return {"refused": str(error)}, None
    applied = time.perf_counter() - began
    try:
        pipe.image(2)
        setup = time.perf_counter() - began
        row, output = counted(pipe, session)
        row |= {"apply_s": applied, "setup_s": setup}
        row["distance"] = distance(output, plain) if plain is not None else 0.0
        row["evidence"] = {type(t).__name__: e.summary for t, e in session.evidence().items()} if session else {}
        return row, output
    except Exception as error:  # noqa: BLE001 - a recipe that fails is a row
        return {"failed": in_words(error, 1000)}, None
    finally:
        if session:
            session.close()
        bench.wait()


def counted(pipe: Pipeline, session: Session | None) -> tuple[Row, torch.Tensor]:
    """Times, peak and bytes of an image after a first one of as many steps."""
    pipe.image(STEPS)
    cuda = pipe.bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before, times, began = moved(session), list[float](), time.perf_counter()
    output = pipe.image(STEPS, times)
    row = {
        "step_ms": statistics.median(times[1:]),
        "step_ms_least": min(times[1:]),
        "step_ms_most": max(times[1:]),
        "first_step_ms": times[0],
        "image_s": time.perf_counter() - began,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "bytes_moved_per_image": moved(session) - before,
    }
    return row, output


def distance(found: torch.Tensor, plain: torch.Tensor) -> float:
    """Of the denoiser's last outputs, relative to the plain one's norm."""
    return float((found.float() - plain.float()).norm() / plain.float().norm())


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(bench: Bench, models: list[str], out: Path, recipes: tuple[str, ...] = RECIPES) -> list[Row]:
    """All rows, written after each. Models take turns only once: what one has not done by its share is left out."""
    rows: list[Row] = []
    facts = {"environment": environment(bench.device), "tiny": bench.tiny, "steps": STEPS}
    began = time.monotonic()
    for number, name in enumerate(models, 1):
        share = began + (bench.deadline - began) * number / len(models)
        pipe, plain = Pipeline(bench, name), None
        for text in recipes:
            recipe = text.replace("{}", "device='cpu'" if bench.device.type == "cpu" else "device='cuda'")
            row: Row = {"model": name, "recipe": recipe or "plain"}
            if time.monotonic() > share:
                row |= {"left_out": "no time was left"}
            else:
                found, output = measure(pipe, recipe, plain)
                plain, row = output if plain is None else plain, row | found
            rows.append(row)
            show(row)
            atomic_write_text(out, json_text(facts | {"rows": rows}))
        del pipe, plain
        release()
    return rows


def show(row: Row) -> None:
    words = [f"{row['model']:15}", f"{row['recipe']:60}"]
    if "step_ms" in row:
        words += [f"{row['step_ms']:8.1f} ms a step", f"{row['peak_gib'] or 0:6.2f} GiB"]
        words += [f"{row['bytes_moved_per_image'] / 1e9:6.1f} GB moved", f"distance {row['distance']:.1e}"]
    print("  ".join([*words, *(row[key] for key in ("refused", "failed", "left_out") if key in row)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=200.0, help="seconds after which no row is begun")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    run(Bench(torch.device(asked.device), asked.tiny, time.monotonic() + asked.limit), asked.models, asked.out)


if __name__ == "__main__":
    main()
