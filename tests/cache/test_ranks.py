"""Ranks that share one picture decide alike, as one process with all its tokens would; other ranks do not meddle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cache.ranks import computed_steps

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("ranks"),  # set up once, not once in each process
]

TECHNIQUES = (
    "FirstBlockCache(threshold=0.08)",
    "FirstBlockCache(threshold=0.08, late=True)",
    "DBCache(front=2, warm_up=2, threshold=0.05, max_consecutive=4)",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[int]]]]:
    """What two ranks report, each with half of the tokens."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cache.ranks", rank, "2", str(store), *TECHNIQUES],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize("index", range(len(TECHNIQUES)), ids=TECHNIQUES)
def test_ranks_of_one_picture_decide_as_one_process_would(ranks: list[dict[str, list[list[int]]]], index: int) -> None:
    one, other = (rank["together"][index] for rank in ranks)
    assert one == other == computed_steps(TECHNIQUES[index], "both")


@pytest.mark.parametrize("index", range(len(TECHNIQUES)), ids=TECHNIQUES)
def test_ranks_with_pictures_of_their_own_decide_for_themselves(
    ranks: list[dict[str, list[list[int]]]], index: int
) -> None:
    one, other = (rank["alone"][index] for rank in ranks)
    assert one != other
    assert [one, other] == [computed_steps(TECHNIQUES[index], half) for half in ("0", "1")]
