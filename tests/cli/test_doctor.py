"""`hasten doctor`: a table, a file, and no crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten.cli import doctor
from hasten.core.diagnosis import Finding
from tests.cli.conftest import Run

FOUND = [
    Finding(kind="attention kernel", name="math", status="usable", detail="9 kinds of calls right"),
    Finding(kind="attention kernel", name="xformers", status="broken", detail="built for torch 2.10.0+cu128 [wheel]"),
    Finding(kind="optional package", name="peft", status="missing", detail="LoRA adapters: pip install 'peft>=0.17'"),
]


def test_findings_are_shown_and_written(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_all", lambda place: FOUND)  # pyright: ignore
    file = tmp_path / "doctor.json"
    result = run("doctor", "--device", "cpu", "--json", file)
    assert result.exit_code == 0, result.output
    assert "built for torch 2.10.0+cu128 [wheel]" in result.output
    assert "pip install 'peft>=0.17'" in result.output
    assert "1 usable, 1 missing, 1 broken" in result.output
    written = json.loads(file.read_text())
    assert [one["status"] for one in written["findings"]] == ["usable", "broken", "missing"]
    assert written["environment"]["torch"]


def test_everything_is_looked_at(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stand_in(module: str, kind: str, names: object, *rest: str) -> list[Finding]:
        asked.append(module)
        return []

    from hasten.attention import diagnosis
    from hasten.core import packages

    monkeypatch.setattr(diagnosis, "in_another_process", stand_in)
    monkeypatch.setattr(packages, "in_another_process", stand_in)
    assert run("doctor", "--device", "cpu").exit_code == 0
    assert asked == ["hasten.core.packages", "hasten.attention.trial"]


@pytest.mark.parametrize("name", ["cuda:77", "gpu"])
def test_a_device_that_is_not_there(run: Run, name: str) -> None:
    result = run("doctor", "--device", name)
    assert result.exit_code == 2
    assert f"--device {name}:" in result.output
