from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_bytes, atomic_write_text, json_text
from hasten.measure.comparison import Comparison, FidelityRecord, Row, Steps, Timing, WorkloadRecord


def workload(prompt: str = "pizza") -> WorkloadRecord:
    return WorkloadRecord(
        model="m", denoiser="D", dtype="float32", device="cpu", width=8, height=8, steps=4,
        prompts=(prompt,), seeds=(0,), runs=2,
    )  # fmt: skip


def comparison(*rows: Row, prompt: str = "pizza") -> Comparison:
    plain = Row(name="plain", recipe="", kind="baseline", status="ok", seconds_per_image=Timing.of([2.0, 1.0, 4.0]))
    return Comparison(environment={"torch": "2.13", "cores": 2, "tf32": True, "note": None},
                      workload=workload(prompt), rows=(plain, *rows))  # fmt: skip


def written(folder: Path, data: object) -> Path:
    path = folder / "comparison.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def changed(**changes: Any) -> dict[str, Any]:
    return json.loads(comparison().to_json()) | changes


def test_json_keeps_everything_and_the_order_of_the_schema(tmp_path: Path) -> None:
    before = comparison(
        Row(
            name="cache", recipe="A() | B(x=1)", status="ok", speedup=1.5,
            fidelity=FidelityRecord(psnr=31.5, lpips=0.01),
            steps=Steps(full=3, reused=1.5), images=("images/a.png",), step_map={"cond": (True, False)},
            changes=("one", "two"),
        )
    )  # fmt: skip
    text = before.to_json(tmp_path / "out" / "comparison.json")
    assert Comparison.load(tmp_path / "out") == before
    assert (tmp_path / "out" / "comparison.json").read_text("utf-8") == text
    assert list(json.loads(text)) == ["schema", "environment", "workload", "rows", "incomplete", "warnings"]
    assert json.loads(text)["schema"] == 1
    assert json.loads(text)["environment"]["tf32"] is True
    assert Comparison.load(tmp_path / "out").to_json() == text


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(max_size=40), seconds=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5))
def test_any_text_and_time_survives_the_file(
    prompt: str, seconds: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    row = Row(name="a", recipe="", status="ok", seconds_per_image=Timing.of(seconds))
    before = comparison(row, prompt=prompt)
    before.to_json(folder / "comparison.json")
    assert Comparison.load(folder) == before


def test_a_prompt_of_broken_unicode_is_written_and_read_again(tmp_path: Path) -> None:
    before = comparison(prompt="caf\udce9")
    before.to_json(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path).workload.prompts == ("caf\udce9",)


def test_an_infinite_psnr_becomes_identical(tmp_path: Path) -> None:
    record = FidelityRecord(psnr=math.inf, ssim=1.0, lpips=0.0)
    assert (record.psnr, record.identical, record.decibels) == (None, True, math.inf)
    row = Row(name="same", recipe="", status="ok", fidelity=record)
    data = json.loads(comparison(row).to_json())["rows"][1]["fidelity"]
    assert data["psnr"] is None
    assert data["identical"] is True


@pytest.mark.parametrize(
    "values",
    [{"psnr": math.nan}, {"psnr": None}, {"psnr": 30.0, "identical": True}, {"psnr": 30.0, "ssim": math.nan},
     {"psnr": 30.0, "lpips": math.inf}, {"psnr": -math.inf}],
)  # fmt: skip
def test_nan_and_contradictions_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FidelityRecord(**values)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_no_other_number_may_be_nan_or_infinite(number: float) -> None:
    with pytest.raises(ValidationError):
        Timing.of([1.0, number])
    with pytest.raises(ValidationError):
        Row(name="a", recipe="", status="ok", speedup=number)
    with pytest.raises(ValidationError):
        Comparison(environment={"x": number}, workload=workload(), rows=())
    with pytest.raises(HastenError, match="NaN"):
        json_text({"deep": [1.0, number]})


def test_records_are_frozen_and_timings_have_their_median() -> None:
    timing = Timing.of([3.0, 1.0, 2.0])
    assert (timing.min, timing.median, timing.max, timing.runs) == (1.0, 2.0, 3.0, (3.0, 1.0, 2.0))
    assert timing.overlaps(Timing.of([2.5, 9.0]))
    assert not timing.overlaps(Timing.of([3.5, 9.0]))
    with pytest.raises(ValidationError, match="frozen"):
        timing.median = 5.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(HastenError, match="at least one"):
        Timing.of([])


def test_a_refused_row_needs_a_reason() -> None:
    with pytest.raises(ValidationError, match="needs a reason"):
        Row(name="a", recipe="", status="refused")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret.png", "a/../../b.png", "C:\\x.png", "\\\\host\\x", "", "a\0b"]
)
def test_images_stay_inside_the_folder(path: str) -> None:
    with pytest.raises(ValidationError, match="relative path"):
        Row(name="a", recipe="", status="ok", images=(path,))


def test_the_baseline_is_the_row_of_that_kind() -> None:
    assert comparison().baseline is comparison().rows[0] or comparison().baseline == comparison().rows[0]
    only = Comparison(environment={}, workload=workload(), rows=(Row(name="a", recipe="", status="ok"),))
    assert only.baseline is None


def test_loading_tells_what_is_wrong_and_where(tmp_path: Path) -> None:
    def message(data: object) -> str:
        with pytest.raises(HastenError) as caught:
            Comparison.load(written(tmp_path, data))
        return str(caught.value)

    assert "line 2, column 3" in message('{"schema": 1,\n  ]')
    assert "NaN" in message('{"schema": 1, "rows": NaN}')
    assert "nested too deeply" in message("[" * 100_000)
    assert "holds a list" in message([1])
    assert 'no "schema" entry' in message({})
    assert "schema 2" in message(changed(schema=2))
    assert "reads schema 1" in message(changed(schema=2))
    assert "rowz: unknown field (did you mean rows?)" in message(changed(rowz=[]))
    row = json.loads(comparison().to_json())["rows"][0]
    assert "rows[0].speedupp: unknown field (did you mean speedup?)" in message(changed(rows=[row | {"speedupp": 1}]))
    assert "rows[0].status" in message(changed(rows=[row | {"status": "great"}]))
    assert "more problems" in message(changed(rows=[{"a": 1, "b": 2, "c": 3}]))


def test_loading_a_missing_or_binary_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match=r"There is no file .*comparison\.json"):
        Comparison.load(tmp_path)
    (tmp_path / "comparison.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HastenError, match="not UTF-8"):
        Comparison.load(tmp_path / "comparison.json")


def test_writing_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = atomic_write_text(tmp_path / "new" / "file.txt", "first")
    atomic_write_bytes(path, b"second")
    assert path.read_text() == "second"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = atomic_write_text(tmp_path / "file.txt", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HastenError, match="no space left on device"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file.txt"]


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(HastenError, match="taken"):
        comparison().to_json(tmp_path / "taken" / "comparison.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HastenError, match="a folder of that name"):
        comparison().to_json(tmp_path / "folder")


def test_to_pandas_has_dotted_columns_or_says_how_to_install_it() -> None:
    row = Row(name="same", recipe="", status="ok", fidelity=FidelityRecord(psnr=30.0))
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(HastenError, match="pip install pandas"):
            comparison(row).to_pandas()
        return
    frame = comparison(row).to_pandas()
    assert list(frame["name"]) == ["plain", "same"]
    assert frame["fidelity.psnr"][1] == 30.0
    assert frame["seconds_per_image.median"][0] == 2.0
