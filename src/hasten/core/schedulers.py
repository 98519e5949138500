"""What is known about each scheduler of diffusers: its levels of noise, its solver, its randomness.

Known are schedulers that neither the user nor another library has changed, told by the name of the class that provides
their `step`, so that nothing need be imported; of everything else nothing is claimed. A scheduler is read by its
configuration and the tensors that `set_timesteps` left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from hasten.core.intercept import base_class
from hasten.core.noise import NoiseLevel, Prediction

Solver = Literal["euler", "dpmpp_2m", "unipc", "other"]
"""How a sampler combines outputs; dpmpp_2m is the two-step method of DPM-Solver++ (Lu et al. 2022)."""


@dataclass(frozen=True)
class Path:
    """A whole schedule: what is predicted, n+1 levels of the denoiser's input and n levels that the steps lead to."""

    prediction: Prediction
    levels: Sequence[NoiseLevel]
    reached: Sequence[NoiseLevel]


@dataclass(frozen=True)
class Kind:
    """How to read the schedulers of one class."""

    path: Callable[[Any], Path | None]
    noise: Callable[[Any, Mapping[str, Any]], bool]
    """Does `step` add noise, called with these arguments?"""
    solver: Callable[[Any], Solver] = lambda scheduler: "other"
    calls: Callable[[Any], int] = lambda scheduler: 1
    scaled: bool = False
    """Does it keep x0 + sigma*noise?"""
    whole: bool = False
    """Does it go astray when the first steps are left out?"""


def kind_of(scheduler: object) -> Kind | None:
    """What is known about schedulers of this object's class; None for changed and unknown ones."""
    ours = base_class(scheduler)
    for base in ours.__mro__:
        if base.__module__.startswith("diffusers.") and base.__name__ in _KINDS:
            same = (getattr(ours, name, None) is getattr(base, name, None) for name in _METHODS)
            return _KINDS[base.__name__] if all(same) else None
    return None


_METHODS = ("set_timesteps", "scale_model_input", "step", "convert_model_output")


def _setting(scheduler: Any, name: str) -> Any:
    return scheduler.config.get(name)


def _prediction(scheduler: Any, *choices: str) -> Prediction | None:
    name = _setting(scheduler, "prediction_type")
    name = "sample" if name == "original_sample" else name
    return cast(Prediction, name) if name in choices else None


_PLAIN = ("epsilon", "v_prediction", "sample")


def _flow_level(sigma: float) -> NoiseLevel:
    return NoiseLevel(1 - sigma, sigma)


def _scaled_level(sigma: float) -> NoiseLevel:
    """The level of (x0 + sigma*noise) / sqrt(1 + sigma**2)."""
    return NoiseLevel(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))


def _along(
    scheduler: Any, prediction: Prediction | None, sigmas: Sequence[float], level: Callable[[float], NoiseLevel]
) -> Path | None:
    levels = [level(sigma) for sigma in sigmas[: len(scheduler.timesteps) + 1]]
    return Path(prediction, levels, levels[1:]) if prediction else None


def _flow(scheduler: Any) -> Path | None:
    prediction = None if _setting(scheduler, "invert_sigmas") else "flow_prediction"
    return _along(scheduler, prediction, scheduler.sigmas.tolist(), _flow_level)


def _edm(scheduler: Any) -> Path | None:
    return _along(scheduler, _prediction(scheduler, *_PLAIN), scheduler.sigmas.tolist(), _scaled_level)


def _edm_midpoint(scheduler: Any) -> Path | None:
    """Every second call stands at the geometric mean of the levels around it."""
    between = scheduler.sigmas_interpol.tolist()
    sigmas = [between[at] if at % 2 else sigma for at, sigma in enumerate(scheduler.sigmas.tolist())]
    return _along(scheduler, _prediction(scheduler, *_PLAIN), sigmas, _scaled_level)


def _dpm_family(scheduler: Any) -> Path | None:
    """Their own sigma is sigma/alpha, or the flow time with `use_flow_sigmas`."""
    if _setting(scheduler, "use_flow_sigmas"):
        prediction = _prediction(scheduler, "flow_prediction", "epsilon", "sample")
        return _along(scheduler, prediction, scheduler.sigmas.tolist(), _flow_level)
    return _along(scheduler, _prediction(scheduler, *_PLAIN), scheduler.sigmas.tolist(), _scaled_level)


def _by_timestep(scheduler: Any, following: Sequence[int], final: float) -> Path | None:
    """A path along the training timesteps; `following` are those that the steps lead to, below 0 the final level."""
    prediction, table = _prediction(scheduler, *_PLAIN), scheduler.alphas_cumprod.tolist()

    def level(timestep: int) -> NoiseLevel:
        signal = table[timestep] if timestep >= 0 else final
        return NoiseLevel(math.sqrt(signal), math.sqrt(1 - signal))

    reached = [level(timestep) for timestep in following]
    levels = [*map(level, scheduler.timesteps.tolist()), *reached[-1:]]
    return Path(prediction, levels, reached) if prediction else None


