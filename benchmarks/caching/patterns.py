"""Rows that have a published shape: what FORA and DeepCache lose as their interval grows.

    PYTHONPATH=.peers OMP_NUM_THREADS=1 python benchmarks/caching/patterns.py

The last case is the one of the article that began this project: a DiT, 250 DDIM steps, everything computed every third.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from harness import Bench, measured
from isolation import RowFailed, isolated
from methods import Method, Setting, intervals
from ours import apply
from peers import peers
from run import HERE, Results, describe, header_of, make_references, open_bench, outcome, say

INTERVALS = (2, 3, 5, 10)
CASES = (("emoji-dit", 50, "FORA"), ("emoji-flux", 50, "FORA"), ("emoji-sd", 50, "DeepCache"))
ARTICLE = ("emoji-dit", 250, "FORA")


def methods_for(technique: str) -> list[Method]:
    """hasten's technique and, for DeepCache, the package."""
    own = Method(technique, "ours", partial(apply, recipe=technique + "(interval={interval})"), intervals)
    package = [method for method in peers() if method.name == "DeepCache package" and technique == "DeepCache"]
    return [own, *package]


def run_case(bench: Bench, steps: int, technique: str, wanted: tuple[int, ...], results: Results) -> None:
    """All intervals of one technique on one model."""
    make_references(bench, steps, results)
    for method in methods_for(technique):
        for interval in wanted:
            key = f"{method.name}, N = {interval}"
            setting = Setting(steps, -(-steps // interval), {"interval": interval})
            if results.has(key):
                continue
            try:
                row = isolated(measured, bench, method, setting, f"pattern-{steps}-{method.name}-{interval}")
            except RowFailed as error:
                row = {"status": "failed", "reason": str(error)}
            results.add(key, describe(method, setting) | row)
            say(bench, f"{steps} steps, {key}: {outcome(row)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--article-prompts", type=int, default=8, help="250 steps take long")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", action="append", metavar="MODEL-STEPS", help="only this case; may be repeated")
    options = parser.parse_args()
    for model, steps, technique in (*CASES, ARTICLE):
        if options.case and f"{model}-{steps}" not in options.case:
            continue
        long = steps == ARTICLE[1]
        bench = open_bench(model, options)
        if long:
            bench.evaluation = bench.evaluation[: options.article_prompts]
        path = options.out / "results" / f"pattern-{model}-{steps}.json"
        run_case(bench, steps, technique, (3,) if long else INTERVALS, Results.open(path, header_of(bench, steps)))


if __name__ == "__main__":
    main()
