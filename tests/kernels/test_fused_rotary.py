"""Norm and rotation of queries and keys, and joining of streams, in one pass."""

from __future__ import annotations

import torch

from hasten.kernels import gated, rotary
from hasten.kernels.coded import Coded, Coding
from hasten.kernels.gated import activate
from hasten.kernels.rotary import HeadNorm, Heads, prepare
from tests.kernels.fused_cases import values

HEADS, SIZE = 2, 8


def stream(tokens: int, seed: int = 0) -> tuple[Heads, torch.Tensor]:
    """Heads of one stream, and their rotation as complex numbers."""
    query, key, value = (values(2, tokens, HEADS, SIZE, seed=seed + n) for n in range(3))
    angles = values(1, tokens, SIZE // 2, seed=seed)
    waves = torch.polar(torch.ones_like(angles), angles)
    return Heads(query, key, value, values(SIZE), values(SIZE, seed=1), (waves.real, waves.imag)), waves


def test_it_is_the_norm_and_the_complex_rotation() -> None:
    one, waves = stream(5)
    query, key, value = prepare([one], HeadNorm(1e-6))
    for found, given, weight in ((query, one.query, one.query_weight), (key, one.key, one.key_weight)):
        normed = torch.nn.functional.rms_norm(given, (SIZE,), weight, 1e-6)
        turned = torch.view_as_complex(normed.unflatten(-1, (-1, 2))) * waves[:, :, None]
        assert torch.allclose(found, torch.view_as_real(turned).flatten(-2), atol=1e-6)
    assert value is one.value


def test_it_is_the_rotation_of_diffusers() -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    one, waves = stream(5)
    both = tuple(part.repeat_interleave(2, -1)[0] for part in (waves.real, waves.imag))
    plain = Heads(one.query, one.key, one.value, rotation=one.rotation)
    query, _, _ = prepare([plain], None)
    assert torch.allclose(query, apply_rotary_emb(one.query, both, sequence_dim=1), atol=1e-6)  # pyright: ignore


def test_streams_are_joined_in_order() -> None:
    (one, _), (other, _) = stream(3), stream(4, seed=5)
    apart = [prepare([part], HeadNorm(1e-6)) for part in (one, other)]
    for found, *parts in zip(prepare([one, other], HeadNorm(1e-6)), *apart, strict=True):
        assert torch.equal(found, torch.cat(parts, 1))


def test_norm_over_all_heads() -> None:
    one, _ = stream(5)
    weight = values(HEADS * SIZE)
    query, _, _ = prepare([Heads(one.query, one.key, one.value, weight, weight)], HeadNorm(1e-6, across=True))
    wanted = torch.nn.functional.rms_norm(one.query.flatten(2), (HEADS * SIZE,), weight, 1e-6)
    assert torch.allclose(query.flatten(2), wanted, atol=1e-6)


def test_activations() -> None:
    x, other = values(2, 3, 32), values(2, 3, 32, seed=1)
    for kind, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        found = activate(x, kind)  # pyright: ignore[reportArgumentType]
        assert torch.equal(found, torch.nn.functional.gelu(x, approximate=approximate))  # pyright: ignore
    assert torch.equal(activate(x, "swiglu", other), torch.nn.functional.silu(x) * other)  # pyright: ignore
    coded = activate(x, "gelu_tanh", coding=Coding("int8"))
    assert isinstance(coded, Coded)
    assert coded.codes.dtype == torch.int8
    assert torch.allclose(coded.values(), torch.nn.functional.gelu(x, approximate="tanh"), atol=0.02)


def test_operators_keep_their_contracts() -> None:
    (one, _), (other, _) = stream(3), stream(4, seed=5)
    checks = ("test_schema", "test_faketensor")
    for second in (None, other):
        given = (*rotary._flat(one), *rotary._flat(second), True, 1e-6, False)
        torch.library.opcheck(rotary._operator, given, test_utils=checks)
    x = values(2, 3, 32)
    for coding in ("", "int8", "float8"):
        torch.library.opcheck(gated._operator, (x, x.clone(), None, "swiglu", coding, 1), test_utils=checks)