def _stride(scheduler: Any) -> int:
    return _setting(scheduler, "num_train_timesteps") // scheduler.num_inference_steps


def _ddim(scheduler: Any) -> Path | None:
    if not scheduler.num_inference_steps:
        return None
    following = [timestep - _stride(scheduler) for timestep in scheduler.timesteps.tolist()]
    return _by_timestep(scheduler, following, float(scheduler.final_alpha_cumprod))


def _pndm(scheduler: Any) -> Path | None:
    following = list[int]()
    for count, timestep in enumerate(scheduler.timesteps.tolist()):
        runge_kutta = not _setting(scheduler, "skip_prk_steps") and count < len(scheduler.prk_timesteps)
        repeated = count % 2 == 1 if runge_kutta else count == 1
        stride = _stride(scheduler) // 2 if runge_kutta else _stride(scheduler)
        following.append(timestep if repeated else timestep - stride)
    return _by_timestep(scheduler, following, float(scheduler.final_alpha_cumprod))


def _ddpm(scheduler: Any) -> Path | None:
    return _by_timestep(scheduler, [*scheduler.timesteps.tolist()[1:], -1], 1.0)


def _tcd(scheduler: Any) -> Path | None:
    return _by_timestep(scheduler, [*scheduler.timesteps.tolist()[1:], 0], 1.0)


def _always(scheduler: Any, given: Mapping[str, Any]) -> bool:
    return True


def _never(scheduler: Any, given: Mapping[str, Any]) -> bool:
    return False


def _if_set(name: str, default: float) -> Callable[[Any, Mapping[str, Any]], bool]:
    """Noise is added when this argument of `step` is not 0."""
    return lambda scheduler, given: bool(given.get(name, default))


def _if_configured(scheduler: Any, given: Mapping[str, Any]) -> bool:
    return bool(_setting(scheduler, "stochastic_sampling"))


def _if_sde(scheduler: Any, given: Mapping[str, Any]) -> bool:
    return str(_setting(scheduler, "algorithm_type")).startswith("sde")


def _euler(scheduler: Any) -> Solver:
    limited = any(_setting(scheduler, name) for name in ("clip_sample", "thresholding", "stochastic_sampling"))
    return "other" if limited else "euler"


def _dpm(scheduler: Any) -> Solver:
    """The first-order method is DDIM."""
    algorithm, order = _setting(scheduler, "algorithm_type"), _setting(scheduler, "solver_order")
    if _setting(scheduler, "thresholding") or algorithm not in ("dpmsolver", "dpmsolver++"):
        return "other"
    midpoint = algorithm == "dpmsolver++" and order == 2 and _setting(scheduler, "solver_type") == "midpoint"
    return "euler" if order == 1 else "dpmpp_2m" if midpoint else "other"


def _single_step_dpm(scheduler: Any) -> Solver:
    return "euler" if _dpm(scheduler) == "euler" else "other"


def _unipc(scheduler: Any) -> Solver:
    return "other" if _setting(scheduler, "thresholding") or _setting(scheduler, "solver_p") else "unipc"


def _twice(scheduler: Any) -> int:
    return 2


def _four_times_at_first(scheduler: Any) -> int:
    return 1 if _setting(scheduler, "skip_prk_steps") else 4


_KINDS: dict[str, Kind] = {
    "FlowMatchEulerDiscreteScheduler": Kind(_flow, _if_configured, _euler),
    "FlowMatchHeunDiscreteScheduler": Kind(_flow, _if_set("s_churn", 0.0), calls=_twice),
    "DDIMScheduler": Kind(_ddim, _if_set("eta", 0.0), _euler),
    "DDIMParallelScheduler": Kind(_ddim, _if_set("eta", 0.0), _euler),
    "DDPMScheduler": Kind(_ddpm, _always),
    "LCMScheduler": Kind(_ddpm, _always),
    "TCDScheduler": Kind(_tcd, _if_set("eta", 0.3)),
    "PNDMScheduler": Kind(_pndm, _never, calls=_four_times_at_first, whole=True),
    "EulerDiscreteScheduler": Kind(_edm, _if_set("s_churn", 0.0), _euler, scaled=True),
    "EulerAncestralDiscreteScheduler": Kind(_edm, _always, scaled=True),
    "HeunDiscreteScheduler": Kind(_edm, _never, calls=_twice, scaled=True),
    "KDPM2DiscreteScheduler": Kind(_edm_midpoint, _never, calls=_twice, scaled=True),
    "LMSDiscreteScheduler": Kind(_edm, _never, scaled=True, whole=True),
    "DPMSolverMultistepScheduler": Kind(_dpm_family, _if_sde, _dpm),
    "DPMSolverSinglestepScheduler": Kind(_dpm_family, _if_sde, _single_step_dpm),
    "UniPCMultistepScheduler": Kind(_dpm_family, _never, _unipc),
    "DEISMultistepScheduler": Kind(_dpm_family, _never),
    "SASolverScheduler": Kind(_dpm_family, _always),
}
