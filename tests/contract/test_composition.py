"""The shipped table of combinations is fresh and true."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hasten.core.files import read_json
from tests.contract.composition import TABLE, TRIPLES_ON, check_applies, combinations, refusals, source_hash
from tests.contract.recorded import Names, pairs_of, recorded, refused_pairs, restricted, threes
from tests.contract.rigs import ARCHITECTURES, TECHNIQUES, make
from tests.contract.tables import documents


@pytest.fixture(scope="module")
def table() -> Any:
    return read_json(TABLE)


def test_the_table_was_made_from_these_sources(table: Any) -> None:
    assert table["sources"] == source_hash(), "stale: run `make table` and commit the result"


def test_the_generated_pages_are_fresh(table: Any) -> None:
    for path, text in documents(table).items():
        assert path.read_text("utf-8") == text, f"{path.name} is stale: run `make table`"


@pytest.mark.parametrize("architecture", TRIPLES_ON)
def test_refusals_are_as_recorded(architecture: str, table: Any) -> None:
    found = {names: refusals(names, architecture) for names in combinations(architecture)}
    assert recorded(found) == table["architectures"][architecture]


OTHERS = [architecture for architecture in ARCHITECTURES if architecture not in TRIPLES_ON]


@pytest.mark.parametrize("architecture", OTHERS)
def test_refusals_of_single_techniques_and_some_pairs_are_as_recorded(architecture: str, table: Any) -> None:
    """Each pair on one of the other architectures; `make table` tries all."""
    some = set(pairs_of(TECHNIQUES)[OTHERS.index(architecture) :: len(OTHERS)])
    tried = [*((name,) for name in TECHNIQUES), *sorted(some)]
    found = {names: refusals(names, architecture) for names in tried}
    made, expected = recorded(found), restricted(table["architectures"][architecture], some)
    assert made == expected


def test_what_is_recorded_says_all_that_is_not_said_of_a_part() -> None:
    alone = {("A",): (), ("B",): ("B: no.",), ("C",): ()}
    pairs = {("A", "B"): ("A and B take x.", "B: no."), ("A", "C"): ("C stops A.",), ("B", "C"): ("B: no.",)}
    made = recorded({**alone, **pairs, ("A", "B", "C"): ()})
    assert made["alone"] == {"B": "B: no."}
    assert made["together"] == {"{first} and {second} take x.": {"A": ["B"]}, "{second} stops {first}.": {"A": ["C"]}}
    assert refused_pairs(made) == {("A", "C"): "{second} stops {first}."}
    assert threes(made) == [("A", "B", "C")]


def sample() -> list[tuple[str, Names]]:
    """Combinations of three that hold every pair of some two architectures, each pair on one of the two if it can."""
    tables: Any = read_json(TABLE)
    seen = set[tuple[str, ...]]()
    found: list[tuple[str, Names]] = []
    for architecture in TRIPLES_ON:
        for names in threes(tables["architectures"][architecture]):
            pairs = set(itertools.combinations(names, 2))
            if not seen.issuperset(pairs):
                found.append((architecture, names))
                seen |= pairs
    return found


@pytest.mark.parametrize(("architecture", "names"), sample(), ids=lambda value: str(value))
def test_combinations_apply_in_any_order(architecture: str, names: Names) -> None:
    torch._dynamo.reset()
    check_applies(names, make(architecture))
