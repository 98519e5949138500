"""GPU kernels: on the CPU through stand-ins at their lowest level, on a GPU for real."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.attention import (
    BlockDiagonal,
    EightBitAttention,
    LocalFromBottomRight,
    LowerTriangular,
    LowerTriangularFromBottomRight,
    attend,
)
from hasten.attention.bias import Bias, materialize
from hasten.attention.call import AttentionCall
from hasten.attention.kernels import KERNELS, LOSSLESS, LOSSY, builtin, float8, sage_attention
from hasten.attention.kernels.flash_attention import FLASH2, FLASH3, FLASH4
from hasten.attention.kernels.float8 import reference_codes
from hasten.attention.kernels.reduction import reduced
from hasten.attention.kernels.tools import padded
from hasten.attention.rows import reference, reference_error
from hasten.compilation import CompileBlocks, FusedBlocks
from hasten.core.errors import Refused
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from hasten.kernels.coded_heads import code_heads
from hasten.kernels.rotary import HeadNorm, Heads, prepare
from hasten.kernels.serving import launches
from tests.attention.fakes import FlashPackage, dense, expected, provide, varlen, window
from tests.contract.rigs import moved

CUDA = torch.device("cuda")
CASES: dict[str, tuple[Bias | None, int, int]] = {
    "none": (None, 7, 11),
    "top": (LowerTriangular(), 7, 7),
    "top wide": (LowerTriangular(), 7, 11),
    "top tall": (LowerTriangular(), 11, 7),
    "bottom wide": (LowerTriangularFromBottomRight(), 7, 11),
    "bottom tall": (LowerTriangularFromBottomRight(), 11, 7),
    "local": (LocalFromBottomRight(2, 1), 9, 9),
    "local backwards": (LocalFromBottomRight(3, 0), 9, 12),
    "local tall": (LocalFromBottomRight(2, 1), 12, 7),
    "blocks": (BlockDiagonal([3, 5, 1], [2, 6, 3]), 9, 11),
}


def tensors(
    queries: int, keys: int, *, heads: int = 4, key_heads: int = 4, size: int = 12, dtype: Any = torch.float32,
    device: str = "cpu",
) -> list[torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(queries * 31 + keys)
    shapes = ((2, heads, queries, size), *[(2, key_heads, keys, size)] * 2)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm(), (found.double() - wanted).abs().max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "package", "version"), [("flash2", FLASH2, 2), ("flash3", FLASH3, 3),
                                                          ("flash4", FLASH4, 4)])  # fmt: skip
def test_flash_packages_get_every_description_without_a_matrix(
    name: str, package: Any, version: int, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = FlashPackage(version)
    provide(monkeypatch, package.modules[0], stand_in)
    bias, queries, keys = CASES[case]
    q, k, v = tensors(queries, keys, key_heads=2)
    close(reduced(KERNELS[name].run, True)(q, k, v, bias, 0.0, None), expected(q, k, v, bias))
    assert stand_in.seen[0][0] == ("varlen" if case == "blocks" else "dense")


def test_flash2_passes_dropout_and_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = FlashPackage(2)
    provide(monkeypatch, "flash_attn", stand_in)
    q, k, v = tensors(5, 5)
    close(KERNELS["flash2"].run(q, k, v, None, 0.25, 0.4), dense(q, k, v, None, 0.4))
    assert stand_in.seen[0][1]["dropout_p"] == 0.25


@pytest.mark.parametrize("size", [12, 16])
@pytest.mark.parametrize("case", CASES)
def test_float8_flash_gets_numbers_and_scales_that_belong_together(
    case: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = FlashPackage(3)
    provide(monkeypatch, "fa3_fwd_interface", stand_in)
    bias, queries, keys = CASES[case]
    q, k, v = tensors(queries, keys, heads=4, key_heads=2, size=size)
    q[0] *= 40  # a scale that were shared would lose the other sample
    v[:, 1] *= 1e-4
    exact = expected(q, k, v, bias)
    found = reduced(KERNELS["flash3_float8"].run, True)(q, k, v, bias, 0.0, None)
    assert stand_in.seen[0][1]["dtype"] == torch.float8_e4m3fn
    assert stand_in.seen[0][1]["q_descale"].shape == (6 if case == "blocks" else 2, 2)
    for sample in range(2):
        for group in (slice(0, 2), slice(2, 4)):
            close(found[sample, group], exact[sample, group], 0.3 if sample == 0 else 0.08)


def test_rounding_to_float8_uses_the_whole_range() -> None:
    part = torch.randn(2, 6, 5, 8) * torch.tensor([1e-6, 1.0, 3e4]).repeat_interleave(2)[None, :, None, None]
    values, scale = float8.quantized(part, 3)
    assert values.float().unflatten(1, (3, 2)).abs().amax((2, 3, 4)).eq(448).all()
    assert scale.shape == (2, 3)
    assert scale.dtype == torch.float32
    assert ((float8.rounded(part, 3) - part).norm(dim=(2, 3)) < 0.04 * part.norm(dim=(2, 3))).all()
    assert float8.rounded(torch.zeros(1, 1, 2, 8), 1).eq(0).all()


@pytest.mark.parametrize("case", CASES)
def test_the_float8_reference_is_near_the_exact_result(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "_ROWS", 4)
    bias, queries, keys = CASES[case]
    q, k, v = tensors(queries, keys, key_heads=2, size=16)
    found, exact = KERNELS["float8_reference"](q, k, v, bias), expected(q, k, v, bias)
    close(found, exact, 0.08)
    assert (found - exact).norm() > 1e-3 * exact.norm(), "nothing was rounded"


@settings(max_examples=200, deadline=None)
@given(queries=st.integers(1, 9), keys=st.integers(1, 9), left=st.integers(0, 9), right=st.integers(0, 9))
def test_no_kernel_meets_a_query_that_sees_nothing(queries: int, keys: int, left: int, right: int) -> None:
    """There softmax divides by zero, and kernels differ in what they make of it."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Bias | None, *_: Any) -> torch.Tensor:
        if bias is not None and not isinstance(bias, torch.Tensor):
            assert materialize(bias, q.shape[2], k.shape[2], q.device).any(1).all()
            assert q.shape[2] <= k.shape[2] or isinstance(bias, LocalFromBottomRight)
        return expected(q, k, v, bias)

    q, k, v = tensors(queries, keys)
    for bias in (LowerTriangular(), LowerTriangularFromBottomRight(), LocalFromBottomRight(left, right)):
        close(reduced(run, True)(q, k, v, bias, 0.0, None), expected(q, k, v, bias))


