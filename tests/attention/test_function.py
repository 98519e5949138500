"""attend(): every back-end of this machine equals a dense float64 matrix, odd lengths and all descriptions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.attention import (
    BlockDiagonal,
    LocalFromBottomRight,
    LowerTriangular,
    LowerTriangularFromBottomRight,
    attend,
)
from hasten.attention.bias import Bias, Described, decoded, encoded, materialize
from hasten.attention.kernels import KERNELS, LOSSLESS
from hasten.core.errors import HastenError, Refused, UnknownName
from tests.attention.fakes import expected

BACKENDS = (*(name for name in LOSSLESS if "cpu" in KERNELS[name].devices), None)
sizes = st.integers(1, 19)


@st.composite
def descriptions(draw: Any) -> tuple[Described | None, int, int]:
    """A description with numbers of queries and keys that fit it."""
    kind = draw(st.sampled_from(["none", "top", "bottom", "local", "blocks"]))
    if kind == "blocks":
        blocks = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4))
        lengths, key_lengths = ([pair[i] for pair in blocks] for i in (0, 1))
        return BlockDiagonal(lengths, key_lengths), sum(lengths), sum(key_lengths)
    queries, keys = draw(sizes), draw(sizes)
    made = {"none": None, "top": LowerTriangular(), "bottom": LowerTriangularFromBottomRight(),
            "local": LocalFromBottomRight(draw(st.integers(0, 9)), draw(st.integers(0, 9)))}  # fmt: skip
    return made[kind], queries, keys


def tensors(
    queries: int, keys: int, *, heads: int = 2, key_heads: int = 2, size: int = 8, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 31 + keys)
    shapes = ((batch, queries, heads, size), *[(batch, keys, key_heads, size)] * 2)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # pyright: ignore


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Bias | None) -> torch.Tensor:
    return expected(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias).transpose(1, 2)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(described=descriptions(), grouped=st.booleans(), size=st.sampled_from([5, 8, 16]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_descriptions_equal_a_dense_matrix(
    backend: str | None, described: tuple[Described | None, int, int], grouped: bool, size: int
) -> None:
    bias, queries, keys = described
    q, k, v = tensors(queries, keys, heads=4, key_heads=2 if grouped else 4, size=size)
    close(attend(q, k, v, bias, backend=backend), dense(q, k, v, bias))


@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (4, 7, 9), (2, 1, 7, 9), (2, 4, 1, 9), (2, 4, 7, 9), (9,)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_are_added_or_say_what_is_seen(backend: str | None, shape: tuple[int, ...]) -> None:
    q, k, v = tensors(7, 9, heads=4, key_heads=4)
    added = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    seen = added > -0.5
    seen[..., 0] = True
    close(attend(q, k, v, added, backend=backend), dense(q, k, v, added))
    close(attend(q, k, v, seen, backend=backend), dense(q, k, v, seen))


@settings(max_examples=60, deadline=None)
@given(described=descriptions())
def test_meaning_is_that_of_xformers(described: tuple[Described | None, int, int]) -> None:
    oracle = pytest.importorskip("xformers.ops.fmha.attn_bias")
    from hasten.attention.kernels.xformers_operator import described as in_its_classes

    bias, queries, keys = described
    if bias is None:
        return
    theirs = in_its_classes(bias).materialize((queries, keys))
    assert isinstance(in_its_classes(bias), oracle.AttentionBias)
    assert torch.equal(theirs.exp().bool(), materialize(bias, queries, keys, torch.device("cpu")))


@given(described=descriptions())
def test_descriptions_survive_the_operator(described: tuple[Described | None, int, int]) -> None:
    assert decoded(*encoded(described[0])) == described[0]


def test_a_long_sequence_of_blocks_needs_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> torch.Tensor:
        raise AssertionError("a matrix was made")

    for kind in (BlockDiagonal, LowerTriangular):
        monkeypatch.setattr(kind, "seen", never)
    q, k, v = tensors(70, 70)
    for backend in ("flash", "math"):
        attend(q, k, v, BlockDiagonal([30, 33, 7]), backend=backend)
        for queries in (60, 65):
            attend(q[:, :queries], k, v, LowerTriangular(), backend=backend)
            attend(q, k[:, :queries], v[:, :queries], LowerTriangular(), backend=backend)


def test_dropout_scale_and_gradients() -> None:
    q, k, v = (part.requires_grad_() for part in tensors(9, 9))
    attend(q, k, v, LowerTriangular(), scale=0.3).square().sum().backward()
    copies = [part.detach().double().requires_grad_() for part in (q, k, v)]
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    scores = torch.einsum("bqhd,bkhd->bhqk", copies[0], copies[1]).mul(0.3).masked_fill(~seen, -torch.inf)
    torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), copies[2]).square().sum().backward()
    for part, copy in zip((q, k, v), copies, strict=True):
        torch.testing.assert_close(part.grad, copy.grad, atol=1e-5, rtol=1e-4, check_dtype=False)
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = torch.stack([attend(q, k, v, dropout=0.3) for _ in range(400)])
        assert not torch.equal(dropped[0], dropped[1])
        torch.testing.assert_close(dropped.mean(0), attend(q, k, v), atol=0.25, rtol=0.0)


@pytest.mark.parametrize("bias", [None, LowerTriangularFromBottomRight(), BlockDiagonal([4, 5]), "tensor"])
@pytest.mark.parametrize("backend", [None, "math", "auto"])
def test_it_compiles_whole(backend: str | None, bias: Bias | str | None) -> None:
    torch._dynamo.reset()
    given = torch.randn(9, 9) if isinstance(bias, str) else bias
    q, k, v = tensors(9, 9)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q * 1, k, v, given, backend=backend) + 1

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    close(compiled(q, k, v) - 1, dense(q, k, v, given))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dimensions": ({"q": torch.zeros(1, 2, 4)}, "attend takes tensors [batch, tokens, heads, head size], not q [1, 2"),
    "heads": ({"k": torch.zeros(1, 3, 2, 4)}, "k and v as many tokens and heads"),
    "type": ({"q": torch.zeros(1, 3, 1, 4).half()}, "must have one type"),
    "blocks": ({"bias": BlockDiagonal([1, 1])}, "BlockDiagonal describes 2 queries and 2 keys, but there are 3 and 3."),
    "tensor": ({"bias": torch.zeros(2, 3)}, "The bias has shape [2, 3]; it must broadcast to [batch, heads, 3, 3]."),
    "dropout": ({"dropout": 1.0}, "attend(dropout=1.0): must be at least 0 and less than 1."),
    "name": ({"backend": "flesh"}, "There is no attention kernel called 'flesh'. Did you mean flash"),
    "device": ({"backend": "flash3"}, "the flash3 kernel runs on cuda, not on cpu."),
    "flash": ({"backend": "flash", "dropout": 0.5}, "the flash kernel has no dropout."),
    "flex": ({"backend": "flex", "dropout": 0.5}, "the flex kernel has no dropout."),
    "uneven": ({"q": torch.zeros(1, 3, 3, 4), **dict.fromkeys("kv", torch.zeros(1, 3, 2, 4))}, "cannot share 2 key"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_served_is_refused_by_name(case: str) -> None:
    changed, sentence = BAD[case]
    arguments: dict[str, Any] = {**dict.fromkeys("qkv", torch.zeros(1, 3, 1, 4)), **changed}
    with pytest.raises((HastenError, Refused, UnknownName)) as caught:
        attend(**arguments)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("make", [lambda: LocalFromBottomRight(-1, 0), lambda: BlockDiagonal([]),
                                  lambda: BlockDiagonal([2, 0]), lambda: BlockDiagonal([1], [1, 2])])  # fmt: skip
def test_descriptions_without_meaning_are_refused(make: Any) -> None:
    with pytest.raises(HastenError):
        make()
