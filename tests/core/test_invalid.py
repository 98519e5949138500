"""What is wrong with a file, in words."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from hasten.core.invalid import explain, place


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    speed: float = 0.0


class Outer(BaseModel):
    rows: list[Inner]


def words(data: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    return explain(caught.value, (Outer, Inner))


def test_an_unknown_field_gets_its_neighbour() -> None:
    assert words({"rows": [{"sped": 1.0}]}) == "rows[0].sped: unknown field (did you mean speed?)."


def test_only_the_first_problems_are_shown() -> None:
    found = words({"rows": [{"speed": "fast"}] * 5})
    assert found.count("rows[") == 3
    assert found.endswith("; and 2 more problems.")


def test_places_read_as_code() -> None:
    assert place(("rows", 2, "fidelity", "psnr")) == "rows[2].fidelity.psnr"
    assert place(()) == "the file"
