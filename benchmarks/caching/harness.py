"""Measures rows: pictures of every evaluation prompt, their time and work, and their distance to both references."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from counting import Work, summary
from methods import Method, Search, Setting, nearest
from references import Pictures, read_pictures
from torch import Tensor

from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_bytes
from hasten.core.workload import Workload
from hasten.measure.instruments import synchronize
from hasten.measure.quality import fidelities
from hasten.measure.rendering import arguments

Pair = tuple[str, int]


@dataclass
class Bench:
    """A model with its prompts. Rows run in forked copies, so `pipeline` itself stays untouched."""

    model: str
    pipeline: Any
    workload: Workload
    calibration: list[Pair]
    evaluation: list[Pair]
    cache: Path
    device: str = "cpu"

    @property
    def denoiser(self) -> Any:
        """The network that is called once a step."""
        return getattr(self.pipeline, "transformer", None) or self.pipeline.unet

    def picture(self, pair: Pair, steps: int, *, latent: bool = False) -> Tensor:
        """One picture, float [3, H, W] in [0, 1], or its latent."""
        given = arguments(self.pipeline, self.workload.replace(steps=steps), *pair)
        if latent and "prompt" in given:  # DiTPipeline always decodes
            given["output_type"] = "latent"
        images = self.pipeline(**given).images
        if isinstance(images, Tensor):
            return images
        found = torch.from_numpy(np.asarray(images)[0]).permute(2, 0, 1).float()
        if not found.isfinite().all():
            raise HastenError("The picture holds NaN or infinite values.")
        return found.clamp(0, 1)

    def draw(self, pipeline: Any, steps: int) -> None:
        """Half of the calibration pictures, thrown away: for peers that measure something on uncached runs."""
        for pair in self.calibration[: max(1, len(self.calibration) // 2)]:
            self.picture(pair, steps)

    def on_device(self) -> Bench:
        """Move the pipeline to the device; only in a child process, since a GPU does not survive a fork."""
        if self.device != "cpu":
            self.pipeline.to(self.device)
        return self


def mean_full_steps(bench: Bench, method: Method, setting: Setting) -> float:
    """Full steps a picture takes on the calibration prompts."""
    bench.on_device()
    complete, work = _complete(bench), Work()
    counts: list[list[int]] = []
    with work.watching(bench.denoiser), method.prepare(bench.pipeline, setting):
        for pair in bench.calibration:
            bench.picture(pair, setting.run_steps, latent=True)
            counts.append(work.take())
    return summary(counts, complete, setting.run_steps)["full_steps"]


def _complete(bench: Bench) -> int:
    """Work of one complete denoiser call, from a short plain run."""
    work = Work()
    with work.watching(bench.denoiser):
        bench.picture(bench.evaluation[0], 2, latent=True)
    return max(work.take())


def calibrated(bench: Bench, method: Method, steps: int) -> dict[str, Any]:
    """What the method measures beforehand on uncached runs."""
    assert method.calibrate is not None
    return dict(method.calibrate(bench.on_device().pipeline, steps, bench.draw))


def measured(bench: Bench, method: Method, setting: Setting, key: str) -> dict[str, Any]:
    """A finished row: counts, times and both distances for each evaluation prompt. Pictures go to the cache."""
    bench.on_device()
    complete = _complete(bench)
    plain = timed(bench, bench.evaluation[0], setting.steps)[1:]
    work, pictures = Work(), list[Tensor]()
    wall, cpu, counts = list[float](), list[float](), list[list[int]]()
    with ExitStack() as stack:
        stack.enter_context(work.watching(bench.denoiser))
        began = time.perf_counter()
        stack.enter_context(method.prepare(bench.pipeline, setting))
        set_up = time.perf_counter() - began
        for pair in bench.evaluation:
            image, seconds, processor = timed(bench, pair, setting.run_steps)
            pictures.append(image)
            wall.append(seconds)
            cpu.append(processor)
            counts.append(work.take())
    found = summary(counts, complete, setting.steps)
    found["left_out_steps"] -= setting.steps - setting.run_steps
    problem = (
        None
        if method.kind in ("plain", "baseline") or found["work"] < 0.999
        else "It ran without an error but reused nothing: all of the work was done."
    )
    images = torch.stack(pictures)
    save_pictures(bench.cache / key, images, exact=method.kind == "plain")
    times = {"median": median(wall), "runs": wall, "plain_meanwhile": plain[0]}
    processor_times = {"median": median(cpu), "plain_meanwhile": plain[1]}
    return {
        "status": "failed" if problem else "ok",
        "reason": problem,
        **found,
        "seconds": rounded(times),
        "cpu_seconds": rounded(processor_times),
        "set_up_seconds": rounded(set_up),
        **distances(bench, images, setting),
    }


def timed(bench: Bench, pair: Pair, steps: int) -> tuple[Tensor, float, float]:
    """A picture, its wall-clock seconds and the processor seconds of this process."""
    device = torch.device(bench.device)
    synchronize(device)
    began, processor = time.perf_counter(), time.process_time()
    image = bench.picture(pair, steps)
    synchronize(device)
    return image, time.perf_counter() - began, time.process_time() - processor


def distances(bench: Bench, images: Tensor, setting: Setting) -> dict[str, Any]:
    """Per prompt PSNR (dB, None: identical), SSIM and LPIPS to the plain pictures and to the converged ones."""
    found: dict[str, Any] = {}
    for name, key in (("to_plain", f"plain-{setting.steps}"), ("to_converged", "converged")):
        references = read_pictures(bench.cache / key)
        if references is None:
            continue
        each = [one.to_dict() for one in fidelities(list(images), list(references[: len(images)]))]
        found[name] = {part: [_to(one[part], decimals) for one in each] for part, decimals in DECIMALS.items()}
    return found


DECIMALS = {"psnr": 2, "ssim": 4, "lpips": 5}
"""What is kept of a picture's distances; tables show at most three decimals of means over pictures."""


def _to(value: float | None, decimals: int) -> float | None:
    return None if value is None else round(value, decimals)


def save_pictures(path: Path, images: Tensor, *, exact: bool) -> None:
    """Keep pictures [N, 3, H, W]: references as float32, all others as uint8."""
    atomic_write_bytes(path.with_suffix(".npz"), Pictures(images, exact).to_bytes())


def values_for(
    bench: Bench, method: Method, setting: Setting, extra: dict[str, Any], known: dict[str, float]
) -> dict[str, Any]:
    """The parameters that bring a method to a budget; `known` remembers what was tried, across budgets and runs."""
    if not isinstance(method.tune, Search):
        return dict(nearest(method.tune, setting.steps, setting.budget)) | extra
    from searching import bisected

    return bisected(bench, method, method.tune, Setting(setting.steps, setting.budget, extra), known)


def rounded(value: Any) -> Any:
    """Numbers with four significant digits, so that raw results stay readable."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value
