"""Compiled code on disk: the second process starts warm; damaged and foreign files are left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.cache import FORA
from hasten.compilation import CompileBlocks
from hasten.compilation import artifacts as module
from hasten.compilation.artifacts import MAGIC, ArtifactStore, environment, store_for
from hasten.compilation.compiler import missing_tools
from hasten.compilation.libraries import packed, unpacked
from hasten.core.errors import HastenError
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.target import Target

PROGRAM = """
import json, torch
torch.set_num_threads(1)
from hasten import CompileBlocks, accelerate, warm_up
from hasten.compilation.compiler import CompileCounter
from hasten.core.registry import specs
spec, technique = specs()["dit"], CompileBlocks()
with accelerate(spec.build({**spec.tiny, "num_layers": 1}), technique) as session:
    warm_up(session)
    counter = session.state(technique, CompileCounter)
    print(json.dumps([counter.graphs, counter.cached, counter.seconds, session.evidence()[technique].summary]))
"""


def run(folder: Path, number: int) -> Any:
    """A process with the same folder of ours, and an empty one of PyTorch's own."""
    own = {
        "HASTEN_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor {number}".replace(" ", "")),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A damaged file in the place of what the program keeps."""
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(folder))
    spec = specs()["dit"]
    file = store_for(Target.of(spec.build({**spec.tiny, "num_layers": 1})), (CompileBlocks(),)).path
    file.parent.mkdir(parents=True)
    file.write_bytes(DAMAGED)
    return file


DAMAGED = MAGIC + b"0" * 64 + b"\n" + packed(b"bundle", {})


@pytest.mark.skipif(any(missing_tools("inductor", torch.device("cpu"))), reason="inductor cannot work here")
def test_a_damaged_file_does_no_harm_and_the_second_process_starts_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = damaged(tmp_path, monkeypatch)
    (graphs, cached, cold, _), said = run(tmp_path, 1)
    assert (graphs, cached) == (1, 0)
    assert "is ignored and will be made again: it is damaged" in said
    assert list((tmp_path / "compiled").iterdir()) == [file]
    assert file.read_bytes() != DAMAGED
    (graphs, cached, warm, summary), _ = run(tmp_path, 2)
    assert (graphs, cached) == (1, 1)
    assert "1 found in the cache" in summary
    assert warm < cold / 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not written by this version"),
        (b"something else\n", "not written by this version"),
        (DAMAGED, "damaged"),
    ],
)
def test_unusable_files_are_ignored_with_a_warning(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "code.bin"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=words):
        assert ArtifactStore(path).load() == 0


def test_no_file_is_no_problem(tmp_path: Path) -> None:
    assert ArtifactStore(tmp_path / "missing.bin").load() == 0


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have owners on POSIX")
def test_another_users_file_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "code.bin"
    path.write_bytes(b"x")
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="another user"):
        assert ArtifactStore(path).load() == 0


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compiled").write_text("a file in the way")
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"bundle", None))
    with pytest.warns(UserWarning, match="was not kept for the next process"):
        assert ArtifactStore(tmp_path / "compiled" / "code.bin").save(1, 0) == 0


def test_it_writes_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"bundle", None))
    store = ArtifactStore(tmp_path / "code.bin")
    assert store.save(0, 0) == 0
    assert store.save(2, 2) > 0, "found in PyTorch's own cache, but not in this file"
    assert store.save(2, 2) == 0
    assert store.save(3, 2) > 0


def test_packing_and_unpacking() -> None:
    libraries = {"ab/one.so": b"1\n", "two.so": b""}
    assert unpacked(packed(b"bundle\n", libraries)) == (b"bundle\n", libraries)
    for name in ("../evil.so", "/evil.so", "evil.py"):
        with pytest.raises(HastenError, match="unexpected name"):
            unpacked(packed(b"", {name: b""}))
    for broken in (b"", b"[]\n", packed(b"bundle", {})[:-1]):
        with pytest.raises(HastenError, match="table of contents"):
            unpacked(broken)


def test_a_file_belongs_to_environment_model_and_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.of(specs()["dit"].build_tiny())
    paths = {store_for(target, recipe).path for recipe in ((CompileBlocks(),), (CompileBlocks(), FORA()))}
    paths.add(store_for(Target.of(specs()["flux"].build_tiny()), (CompileBlocks(),)).path)
    assert len(paths) == 3
    assert store_for(target, (FORA(), CompileBlocks())).path in paths
    monkeypatch.setattr(module, "environment", lambda device: {**environment(device), "torch": "1.0"})
    assert store_for(target, (CompileBlocks(),)).path not in paths


def test_switched_off_it_neither_reads_nor_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ArtifactStore, "load", fail)
    monkeypatch.setattr(ArtifactStore, "save", fail)
    for technique in (CompileBlocks(keep=False), CompileBlocks(backend="eager")):
        if not list(technique.problems(target := Target.of(specs()["dit"].build_tiny()))):
            with accelerate(target, technique):
                pass
