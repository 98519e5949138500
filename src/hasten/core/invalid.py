"""Says in words what is wrong with a file that pydantic did not accept."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

SHOWN = 3


def explain(error: ValidationError, records: Iterable[type[BaseModel]]) -> str:
    """The first problems as one sentence; unknown fields get the nearest field that one of the `records` has."""
    known = {field.alias or name for record in records for name, field in record.model_fields.items()}
    problems = error.errors(include_url=False)
    shown = "; ".join(f"{place(one['loc'])}: {_problem(one, known)}" for one in problems[:SHOWN])
    return shown + (f"; and {len(problems) - SHOWN} more problems." if len(problems) > SHOWN else ".")


def place(location: tuple[int | str, ...]) -> str:
    """`("rows", 2, "fidelity", "psnr")` as `rows[2].fidelity.psnr`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".") or "the file"


def _problem(one: ErrorDetails, known: set[str]) -> str:
    if one["type"] != "extra_forbidden":
        return one["msg"].removeprefix("Value error, ")
    close = difflib.get_close_matches(str(one["loc"][-1]), sorted(known), n=1)
    return "unknown field" + (f" (did you mean {close[0]}?)" if close else "")
