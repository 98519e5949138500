"""The shipped table of combinations is fresh and true."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hasten.core.files import read_json
from tests.contract.composition import APPLIES, TABLE, TRIPLES_ON, check_applies, combinations, refusal, source_hash
from tests.contract.rigs import ARCHITECTURES, make
from tests.contract.tables import documents


@pytest.fixture(scope="module")
def table() -> Any:
    return read_json(TABLE)


def test_the_table_was_made_from_these_sources(table: Any) -> None:
    assert table["sources"] == source_hash(), "stale: run `make table` and commit the result"


def test_the_generated_pages_are_fresh(table: Any) -> None:
    for path, text in documents(table).items():
        assert path.read_text("utf-8") == text, f"{path.name} is stale: run `make table`"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_refusals_are_as_recorded(architecture: str, table: Any) -> None:
    rig = make(architecture)
    for names in combinations(architecture):
        recorded = table["outcomes"][architecture][" + ".join(names)]
        assert (refusal(names, rig) or APPLIES) == recorded, names


def sample() -> list[tuple[str, str]]:
    """Combinations of three that hold every pair of some two architectures, each pair on one of the two if it can."""
    recorded: Any = read_json(TABLE)
    seen = set[tuple[str, ...]]()
    found: list[tuple[str, str]] = []
    for architecture in TRIPLES_ON:
        for text, outcome in recorded["outcomes"][architecture].items():
            pairs = set(itertools.combinations(text.split(" + "), 2))
            if text.count(" + ") == 2 and outcome == APPLIES and not seen.issuperset(pairs):
                found.append((architecture, text))
                seen |= pairs
    return found


@pytest.mark.parametrize(("architecture", "names"), sample())
def test_combinations_apply_in_any_order(architecture: str, names: str) -> None:
    torch._dynamo.reset()
    assert check_applies(tuple(names.split(" + ")), make(architecture)) == APPLIES
