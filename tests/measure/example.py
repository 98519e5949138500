"""A made-up comparison with drawn pictures, to test and to look at the report; its timings are invented."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from hasten.measure.comparison import (
    Comparison,
    FidelityRecord,
    Kind,
    Phases,
    Row,
    Status,
    Steps,
    Timing,
    WorkloadRecord,
)

PROMPTS = (
    "pizza, fluent style",
    "grinning face with sweat, noto style",
    "a very long prompt that nobody would type by hand but that some user surely pastes: ultra detailed, "
    "volumetric light, cinematic, 35 mm, award-winning, trending, masterpiece, intricate, sharp focus",
    "red apple, twemoji style",
)
STEPS = 28
FLOOR = FidelityRecord(psnr=51.3, ssim=0.9996, lpips=0.0004, lpips_resolution=128)
PLAIN_SECONDS = 4.21


@dataclass(frozen=True)
class Case:
    """One made-up row: `error` is the strength of the change to the picture, `full` the steps computed."""

    name: str
    recipe: str
    speedup: float = 1.0
    error: float = 0.0
    full: int = STEPS
    kind: Kind = "recipe"
    status: Status = "ok"
    reason: str | None = None
    setup: float | None = None
    noise: float = 0.0
    changes: tuple[str, ...] = ()


_CACHE = "transformer.transformer_blocks: first-block cache around the stack (3 blocks)"
_SINGLE = "transformer.single_transformer_blocks: reused with the first stack (6 blocks)"
CASES = (
    Case("plain", "", kind="baseline"),
    Case(
        "ChannelsLast() | AttentionBackend()",
        "ChannelsLast() | AttentionBackend('native')",
        1.09,
        setup=0.2,
        changes=(
            "vae: weights in channels_last (38 weights)",
            "transformer: attention back-end 'native' (9 modules)",
        ),
    ),
    Case(
        "ChannelsLast() | FirstBlockCache(threshold=0.06)",
        "ChannelsLast() | FirstBlockCache(threshold=0.06)",
        1.38,
        error=0.06,
        full=19,
        setup=0.3,
        changes=("vae: weights in channels_last (38 weights)", _CACHE, _SINGLE),
    ),
    Case(
        "ChannelsLast() | FirstBlockCache(threshold=0.12)",
        "ChannelsLast() | FirstBlockCache(threshold=0.12)",
        1.94,
        error=0.06,
        noise=5.0,
        full=12,
        setup=0.3,
        changes=("vae: weights in channels_last (38 weights)", _CACHE, _SINGLE),
    ),
    Case(
        "ChannelsLast() | FirstBlockCache(threshold=0.4)",
        "ChannelsLast() | FirstBlockCache(threshold=0.4)",
        3.61,
        error=0.32,
        full=5,
        setup=0.3,
        changes=(_CACHE, _SINGLE),
    ),
    Case(
        "CompileBlocks()",
        "CompileBlocks()",
        1.31,
        noise=0.5,
        setup=41.5,
        changes=("transformer.transformer_blocks: each of 3 blocks compiled (1 graph)",),
    ),
    Case("plain, 15 steps", "", 1.86, error=0.11, full=15, kind="fewer_steps"),
    Case(
        "DeepCache",
        "DeepCache(interval=3)",
        status="refused",
        reason="DeepCache needs a U-Net with skip connections; FluxTransformer2DModel has none. "
        "FORA(interval=3) reuses whole blocks in the same way.",
    ),
    Case(
        "ChannelsLast() | FORA(interval=3)",
        "FORA(interval=3)",
        2.3,
        error=0.09,
        full=10,
        status="interrupted",
        reason="Stopped by the user after 2 of 4 images.",
        changes=("transformer.transformer_blocks: attention and MLP outputs kept for 3 steps",),
    ),
)


def make_example_comparison(
    folder: Path,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    seeds: tuple[int, ...] = (0,),
    cases: tuple[Case, ...] = CASES,
    size: int = 128,
) -> Comparison:
    """Draw the pictures of each case into `folder` and return the comparison that describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [draw(index + 7 * seed, size) for index in range(len(prompts)) for seed in seeds]
    return Comparison(
        environment={
            "machine": "example",
            "cpu": "2 cores",
            "torch": "2.13.0",
            "diffusers": "0.42.1",
            "peak_memory": "growth of the process's resident memory",
            "note": "a drawn example: the timings are invented",
        },
        workload=WorkloadRecord(
            model="emoji-flux",
            denoiser="FluxTransformer2DModel",
            dtype="float32",
            device="cpu",
            width=size,
            height=size,
            steps=STEPS,
            guidance=3.5,
            prompts=prompts,
            seeds=seeds,
            max_sequence_length=32,
            runs=3,
        ),
        rows=tuple(_row(case, plain, folder) for case in cases),
        incomplete=any(case.status == "interrupted" for case in cases),
    ).in_folder(folder)


