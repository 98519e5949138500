"""Techniques: values are checked and converted when one is made, and it never changes afterwards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import pytest

from hasten.cache import FirstBlockCache
from hasten.core.errors import InvalidSetting, UnknownName
from hasten.core.registry import techniques
from hasten.core.technique import Stage, Technique, about, describe_type


@dataclass(frozen=True, kw_only=True)
class Sample(Technique):
    """One parameter of every kind."""

    stage: ClassVar[Stage] = Stage.CACHE

    needed: int = field(metadata=about("needed", ge=1, le=9))
    ratio: float = field(default=0.5, metadata=about("ratio", gt=0.0, le=1.0, off=1.0, trial=0.25))
    kind: Literal["fast", "slow"] = field(default="fast", metadata=about("kind"))
    flag: bool = field(default=False, metadata=about("flag"))
    maybe: int | None = field(default=None, metadata=about("maybe", ge=0))
    names: tuple[str, ...] = field(default=(), metadata=about("names"))
    pairs: tuple[float, ...] = field(default=(), metadata=about("pairs"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"needed": 0}, r"Sample\(needed=0\): must be at least 1"),
        ({"needed": 10}, "must be at most 9"),
        ({"needed": True}, "expected int, got bool"),
        ({"needed": 1.0}, "expected int, got float"),
        ({"needed": "1"}, "expected int, got str"),
        ({"needed": None}, "expected int, got NoneType"),
        ({"ratio": 0}, "must be greater than 0.0"),
        ({"ratio": float("nan")}, "must be a finite number"),
        ({"ratio": float("-inf")}, "must be a finite number"),
        ({"ratio": 10**400}, "must be a finite number"),
        ({"ratio": True}, "expected float, got bool"),
        ({"ratio": 1j}, "expected float, got complex"),
        ({"kind": "fats"}, r"'fats' is not a choice. Did you mean fast\?"),
        ({"kind": 1}, "expected one of 'fast', 'slow', got int"),
        ({"flag": 1}, "expected bool, got int"),
        ({"maybe": -1}, "must be at least 0"),
        ({"maybe": "x"}, "expected int or None, got str"),
        ({"names": "abc"}, "expected tuple of str, got str"),
        ({"names": ("a", 1)}, "expected tuple of str"),
        ({"pairs": ("a",)}, "expected tuple of float"),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        Sample(**cast("dict[str, Any]", {"needed": 1} | values))
    with pytest.raises(InvalidSetting, match=message):
        Sample.build({"needed": 1} | values)


def test_values_are_converted() -> None:
    sample = Sample.build({"needed": 3, "ratio": 1, "names": ["a", "b"], "pairs": [1, 2.5], "maybe": None})
    assert sample == Sample(needed=3, ratio=1.0, names=("a", "b"), pairs=(1.0, 2.5))
    assert [type(value) for value in dataclasses.asdict(sample)["pairs"]] == [float, float]
    assert hash(sample) == hash(Sample(needed=3, ratio=1.0, names=("a", "b"), pairs=(1.0, 2.5)))


def test_missing_and_unknown_values() -> None:
    with pytest.raises(InvalidSetting, match="Sample needs a value for needed"):
        Sample.build({})
    with pytest.raises(UnknownName, match=r"no parameter of Sample called 'ration'. Did you mean ratio\?"):
        Sample.build({"needed": 1, "ration": 1})
    with pytest.raises(TypeError):
        FirstBlockCache(0.1)  # pyright: ignore


def test_a_technique_never_changes() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FirstBlockCache().threshold = 1.0  # pyright: ignore


def test_inert_and_trial_settings_come_from_the_field() -> None:
    assert Sample(needed=2).inert() == Sample(needed=2, ratio=1.0)
    assert FirstBlockCache.trial() == FirstBlockCache(threshold=10.0)
    assert techniques()["CompileBlocks"].trial().inert() is None


def test_types_in_words() -> None:
    hints = {"a": int | None, "b": Literal["x", "y"], "c": tuple[str, ...], "d": bool}
    assert [describe_type(hint) for hint in hints.values()] == [
        "int or None", "one of 'x', 'y'", "tuple of str", "bool",
    ]  # fmt: skip


@pytest.mark.parametrize("cls", techniques().values(), ids=str)
def test_absurd_numbers_are_refused_by_every_parameter(cls: type[Technique]) -> None:
    for name, item in cls.settings().items():
        if isinstance(item.default, float | int) and not isinstance(item.default, bool):
            for absurd in (float("nan"), float("inf"), -float("inf"), -1, -1e9, "1", (1,), None, [], {}):
                with pytest.raises(InvalidSetting, match=f"{cls.__name__}\\({name}="):
                    cls.build({name: absurd})


def test_the_unfinished_base_says_so() -> None:
    sample: Any = Sample(needed=1)
    assert sample.claims() == ()
    for method in (sample.problems, sample.engaged):
        with pytest.raises(NotImplementedError):
            method(None)
