"""How much each layer's quantization disturbs the output of the network: measured, and as foretold from statistics."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from hasten.core.target import Target
from hasten.core.weights import weights_hash
from hasten.core.workload import Workload
from hasten.kernels.rounding import as_matrix, quantize_integer
from hasten.measure.progress import Progress, Silent
from hasten.models import LoadedModel
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.error import relative_error
from hasten.quantize.engine.gains_file import save_gains, usual_gains
from hasten.quantize.engine.sites import Site, sites
from hasten.quantize.engine.statistics_file import StatisticsFile, usual_file
from hasten.quantize.engine.watching import Statistics, key_of
from hasten.search.quantization.calls import Call, record_calls
from hasten.search.quantization.collect import collect

PROBE_BITS, PROBE_GROUP = 3, 64
"""How layers are rounded to be tried: coarsely, so that what it does stands out from rounding."""


@dataclass(frozen=True)
class Sensitivity:
    """One layer, rounded alone."""

    layer: str
    foretold: float
    """Relative squared error of its own output, from statistics."""
    measured: float
    """Relative squared error of the network's output in single steps, the mean over calls."""

    @property
    def gain(self) -> float:
        """How much of the layer's error the network's output has."""
        return self.measured / self.foretold if self.foretold > 0 else 0.0


def probe(layers: Sequence[Site], known: Statistics, calls: Sequence[Call], progress: Progress) -> list[Sensitivity]:
    """Round each layer alone, and see what that does to recorded calls."""
    found: list[Sensitivity] = []
    for site in layers:
        module = quantized_layer(site, quantize_integer(site.weight, PROBE_BITS, PROBE_GROUP, symmetric=False))
        foretold = relative_error(as_matrix(site.weight), module.quantized, known.of(site).second)
        with standing_in(site, module):
            measured = fmean(call.error() for call in calls)
        found.append(Sensitivity(key_of(site), foretold, measured))
        progress.advance()
    return found


@contextmanager
def standing_in(site: Site, module: nn.Module) -> Generator[None]:
    """Let a module stand in a layer's place for a while."""
    before = site.parent._modules[site.name]
    site.parent._modules[site.name] = module
    try:
        yield
    finally:
        site.parent._modules[site.name] = before


def measure_gains(
    model: LoadedModel, workload: Workload | None = None, *, file: Path | None = None, progress: Progress | None = None
) -> tuple[Path, list[Sensitivity]]:
    """Measure how much each layer of the denoisers matters, and write it where `MixedPrecision` finds it.

    Each layer is rounded alone, and the denoiser run on recorded calls: a run for each layer and call. Statistics are
    gathered first where they are missing.
    """
    target, shown = Target.of(model.pipeline), progress or Silent()
    weights = weights_hash(target.denoisers[0].module)
    there = usual_file(weights)
    known = StatisticsFile(there if there.is_file() else collect(model, workload, progress=shown)).statistics
    names = {denoiser.name for denoiser in target.denoisers}
    chosen = [site for site in sites(target, names, (), True, everywhere=True) if key_of(site) in known.layers]
    calls = record_calls(model.pipeline, workload or model.workload)
    shown.start(1, len(chosen))
    shown.row("trying layers")
    found = probe(chosen, known, calls, shown)
    gains = {one.layer: one.gain for one in found}
    about = {"model": model.name, "weights_sha256": weights, "calls": len(calls), "bits": PROBE_BITS}
    return save_gains(file or usual_gains(weights), gains, about), found


def errors_alone(places: Sequence[tuple[Site, nn.Module]], calls: Sequence[Call]) -> dict[str, float]:
    """What each quantized layer of an applied recipe does alone, all others being original; relative squared errors.

    Layers that give undefined numbers come out infinite.
    """
    originals = [(site, site.present) for site, _ in places]
    now = [site.parent._modules[site.name] for site, _ in places]
    try:
        for site, original in originals:
            site.parent._modules[site.name] = original
        return {key_of(site): _alone(site, module, calls) for site, module in places}
    finally:
        for (site, _), module in zip(places, now, strict=True):
            site.parent._modules[site.name] = module


def _alone(site: Site, module: nn.Module, calls: Sequence[Call]) -> float:
    with standing_in(site, module):
        found = fmean(call.error() for call in calls)
    return found if found == found else float("inf")


def agreement(found: Sequence[Sensitivity]) -> dict[str, Any]:
    """How well statistics foretell what was measured: rank correlation, and the spread of gains around their median."""
    foretold, measured = torch.tensor([s.foretold for s in found]), torch.tensor([s.measured for s in found])
    ranks = torch.stack([foretold.argsort().argsort(), measured.argsort().argsort()]).double()
    gains = sorted(one.gain for one in found if one.gain > 0)
    middle = median(gains) if gains else 0.0
    return {
        "layers": len(found),
        "rank_correlation": round(float(torch.corrcoef(ranks)[0, 1]), 3),
        "gain_median": middle,
        "gain_tenth": gains[len(gains) // 10] if gains else 0.0,
        "gain_nine_tenths": gains[len(gains) * 9 // 10] if gains else 0.0,
        "most_sensitive": [one.layer for one in sorted(found, key=lambda one: -one.gain)[:5]],
    }