def _row(case: Case, plain: list[Image.Image], folder: Path) -> Row:
    if case.status in ("refused", "failed"):
        return Row(name=case.name, recipe=case.recipe, status=case.status, reason=case.reason)
    done = plain if case.status == "ok" else plain[: max(1, len(plain) // 2)]
    pictures = [_changed(picture, case, seed) for seed, picture in enumerate(done)]
    seconds = PLAIN_SECONDS / case.speedup
    steps = case.full if case.kind == "fewer_steps" else STEPS
    baseline = case.kind == "baseline"
    return Row(
        name=case.name,
        recipe=case.recipe,
        kind=case.kind,
        status=case.status,
        reason=case.reason,
        seconds_per_image=Timing.of([seconds * factor for factor in (1.0, 0.985, 1.03)]),
        speedup=case.speedup,
        setup_seconds=case.setup,
        pays_off_after_images=_pays_off(case, seconds),
        peak_memory_bytes=int((412 + 90 * case.error + (case.setup or 0)) * 2**20),
        steps=Steps(full=case.full, reused=steps - case.full),
        fidelity=None if baseline else _fidelity(pictures, done),
        noise_floor=FLOOR,
        engaged=(f"{len(case.changes)} changes in use",) if case.changes else (),
        phases=Phases(text_encoder=0.04, denoise=seconds - 0.4, vae=0.31),
        images=tuple(_save(picture, folder, case.name, index) for index, picture in enumerate(pictures)),
        changes=case.changes,
        step_map={"": _step_map(case.full, steps)},
    )


def _pays_off(case: Case, seconds: float) -> int | None:
    return math.ceil(case.setup / (PLAIN_SECONDS - seconds)) if case.setup else None


def _step_map(full: int, steps: int) -> tuple[bool, ...]:
    chosen = {round(index * (steps - 1) / max(1, full - 1)) for index in range(full)}
    return tuple(step in chosen for step in range(steps))


def _save(picture: Image.Image, folder: Path, name: str, index: int) -> str:
    path = f"images/{re.sub('[^a-zA-Z0-9.]+', '-', name).strip('-')[:80]}-{index}.png"
    (folder / "images").mkdir(exist_ok=True)
    picture.save(folder / path)
    return path


def _fidelity(pictures: list[Image.Image], plain: list[Image.Image]) -> FidelityRecord:
    """The PSNR of the files; SSIM and LPIPS are invented from it."""
    pairs = zip(pictures, plain, strict=True)
    errors = [np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2) for a, b in pairs]
    different = [10 * math.log10(255**2 / error) for error in errors if error > 0]
    if not different:
        return FidelityRecord(psnr=math.inf, ssim=1.0, lpips=0.0, lpips_resolution=128)
    psnr = sum(different) / len(different)
    wrong = 10 ** (-psnr / 20)
    return FidelityRecord(psnr=psnr, ssim=1 - 2 * wrong**1.2, lpips=wrong * 0.9, lpips_resolution=128)


def draw(seed: int, size: int) -> Image.Image:
    """One of four emoji-like drawings, shaded and slightly noisy."""
    big = size * 3
    picture = Image.new("RGB", (big, big), (250, 250, 252))
    (_pizza, _face, _balloon, _apple)[seed % 4](ImageDraw.Draw(picture), big / 128, seed)
    shaded = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS), float)
    rows = np.linspace(1.05, 0.9, size)[:, None, None]
    noise = np.random.default_rng(seed).normal(0, 1.2, (size, size, 3))
    colored = np.where(shaded.min(axis=2, keepdims=True) < 245, shaded * rows, shaded)
    return Image.fromarray(np.clip(colored + noise, 0, 255).astype(np.uint8))


