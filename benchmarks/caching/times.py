"""Wall-clock seconds of the rows that run.py has measured, on an idle machine: a GPU, or one thread of a CPU.

    PYTHONPATH=.peers python benchmarks/caching/times.py --device cuda
    PYTHONPATH=.peers OMP_NUM_THREADS=1 python benchmarks/caching/times.py --device cpu --repeats 2

Every row runs at the setting that run.py found; a plain picture is made before and after each row, and the ratio is
to these two. One process for hasten's rows and the baselines, one for each peer, since peers patch classes.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from baselines import baselines
from harness import Bench, rounded, timed
from isolation import RowFailed, isolated
from methods import Method, Setting
from ours import ours
from peers import peers
from run import FRACTIONS, HERE, MODELS, facts_of, open_bench, say

from hasten.core.files import atomic_write_text, json_text, read_json

Job = tuple[str, Method, Setting]
"""A row's key and what makes it."""


def jobs(content: dict[str, Any]) -> list[Job]:
    """The finished rows of a results file, with the values that were found for them."""
    found: list[Job] = []
    for method in (*baselines(), *ours(), *peers()):
        for fraction in FRACTIONS:
            row = content["rows"].get(key := f"{method.name} @ 1/{fraction}", {})
            if row.get("status") == "ok":
                values = {name: value for name, value in row["setting"].items() if name != "recipe"}
                found.append((key, method, Setting(content["steps"], row["budget"], values)))
    return found


def process_of(job: Job) -> str:
    """Which rows may share a process."""
    return job[1].name if job[1].kind == "peer" else ""


def together(bench: Bench, group: list[Job], repeats: int) -> dict[str, Any]:
    """Times of some rows, one after the other in this process."""
    bench.on_device()
    steps = group[0][2].steps
    timed(bench, bench.evaluation[0], steps)
    # A peer stays on the pipeline, so its plain pictures are all made beforehand.
    before = [timed(bench, bench.evaluation[0], steps)[1] for _ in range(2)]
    return {key: one(bench, method, setting, repeats, before) for key, method, setting in group}


def one(bench: Bench, method: Method, setting: Setting, repeats: int, before: list[float]) -> dict[str, Any]:
    """One row: a picture to warm up, then one of each of the first prompts."""
    if method.kind != "peer":
        before = [timed(bench, bench.evaluation[0], setting.steps)[1]]
    with method.prepare(bench.pipeline, setting):
        timed(bench, bench.evaluation[0], setting.run_steps)
        seconds = [timed(bench, pair, setting.run_steps)[1] for pair in bench.evaluation[:repeats]]
    after = [] if method.kind == "peer" else [timed(bench, bench.evaluation[0], setting.steps)[1]]
    return dict(rounded({"seconds": median(seconds), "runs": seconds, "plain": median(before + after)}))


def measured(bench: Bench, content: dict[str, Any], repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows of a results file."""
    every = sorted(jobs(content), key=process_of)
    for name, group in groupby(every, key=process_of):
        members = list(group)
        # The forecasts of a peer outlive it; its budgets get a process each.
        for some in [[job] for job in members] if name else [members]:
            try:
                yield from isolated(together, bench, some, repeats).items()
            except RowFailed as error:
                yield from ((key, {"problem": str(error)}) for key, _, _ in some)
        say(bench, name or "hasten and baselines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.set_defaults(prompts=32)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for model in options.model or MODELS:
        bench = open_bench(model, options)
        content = cast("dict[str, Any]", read_json(options.out / "results" / f"{model}-{options.steps}.json"))
        rows = dict(measured(bench, content, options.repeats))
        facts = isolated(facts_of, options.device) | {"threads": torch.get_num_threads()}
        kind = torch.device(options.device).type
        path = options.out / "results" / "times" / f"{model}-{options.steps}-{kind}.json"
        atomic_write_text(
            path, json_text({"schema": 1, "weights": content["weights"], "environment": facts, "rows": rows})
        )


if __name__ == "__main__":
    main()
