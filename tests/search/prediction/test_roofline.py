"""Rooflines: known small cases, and the figures that an H200 showed."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from hasten.core.workload import Workload
from hasten.search.prediction.calls import calls
from hasten.search.prediction.devices import find_device
from hasten.search.prediction.model import planned_model
from hasten.search.prediction.roofline import _crossing, _occupied, duration
from hasten.search.prediction.trace import Kind, Operation, Trace, trace
from tests.search.prediction.stand_ins import DEVICE


def operation(kind: Kind, reads: dict[int, int], writes: dict[int, int], flops: int = 0) -> Operation:
    return Operation(kind, kind, torch.float32, flops, tuple(reads.items()), tuple(writes.items()), inside=True)


def test_a_kernel_is_bound_by_arithmetic_or_by_memory() -> None:
    device = dataclasses.replace(DEVICE, launch_seconds=0.0, view_seconds=0.0, module_seconds=0.0)
    heavy = Trace([operation("product", {1: 10}, {2: 10}, flops=10**12)])
    light = Trace([operation("product", {1: 10**11}, {2: 0}, flops=10)])
    assert duration(heavy, device).seconds == pytest.approx(1.0)
    assert duration(light, device).seconds == pytest.approx(1.0)


def test_the_host_hides_behind_the_device_or_the_other_way_round() -> None:
    found = Trace([operation("pass", {1: 1000}, {2: 1000})] * 100)
    slow = dataclasses.replace(DEVICE, launch_seconds=1e-3)
    assert duration(found, slow).seconds == pytest.approx(0.1)
    assert duration(found, slow, replayed=True).seconds == pytest.approx(100 * 2000 / 1e11)
    together = dataclasses.replace(slow, overlaps=False)
    assert duration(found, together).seconds == pytest.approx(0.1 + 100 * 2000 / 1e11)


def test_fused_passes_move_only_what_crosses_to_products() -> None:
    chain = [
        operation("pass", {1: 100}, {2: 100}),
        operation("pass", {2: 100}, {3: 100}),  # 2 stays in registers
        operation("product", {3: 100}, {4: 100}),
        operation("pass", {4: 100, 1: 100}, {5: 100}),  # of another depth: 1 is read again
        operation("product", {5: 100}, {6: 100}),
    ]
    moved, count = _crossing(chain)
    assert (moved, count) == (100 + 100 + 200 + 100, 2)


def test_compiling_never_predicts_more_work() -> None:
    found = flux()
    device = find_device("h200")
    eager, blocks, whole = (duration(found, device, kind).device for kind in ("", "blocks", "whole"))
    assert whole <= blocks < eager


@pytest.mark.parametrize(
    ("shape", "least", "most"),
    [((1, 4608, 12288, 3072), 0.9, 1.0), ((1, 1, 18432, 3072), 0.0, 0.05), ((1, 64, 64, 64), 0.0, 0.1)],
)
def test_small_products_leave_processors_idle(shape: tuple[int, int, int, int], least: float, most: float) -> None:
    assert least <= _occupied(shape, 132) <= most


@cache
def flux() -> Trace:
    return denoising("FLUX.1-dev")


@cache
def denoising(name: str) -> Trace:
    model = planned_model(name)
    call = next(call for call in calls(model, model.workload) if call.part == model.target.denoisers[0].name)
    return trace(call.run, call.module, model.target.denoisers[0].spec.repeated_blocks)


def test_work_of_flux_is_what_was_counted() -> None:
    attention = sum(item.flops for item in flux().operations if item.kind == "attention")
    assert attention / 1e12 == pytest.approx(14.9, abs=0.05)
    assert (flux().flops - attention) / 1e12 == pytest.approx(59.5, abs=0.05)


@pytest.mark.parametrize(
    ("name", "compiled", "measured"),
    [
        ("FLUX.1-dev", "", 0.173),
        ("FLUX.1-dev", "blocks", 0.132),
        ("Z-Image-Turbo", "", 0.146),
        ("Z-Image-Turbo", "blocks", 0.100),
        ("stable-diffusion-xl-base-1.0", "", 0.072),
        ("stable-diffusion-xl-base-1.0", "whole", 0.0378),
    ],
)
def test_steps_are_as_long_as_measured_on_an_h200(name: str, compiled: str, measured: float) -> None:
    """Times of one H200 with PyTorch 2.11 and diffusers 0.42.1, at 1024 x 1024."""
    assert duration(denoising(name), find_device("h200"), compiled).seconds == pytest.approx(measured, rel=0.1)


def test_guidance_doubles_the_batch_or_the_calls() -> None:
    model = planned_model("Z-Image")
    part = {call.part: call for call in calls(model, Workload(width=256, height=256, guidance=0.0))}
    both = {call.part: call for call in calls(model, Workload(width=256, height=256, guidance=4.0))}
    once, twice = (trace(found["transformer"].run, found["transformer"].module).flops for found in (part, both))
    assert twice == pytest.approx(2 * once, rel=0.01)
    assert (part["text_encoder"].times, both["text_encoder"].times) == (1, 2)
    model = planned_model("Qwen-Image")
    small = {call.part: call.times for call in calls(model, Workload(width=256, height=256, guidance=4.0))}
    assert small["transformer"] == 2
