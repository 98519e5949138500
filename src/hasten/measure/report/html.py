"""The self-contained HTML report: figures and pictures arranged for the template, then rendered with jinja2."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hasten.measure.comparison import Comparison, Phases, Row
from hasten.measure.quality import SCALE
from hasten.measure.report import formatting as fmt
from hasten.measure.report import heat, summary, verdict
from hasten.measure.report.images import Gallery, Picture, build_gallery
from hasten.measure.report.names import labels, readable, shared_words
from hasten.measure.report.scatter import lay_out

_TEMPLATES = Path(__file__).parent / "templates"
_TIMES = "\N{MULTIPLICATION SIGN}"
_PARTS = (("text_encoder", "text encoder"), ("denoise", "denoising"), ("vae", "VAE"))


@dataclass(frozen=True)
class Part:
    """A part of the time of one image; `share` is its percentage of the slowest row's time."""

    key: str
    name: str
    seconds: str
    share: float


@dataclass(frozen=True)
class Strip:
    """Which steps of one branch were computed in full."""

    branch: str
    full: tuple[bool, ...]
    text: str


@dataclass(frozen=True)
class RowView:
    """One row as the template shows it: `row` for what is text already, the rest formatted."""

    index: int
    row: Row
    name: str
    label: str
    ran: bool
    time: str
    spread: str
    time_share: float
    speedup: str
    faster: bool
    setup: str
    memory: str
    steps: str
    psnr: str
    ssim: str
    lpips: str
    closeness: str
    difference: str
    engaged: str
    parts: list[Part]
    strips: list[Strip]


@dataclass(frozen=True)
class Shot:
    """One picture of one row in the image grid."""

    view: RowView
    image: int
    picture: Picture
    verdict: str


@dataclass(frozen=True)
class Scene:
    """All rows' pictures of one prompt and seed."""

    image: int
    prompt: str
    seed: int
    shots: list[Shot]


def render_html(comparison: Comparison, folder: Path) -> str:
    """Render the report with its images read from `folder`; equal data and files give equal bytes."""
    gallery = build_gallery(comparison, folder)
    short = labels(comparison.rows)
    views = [_view(index, label, comparison) for index, label in enumerate(short)]
    script = (_TEMPLATES / "report.js").read_text("utf-8")
    choice = verdict.pick(comparison)
    json_bytes = comparison.to_json().encode("utf-8", errors="backslashreplace")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            comparison=comparison,
            work=comparison.workload,
            model=fmt.model_name(comparison.workload.model),
            headline=summary.headline(comparison),
            paragraphs=[summary.sentences(comparison), summary.cautions(comparison)],
            tiles=summary.tiles(comparison),
            views=views,
            scenes=_scenes(comparison, gallery, views),
            images_note=gallery.note,
            has_heat=any(picture.heat for picture in gallery.pictures.values()),
            charts=[("wide", lay_out(comparison)), ("narrow", lay_out(comparison, 360, 400))],
            shared=" + ".join(shared_words(comparison.rows)),
            pick=comparison.rows.index(choice.row) if choice else None,
            scale=SCALE,
            memory_note=fmt.memory_note(comparison),
            lpips_note=fmt.lpips_note(comparison),
            heat_gradient=heat.css_gradient(),
            heat_full=round(255 / heat.AMPLIFICATION),
            amplification=heat.AMPLIFICATION,
            style=(_TEMPLATES / "report.css").read_text("utf-8"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
            json_text=json_bytes.decode("utf-8"),
            json_base64=base64.b64encode(json_bytes).decode("ascii"),
        )
        + "\n"
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cast("dict[str, object]", environment.filters).update(readable=_readable, pieces=_pieces, words=_words)
    cast("dict[str, object]", environment.globals).update(plural=fmt.plural)
    return environment


