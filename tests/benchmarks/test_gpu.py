"""The parts of the single-GPU benchmark that need no GPU."""

from __future__ import annotations

import pytest
from benchmarks.gpu.kinds import by_kind
from benchmarks.gpu.step import OURS, mask

from hasten.core.expression import parse
from hasten.core.registry import techniques


@pytest.mark.parametrize(("steps", "full"), [(28, 10), (28, 7), (8, 2), (50, 17)])
def test_a_mask_computes_so_many_steps_the_first_and_the_last_among_them(steps: int, full: int) -> None:
    found = mask(steps, full)
    assert (len(found), found.count("1")) == (steps, full)
    assert found[0] == found[-1] == "1"


def test_kernels_are_told_apart_by_name() -> None:
    names = {"nvjet_tst_128x256": 1.0, "cudnn_generated_fort_native_sdpa": 2.0, "token_kernel": 4.0,
             "triton_poi_fused_add_3": 8.0, "Memcpy DtoD": 16.0}  # fmt: skip
    assert by_kind(names) == {"products": 1.0, "attention": 2.0, "fused": 4.0, "rest": 8.0, "copies": 16.0}


def test_recipes_can_be_read() -> None:
    known = [text for text in OURS.values() if "Float8Linear" in techniques() or "Float8Linear" not in text]
    assert known
    assert all(parse(text).techniques for text in known)
