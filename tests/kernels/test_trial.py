"""What `hasten doctor` says of the kernels of quantized products."""

from __future__ import annotations

import pytest
import torch

from hasten.core.diagnosis import Finding
from hasten.kernels import product, trial
from hasten.kernels.call import Kernel, Product
from hasten.quantize import diagnose

CPU = torch.device("cpu")


def examined(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> Finding:
    monkeypatch.setattr(trial, "kernels", lambda device: [kernel])
    return trial.examine(kernel.name, CPU, torch.bfloat16)


def test_a_sound_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(monkeypatch, product.REFERENCE)
    assert (found.status, found.detail) == ("usable", "72 kinds of products right, error at most 0 %")


def test_a_kernel_that_is_wrong_for_one_kind_of_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(given: Product) -> torch.Tensor:
        return product.reference(given) * (0.5 if given.weight.number.name == "table4" else 1)

    found = examined(monkeypatch, Kernel("halves", lambda given: given.activations == "none", halved))
    assert found.status == "broken"
    assert found.detail.startswith("wrong results (3 tokens, 4-bit table, activations none: off by 50 %")


def test_a_kernel_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined(monkeypatch, Kernel("idle", lambda given: False, product.reference)).status == "unfit"


def test_every_kernel_of_this_machine_is_tried() -> None:
    found = {finding.name: finding for finding in diagnose(CPU)}
    assert list(found) == [*(kernel.name for kernel in product.kernels(CPU)), "kernels in Triton"]
    assert {finding.status for finding in found.values()} <= {"usable", "unfit"}
    assert found["widened in the cache"].status == "usable"
