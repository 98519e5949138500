"""The parts of a plan file: sampling grid, recorded outputs of a seed, plans, and what they are valid for."""

from __future__ import annotations

import base64
import binascii
import itertools
import math
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
    model_validator,
)

from hasten.cache.engine.rules import Rule, parse_rule
from hasten.core.errors import HastenError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
Solver = Literal["euler", "dpmpp_2m"]
Goal = Literal["reproduce", "converge"]
Fact = str | bool | int | float | None
Floats = NDArray[np.float64]


class PlanRecord(BaseModel):
    """Frozen, with known fields and finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Measured(PlanRecord):
    """What calibration may have measured: PSNR (dB) and seconds per image. Files leave out what it has not."""

    predicted_db: float | None = None
    measured_psnr: float | None = None
    measured_seconds: PositiveFloat | None = None

    @model_serializer(mode="wrap")
    def _short(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("measured_psnr", "measured_seconds", "chosen")
        return {name: value for name, value in whole(self).items() if value or name not in optional}


class Grid(PlanRecord):
    """Noise levels of a deterministic sampler, first to last, with the one reached after the last step.

    The network input at node k is alpha[k]*x0 + sigma[k]*noise. `prediction` is what the network emits and
    `solver` the update of the scheduler that runs on the grid.
    """

    alpha: tuple[NonNegativeFloat, ...]
    sigma: tuple[NonNegativeFloat, ...]
    prediction: Prediction = "flow_prediction"
    solver: Solver = "euler"

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if len(self.alpha) != len(self.sigma) or len(self.alpha) < 2:
            raise ValueError("alpha and sigma need one number per node, and at least two nodes")
        if any(alpha + sigma <= 0 for alpha, sigma in zip(self.alpha, self.sigma, strict=True)):
            raise ValueError("alpha and sigma cannot both be 0 at one node")
        if any(before <= after for before, after in itertools.pairwise(self.flow_time)):
            raise ValueError("sigma/(alpha+sigma) must fall from node to node")
        return self

    @property
    def steps(self) -> int:
        """Number of denoising steps, one fewer than nodes."""
        return len(self.alpha) - 1

    @property
    def flow_time(self) -> tuple[float, ...]:
        """s = sigma/(alpha+sigma) at every node, from 1 (noise) to 0 (clean)."""
        return tuple(sigma / (alpha + sigma) for alpha, sigma in zip(self.alpha, self.sigma, strict=True))


class SeedRecord(PlanRecord):
    """The outputs of one uncached run, up to a rotation that no error can notice.

    `factor` is the upper triangle, row by row, of F with F^T F = G, where G holds the inner products of
    (xh_0, u_0, ..., u_(T-1)): the state at the start and the velocity at every step (guided output). It is kept as
    little-endian float32 in base64. Rounding F costs an error vector 6e-8 of an output; rounding G would cost 2e-4.
    """

    seed: int
    prompt: str = ""
    factor: str

    @classmethod
    def of(cls, gram: Floats, *, seed: int, prompt: str = "") -> SeedRecord:
        """Keep the inner products `gram`, (T+1, T+1), symmetric and positive semi-definite up to rounding."""
        values, vectors = np.linalg.eigh((gram + gram.T) / 2)
        root = np.sqrt(np.clip(values, 0.0, None))[:, None] * vectors.T
        upper: Floats = np.asarray(np.linalg.qr(root, mode="r"))
        triangle = upper[np.triu_indices(len(gram))].astype("<f4")
        return cls(seed=seed, prompt=prompt, factor=base64.b64encode(triangle.tobytes()).decode("ascii"))

    @model_validator(mode="after")
    def _readable(self) -> Self:
        try:
            finite = bool(np.isfinite(self._numbers()).all())
        except (binascii.Error, ValueError) as error:
            raise ValueError("factor is not base64 of little-endian float32 numbers") from error
        if not finite:
            raise ValueError("factor holds numbers that are not finite")
        if self.size * (self.size + 1) // 2 != len(self._numbers()) or self.size < 2:
            raise ValueError("factor is no upper triangle: its length does not fit")
        return self

    @property
    def size(self) -> int:
        """Number of vectors: one more than the grid has steps."""
        return (math.isqrt(8 * len(self._numbers()) + 1) - 1) // 2

    def basis(self) -> Floats:
        """F, (T+1, T+1): its columns have the inner products of (xh_0, u_0, ..., u_(T-1))."""
        full = np.zeros((self.size, self.size))
        full[np.triu_indices(self.size)] = self._numbers()
        return full

    def _numbers(self) -> NDArray[np.float32]:
        return np.frombuffer(base64.b64decode(self.factor, validate=True), dtype="<f4")


class Plan(Measured):
    """Which steps are computed in full, and by which rule each gap behind them is filled.

    `compute` are step indices, 0 first; `rules` has one rule per full step, used until the next one or the end. In a
    file one text stands for as many equal ones. `predicted_db` is 20*log10(|final sample|/|error|), from calibration;
    null for no error at all. It is optimistic, because outputs leave the recorded path: it ranks plans and promises
    nothing. `chosen` marks the plan that is used for its number of full steps.
    """

    full_steps: PositiveInt
    compute: tuple[int, ...]
    rules: tuple[str, ...]
    origin: Literal["dp", "uniform", "swap"]
    chosen: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_for_all(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        rules, compute = given.get("rules"), given.get("compute")
        if isinstance(rules, str) and isinstance(compute, list | tuple):
            return {**given, "rules": (rules,) * len(cast("list[int]", compute))}
        return given

    @field_serializer("rules")
    def _as_one(self, rules: tuple[str, ...]) -> tuple[str, ...] | str:
        return rules[0] if len(set(rules)) == 1 else rules

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.compute) == len(self.rules) == self.full_steps:
            raise ValueError(f"compute and rules need one entry for each of the {self.full_steps} full steps")
        if self.compute[0] != 0 or any(a >= b for a, b in itertools.pairwise(self.compute)):
            raise ValueError("compute must rise from 0, the first step, which is always computed")
        try:
            for text in self.rules:
                parse_rule(text)
        except HastenError as error:
            raise ValueError(str(error)) from error
        return self

    def parsed_rules(self) -> tuple[Rule, ...]:
        """The rules as objects."""
        return tuple(map(parse_rule, self.rules))


class PlanKey(PlanRecord):
    """What a plan is valid for. `weights_sha256` identifies the denoiser's weights, sizes are in pixels."""

    model: str
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scheduler: str
    scheduler_config: dict[str, Fact] = {}
    steps: PositiveInt
    width: PositiveInt
    height: PositiveInt
    guidance: float | None = None
    recipe: str = ""
    goal: Goal = "reproduce"

    def differences(self, other: PlanKey) -> tuple[str, ...]:
        """One clause per field in which `other`, what runs now, differs: "steps is 50, calibrated with 28"."""
        return tuple(
            f"{name} is {_shown(getattr(other, name))}, calibrated with {_shown(getattr(self, name))}"
            for name in type(self).model_fields
            if getattr(self, name) != getattr(other, name)
        )


class SolverAnswer(Measured):
    """Fewer steps of `solver` at chosen noise levels.

    `nodes` are steps of the recorded grid, `flow_time` their s and the final one. `goal` says what the final state is
    compared with: the recorded sampler's ("reproduce") or the converged one ("converge").
    """

    solver: Solver
    goal: Goal
    origin: Literal["dp", "uniform"]
    steps: PositiveInt
    nodes: tuple[int, ...]
    flow_time: tuple[NonNegativeFloat, ...]

    @property
    def noise_to_signal(self) -> tuple[float, ...]:
        """sigma/alpha at the nodes, the scale of EDM and Karras schedulers (infinite where there is no signal)."""
        return tuple(s / (1 - s) if s < 1 else math.inf for s in self.flow_time)


def _shown(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else repr(value)
