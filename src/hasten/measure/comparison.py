"""The result of `hasten compare`, read from and written to `comparison.json` (schema 1) whole.

Every number is finite: the infinite PSNR of identical images is written as null beside `"identical": true`,
and NaN is refused where a record is created, so that it reaches neither the file nor the report.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.invalid import explain
from hasten.measure.records import (
    Fact,
    FidelityRecord,
    Kind,
    Phases,
    Record,
    Row,
    Status,
    Steps,
    Timing,
    WorkloadRecord,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "SCHEMA",
    "Comparison",
    "Fact",
    "FidelityRecord",
    "Kind",
    "Phases",
    "Row",
    "Status",
    "Steps",
    "Timing",
    "WorkloadRecord",
]

SCHEMA = 1


class Comparison(Record):
    """Several recipes on one workload, the baseline first.

    `environment` names the machine and the versions; its entry `peak_memory`, where present, says what the
    memory column measures. `warnings` are sentences about the measurement as a whole, such as a busy machine.
    """

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    environment: dict[str, Fact]
    workload: WorkloadRecord
    rows: tuple[Row, ...]
    incomplete: bool = False
    warnings: tuple[str, ...] = ()
    _folder: Path | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Comparison) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]  # holds dictionaries

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read `comparison.json`, or the one in a folder; raises HastenError naming file, place and field."""
        file = Path(path)
        file = file / "comparison.json" if file.is_dir() else file
        data = read_json(file)
        _check_schema(data, file)
        try:
            return cls.model_validate(data).in_folder(file.parent)
        except ValidationError as error:
            raise HastenError(f"{file}: {explain(error, _records())}") from error

    def in_folder(self, folder: str | os.PathLike[str]) -> Comparison:
        """The same comparison with its images found in `folder`."""
        copy = self.model_copy()
        copy._folder = Path(folder)
        return copy

    @property
    def folder(self) -> Path:
        """Where the images lie: as loaded or set by `in_folder`, otherwise the current folder."""
        return self._folder or Path()

    @property
    def baseline(self) -> Row | None:
        """The plain row that all others are measured against, if it was run."""
        return next((row for row in self.rows if row.kind == "baseline"), None)

    def table(self) -> Table:
        """The results as a table for the terminal."""
        from hasten.measure.report import render_table

        return render_table(self)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, folder: str | os.PathLike[str] | None = None
    ) -> str:
        """Return the self-contained report and write it to `path` if given.

        The images are read from `folder`, by default the folder of this comparison, or else that of `path`.
        """
        from hasten.measure.report import render_html

        found = folder or self._folder or (Path(path).parent if path is not None else Path())
        html = render_html(self, Path(found))
        if path is not None:
            atomic_write_text(path, html)
        return html

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the text of `comparison.json` and write it to `path` if given; equal data, equal bytes."""
        text = json_text(self.model_dump(by_alias=True))
        if path is not None:
            atomic_write_text(path, text)
        return text

    def to_pandas(self) -> Any:
        """One pandas row per recipe, nested values as dotted columns (`fidelity.psnr`); needs pandas."""
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise HastenError("to_pandas needs pandas, which is not installed: pip install pandas") from error
        return pandas.DataFrame([_flat(row) for row in self.rows])


def _check_schema(data: object, file: Path) -> None:
    if not isinstance(data, Mapping):
        raise HastenError(f"{file} is no comparison: it holds a {type(data).__name__}, not an object.")
    version = cast("Mapping[str, object]", data).get("schema")
    if version is None:
        raise HastenError(f'{file} is no comparison: it has no "schema" entry.')
    if version != SCHEMA:
        raise HastenError(f"{file} has schema {version!r}; this version of hasten reads schema {SCHEMA}.")


def _flat(row: Row) -> dict[str, object]:
    columns: dict[str, object] = {}
    for name, value in row.model_dump().items():
        if name in ("seconds_per_image", "steps", "fidelity", "noise_floor", "phases"):
            fields = type(row).model_fields[name].annotation
            columns |= {f"{name}.{inner}": (value or {}).get(inner) for inner in _names_in(fields)}
        else:
            columns[name] = value
    return columns


def _names_in(annotation: Any) -> tuple[str, ...]:
    record = next(part for part in annotation.__args__ if part is not type(None))
    return tuple(record.model_fields)


def _records() -> tuple[type[BaseModel], ...]:
    """What such a file consists of."""
    return (Comparison, WorkloadRecord, Row, Timing, Steps, FidelityRecord, Phases)
