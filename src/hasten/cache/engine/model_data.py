"""Numbers that belong to a model: read from the files that ship with hasten or that `hasten calibrate` wrote.

A file holds named sets. A set is found by its name, by the name a model was loaded by, by the hash of the denoiser's
configuration, or by a released model of the same configuration - in this order, and never by guessing between two.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Generic, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError, model_validator

from hasten.core.errors import HastenError, nearest
from hasten.core.files import read_json
from hasten.core.identity import config_hash, names_of, released_as
from hasten.core.invalid import explain
from hasten.core.target import Denoiser

AUTO = "auto"
Indicator = Literal[
    "declared", "modulated_input", "projected_time_embedding", "time_embedding", "timestep", "first_layer"
]
"""What is compared; `declared` is what the architecture's specification declares, `first_layer` that of a U-Net."""
Quantity = Literal["residual", "deep_feature"]


class Entry(BaseModel):
    """Frozen, with known fields and finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Provenance(Entry):
    """Where numbers come from: a publication, or runs of a model with these settings."""

    by: str
    source: str | None = None
    licence: str | None = None
    note: str | None = None
    model: str | None = None
    scheduler: str | None = None
    steps: NonNegativeInt | None = None
    guidance: float | None = None
    width: NonNegativeInt | None = None
    height: NonNegativeInt | None = None
    pictures: NonNegativeInt | None = None
    date: str | None = None


class ModelSet(Entry):
    """Numbers for some models. `config` is the hash of the denoiser's configuration they were measured on."""

    models: tuple[str, ...]
    config: str | None = None
    provenance: Provenance


class TeaCacheSet(ModelSet):
    """A polynomial, highest power first, from the relative change of the indicator to that of the output.

    It is not extrapolated beyond `range`, where that is known. `first` and `last` steps are always computed (a
    `first` below 1 is a share). `speedups` are the authors' figures for thresholds, `computed_share` ours: the mean
    share of steps that the threshold computes.
    """

    coefficients: Annotated[tuple[float, ...], Field(min_length=1)]
    indicator: Indicator = "modulated_input"
    first: NonNegativeInt | NonNegativeFloat = 1
    last: NonNegativeInt = 1
    range: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    r_squared: float | None = None
    points: NonNegativeInt | None = None
    speedups: Mapping[str, float] = Field(default_factory=dict)
    computed_share: Mapping[str, float] = Field(default_factory=dict)


