"""Homes of weights: page-locked memory within its budget, files, plain memory; and buffers that keep every layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hasten.core.errors import HastenError, InvalidSetting
from hasten.memory.engine import arena as arenas
from hasten.memory.engine.arena import ALIGNMENT, Arena, size_in_arena
from hasten.memory.engine.sizes import in_words, parse_bytes
from hasten.memory.engine.storage import Storage, folder_problem
from hasten.memory.engine.weights import Unit

LAYOUTS = (
    torch.randn(3, 5),
    torch.randn(5, 3).t(),
    torch.randn(2, 4, 6, 8).to(memory_format=torch.channels_last),
    torch.arange(7, dtype=torch.int8),
    torch.tensor(2.5, dtype=torch.float64),
    torch.randn(9).bfloat16(),
    torch.empty(0, 4),
    torch.tensor([True, False]),
)


def unit(name: str, *tensors: torch.Tensor) -> Unit:
    return Unit(name, [nn.Parameter(tensor.clone(), requires_grad=False) for tensor in tensors])


def test_a_buffer_keeps_values_types_and_strides() -> None:
    arena = Arena(LAYOUTS)
    assert arena.buffer.numel() == size_in_arena(LAYOUTS)
    moved = arena.views(arena.buffer.clone())
    for view, tensor in zip(moved, LAYOUTS, strict=True):
        assert torch.equal(view, tensor)
        assert (view.dtype, view.shape, view.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert (view.storage_offset() * view.element_size()) % ALIGNMENT == 0


def test_the_budget_of_page_locked_memory_is_never_exceeded() -> None:
    pinned: list[int] = []
    units = [unit(str(n), torch.randn(10), torch.randn(10)) for n in range(4)]  # 80 bytes, 512 in a buffer
    budget = 1100
    storage = Storage(budget, None, pin=lambda arena: pinned.append(arena.buffer.numel()))
    storage.store(units)
    assert pinned == [512, 512], "those that come first"
    assert storage.pinned == sum(pinned) <= budget
    assert [one.arena is not None for one in units] == [True, True, False, False]
    storage.close()


@pytest.mark.parametrize("budget", [0, 511])
def test_without_room_nothing_is_page_locked(budget: int) -> None:
    storage = Storage(budget, None, pin=lambda arena: pytest.fail("page-locked"))
    one = unit("a", torch.randn(10), torch.randn(10))
    address = one.weights[0].tensor.data_ptr()
    storage.store([one])
    assert one.weights[0].tensor.data_ptr() == address
    storage.close()


def test_weights_with_gaps_are_left_in_plain_memory() -> None:
    gaps = torch.randn(4, 6)[:, ::2]
    one = Unit("a", [nn.Parameter(gaps, requires_grad=False)])
    storage = Storage(10**6, None, pin=lambda arena: pytest.fail("page-locked"))
    storage.store([one])
    assert one.weights[0].tensor.stride() == gaps.stride()
    storage.close()
    assert torch.equal(one.weights[0].tensor, gaps)


def test_closing_gives_memory_back_and_lets_the_pages_go(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append("lock") or 0,  # pyright: ignore
        cudaHostUnregister=lambda address: calls.append("unlock"),  # pyright: ignore
    )
    monkeypatch.setattr(arenas, "_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    one = unit("a", *LAYOUTS)
    kept = [weight.tensor.clone() for weight in one.weights]
    storage = Storage(10**6, None)
    storage.store([one])
    assert calls == ["lock"]
    buffer = one.arena.buffer if one.arena else None
    assert buffer is not None
    storage.close()
    storage.close()
    assert calls == ["lock", "wait", "unlock"]
    for weight, before in zip(one.weights, kept, strict=True):
        assert torch.equal(weight.tensor, before)
        assert weight.tensor.stride() == before.stride()
        assert weight.tensor.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()


def test_a_driver_that_does_not_page_lock_is_an_error_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)  # pyright: ignore
    monkeypatch.setattr(arenas, "_runtime", lambda: runtime)
    one, storage = unit("a", torch.randn(4)), Storage(10**6, None)
    with pytest.raises(HastenError, match=r"256 bytes \(CUDA error 2\); allow less .* or none with pinned='0'"):
        storage.store([one])
    storage.close()
    assert storage.pinned == 0


def test_files(tmp_path: Path) -> None:
    one, empty = unit("a", *LAYOUTS), unit("b")
    kept = [weight.tensor.clone() for weight in one.weights]
    storage = Storage(10**6, tmp_path, pin=lambda arena: pytest.fail("page-locked"))
    storage.store([one, empty])
    [file] = tmp_path.rglob("*.safetensors")
    assert storage.on_disk == size_in_arena(LAYOUTS) <= file.stat().st_size
    assert all(torch.equal(w.tensor, before) for w, before in zip(one.weights, kept, strict=True))
    storage.close()
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(w.tensor, before) for w, before in zip(one.weights, kept, strict=True))


def test_folders(tmp_path: Path) -> None:
    assert folder_problem(str(tmp_path), 1) is None
    assert "does not exist" in (folder_problem(str(tmp_path / "x"), 1) or "")
    assert "GB free, and the weights take" in (folder_problem(str(tmp_path), 10**18) or "")


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("512MiB", 2**29), (" 1.5 gb ", 15 * 10**8), ("17", 17), ("17B", 17), ("0", 0), ("2k", None)],
)
def test_amounts(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(InvalidSetting, match="write it like '8GB'"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1GB", "GB", "1e9", "8 GiBs", "nan", "8GB8"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(InvalidSetting, match="no amount of memory"):
        parse_bytes(text)


def test_amounts_in_words() -> None:
    assert [in_words(n) for n in (17, 1200, 512 * 10**6, 23_800_000_000)] == ["17 bytes", "1.2 kB", "512 MB", "23.8 GB"]
