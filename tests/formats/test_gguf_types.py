"""Every type of GGUF against the `gguf` package: values and bytes, bit for bit."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Ids

from hasten.core.errors import HastenError, UnknownName
from hasten.formats.gguf.quantizing import QUANTIZERS, fitting, quantize
from hasten.formats.gguf.types import BY_NAME, PLAIN, TYPES, type_of
from hasten.kernels.weight import QuantizedWeight

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0")
"""Types that the package quantizes to as well."""


def reference_values(name: str, data: Any) -> Any:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data.copy(), Ids[name])


def stored_bytes(name: str, rows: int = 48) -> Any:
    """Blocks of random bytes, of zeros and of ones; of TQ1_0 such as can occur."""
    random = np.random.default_rng(0)
    if name == "TQ1_0":
        return gguf.quants.quantize(random.standard_normal((rows, 256)).astype(np.float32), Ids.TQ1_0)
    data = random.integers(0, 256, (rows, BY_NAME[name].size), dtype=np.uint8)
    data[0], data[1] = 0, 255
    return data


def same_bits(one: Any, other: Any) -> bool:
    return bool(((one.view(np.uint32) == other.view(np.uint32)) | (np.isnan(one) & np.isnan(other))).all())


def weights(rows: int = 64, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def loss(values: torch.Tensor, weight: QuantizedWeight) -> float:
    """Relative root mean square."""
    return ((weight.dequantize() - values).norm() / values.norm()).item()


def test_ids_and_sizes_are_those_of_ggml() -> None:
    sizes: Any = gguf.constants.GGML_QUANT_SIZES
    for kind in TYPES:
        assert (Ids[kind.name].value, sizes[Ids[kind.name]]) == (kind.id, (kind.block, kind.size))
    for number, (name, dtype) in PLAIN.items():
        assert (Ids[name].value, sizes[Ids[name]]) == (number, (1, dtype.itemsize))


@pytest.mark.parametrize("name", BY_NAME)
def test_values_are_those_of_the_reference(name: str) -> None:
    data = stored_bytes(name)
    weight = BY_NAME[name].decode(
        torch.from_numpy(data).flatten(), (data.shape[0], BY_NAME[name].block), BY_NAME[name].block
    )
    assert same_bits(weight.dequantize().numpy(), reference_values(name, data))


@pytest.mark.parametrize("name", [kind.name for kind in TYPES if kind.write])
def test_bytes_come_back(name: str) -> None:
    kind, data = BY_NAME[name], torch.from_numpy(stored_bytes(name)).flatten()
    rows = 16  # Of several blocks each.
    weight = kind.decode(data, (rows, 3 * kind.block), 3 * kind.block)
    assert type_of(weight) is kind
    assert torch.equal(kind.encode(weight), data)


@pytest.mark.parametrize("name", EXACT)
def test_quantizers_give_the_bytes_of_the_reference(name: str) -> None:
    values = weights()
    values[0, :256] = 0
    values[1] *= 1e-4
    values[2] = values[2].abs()
    expected = gguf.quants.quantize(values.numpy(), Ids[name])
    assert np.array_equal(BY_NAME[name].encode(quantize(values, name)).numpy(), expected.flatten())


REFERENCE = {
    "Q2_K": (0.29695, 0.26840),
    "Q3_K": (0.15092, 0.14462),
    "Q4_K": (0.07147, 0.07087),
    "Q5_K": (0.03618, 0.03542),
    "Q6_K": (0.01776, 0.01733),
    "IQ4_NL": (0.07623, 0.07501),
    "IQ4_XS": (0.07681, 0.07569),
}
"""Errors of ggml's own C code on 256 x 1024 normal numbers (commit d99724f): plain, and with importances of 1."""


@pytest.mark.parametrize("name", REFERENCE)
def test_the_search_loses_less_than_ggml(name: str) -> None:
    assert loss(weights(128, 1024), quantize(weights(128, 1024), name)) < min(REFERENCE[name]) * 0.995


