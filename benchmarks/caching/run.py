"""Runs the caching benchmark. Each row is stored as it finishes; started again, the run goes on where it stopped.

PYTHONPATH=.peers OMP_NUM_THREADS=1 python benchmarks/caching/run.py --model emoji-dit --steps 28
... --prompts 2 --out /tmp/smoke            a smoke run: every row once, on two prompts
... --only cache-dit                        rows whose name contains the word
... --add "mine=FORA(interval={interval})"  another row of ours
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from baselines import CONVERGED_STEPS, PLAIN, baselines, solve
from harness import Bench, Pair, calibrated, measured, save_pictures, values_for
from isolation import RowFailed, isolated, spread
from methods import Method, Setting
from ours import method_of, ours
from peers import peers
from references import folder_name, read_pictures
from torch import Tensor

import hasten
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.workload import Workload
from hasten.measure.environment import environment, installed
from hasten.models import bundled

HERE = Path(__file__).parent
MODELS = ("emoji-flux", "emoji-sd", "emoji-dit")
FRACTIONS = (2, 3, 4, 5)


@dataclass
class Results:
    """The file of one model and step count."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> Results:
        """Read what is there, or begin; rows of other weights, prompts or machines must not stand in one table."""
        found = cast("dict[str, Any]", read_json(path)) if path.exists() else {"schema": 1, "rows": {}}
        old, new = ({**content, **content.get("environment", {})} for content in (found, header))
        for name in ("weights", "guidance", "prompts", "device"):
            if old.get(name, new[name]) != new[name]:
                raise SystemExit(f"{path} holds rows of other {name}; move it away, or choose another --out.")
        return cls(path, {**found, **header})

    def has(self, key: str) -> bool:
        """Whether a row is done."""
        return key in self.content["rows"]

    def forget(self, name: str) -> None:
        """Drop the rows of a method, so that they are measured again."""
        rows = self.content["rows"]
        self.content["rows"] = {key: row for key, row in rows.items() if row["name"] != name}

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Store a finished row at once."""
        self.content["rows"][key] = row
        atomic_write_text(self.path, json_text(self.content))


def slug(text: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def open_bench(model: str, options: argparse.Namespace) -> Bench:
    """The model on the CPU, with its prompts."""
    lists = cast("dict[str, Any]", read_json(HERE / "prompts.json"))["models"][model]
    loaded = hasten.load(model, device="cpu")
    pairs = {name: [(str(text), int(seed)) for text, seed in lists[name]] for name in lists}
    return Bench(
        model=model,
        pipeline=loaded.pipeline,
        workload=cast(Workload, loaded.workload),
        calibration=pairs["calibration"][: max(1, options.prompts // 4)],
        evaluation=pairs["evaluation"][: options.prompts],
        cache=options.out / ".cache" / folder_name(model, weights_of(model), loaded.workload.guidance),
        device=options.device,
    )


def weights_of(model: str) -> str:
    """SHA-256 over the weight files of a bundled model."""
    total = hashlib.sha256()
    for file in sorted(bundled()[model].rglob("*.safetensors")):
        total.update(file.read_bytes())
    return total.hexdigest()


def header_of(bench: Bench, steps: int) -> dict[str, Any]:
    """What all rows of a file have in common."""
    facts = dict(isolated(facts_of, bench.device))
    facts |= {name: installed(name) for name in ("cache-dit", "DeepCache")}
    facts |= {"date": time.strftime("%Y-%m-%d"), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    names = {"model": bench.model, "weights": weights_of(bench.model), "guidance": bench.workload.guidance}
    return names | {"steps": steps} | {"prompts": len(bench.evaluation), "environment": facts}


def facts_of(device: str) -> dict[str, Any]:
    """Versions and machine; in a child process, since asking a GPU for its name would break later forks."""
    return environment(torch.device(device))


def run_model(bench: Bench, steps: int, options: argparse.Namespace) -> None:
    """Every row of a model at a step count."""
    path = options.out / "results" / f"{bench.model}-{steps}.json"
    results = Results.open(path, header_of(bench, steps))
    make_references(bench, steps, results, options.jobs)
    for method in chosen(options):
        if method.fits(bench.model):
            if options.again:
                results.forget(method.name)
            run_method(bench, method, steps, results)


def chosen(options: argparse.Namespace) -> list[Method]:
    """The rows asked for."""
    added = [method_of(*text.split("=", 1)) for text in options.add]
    every = [*baselines(), *peers(), *ours(), *added]
    return [method for method in every if options.only.lower() in f"{method.kind} {method.name}".lower()]


def make_references(bench: Bench, steps: int, results: Results, jobs: int = 1) -> None:
    """The converged pictures and the plain ones, unless they are there."""
    if read_pictures(bench.cache / "converged") is None:
        say(bench, "converged sampler")
        images = spread(partial(converged, bench), bench.evaluation, jobs)
        save_pictures(bench.cache / "converged", torch.stack(images), exact=True)
    if not results.has("plain") or read_pictures(bench.cache / f"plain-{steps}") is None:
        say(bench, f"plain, {steps} steps")
        row = isolated(measured, bench, PLAIN, Setting(steps, steps), f"plain-{steps}")
        results.add("plain", describe(PLAIN, Setting(steps, steps)) | row)


def converged(bench: Bench, pair: Pair) -> Tensor:
    """What the sampler tends to: many steps of a second-order solver."""
    bench.on_device()
    with solve(bench.pipeline, Setting(CONVERGED_STEPS, CONVERGED_STEPS), solver="dpm++"):
        return bench.picture(pair, CONVERGED_STEPS).cpu()


def run_method(bench: Bench, method: Method, steps: int, results: Results) -> None:
    """All budgets of one method; what went wrong becomes the row, and is not tried at the other budgets."""
    known = Tried(bench.cache / f"search-{steps}-{slug(method.name)}.json")
    for fraction in FRACTIONS:
        key, first = f"{method.name} @ 1/{fraction}", f"{method.name} @ 1/{FRACTIONS[0]}"
        if results.has(key):
            continue
        broken = results.content["rows"].get(first, {}).get("status") == "failed"
        setting = Setting(steps, steps // fraction)
        row: dict[str, Any] = {"status": "failed", "reason": results.content["rows"][first]["reason"]} if broken else {}
        if not row:
            setting, row = run_row(bench, method, setting, known, f"{steps}/{slug(key)}")
        results.add(key, describe(method, setting) | row)
        say(bench, f"{steps} steps, {key}: {outcome(row)}")


def run_row(bench: Bench, method: Method, setting: Setting, known: Tried, key: str) -> tuple[Setting, dict[str, Any]]:
    """Calibrate and tune where needed, then measure; the setting that was used, and the row."""
    try:
        if "extra" not in known:
            known["extra"] = isolated(calibrated, bench, method, setting.steps) if method.calibrate else {}
        counts = known.setdefault("counts", {})
        values = values_for(bench, method, setting, known["extra"], counts)
        known.save()
        setting = Setting(setting.steps, setting.budget, values)
        return setting, isolated(measured, bench, method, setting, key)
    except RowFailed as error:
        return setting, {"status": "failed", "reason": str(error)}


class Tried(dict[str, Any]):
    """What a search has found out so far, kept on disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(cast("dict[str, Any]", read_json(path)) if path.exists() else {})
        self.path = path

    def save(self) -> None:
        """Write it down."""
        atomic_write_text(self.path, json_text(dict(self)))


def describe(method: Method, setting: Setting) -> dict[str, Any]:
    """What a row is, before it has run."""
    setting_values = dict(setting.values) | ({"recipe": method.detail} if method.detail else {})
    return {"name": method.name, "kind": method.kind, "budget": setting.budget, "setting": setting_values}


def outcome(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    if row["status"] != "ok":
        return row["reason"]
    psnr = [value for value in row["to_plain"]["psnr"] if value is not None]
    decibels = f"{sum(psnr) / len(psnr):.2f} dB" if psnr else "identical"
    return f"{row['full_steps']:.2f} full steps, {decibels}, {row['cpu_seconds']['median']:.3f} s"


def say(bench: Bench, text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {bench.model}: {text}", flush=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--steps", type=int, action="append")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--only", default="")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=RECIPE")
    parser.add_argument("--again", action="store_true", help="measure the chosen rows again")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the converged pictures")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for model in options.model or MODELS:
        bench = open_bench(model, options)
        for steps in options.steps or (28, 50):
            run_model(bench, steps, options)


if __name__ == "__main__":
    main()
