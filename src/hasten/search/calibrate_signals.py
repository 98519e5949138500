"""Measures the numbers that TeaCache and MagCache need for a model, from a few uncached pictures.

TeaCache: a polynomial of degree 4 is fitted to pairs of relative changes, of the indicator and of the denoiser's
output, over all steps and pictures (arXiv:2411.19108, section 4.3). MagCache: the ratio of the residual's magnitude to
that of the step before, mean over positions and pictures (arXiv:2506.09045, equation 4).
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from hasten.cache.engine.model_data import (
    MAGCACHE,
    TEACACHE,
    Library,
    MagCacheSet,
    ModelSet,
    Provenance,
    TeaCacheSet,
)
from hasten.core.errors import HastenError, Refused
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.identity import config_hash
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.measure.environment import installed
from hasten.measure.progress import Progress, Silent
from hasten.measure.rendering import render
from hasten.models import LoadedModel
from hasten.search.fitting import DEGREE, fit, lowest, share, threshold_for
from hasten.search.recording import Purpose, Recording, Records, Request

PICTURES = 8
"""How many prompts are used unless told otherwise."""
FIRST_SEED = 1000
"""Seeds of calibration pictures begin here, apart from those that comparisons use."""
POOR_FIT = 0.7
"""A coefficient of determination below which a warning is given."""
WIDE_SPREAD = 0.05
"""A standard deviation of a ratio over pictures above which a warning is given."""
SHARES = (1 / 2, 1 / 3, 1 / 4)
"""Shares of computed steps for which thresholds are worked out."""


@dataclass(frozen=True)
class Calibration:
    """A set of numbers with the name of its model, what to say about it, and what to be careful about."""

    kind: Purpose
    name: str
    numbers: ModelSet
    summary: str
    warnings: tuple[str, ...] = ()

    def save(self, file: Path) -> Path:
        """Write it to a file, beside the sets of other models that the file may hold; the old one is replaced."""
        check_file(file, self.kind)
        there = cast("dict[str, dict[str, object]]", read_json(file)) if file.exists() else {"sets": {}}
        sets = there["sets"]
        sets[self.name] = self.numbers.model_dump(exclude_unset=True, exclude_none=True)
        return atomic_write_text(file, json_text({"schema": 1, "kind": self.kind, "sets": sets}))


def check_file(file: Path, kind: Purpose) -> None:
    """Raise HastenError when a file is there that holds something else, which must not be lost."""
    library: Library[TeaCacheSet] | Library[MagCacheSet] = TEACACHE if kind == "teacache" else MAGCACHE
    if file.exists():
        library.read(file)


def calibrate(
    model: LoadedModel, purpose: Purpose, workload: Workload | None = None, progress: Progress | None = None
) -> Calibration:
    """Make one uncached picture for each prompt of the workload, and work out the numbers.

    Raises Refused when the model has no place for the cache, HastenError when the runs show too little.
    """
    workload = workload or model.workload.replace(prompts=model.workload.prompts[:PICTURES])
    target = Target.of(model.pipeline)
    if reasons := list(Recording(purpose=purpose).problems(target)):
        raise Refused(reasons)
    requests = _watched(model, purpose, workload, progress or Silent())
    about = (_title(model.name), target, _provenance(model, target, workload))
    if purpose == "teacache":
        return _teacache(requests, *about)
    return _magcache(requests, workload.steps, *about)


def _watched(model: LoadedModel, purpose: Purpose, workload: Workload, progress: Progress) -> list[Request]:
    recording = Recording(purpose=purpose)
    progress.start(1, len(workload.prompts))
    progress.row(f"watching {model.name}")
    with accelerate(model.pipeline, recording) as session:
        for number, prompt in enumerate(workload.prompts):
            render(model.pipeline, workload, prompt, FIRST_SEED + number)
            progress.advance()
        return list(session.state(recording, Records).requests.values())


def _title(name: str) -> str:
    return re.sub(r"-diffusers$", "", Path(name).name, flags=re.IGNORECASE)


def _provenance(model: LoadedModel, target: Target, workload: Workload) -> Provenance:
    return Provenance(
        by=f"calibrated by hasten {installed('hasten') or ''}".strip(),
        model=_title(model.name),
        scheduler=type(target.scheduler).__name__,
        steps=workload.steps,
        guidance=workload.guidance,
        width=workload.width,
        height=workload.height,
        pictures=len(workload.prompts),
        date=datetime.now(UTC).date().isoformat(),
    )


def _teacache(requests: list[Request], name: str, target: Target, provenance: Provenance) -> Calibration:
    pairs = [pair for request in requests for record in request for pair in record.pairs]
    if len({x for x, _ in pairs}) <= DEGREE:
        raise HastenError(f"Only {len(pairs)} changes were seen, too few for a polynomial; use more prompts or steps.")
    coefficients, r_squared = fit(pairs)
    denoiser = target.denoisers[0]
    chosen = TeaCacheSet(
        models=(name,),
        config=config_hash(denoiser),
        coefficients=coefficients,
        indicator="first_layer" if denoiser.spec.unet else "declared",
        range=(min(x for x, _ in pairs), max(x for x, _ in pairs)),
        r_squared=round(r_squared, 4),
        points=len(pairs),
        provenance=provenance,
    )
    shares = {f"{at:.4g}": round(share(chosen, requests, at), 3) for at in _thresholds(chosen, requests)}
    chosen = chosen.model_copy(update={"computed_share": shares})
    told = ", ".join(f"threshold {at} computes {part:.0%} of the steps" for at, part in shares.items())
    return Calibration(
        "teacache", name, chosen, f"R^2 = {r_squared:.3f} over {len(pairs)} changes; {told}", _doubts(chosen)
    )


def _thresholds(chosen: TeaCacheSet, requests: list[Request]) -> list[float]:
    return [threshold_for(chosen, requests, part) for part in SHARES]


def _doubts(chosen: TeaCacheSet) -> tuple[str, ...]:
    found: list[str] = []
    if (chosen.r_squared or 0.0) < POOR_FIT:
        found.append(
            f"the polynomial explains little of the change (R^2 = {chosen.r_squared:.2f}): TeaCache will often "
            f"be wrong on this model; FirstBlockCache and SeaCache need no such fit"
        )
    if (low := lowest(chosen)) < 0:
        found.append(f"the polynomial predicts negative changes (down to {low:.3f}), which postpone computing")
    return tuple(found)


def _magcache(requests: list[Request], steps: int, name: str, target: Target, provenance: Provenance) -> Calibration:
    measured = [[r.ratio for request in requests for r in request if r.step == step] for step in range(steps)]
    known = [[ratio for ratio in ratios if ratio is not None] for ratios in measured]
    if not any(known):
        raise HastenError("Nothing was kept that could be compared from step to step; use at least two steps.")
    denoiser = target.denoisers[0]
    spread = [statistics.pstdev(ratios) if ratios else 0.0 for ratios in known]
    chosen = MagCacheSet(
        models=(name,),
        config=config_hash(denoiser),
        ratios=tuple(round(statistics.fmean(ratios), 5) if ratios else 1.0 for ratios in known),
        quantity="deep_feature" if denoiser.spec.unet else "residual",
        spread=tuple(round(one, 5) for one in spread),
        provenance=provenance,
    )
    worst = max(range(steps), key=lambda step: spread[step])
    summary = f"{steps} ratios from {min(chosen.ratios):.3f} to {max(chosen.ratios):.3f}"
    doubts = [f"step {worst} differs much between pictures (ratios spread by {spread[worst]:.3f})"]
    return Calibration("magcache", name, chosen, summary, tuple(doubts) if spread[worst] > WIDE_SPREAD else ())