def test_q4_k_is_a_decibel_and_more_above_q4_0() -> None:
    values = weights(128, 1024)
    ratio = loss(values, quantize(values, "Q4_0")) / loss(values, quantize(values, "Q4_K"))
    assert 20 * np.log10(ratio) > 1.5


@pytest.mark.parametrize("name", REFERENCE)
def test_importance_moves_errors_to_inputs_that_matter_less(name: str) -> None:
    values = weights(128)
    importance = torch.exp(1.5 * torch.randn(512, generator=torch.Generator().manual_seed(1)))

    def weighted(weight: QuantizedWeight) -> float:
        return (importance * (weight.dequantize() - values).square()).sum().item()

    assert weighted(quantize(values, name, importance)) < 0.85 * weighted(quantize(values, name))


def test_equal_importances_are_none() -> None:
    one, other = quantize(weights(8), "Q4_K"), quantize(weights(8), "Q4_K", torch.full((512,), 3.0))
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_odd_blocks_stay_finite(name: str) -> None:
    values = weights(8)
    values[0] = 0
    values[1], values[2], values[3] = 1.5, -2.0, 1e-9
    values[4, 1:] = 0
    values[5] *= 1e4
    importance = torch.zeros(512)
    importance[7] = 1
    for given in (None, importance):
        found = quantize(values, name, given).dequantize()
        assert found.isfinite().all()
        assert not found[0].any()


@pytest.mark.parametrize(("number", "word"), [(float("nan"), "finite"), (float("inf"), "finite"), (3e9, "large")])
def test_numbers_that_cannot_be_stored_are_refused(number: float, word: str) -> None:
    values = weights(8)
    values[3, 3] = number
    with pytest.raises(HastenError, match=word):
        quantize(values, "Q4_K")


def test_wrong_importances_are_refused() -> None:
    for bad in (torch.ones(3), -torch.ones(512), torch.full((512,), float("nan"))):
        with pytest.raises(HastenError, match="512"):
            quantize(weights(8), "Q4_K", bad)


@pytest.mark.parametrize(
    ("kind", "shape", "expected", "columns"),
    [
        ("Q4_K", (64, 512), "Q4_K", 512),
        ("Q4_K", (128, 128), "Q4_K", 256),
        ("Q4_K", (8, 48), "Q5_0", 32),
        ("Q6_K", (4, 96), "Q8_0", 96),
        ("Q4_0", (64, 16, 3, 3), "Q4_0", 32),
        ("Q8_0", (64,), "Q8_0", 64),
    ],
)
def test_what_fits_which_weight(kind: str, shape: tuple[int, ...], expected: str, columns: int) -> None:
    found = fitting(kind, shape)
    assert found is not None
    assert (found[0].name, found[1]) == (expected, columns)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = quantize(values, kind)
    assert weight.shape == shape
    assert loss(values, weight) < 0.15
    assert (kind_of := type_of(weight)) is not None
    assert kind_of.name == expected


def test_a_grid_over_rows_holds_the_same_numbers() -> None:
    values = weights(16, 256)
    flat = quantize(values.reshape(32, 128), "Q4_K")
    assert torch.equal(flat.dequantize().flatten(), quantize(values, "Q4_K").dequantize().flatten())


def test_what_does_not_fit_or_exist_is_refused() -> None:
    assert fitting("Q4_K", (3, 5)) is None
    with pytest.raises(HastenError, match="whole blocks"):
        quantize(torch.randn(3, 5), "Q4_K")
    with pytest.raises(UnknownName, match="Did you mean Q4_K"):
        quantize(weights(8), "Q4_k_")


def test_codes_of_other_kinds_are_not_taken_for_those_of_a_type() -> None:
    weight = quantize(weights(8), "Q4_0")
    assert type_of(weight) is BY_NAME["Q4_0"]
    wide = weight.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    assert type_of(wide) is None
    nested = quantize(weights(8), "Q4_K")
    nested.scale.codes[0, 0] = 64
    assert type_of(nested) is None