class Operators:
    """PyTorch's own operators, as their sources describe them."""

    def flash(self, q: Any, k: Any, v: Any, starts: Any, key_starts: Any, longest: int, longest_key: int,
              dropout: float, causal: bool, debug: bool, *, scale: float | None = None,
              window_size_left: int = -1, window_size_right: int = -1) -> Any:  # fmt: skip
        assert q.shape[-1] % 8 == 0
        if starts is not None:
            return (varlen(q, k, v, starts, key_starts, scale),)
        assert (longest, longest_key) == (q.shape[1], k.shape[1])
        seen = window(q.shape[1], k.shape[1], window_size_left, window_size_right, causal)
        found = dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, scale)
        return (found.transpose(1, 2),)

    def efficient(self, q: Any, k: Any, v: Any, bias: Any, starts: Any, key_starts: Any, longest: Any,
                  longest_key: Any, dropout: float, kind: int, trained: bool, *, scale: float | None = None,
                  window_size: int | None = None) -> Any:  # fmt: skip
        assert q.shape[2] == k.shape[2], "as many key heads as query heads"
        assert q.shape[-1] % 8 == 0
        if starts is not None:
            assert kind == 0
            assert len(q) == 1
            return (varlen(q[0], k[0], v[0], starts, key_starts, scale)[None],)
        assert kind == 2
        seen = window(q.shape[1], k.shape[1], -1 if window_size is None else window_size - 1, -1, True)
        found = dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, scale)
        return (found.transpose(1, 2),)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[0] and "top" not in name])
