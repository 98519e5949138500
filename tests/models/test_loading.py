"""Loading by name, folder and hub id: it works, or says in one sentence why not."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import hasten
from hasten.core.errors import HastenError, UnknownName
from hasten.models import bundled, check_safetensors, default_workload, find_folder, load


def test_a_bundled_name_a_folder_and_a_hub_id_are_told_apart(tmp_path: Path) -> None:
    assert find_folder("emoji-dit") == bundled()["emoji-dit"]
    copied = tmp_path / "copy"
    shutil.copytree(bundled()["emoji-dit"], copied)
    assert find_folder(str(copied)) == copied
    assert find_folder("some-owner/some-model") is None


@pytest.mark.parametrize("name", ["emoji-flx", "nonsense", "./nowhere", "/no/such/folder", "a/b/c"])
def test_what_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(UnknownName, match="emoji-flux"):
        find_folder(name)


def test_folders_that_hold_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(HastenError, match="is a file"):
        find_folder(str(tmp_path / "file.txt"))
    with pytest.raises(HastenError, match="no model_index.json"):
        find_folder(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{broken")
    with pytest.raises(HastenError, match="line 1, column 2"):
        find_folder(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(HastenError, match="_class_name"):
        find_folder(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(HastenError, match="Cannot load the folder"):
        load(str(tmp_path))


def weights(tmp_path: Path, header: bytes, data: bytes, length: int | None = None) -> Path:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return file


def test_damaged_weight_files(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    check_safetensors(weights(tmp_path, header, bytes(8)))
    with pytest.raises(HastenError, match="where its header promises"):
        check_safetensors(weights(tmp_path, header, bytes(7)))
    with pytest.raises(HastenError, match="truncated within its header"):
        check_safetensors(weights(tmp_path, header, bytes(8), 2**60))
    for header in (b"[]", b"{", b'{"w": 3}', b'{"w": {"data_offsets": []}}', b"[" * 100_000):
        with pytest.raises(HastenError, match="header is not valid"):
            check_safetensors(weights(tmp_path, header, b""))
    (tmp_path / "tiny.safetensors").write_bytes(b"abc")
    with pytest.raises(HastenError, match="truncated"):
        check_safetensors(tmp_path / "tiny.safetensors")


def test_a_workload_file_with_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "workload.json"
    file.write_text('{"stepz": 3}')
    with pytest.raises(HastenError, match="stepz"):
        default_workload(tmp_path)
    file.write_text("[1]")
    with pytest.raises(HastenError, match="no table"):
        default_workload(tmp_path)
    file.write_text('{"steps": 0}')
    with pytest.raises(HastenError, match="at least 1"):
        default_workload(tmp_path)
    file.unlink()
    assert len(default_workload(tmp_path).prompts) == 4


def test_types_and_devices() -> None:
    assert next(load("emoji-dit", dtype="bfloat16").pipeline.transformer.parameters()).dtype == torch.bfloat16
    assert next(load("emoji-dit").pipeline.transformer.parameters()).dtype == torch.float32
    with pytest.raises(UnknownName, match="bfloat16"):
        load("emoji-dit", dtype="bfloat")
    with pytest.raises(HastenError, match="cannot be used"):
        load("emoji-dit", device="cuda:9")


CODE = """
from hasten.core.errors import HastenError
from hasten.models import load
def attempt(name):
    try:
        print("loaded", type(load(name).pipeline).__name__, flush=True)
    except HastenError as error:
        print(error, flush=True)
for name in ("owner/tiny", "nobody/tiny", "gated/tiny"):
    attempt(name)
input()
attempt("owner/other")
"""


def test_what_a_hub_gives_and_refuses(tmp_path: Path) -> None:
    """All in one process, since its imports take most of the time."""
    base = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    base["PYTHONPATH"] = str(Path(hasten.__file__).parents[1])
    with serving(type("OurHub", (Hub,), {"folder": bundled()["emoji-dit"]})) as address:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CODE],
            env=base | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "said").open("w"),
            text=True,
        )
        assert process.stdout
        loaded, missing, gated = (process.stdout.readline() for _ in range(3))
    unreachable, _ = process.communicate("\n", timeout=100)
    assert loaded.strip() == "loaded DiTPipeline", (tmp_path / "said").read_text()[-2000:]
    assert "there is no such model, or it is private" in missing
    assert "its licence must be accepted on the hub first" in gated
    assert "the hub cannot be reached, and the model is not in the local cache" in unreachable


def test_a_hub_that_may_not_be_asked_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        HastenError, match="Cannot load 'owner/tiny' from the model hub: HF_HUB_OFFLINE is set"
    ) as caught:
        load("owner/tiny")
    assert "emoji-flux" in str(caught.value)
    assert "\n" not in str(caught.value)


class Hub(SimpleHTTPRequestHandler):
    """The part of a model hub that a download needs: the list of files, and the files."""

    folder: Path
    commit = "0" * 40
    refusals = {"/nobody/": (401, "RepoNotFound"), "/gated/": (403, "GatedRepo")}

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, *, body: bool) -> None:
        for owner, refusal in self.refusals.items():
            if owner in self.path:
                return self.refuse(*refusal)
        if self.path.startswith("/api/models/"):
            return self.send(self.listing(), "application/json", body)
        file = self.folder / self.path.partition("/resolve/")[2].partition("/")[2].partition("?")[0]
        if not file.is_file():
            return self.send_error(404)
        return self.send(file.read_bytes(), "application/octet-stream", body)

    def listing(self) -> bytes:
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        names = {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in files}
        if "/tree/" in self.path:
            return json.dumps(
                [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in names.items()]
            ).encode()
        return json.dumps(
            {"id": "owner/tiny", "sha": self.commit, "siblings": [{"rfilename": n} for n in names]}
        ).encode()

    def send(self, data: bytes, kind: str, body: bool) -> None:
        self.send_response(200)
        headers = {"Content-Type": kind, "Content-Length": len(data), "ETag": f'"{hash(data)}"'}
        for name, value in (headers | {"X-Repo-Commit": self.commit}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Stay silent."""


@contextmanager
def serving(handler: type[Hub]) -> Generator[str]:
    """The address of a hub that answers while the block runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize("kept", ["as text", "not at all"])
@pytest.mark.parametrize("dtypes", [None, {"vae": "float16"}])
def test_an_autoencoder_whose_link_an_archive_lost(
    kept: str, dtypes: dict[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, original = tmp_path / "emoji-sd", load("emoji-sd", device="cpu").pipeline.vae.state_dict()
    shutil.copytree(bundled()["emoji-sd"], folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    if kept == "as text":
        file.write_text("../../emoji-flux/vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(HastenError, match=r"damaged|Cannot load"):
        load(str(folder))
    models = {**bundled(), "emoji-sd": folder}
    monkeypatch.setattr("hasten.models.bundled", lambda: models)
    vae = load("emoji-sd", device="cpu", dtypes=dtypes).pipeline.vae
    assert vae.dtype == (torch.float16 if dtypes else torch.float32)
    assert all(torch.equal(value, original[name].to(vae.dtype)) for name, value in vae.state_dict().items())