def _pizza(pen: ImageDraw.ImageDraw, k: float, seed: int) -> None:
    pen.polygon([(14 * k, 30 * k), (114 * k, 24 * k), (66 * k, 118 * k)], fill=(255, 200, 64))
    pen.line([(12 * k, 30 * k), (116 * k, 24 * k)], fill=(196, 118, 50), width=int(16 * k))
    for x, y, radius in ((48, 50, 10), (84, 46, 9), (66, 78, 9), (62, 100, 5)):
        pen.ellipse([(x - radius) * k, (y - radius) * k, (x + radius) * k, (y + radius) * k], fill=(206, 54, 40))
    for x, y in ((64, 58), (78, 66), (54, 70)):
        pen.ellipse([(x - 3) * k, (y - 2) * k, (x + 4) * k, (y + 2) * k], fill=(64, 128, 54))


def _face(pen: ImageDraw.ImageDraw, k: float, seed: int) -> None:
    pen.ellipse([12 * k, 12 * k, 116 * k, 116 * k], fill=(255, 206, 50))
    for x in (46, 82):
        pen.ellipse([(x - 6) * k, 42 * k, (x + 6) * k, 62 * k], fill=(92, 58, 26))
    pen.chord([36 * k, 52 * k, 92 * k, 102 * k], 0, 180, fill=(120, 44, 30))
    pen.chord([44 * k, 54 * k, 84 * k, 84 * k], 0, 180, fill=(255, 252, 248))
    pen.ellipse([96 * k, 20 * k, 112 * k, 44 * k], fill=(80, 176, 250))


def _balloon(pen: ImageDraw.ImageDraw, k: float, seed: int) -> None:
    pen.ellipse([32 * k, 8 * k, 96 * k, 84 * k], fill=(70, 110, 226))
    pen.polygon([(58 * k, 90 * k), (70 * k, 90 * k), (64 * k, 80 * k)], fill=(44, 74, 170))
    pen.line([(64 * k, 90 * k), (58 * k, 104 * k), (68 * k, 120 * k)], fill=(140, 140, 150), width=int(2 * k))
    pen.ellipse([44 * k, 20 * k, 58 * k, 40 * k], fill=(160, 190, 255))


def _apple(pen: ImageDraw.ImageDraw, k: float, seed: int) -> None:
    for x in (46, 76):
        pen.ellipse([(x - 30) * k, 36 * k, (x + 32) * k, 116 * k], fill=(214, 44, 50))
    pen.line([(62 * k, 42 * k), (68 * k, 16 * k)], fill=(110, 72, 40), width=int(5 * k))
    pen.ellipse([68 * k, 12 * k, 100 * k, 30 * k], fill=(88, 160, 66))
    pen.ellipse([34 * k, 50 * k, 46 * k, 68 * k], fill=(248, 150, 150))


def _changed(picture: Image.Image, case: Case, seed: int) -> Image.Image:
    """Blur, shift and noise that grow with `error`; `noise` flips last bits only."""
    if not case.error and not case.noise:
        return picture
    blurred = picture.filter(ImageFilter.GaussianBlur(6 * case.error))
    shifted = np.roll(np.asarray(blurred, float), round(8 * case.error * picture.width / 128), axis=1)
    random = np.random.default_rng(1000 + seed)
    noise = random.normal(0, 12 * case.error + case.noise, shifted.shape)
    return Image.fromarray(np.clip(np.rint(shifted + noise), 0, 255).astype(np.uint8))