@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_operators_of_pytorch_get_descriptions(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, f"_{name}_attention_forward", getattr(Operators(), name))
    bias, queries, keys = CASES[case]
    q, k, v = tensors(queries, keys)
    if name == "efficient" and isinstance(bias, LocalFromBottomRight) and bias.window_right:
        pytest.skip("goes through a matrix")
    run = padded(getattr(builtin, f"_{name}_operator"), 8)
    if "tall" in case and not isinstance(bias, LocalFromBottomRight):
        pytest.skip("comes down to a square triangle")
    close(reduced(run, True)(q, k, v, bias, 0.0, None), expected(q, k, v, bias))


def test_a_failure_of_pytorch_says_its_reasons() -> None:
    q, k, v = tensors(5, 5)
    with pytest.raises(Refused, match="PyTorch's FLASH_ATTENTION kernel does not take attention on 2x4x5x12, 2x4x5x12"):
        builtin.flash(q, k, v[..., :4], None, 0.0, None)


class Sage:
    """SageAttention: version 1 changes the keys in place; each has its own head sizes."""

    def __init__(self, version: str) -> None:
        self.first = version.startswith("1.")

    def sageattn(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND",
        is_causal: bool = False, sm_scale: float | None = None, smooth_k: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        assert tensor_layout == "HND"
        assert q.shape[-1] in ((64, 96, 128) if self.first else (64, 128))
        assert q.shape[2] == k.shape[2] or not is_causal
        if smooth_k and self.first:
            k -= k.mean(dim=2, keepdim=True)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        return dense(q, k, v, seen.tril() if is_causal else seen, sm_scale).to(q.dtype)


@pytest.mark.parametrize("version", ["1.0.6", "2.2.0"])
@pytest.mark.parametrize("size", [40, 64, 96, 128])
def test_sage_leaves_the_keys_alone(version: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, "sageattention", Sage(version))
    monkeypatch.setattr(sage_attention, "installed", lambda name: version)  # pyright: ignore
    for bias, keys in ((None, 13), (LowerTriangular(), 9)):
        q, k, v = tensors(9, keys, size=size)
        kept = k.clone()
        close(KERNELS["sage"].run(q, k, v, bias, 0.0, None), expected(q, kept, v, bias))
        assert torch.equal(k, kept)


def call(**changed: Any) -> AttentionCall:
    sizes = {"batch": 1, "heads": 4, "key_heads": 4, "queries": 8, "keys": 8, "head_size": 64, "value_size": 64}
    facts: dict[str, Any] = {"device": CUDA, "dtype": torch.bfloat16, **sizes, **changed}
    return AttentionCall(**facts)


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mask": ("flash3", {"bias": "mask"}, "the flash3 kernel takes no mask, and attention of 8 tokens"),
    "head": ("flash", {"head_size": 512, "value_size": 512}, "the flash kernel takes head sizes up to 256, not 512"),
    "value": ("flash2", {"value_size": 32}, "the flash2 kernel needs values of the queries' size 64, not 32"),
    "dropout": ("cudnn", {"dropout": True}, "the cudnn kernel has no dropout"),
    "gradients": ("sage", {"gradients": True}, "the sage kernel computes no gradients"),
    "local": ("sage", {"bias": "LocalFromBottomRight"}, "the sage kernel takes no LocalFromBottomRight of 8 queries"),
    "heads": ("flash", {"key_heads": 3}, "4 query heads cannot share 3 key heads evenly"),
}


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_kernel_lacks_is_named(case: str) -> None:
    name, changed, sentence = REFUSED[case]
    assert sentence in next(KERNELS[name].unmet(call(**changed)))


def test_what_the_released_wheel_of_flash_attention_3_is_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    half, local = call(dtype=torch.float16), call(bias="LocalFromBottomRight")
    provide(monkeypatch, "flash_attn_interface", FlashPackage(3))
    lacks, lacks8 = KERNELS["flash3"].lacks, KERNELS["flash3_float8"].lacks
    assert lacks
    assert lacks8
    assert lacks(half) is lacks(local) is None
    provide(monkeypatch, "fa3_fwd_interface", FlashPackage(3))
    assert lacks(half) == "the wheel fa3-fwd is built without float16; use bfloat16 or another kernel"
    assert lacks(local) == lacks8(local) == "the wheel fa3-fwd is built without windows; use flash2 or flex"
    assert lacks(call()) is lacks8(half) is None


