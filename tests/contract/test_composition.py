"""The shipped table of combinations is fresh and true."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hasten.core.files import read_json
from tests.contract.composition import APPLIES, TABLE, check_applies, combinations, refusal, source_hash
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_refusals_are_as_recorded(architecture: str, table: Any) -> None:
    rig = make(architecture)
    for names in combinations(architecture):
        recorded = table["outcomes"][architecture][" + ".join(names)]
        assert (refusal(names, rig) or APPLIES) == recorded, names


def sample() -> list[tuple[tuple[str, str], int]]:
    """Each pair once, on an architecture that changes from pair to pair."""
    return [(pair, index) for index, pair in enumerate(itertools.combinations(TECHNIQUES, 2))]


@pytest.mark.parametrize(("pair", "turn"), sample())
def test_a_pair_applies_in_any_order(pair: tuple[str, str], turn: int, table: Any) -> None:
    working = [a for a in ARCHITECTURES if table["outcomes"][a][" + ".join(pair)] == APPLIES]
    if not working:
        pytest.skip("refused everywhere, with a reason")
    assert check_applies(pair, make(working[turn % len(working)])) == APPLIES
