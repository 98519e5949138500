"""Runs every pair of techniques on every architecture and writes the outcome as data: `make table`.

The table ships with the package (`src/hasten/data/composition.json`), beside a hash of the sources it was made
from; the tests fail when it is stale.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from hasten.core.files import atomic_write_text, json_text
from hasten.core.recipe import Recipe
from hasten.core.registry import FAMILIES
from hasten.core.resolve import resolve
from hasten.core.target import Target
from tests.contract.rigs import ARCHITECTURES, TECHNIQUES, Rig, fingerprint, make, plain_output, trial

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "src" / "hasten" / "data" / "composition.json"
APPLIES, FAILED = "applies", "failed:"
TRIPLES_ON = ("flux", "stable_diffusion")
"""Architectures on which combinations of three are run as well."""
PARTS = 4
"""Into how many processes the combinations of an architecture are shared out."""


def source_hash() -> str:
    """A hash over the sources that decide about compositions."""
    folders = ("core", "denoisers", *FAMILIES)
    files = sorted(file for name in folders for file in (ROOT / "src" / "hasten" / name).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def combinations(architecture: str) -> Iterator[tuple[str, ...]]:
    """The combinations whose outcome is recorded for an architecture."""
    for size in (1, 2):
        yield from itertools.combinations(TECHNIQUES, size)
    if architecture in TRIPLES_ON:
        rig = make(architecture)
        yield from covering([pair for pair in itertools.combinations(TECHNIQUES, 2) if refusal(pair, rig) is None])


def covering(pairs: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Combinations of three, none of them holding a pair that is not listed, which hold every listed pair.

    A pair that nothing third goes with is left out.
    """
    left = dict.fromkeys(pairs)
    allowed = frozenset(pairs)
    for pair in pairs:
        threes = [tuple(sorted({*pair, third}, key=TECHNIQUES.index)) for third in TECHNIQUES if third not in pair]
        threes = [three for three in threes if allowed.issuperset(itertools.combinations(three, 2))]
        if pair in left and threes:
            best = max(threes, key=lambda three: sum(two in left for two in itertools.combinations(three, 2)))
            for two in itertools.combinations(best, 2):
                left.pop(two, None)
            yield best


def refusal(names: tuple[str, ...], rig: Rig) -> str | None:
    """What the planner says against a combination, without applying it."""
    reasons = resolve(Recipe(tuple(map(trial, names))), Target.of(rig)).refusals
    return " ".join(reasons) or None


def outcome(names: tuple[str, ...], architecture: str) -> str:
    """The planner's sentence, or "applies" after a run in which all took part and everything was restored."""
    rig = make(architecture)
    # What the compiler has learnt from one combination must not decide about the next.
    torch._dynamo.reset()
    return refusal(names, rig) or check_applies(names, rig)


def check_applies(names: tuple[str, ...], rig: Rig) -> str:
    """Run a combination, which has to mean the same in any order; asserts that it works, and returns "applies"."""
    plans = {resolve(Recipe(tuple(map(trial, order))), Target.of(rig)).techniques for order in (names, names[::-1])}
    assert len(plans) == 1, names
    before = fingerprint(rig)
    with rig.accelerated(*map(trial, names)) as session:
        output = rig.run()
        session.evidence()
    assert output.isfinite().all(), names
    assert fingerprint(rig)[1:] == before[1:], names
    assert torch.equal(rig.run(), plain_output(rig.spec.name)), names
    return APPLIES


def outcomes_of(architecture: str, part: int) -> dict[str, str]:
    """The outcome of every `PARTS`-th combination on an architecture."""
    torch.set_num_threads(1)
    some = itertools.islice(combinations(architecture), part, None, PARTS)
    return {" + ".join(names): outcome_or_failure(names, architecture) for names in some}


def outcome_or_failure(names: tuple[str, ...], architecture: str) -> str:
    """The outcome, or what was raised where nothing should be."""
    try:
        return outcome(names, architecture)
    except Exception as error:  # noqa: BLE001 - all failures are told together at the end
        return f"{FAILED} {type(error).__name__}: {error}"


def make_table() -> dict[str, Any]:
    """Run everything, side by side in fresh processes (the compiler keeps what it learns), and return the table."""
    outcomes: dict[str, dict[str, str]] = {architecture: {} for architecture in ARCHITECTURES}
    jobs = list(itertools.product((*TRIPLES_ON, *(a for a in ARCHITECTURES if a not in TRIPLES_ON)), range(PARTS)))
    with ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for (architecture, _), found in zip(jobs, pool.map(outcomes_of, *zip(*jobs, strict=True)), strict=True):
            outcomes[architecture] |= found
    failures = [(a, n, text) for a, found in outcomes.items() for n, text in found.items() if text.startswith(FAILED)]
    assert not failures, "\n".join(f"{a}: {names} {text[:300]}" for a, names, text in failures)
    for architecture, found in outcomes.items():
        outcomes[architecture] = {" + ".join(names): found[" + ".join(names)] for names in combinations(architecture)}
    return {"sources": source_hash(), "techniques": list(TECHNIQUES), "outcomes": outcomes}


if __name__ == "__main__":
    from tests.contract.tables import write_documents

    table = make_table()
    atomic_write_text(TABLE, json_text(table))
    write_documents(table)
    for architecture, found in table["outcomes"].items():
        applying = sum(value == APPLIES for value in found.values())
        print(f"{architecture}: {applying} of {len(found)} combinations apply, the others are refused with a reason")