def test_sage_1_needs_whole_blocks_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = KERNELS["sage"].lacks
    assert lacks
    monkeypatch.setattr(sage_attention, "installed", lambda name: "1.0.6")  # pyright: ignore
    assert lacks(call(keys=4608)) is None
    assert lacks(call(keys=77)) == "SageAttention 1 takes multiples of 64 keys, not 77; version 2 takes any"
    assert "takes no BlockDiagonal" in str(lacks(call(keys=128, bias="BlockDiagonal")))
    monkeypatch.setattr(sage_attention, "installed", lambda name: "2.2.0")  # pyright: ignore
    assert lacks(call(keys=77)) is None


def test_another_generation_of_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    sentence = "the flash3 kernel needs a GPU of compute capability 9.x, not 8.x"
    assert KERNELS["flash3"].problem(CUDA, torch.bfloat16) == sentence


@pytest.mark.usefixtures("_hopper")
def test_packages_that_are_missing_old_or_broken_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = KERNELS["flash2"]
    found = entry.obstacle(CUDA, torch.bfloat16)
    assert found
    assert (found.status, found.sentence) == (
        "missing",
        "the flash2 kernel needs flash-attn; install it: pip install flash-attn --no-build-isolation",
    )
    provide(monkeypatch, "flash_attn", object())
    found = entry.obstacle(CUDA, torch.bfloat16)
    assert found
    assert found.status == "too old"
    provide(monkeypatch, "flash_attn", FlashPackage(2))
    assert entry.obstacle(CUDA, torch.bfloat16) is None
    provide(monkeypatch, "flash_attn", object())
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    found = entry.obstacle(CUDA, torch.bfloat16)
    assert found
    assert found.status == "broken"
    assert found.sentence.startswith("flash-attn  does not load: ModuleNotFoundError")


def test_the_error_is_measured_against_math() -> None:
    q, k, v = tensors(200, 90, key_heads=2)
    bias = LocalFromBottomRight(50, 3)
    found = KERNELS["math"](q, k, v, bias)
    assert reference_error(q, k, v, bias, None, found) < 1e-6
    assert reference_error(q, k, v, bias, None, found * 1.1) == pytest.approx(0.1, rel=1e-3)
    found[1, 3, 150, 2] = torch.nan
    assert reference_error(q, k, v, bias, None, found) != reference_error(q, k, v, bias, None, found)
    close(reference(q, k, v, bias, None), expected(q, k, v, bias))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_on_a_gpu(name: str, case: str, size: int, dtype: torch.dtype) -> None:
    bias, queries, keys = CASES[case]
    if isinstance(bias, BlockDiagonal):
        bias = BlockDiagonal([n * 20 for n in bias.lengths], [n * 20 for n in bias.key_lengths])
    queries, keys = (queries * 20, keys * 20) if isinstance(bias, BlockDiagonal) else (queries * 20 + 1, keys * 20 + 1)
    q, k, v = tensors(queries, keys, key_heads=2, size=size, dtype=dtype, device="cuda")
    if problem := KERNELS[name].refuses(AttentionCall.of(q, k, v, bias, 0.0)):
        pytest.skip(problem)
    found = attend(*(part.transpose(1, 2) for part in (q, k, v)), bias, backend=name).transpose(1, 2)  # pyright: ignore
    tolerance = 0.12 if name in LOSSY else {torch.float32: 2e-3, torch.float16: 2e-3}.get(dtype, 1.2e-2)
    close(found, expected(q, k, v, bias).to(found.device), tolerance)


@needs_gpu
@pytest.mark.parametrize("name", [name for name in LOSSLESS if KERNELS[name].masks == "yes"])
def test_masks_on_a_gpu(name: str) -> None:
    q, k, v = tensors(77, 130, size=64, dtype=torch.bfloat16, device="cuda")
    if problem := KERNELS[name].problem(CUDA, torch.bfloat16):
        pytest.skip(problem)
    for shape in ((77, 130), (2, 1, 1, 130), (2, 4, 77, 130)):
        added = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for bias in (added, added > -0.5):
            close(KERNELS[name](q, k, v, bias), expected(q, k, v, bias), 1.5e-2)


