"""The Triton kernels between products give what their references give: in the interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.fused_cases import all_cases, difference

HAVE_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.fused_cases"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found: dict[str, float] = json.loads(made.splitlines()[-1])
    assert len(found) > 40
    # The interpreter rounds 8-bit floats in its own way: what counts there is that few codes differ.
    limits = {name: 0.1 if "float8" in name else 1e-5 for name in found}
    assert not {name: value for name, value in found.items() if value > limits[name]}


@pytest.mark.skipif(not (HAVE_TRITON and torch.cuda.is_available()), reason="needs an NVIDIA GPU and Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    limit = 2e-5 if dtype == torch.float32 else 0.07
    with torch.no_grad():
        for name, made, wanted in all_cases(dtype, "cuda", small=False):
            assert difference(made, wanted) <= limit, name
