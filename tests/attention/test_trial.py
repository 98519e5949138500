"""What `hasten doctor` says of attention kernels: right, wrong, NaN, failing, missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hasten.attention import diagnose, trial
from hasten.attention.kernels import KERNELS
from hasten.core.diagnosis import Finding

CPU = torch.device("cpu")


def examined(monkeypatch: pytest.MonkeyPatch, change: Callable[..., torch.Tensor]) -> Finding:
    plain = KERNELS["math"].run

    def run(*given: Any) -> torch.Tensor:
        return change(plain(*given), *given)

    monkeypatch.setitem(KERNELS, "math", replace(KERNELS["math"], run=run))
    return trial.examine("math", CPU, torch.float32)


def test_a_sound_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(monkeypatch, lambda out, *_: out)
    assert found.status == "usable"
    assert found.detail.startswith(f"{len(trial.CASES)} kinds of calls right, error at most ")


def test_a_kernel_that_is_wrong_in_one_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: object) -> torch.Tensor:
        return out * 0.5 if key.shape[2] == 77 else out

    found = examined(monkeypatch, halved)
    assert (found.status, found.detail) == ("broken", "wrong results (cross-attention: off by 50 %)")


def test_a_kernel_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(out: torch.Tensor, query: torch.Tensor, *_: object) -> torch.Tensor:
        return out * torch.nan if query.abs().max() > 20 else out

    found = examined(monkeypatch, overflowing)
    assert (found.status, found.detail) == ("broken", "wrong results (large numbers: NaN or infinity)")


def test_a_kernel_that_raises_is_named_with_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(out: torch.Tensor, query: torch.Tensor, *_: object) -> torch.Tensor:
        raise ValueError("no image")

    with pytest.raises(RuntimeError, match="self-attention: ValueError: no image"):
        examined(monkeypatch, failing)


def test_what_a_kernel_does_not_take_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "math", replace(KERNELS["math"], masks="no"))
    found = trial.examine("math", CPU, torch.float32)
    assert found.detail.endswith("; takes no mask, triangle, window")


def test_every_kernel_of_this_machine() -> None:
    found = {one.name: one for one in diagnose(CPU)}
    assert set(found) == set(KERNELS)
    for name, entry in KERNELS.items():
        if "cpu" in entry.devices:
            assert found[name].status == "usable", found[name]
        else:
            assert found[name].status in ("unfit", "missing", "too old", "broken")
            assert found[name].detail