class MagCacheSet(ModelSet):
    """Mean magnitude of a step's residual over that of the step before, for each step (1 for the first).

    `unconditional` are the ratios of the other guidance branch, kept for the record; `computed` are steps that are
    never left out; `published_settings` what the authors recommend.
    """

    ratios: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
    unconditional: tuple[NonNegativeFloat, ...] = ()
    computed: tuple[NonNegativeInt, ...] = ()
    quantity: Quantity = "residual"
    spread: tuple[NonNegativeFloat, ...] = ()
    published_settings: Mapping[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("unconditional", "spread"):
            if len(getattr(self, name)) not in (0, len(self.ratios)):
                raise ValueError(f"{name} needs as many numbers as ratios")
        return self


S = TypeVar("S", bound=ModelSet)


class DataFile(Entry, Generic[S]):
    """A file of sets of one kind, by name."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    kind: str
    sets: Annotated[dict[str, S], Field(min_length=1)]


class NoData(HastenError):
    """No numbers are known for a denoiser; the text says how to get them."""


class Library(Generic[S]):
    """All sets of one kind that can be chosen for a parameter of a technique."""

    def __init__(self, kind: str, title: str, parameter: str, form: type[DataFile[S]]) -> None:
        """`title` names the numbers in sentences, `parameter` is the technique's parameter that takes a choice."""
        self.kind, self._title, self._parameter, self._form = kind, title, parameter, form

    @functools.cached_property
    def shipped(self) -> dict[str, S]:
        """The sets that come with hasten."""
        return self.read(Path(str(resources.files("hasten"))) / "data" / f"{self.kind}.json").sets

    def read(self, file: Path) -> DataFile[S]:
        """Read a file; raises HastenError naming the file and the field."""
        data = read_json(file)
        kind = cast("Mapping[str, object]", data).get("kind") if isinstance(data, Mapping) else None
        if kind != self.kind:
            made = f"it was made for {kind}" if isinstance(kind, str) else 'it has no "kind" entry'
            raise HastenError(f"{file} holds no {self._title}: {made}.")
        try:
            return self._form.model_validate(data)
        except ValidationError as error:
            raise HastenError(f"{file}: {explain(error, (self._form,))}") from None

    def choose(self, wanted: str, denoiser: Denoiser) -> S:
        """The set `wanted` by name or file, or for `auto` the one made for this denoiser; raises HastenError."""
        if wanted.endswith(".json"):
            return self._from_file(Path(wanted).expanduser(), denoiser)
        if wanted == AUTO:
            return self._found(self.shipped, denoiser)
        folded = {name.casefold(): one for name, one in self.shipped.items()}
        if wanted.casefold() in folded:
            return folded[wanted.casefold()]
        choices = [AUTO, *self.shipped]
        raise NoData(
            f"There are no {self._title} called {wanted!r}, nor is it a .json file. {nearest(wanted, choices)}"
        )

    def _from_file(self, file: Path, denoiser: Denoiser) -> S:
        sets = self.read(file).sets
        if len(sets) > 1:
            return self._found(sets, denoiser)
        ((name, only),) = sets.items()
        if only.config is not None and only.config != config_hash(denoiser):
            raise NoData(
                f"{file} was made for {name}, whose configuration differs from this {denoiser.spec.model_class}; "
                f"{self._command()}."
            )
        return only

    def _found(self, sets: Mapping[str, S], denoiser: Denoiser) -> S:
        names, alike = names_of(denoiser), released_as(denoiser)
        if named := _by_names(sets, names):
            return named
        key = config_hash(denoiser)
        if matching := [one for one in sets.values() if one.config == key]:
            return matching[-1]
        if not _released_elsewhere(names, denoiser):
            found = {name: one for name in alike if (one := _by_names(sets, (name,)))}
            if len({id(one) for one in found.values()}) == 1 and len(found) == len(alike):
                return next(iter(found.values()))
            if found:
                raise NoData(self._ambiguous(alike, list(found)))
        raise NoData(
            f"There are no {self._title} for this {denoiser.spec.model_class}; {self._command()}, "
            f"or name a set: {', '.join(self.shipped)}."
        )

    def _ambiguous(self, alike: tuple[str, ...], found: list[str]) -> str:
        return (
            f"This denoiser has the configuration of {' and of '.join(alike)}, which need different {self._title}; "
            f'say which it is, such as {self._parameter}="{found[0]}".'
        )

    def _command(self) -> str:
        file = f"{self.kind}-data.json"
        command = f"hasten calibrate MODEL --for {self.kind} -o {file}"
        return f'measure them with `{command}` and give {self._parameter}="{file}"'


def _by_names(sets: Mapping[str, S], names: tuple[str, ...]) -> S | None:
    wanted = {name.casefold() for name in names}
    return next((one for one in sets.values() if wanted & {model.casefold() for model in one.models}), None)


def _released_elsewhere(names: tuple[str, ...], denoiser: Denoiser) -> bool:
    """Was it loaded by the name of a released model? Then another model's numbers are not right for it."""
    return any(_in(name, denoiser.spec.released) for name in names)


def _in(name: str, others: Mapping[str, object]) -> bool:
    return name.casefold() in {other.casefold() for other in others}


TEACACHE: Library[TeaCacheSet] = Library("teacache", "TeaCache coefficients", "coefficients", DataFile[TeaCacheSet])
MAGCACHE: Library[MagCacheSet] = Library("magcache", "magnitude ratios", "ratios", DataFile[MagCacheSet])


def problems(library: Library[S], wanted: str, denoiser: Denoiser) -> Iterator[str]:
    """Say why there are no numbers for a denoiser."""
    try:
        library.choose(wanted, denoiser)
    except HastenError as error:
        yield str(error)
