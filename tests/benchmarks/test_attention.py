"""The attention benchmark runs small on the CPU, and a kernel that fails is a row."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.attention.kernels import KERNELS

FILE = Path(__file__).parents[2] / "benchmarks" / "attention" / "run.py"


@pytest.fixture(scope="module")
def script() -> Any:
    found = importlib.util.spec_from_file_location("attention_benchmark", FILE)
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patched:  # dataclasses look their module up
        patched.setitem(__import__("sys").modules, found.name, module)
        found.loader.exec_module(module)
        yield module


def test_kernels_are_timed_and_failures_are_rows(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise ValueError("no image")

    monkeypatch.setitem(KERNELS, "flash", replace(KERNELS["flash"], run=fail))
    rows = script.kernels(script.Bench(torch.device("cpu"), torch.float32, True))
    found = {row["kernel"]: row for row in rows if row["shape"] == "small cross"}
    assert found["math"]["ms"] > 0
    assert found["math"]["error"] < 1e-6
    assert 0.01 < found["float8_reference"]["error"] < 0.1
    assert found["flash"]["failed"] == "ValueError: no image"
    assert found["flash3"]["refused"] == "the flash3 kernel runs on cuda, not on cpu"


def test_recipes_are_compared_with_the_plain_model(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "MODELS", ("FLUX.1-dev",))
    recipes = (
        "",
        "FusedQKV()",
        "AttentionBackend(name='cudnn')",
        "EightBitAttention(kernel='float8_reference', least_keys=0)",
    )
    rows = script.models(script.Bench(torch.device("cpu"), torch.float32, True), recipes)
    plain, fused, refused, coarse = rows
    assert plain["recipe"] == "plain"
    assert plain["distance"] == 0
    assert fused["distance"] < 1e-5
    assert "projections were computed as" in fused["evidence"]["FusedQKV"]
    assert "the cudnn kernel runs on cuda" in refused["refused"]
    assert 1e-4 < coarse["distance"] < 0.2
