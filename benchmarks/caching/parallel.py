"""The caching benchmark on a machine with many cores: `python benchmarks/caching/parallel.py --out FOLDER --jobs 16`.

Fidelity does not depend on what else a machine does, times do: run this for the pictures, and `run.py` alone on an
idle machine where seconds matter. Each row runs as in `run.py`; only the rows are shared out over processes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, cast

from baselines import baselines
from methods import Search
from ours import ours
from peers import peers
from run import MODELS, slug

from hasten.core.files import atomic_write_text, json_text, read_json

HERE = Path(__file__).parent
CALIBRATED = ("TeaCache", "MagCache", "PlannedCache")
Shard = tuple[str, int, str]
"""Model, steps, and the words that `run.py --only` takes."""


def shards(models: Sequence[str], steps: Sequence[int]) -> list[Shard]:
    """One for each method: long ones first, those that read calibrated data last, which may be made meanwhile."""
    methods = [*baselines(), *ours(), *peers()]
    last = [m for m in methods if m.name in CALIBRATED]
    first = sorted((m for m in methods if m not in last), key=lambda m: not isinstance(m.tune, Search))
    wanted = product(steps, [*first, *last], models)
    return [(model, count, f"{m.kind} {m.name}") for count, m, model in wanted if m.fits(model)]


def run(model: str, steps: int, only: str, out: Path, options: argparse.Namespace) -> int:
    """One process of run.py; its output goes to a log beside its results."""
    out.mkdir(parents=True, exist_ok=True)
    arguments = [f"--model={model}", f"--steps={steps}", f"--only={only}", f"--out={out}", f"--device={options.device}"]
    arguments += [f"--prompts={options.prompts}", f"--jobs={max(1, options.jobs // 6)}"]
    command = [sys.executable, "-W", "ignore", str(HERE / "run.py"), *arguments]
    with (out / "log.txt").open("a") as log:
        return subprocess.run(command, stdout=log, stderr=log, check=False, env=environ()).returncode


def environ() -> dict[str, str]:
    """One thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def prepared(shard: Shard, options: argparse.Namespace) -> Path:
    """A folder for a shard that holds the plain and the converged pictures already."""
    model, steps, only = shard
    folder = options.out / "shards" / f"{model}-{steps}-{slug(only)}"
    if not folder.exists():
        shutil.copytree(options.out / "base" / f"{model}-{steps}", folder)
    return folder


def merged(options: argparse.Namespace, models: Sequence[str], steps: Sequence[int]) -> None:
    """All rows of each model and step count in one file under results/."""
    for model, count in product(models, steps):
        rows: dict[str, Any] = {}
        content: dict[str, Any] = {}
        for path in sorted((options.out / "shards").glob(f"{model}-{count}-*/results/*.json")):
            content = cast("dict[str, Any]", read_json(path))
            rows |= content["rows"]
        if content:
            target = options.out / "results" / f"{model}-{count}.json"
            atomic_write_text(target, json_text({**content, "rows": rows}))


def run_all(options: argparse.Namespace, models: Sequence[str], steps: Sequence[int]) -> None:
    """The references of each model and step count first, its shards as soon as they are there."""
    began = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        base = {(m, n): pool.submit(base_of, m, n, options) for n, m in product(steps, models)}

        def work(shard: Shard) -> None:
            base[shard[:2]].result()
            if time.monotonic() - began < options.minutes * 60:
                run(*shard, prepared(shard, options), options)
                print(f"{time.monotonic() - began:6.0f} s {shard}", flush=True)

        list(pool.map(work, shards(models, steps)))


def base_of(model: str, steps: int, options: argparse.Namespace) -> int:
    """Make the plain and the converged pictures."""
    return run(model, steps, "no method has this name", options.out / "base" / f"{model}-{steps}", options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--steps", type=int, action="append")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--merge", action="store_true", help="only put together what earlier runs have finished")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further process after so long")
    options = parser.parse_args()
    models, steps = options.model or list(MODELS), options.steps or [28, 50]
    if not options.merge:
        run_all(options, models, steps)
    merged(options, models, steps)


if __name__ == "__main__":
    main()