@needs_gpu
def test_float8_flash_is_what_the_reference_says() -> None:
    entry = KERNELS["flash3_float8"]
    if problem := entry.problem(CUDA, torch.bfloat16):
        pytest.skip(problem)
    q, k, v = tensors(515, 515, size=128, dtype=torch.bfloat16, device="cuda")
    exact, plain = expected(q, k, v, None), KERNELS["float8_reference"](q, k, v)
    found = entry(q, k, v)
    assert (found.float() - plain.float()).norm() < 0.6 * (found.double() - exact).norm()


def streams(device: str, dtype: torch.dtype) -> list[Heads]:
    """Two streams of one FLUX block: parts of stacked projections, norms of their own, a rotation."""
    made: list[Heads] = []
    for tokens in (77, 515):
        whole = tensors(tokens, tokens, heads=12, size=128, dtype=dtype, device=device)[0].transpose(1, 2)
        angles = torch.rand(1, tokens, 64, device=device)
        weights = (torch.rand(128, device=device, dtype=dtype) + 0.5 for _ in range(2))
        made.append(Heads(*whole.split(4, 2), *weights, (angles.cos(), angles.sin())))  # pyright: ignore
    return made


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float8_flash_takes_codes_from_the_pass_before(dtype: torch.dtype) -> None:
    entry = KERNELS["flash3_float8"]
    if problem := entry.problem(CUDA, dtype):
        pytest.skip(problem)
    assert entry.codes
    with torch.no_grad():
        made, norm = streams("cuda", dtype), HeadNorm(1e-6)
        before = launches["code_heads"]
        coded = code_heads(made, norm)
        assert launches["code_heads"] == before + 1
        found, plain = entry.codes(coded, None), reference_codes(coded, None)
        q, k, v = (part.transpose(1, 2) for part in prepare(made, norm))
        exact = expected(q, k, v, None)
        afterwards = entry(q, k, v)
    assert (found.shape, found.dtype) == ((2, 592, 4, 128), dtype)
    errors = [float((one.double() - exact).norm()) for one in (found.transpose(1, 2), afterwards)]
    assert errors[0] < 1.1 * errors[1]
    assert (found.float() - plain.float()).norm() < 0.6 * errors[0]


@needs_gpu
def test_what_is_not_a_number_reaches_the_codes() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not convert to 8-bit floats")
    (one, _), norm = streams("cuda", torch.bfloat16), HeadNorm(1e-6)
    one.query[0, 3, 1, 2] = torch.nan
    one.value[1, 5, 2, 7] = torch.nan
    with torch.no_grad():
        query, key, value = code_heads([one], norm).values()
    assert query[0, 3, 1].isnan().all()
    assert query.isnan().sum() == 128
    assert value[1, 5, 2, 7].isnan()
    assert value[0].isfinite().all()
    assert key.isfinite().all()


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_on_a_gpu_hand_codes_to_attention(compiled: bool) -> None:
    if problem := KERNELS["flash3_float8"].problem(CUDA, torch.bfloat16):
        pytest.skip(problem)
    torch._dynamo.reset()
    spec = specs()["flux"]
    config = {**spec.tiny, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    model = spec.build(config).to("cuda", torch.bfloat16)
    given = moved(spec.example(config, InputSize(batch=2)), CUDA)
    given = {name: x.bfloat16() if x.is_floating_point() and name != "timestep" else x for name, x in given.items()}
    technique = EightBitAttention(kernel="flash3_float8", least_keys=0)
    recipe = technique | FusedBlocks()
    with torch.no_grad():
        plain = model(**given, return_dict=False)[0].float()
        with accelerate(model, recipe | CompileBlocks() if compiled else recipe) as session:
            found = model(**given, return_dict=False)[0].float()
            assert "6 of them took codes from the pass before; 0 stayed" in session.evidence()[technique].summary
    assert 0 < (found - plain).norm() < 0.05 * plain.norm()
