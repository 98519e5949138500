"""Workloads: what they accept, and plain words for what they do not."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.core.errors import InvalidSetting
from hasten.core.workload import Workload


def test_lists_become_tuples_so_that_a_workload_can_be_compared_and_hashed() -> None:
    made: Any = Workload
    workload = made(prompts=["a", "b"], seeds=[1, 2, 3])
    assert workload == Workload(prompts=("a", "b"), seeds=(1, 2, 3))
    assert hash(workload) == hash(Workload(prompts=("a", "b"), seeds=(1, 2, 3)))
    assert workload.images == 6
    assert workload.replace(seeds=(4,)).images == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": "a red fox"}, "prompts must be a list of texts, not 'a red fox'"),
        ({"prompts": 5}, "prompts must be a list of texts"),
        ({"prompts": ["a", 5]}, "prompts must be a list of texts"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, not 3"),
        ({"seeds": [1.5]}, "seeds must be a list of whole numbers"),
        ({"seeds": []}, "needs at least one seed"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": "x"}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"batch": -1}, "batch must be a whole number"),
        ({"width": 100}, "width must be a multiple of 8"),
        ({"height": 8}, "height must be a multiple of 8 and at least 16"),
        ({"height": "64"}, "height must be a multiple of 8"),
        ({"guidance": float("nan")}, "guidance must be a finite number, not nan"),
        ({"guidance": float("-inf")}, "guidance must be a finite number, not -inf"),
    ],
)
def test_what_is_no_workload(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        Workload(**values)