def _readable(value: object) -> str:
    """A setting or an environment entry as a reader expects it."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pieces(recipe: str) -> list[str]:
    """The recipe in pieces between which a line may break."""
    return re.split(r"(?<=[(,|])", recipe)


def _words(name: str) -> list[str]:
    """A name in pieces between which a line may break: `FirstBlockCache` as First, Block, Cache."""
    return re.split(r"(?<=[a-z])(?=[A-Z])", name)


def _view(index: int, label: str, comparison: Comparison) -> RowView:
    row, slowest = comparison.rows[index], _slowest(comparison)
    found = row.fidelity
    median = row.seconds_per_image.median if row.seconds_per_image else None
    return RowView(
        index=index,
        row=row,
        name=readable(row.name),
        label=label,
        ran=verdict.has_run(row),
        time=_dashed(fmt.seconds(median)),
        spread=_dashed(fmt.spread(row)).replace("-", "\N{EN DASH}"),
        time_share=100 * (median or 0) / slowest,
        speedup=_dashed(fmt.speedup(row.speedup, _TIMES)),
        faster=row.kind != "baseline" and verdict.is_faster(row, comparison.baseline),
        setup=_dashed(fmt.setup(row.setup_seconds)),
        memory=_dashed(fmt.memory(row.peak_memory_bytes)),
        steps=_dashed(fmt.steps(row.steps)).replace("/", " / "),
        psnr=_dashed(fmt.psnr(found)),
        ssim=_dashed(fmt.ratio(found.ssim if found else None)),
        lpips=_dashed(fmt.ratio(found.lpips if found else None)),
        closeness=verdict.closeness(row) if found else "",
        difference=verdict.difference_text(row),
        engaged=_dashed(fmt.engaged(row)),
        parts=_parts(row.phases, median, slowest) if row.phases and verdict.has_run(row) else [],
        strips=_strips(row),
    )


def _dashed(text: str) -> str:
    return "\N{EN DASH}" if text == fmt.NOTHING else text


def _slowest(comparison: Comparison) -> float:
    """The longest time of any row, measured as a whole or as the sum of its parts; at least a nanosecond."""
    medians = [row.seconds_per_image.median for row in comparison.rows if row.seconds_per_image]
    sums = [sum(row.phases.model_dump().values()) for row in comparison.rows if row.phases]
    return max([*medians, *sums, 1e-9])


def _parts(phases: Phases, median: float | None, slowest: float) -> list[Part]:
    values = [(key, name, float(getattr(phases, key))) for key, name in _PARTS]
    rest = (median or 0) - sum(value for _, _, value in values)
    if median and rest > 0.01 * median:
        values.append(("rest", "rest", rest))
    return [Part(key, name, fmt.seconds(value), 100 * value / slowest) for key, name, value in values]


def _strips(row: Row) -> list[Strip]:
    return [
        Strip(branch, full, f"{sum(full)} of {fmt.plural(len(full), 'step')} computed in full: {_runs(full)}")
        for branch, full in (row.step_map or {}).items()
    ]


def _runs(full: tuple[bool, ...]) -> str:
    """The computed steps, counted from 1, as ranges: `1-4, 7, 9`."""
    steps = [index for index, computed in enumerate(full, start=1) if computed]
    starts = [step for step in steps if step - 1 not in steps]
    ends = [step for step in steps if step + 1 not in steps]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)) or "none"


def _scenes(comparison: Comparison, gallery: Gallery, views: list[RowView]) -> list[Scene]:
    work = comparison.workload
    pairs = [(prompt, seed) for prompt in work.prompts for seed in work.seeds]
    scenes = [
        Scene(image, prompt, seed, [_shot(gallery, view, image) for view in views if view.row.images])
        for image, (prompt, seed) in enumerate(pairs)
    ]
    return [scene for scene in scenes if any(shot.picture.uri for shot in scene.shots)]


def _shot(gallery: Gallery, view: RowView, image: int) -> Shot:
    picture = gallery.pictures.get((view.index, image), Picture(problem="not made"))
    if view.row.kind == "baseline":
        return Shot(view, image, picture, "")
    if picture.psnr is None:
        return Shot(view, image, picture, "")
    return Shot(view, image, picture, "identical" if picture.identical else f"{picture.psnr:.1f} dB")
