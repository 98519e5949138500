"""Files are written whole or not at all, and JSON is strict both ways."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.errors import HastenError
from hasten.core.files import (
    atomic_write_bytes,
    atomic_write_text,
    ensure_folder,
    ensure_writable,
    json_text,
    read_json,
)


def test_text_and_bytes_are_written_with_their_folders(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "größe.txt"
    assert atomic_write_text(file, "€\udcff\n") == file
    assert file.read_bytes() == "€\\udcff\n".encode()
    atomic_write_bytes(file, b"\0new")
    assert file.read_bytes() == b"\0new"
    assert [entry.name for entry in file.parent.iterdir()] == ["größe.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_keeps_the_old_file(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    file = atomic_write_text(tmp_path / "x.json", "old")
    monkeypatch.setattr(os if failing == "fsync" else Path, failing, full)
    with pytest.raises(HastenError, match=r"Cannot write x\.json into .*: no space left on device"):
        atomic_write_text(file, "new")
    monkeypatch.undo()
    assert file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text(tmp_path / "x", "new")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HastenError, match="a folder of that name is there"):
        atomic_write_text(tmp_path / "folder", "")
    for unusable in (lambda: atomic_write_text(tmp_path / "file" / "x", ""), lambda: ensure_folder(tmp_path / "file")):
        with pytest.raises(HastenError, match="Cannot create the folder"):
            unusable()


def test_very_long_names_are_written_when_the_file_system_takes_them(tmp_path: Path) -> None:
    assert atomic_write_text(tmp_path / ("n" * 250), "x").read_text() == "x"
    with pytest.raises(HastenError, match="Cannot write"):
        atomic_write_text(tmp_path / ("n" * 300), "x")


def test_a_folder_is_probed_before_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ensure_writable(tmp_path / "new" / "deeper") == tmp_path / "new" / "deeper"
    assert ensure_writable(tmp_path) == tmp_path
    assert not list(tmp_path.iterdir()), "a check leaves nothing behind"

    def denied(*_: object, **__: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", denied)
    with pytest.raises(HastenError, match="Cannot write into the folder .*: permission denied"):
        ensure_writable(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1, column 1"),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6: not valid JSON"),
        (b'{"a": NaN}', "it contains NaN"),
        (b"[-Infinity]", "it contains -Infinity"),
        (b"\xff\xfe", r"not UTF-8 text \(byte 0\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON"),
    ],
)
def test_what_is_no_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(HastenError, match=rf"x\.json.*{message}"):
        read_json(tmp_path / "x.json")


def test_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match="There is no file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(HastenError, match="Cannot read .*: is a directory"):
        read_json(tmp_path)


numbers = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
trees: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(trees)
def test_json_text_is_json(data: Any) -> None:
    assert json.loads(json_text(data)) == data


def test_json_survives_a_file(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None], "b": {"c": [[1, 2], [3]]}, "€": "\udcff", "t": [], "e": {}}
    assert read_json(atomic_write_text(tmp_path / "x.json", json_text(data))) == data
    assert json_text({"a": [1, 2], "b": []}) == '{\n  "a": [1, 2],\n  "b": []\n}\n'


def test_what_fits_on_a_line_is_not_spread_over_several() -> None:
    rows = [{"psnr": 36.5, "name": "a"}, {"psnr": 31.2, "name": "b" * 160}]
    lines = json_text({"rows": rows}).splitlines()
    assert lines[2] == '    {"psnr": 36.5, "name": "a"},'
    assert lines[3:6] == ["    {", '      "psnr": 31.2,', f'      "name": "{"b" * 160}"']
    assert json_text({"a": {"b": {}, "c": [1]}}).count("\n") == 6
    assert json_text([0] * 21).count(" ") == 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_lacks(number: float) -> None:
    with pytest.raises(HastenError, match="NaN and infinite numbers"):
        json_text({"a": [number]})
