"""Runs every pair of techniques on every architecture and writes the outcome as data: `make table`.

The table ships with the package (`src/hasten/data/composition.json`), beside a hash of the sources it was made
from; the tests fail when it is stale.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
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
from tests.contract.recorded import Names, Reasons, recorded
from tests.contract.rigs import ARCHITECTURES, TECHNIQUES, Rig, fingerprint, make, plain_output, trial

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "src" / "hasten" / "data" / "composition.json"
FAILED = "failed:"
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


def combinations(architecture: str) -> Iterator[Names]:
    """The combinations whose outcome is recorded for an architecture."""
    for size in (1, 2):
        yield from itertools.combinations(TECHNIQUES, size)
    if architecture in TRIPLES_ON:
        pairs = itertools.combinations(TECHNIQUES, 2)
        yield from covering([pair for pair in pairs if not refusals(pair, architecture)])


def covering(pairs: list[Names]) -> Iterator[Names]:
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


@functools.cache
def refusals(names: Names, architecture: str) -> Reasons:
    """What the planner says against a combination, without applying it."""
    return resolve(Recipe(tuple(map(trial, names))), _target(architecture)).refusals


@functools.cache
def _target(architecture: str) -> Target:
    return Target.of(make(architecture))


def outcome(names: Names, architecture: str) -> Reasons:
    """The planner's sentences, or none after a run in which all took part and everything was restored."""
    # What the compiler has learnt from one combination must not decide about the next.
    torch._dynamo.reset()
    if reasons := refusals(names, architecture):
        return reasons
    check_applies(names, make(architecture))
    return ()


def check_applies(names: Names, rig: Rig) -> None:
    """Run a combination, which has to mean the same in any order; asserts that it works."""
    plans = {resolve(Recipe(tuple(map(trial, order))), Target.of(rig)).techniques for order in (names, names[::-1])}
    assert len(plans) == 1, names
    before = fingerprint(rig)
    with rig.accelerated(*map(trial, names)) as session:
        output = rig.run()
        session.evidence()
    assert output.isfinite().all(), names
    assert fingerprint(rig)[1:] == before[1:], names
    assert torch.equal(rig.run(), plain_output(rig.spec.name)), names


def outcomes_of(architecture: str, part: int) -> dict[Names, Reasons]:
    """The outcome of every `PARTS`-th combination on an architecture."""
    torch.set_num_threads(1)
    some = itertools.islice(combinations(architecture), part, None, PARTS)
    return {names: outcome_or_failure(names, architecture) for names in some}


def outcome_or_failure(names: Names, architecture: str) -> Reasons:
    """The outcome, or what was raised where nothing should be."""
    try:
        reasons = outcome(names, architecture)
        assert len(names) < 3 or not reasons, f"all of its pairs apply, but together: {reasons}"
        return reasons
    except Exception as error:  # noqa: BLE001 - all failures are told together at the end
        return (f"{FAILED} {type(error).__name__}: {error}",)


def make_table() -> dict[str, Any]:
    """Run everything, side by side in fresh processes (the compiler keeps what it learns), and return the table."""
    outcomes: dict[str, dict[Names, Reasons]] = {architecture: {} for architecture in ARCHITECTURES}
    jobs = list(itertools.product((*TRIPLES_ON, *(a for a in ARCHITECTURES if a not in TRIPLES_ON)), range(PARTS)))
    with ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for (architecture, _), found in zip(jobs, pool.map(outcomes_of, *zip(*jobs, strict=True)), strict=True):
            outcomes[architecture] |= found
    failures = [
        f"{architecture}: {' + '.join(names)} {reasons[0][:300]}"
        for architecture, found in outcomes.items()
        for names, reasons in found.items()
        if reasons and reasons[0].startswith(FAILED)
    ]
    assert not failures, "\n".join(failures)
    for architecture, found in outcomes.items():
        applying = sum(not reasons for reasons in found.values())
        print(f"{architecture}: {applying} of {len(found)} combinations apply, the others are refused with a reason")
    return as_table(outcomes)


def as_table(outcomes: Mapping[str, Mapping[Names, Reasons]]) -> dict[str, Any]:
    """What is written, from the outcomes of each architecture in any order."""
    tables = {a: recorded({names: found[names] for names in combinations(a)}) for a, found in outcomes.items()}
    return {"sources": source_hash(), "techniques": list(TECHNIQUES), "architectures": tables}


if __name__ == "__main__":
    from tests.contract.tables import write_documents

    table = make_table()
    atomic_write_text(TABLE, json_text(table))
    write_documents(table)
