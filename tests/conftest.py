"""One thread a process: test processes run side by side, and threads that wait for a core cost far more."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
