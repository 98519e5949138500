"""Names of weights as data: which architecture and naming a file has, and how its weights become those of another."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from hasten.core.errors import HastenError, nearest
from hasten.formats.format import Entry, Reader
from hasten.formats.keys.joins import Inputs, Join, Outputs, Same

Change = Callable[[list[Entry]], list[Entry]]


@dataclass(frozen=True)
class Rule:
    """Weights in another naming, and the same in that of diffusers. One side has one name, the other its parts.

    In a pattern `#` stands for a number and `*` for anything; in their order they are the same on both sides.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    join: Join = field(default_factory=Same)


def renamed(theirs: str, ours: str, join: Join | None = None) -> Rule:
    """A weight with two names."""
    return Rule((theirs,), (ours,), join or Same())


def fused(theirs: str, *ours: str, shares: tuple[int, ...] = ()) -> Rule:
    """A weight whose outputs are those of several weights in diffusers."""
    return Rule((theirs,), ours, Outputs(shares))


def _no_rules(names: Collection[str]) -> Sequence[Rule]:
    return (renamed("*", "*"),)


@dataclass(frozen=True, kw_only=True)
class Naming:
    """One way to name the weights of an architecture."""

    architecture: str
    """As in `denoisers`, or the name of a text encoder or VAE."""
    scheme: str
    """"diffusers" (for text encoders, that of transformers), "original" or the name of a tool."""
    marks: tuple[str, ...]
    """Names that every file of this kind has."""
    prefixes: tuple[str, ...] = ("", "model.diffusion_model.", "diffusion_model.")
    """What files put before the names."""
    rules: Callable[[Collection[str]], Sequence[Rule]] = _no_rules
    """The relation to diffusers' names; may depend on which there are, in either naming."""
    ignored: tuple[str, ...] = ()
    """Patterns of what has no place in diffusers and is left out."""


@dataclass(frozen=True)
class Recognized:
    """What the names of a file say."""

    naming: Naming
    prefix: str


@dataclass(frozen=True)
class Step:
    """Some weights of one naming that make some of another."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change


def recognize(names: Collection[str], namings: Iterable[Naming]) -> Recognized | None:
    """The first naming, and prefix, all of whose marks are among the names."""
    found = set(names)
    for naming in namings:
        for prefix in naming.prefixes:
            if all(prefix + mark in found for mark in naming.marks):
                return Recognized(naming, prefix)
    return None


def to_diffusers(names: Sequence[str], found: Recognized) -> list[Step]:
    """How the weights of a file become those of diffusers. Names without the prefix are left out."""
    inner = [name.removeprefix(found.prefix) for name in names if name.startswith(found.prefix)]
    inner = [name for name in inner if not any(_pattern(p).fullmatch(name) for p in found.naming.ignored)]
    rules = found.naming.rules(inner)
    steps = _steps(inner, [_Directed(r.theirs, r.ours, r.join, len(r.theirs) == 1) for r in rules], found.naming)
    return [Step(tuple(found.prefix + name for name in s.sources), s.targets, s.change) for s in steps]


def from_diffusers(names: Sequence[str], naming: Naming) -> list[Step]:
    """How weights with diffusers' names become those of another naming."""
    rules = naming.rules(names)
    return _steps(list(names), [_Directed(r.ours, r.theirs, r.join, len(r.theirs) > 1) for r in rules], naming)


@dataclass(frozen=True)
class _Directed:
    """A rule in one direction."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    join: Join
    splits: bool
    """Is the source the whole?"""


def _steps(names: list[str], rules: Sequence[_Directed], naming: Naming) -> list[Step]:
    compiled = [[_pattern(pattern) for pattern in rule.sources] for rule in rules]
    groups: dict[tuple[int, tuple[str, ...]], dict[int, str]] = {}
    for name in names:
        rule, part, bound = _place(name, compiled, rules, naming)
        groups.setdefault((rule, bound), {})[part] = name
    return [_step(rules[rule], bound, members, names) for (rule, bound), members in groups.items()]


def _place(
    name: str, compiled: list[list[re.Pattern[str]]], rules: Sequence[_Directed], naming: Naming
) -> tuple[int, int, tuple[str, ...]]:
    for index, patterns in enumerate(compiled):
        for part, pattern in enumerate(patterns):
            if match := pattern.fullmatch(name):
                return index, part, match.groups()
    known = [pattern for rule in rules for pattern in rule.sources]
    raise HastenError(
        f"{name!r} is no weight of {naming.architecture} in the naming {naming.scheme!r}. {nearest(name, known)}"
    )


def _step(rule: _Directed, bound: tuple[str, ...], members: dict[int, str], names: list[str]) -> Step:
    if len(members) < len(rule.sources) and not _may_lack(rule.join, members.values()):
        missing = next(_filled(p, bound) for index, p in enumerate(rule.sources) if index not in members)
        raise HastenError(f"{missing!r} is missing beside {next(iter(members.values()))!r}. {nearest(missing, names)}")
    targets = tuple(_filled(pattern, bound) for pattern in rule.targets)
    return Step(tuple(members[index] for index in sorted(members)), targets, _change(rule))


def _change(rule: _Directed) -> Change:
    if rule.splits:
        return lambda entries: rule.join.split(entries[0], len(rule.targets))
    return lambda entries: [rule.join.join(entries)]


def _may_lack(join: Join, present: Iterable[str]) -> bool:
    """Of layers whose outputs are summed some have no bias."""
    return isinstance(join, Inputs) and all(name.endswith(".bias") for name in present)


def _pattern(pattern: str) -> re.Pattern[str]:
    parts = (re.escape(part) if part not in "#*" else r"(\d+)" if part == "#" else "(.+)" for part in _cut(pattern))
    return re.compile("".join(parts))


def _filled(pattern: str, bound: tuple[str, ...]) -> str:
    values = iter(bound)
    return "".join(next(values) if part in "#*" else part for part in _cut(pattern))


def _cut(pattern: str) -> list[str]:
    return [part for part in re.split(r"([#*])", pattern) if part]


class Renamed(Reader):
    """A reader of the same weights under other names; each fused weight is read once if its parts are read in turn."""

    def __init__(self, reader: Reader, steps: Sequence[Step]) -> None:
        self.reader, self.metadata = reader, reader.metadata
        self._home = {name: (step, index) for step in steps for index, name in enumerate(step.targets)}
        self._last: tuple[Step, list[Entry]] | None = None

    def names(self) -> Sequence[str]:
        """Names after the change."""
        return list(self._home)

    def sources(self) -> int:
        """How many weights of the reader beneath take part."""
        steps = {id(step): step for step, _ in self._home.values()}
        taken = {source for step in steps.values() for source in step.sources}
        return len(taken) if not isinstance(self.reader, Renamed) else self.reader.sources()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape after the change."""
        step, index = self._home[name]
        shapes = [self.reader.shape(source) for source in step.sources]
        parts = step.change([Entry(torch.empty(shape, device="meta")) for shape in shapes])
        return tuple(parts[index].weight.shape)

    def read(self, name: str) -> Entry:
        """Read what the weight is made of, and make it."""
        step, index = self._home[name]
        if self._last is None or self._last[0] is not step:
            self._last = None
            self._last = (step, self._made(step))
        found = self._last[1][index]
        if index == len(step.targets) - 1:
            self._last = None
        return found

    def _made(self, step: Step) -> list[Entry]:
        try:
            return step.change([self.reader.read(source) for source in step.sources])
        except HastenError as error:
            raise HastenError(f"{', '.join(step.sources)}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._last = None
        self.reader.close()
