"""Running only the outer part of a U-Net: the site that U-Net caches share.

The stages are intercepted and their lists of layers are iterated lazily; nothing is replaced. Stages that a
shallow run leaves out hand on 0-dimensional placeholders, so that the U-Net's own code counts its skip
connections as usual and a ControlNet can add its residuals to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from hasten.cache.engine.site import Judge
from hasten.core.intercept import base_class
from hasten.core.patch import Patch
from hasten.core.target import Denoiser

DOWN_STAGES = frozenset(
    {
        "AttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
        "ResnetDownsampleBlock2D",
        "SimpleCrossAttnDownBlock2D",
    }
)
UP_STAGES = frozenset(
    {"AttnUpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D", "UpBlock2D"}
)
"""Stages whose loop pairs `resnets` with `attentions` and takes one skip connection per layer."""


@dataclass(frozen=True)
class Cut:
    """Where a U-Net is cut: stages nearer to the outside than `stage` run completely.

    Of the stage itself the first `layers` down layers run, and the last `layers + 1` up layers.
    """

    stage: int
    layers: int


def cuts(denoiser: Denoiser) -> list[Cut]:
    """All places to cut, from the outside in: one for each layer of the up stages."""
    ups = _Stages(denoiser).ups
    return [Cut(stage, layer) for stage, up in enumerate(ups) for layer in range(len(_layers(up)))]


def obstacles(denoiser: Denoiser) -> Iterator[str]:
    """Say what about this U-Net cannot be cut."""
    stages = _Stages(denoiser)
    known = ((stages.downs, DOWN_STAGES), (stages.ups, UP_STAGES))
    foreign = {base_class(s).__name__ for found, names in known for s in found if base_class(s).__name__ not in names}
    for name in sorted(foreign):
        yield f"stages of class {name} are not supported; supported are {', '.join(sorted(DOWN_STAGES | UP_STAGES))}."
    if not foreign and [len(_layers(d)) + 1 for d in stages.downs] != [len(_layers(u)) for u in stages.ups]:
        yield "each up stage of the U-Net must have one layer more than the down stage it is joined to."


class _Stages:
    """Down and up stages of a U-Net from the outside in, and the stage between them."""

    def __init__(self, denoiser: Denoiser) -> None:
        paths = denoiser.spec.unet
        assert paths is not None
        module = denoiser.module
        self.downs = list(cast(nn.ModuleList, module.get_submodule(paths.down)))
        self.ups = list(cast(nn.ModuleList, module.get_submodule(paths.up)))[::-1]
        self.mid = cast("nn.Module | None", getattr(module, paths.mid, None))


class DeepFeatureSite:
    """Runs a U-Net in full, keeping one deep feature, or only outside the cut; see `engine.site.Site`.

    A call that is to ask does so once the outer down layers have run. A T2I-Adapter adds to what every down stage
    puts out: such calls are computed and keep nothing.
    """

    afresh: tuple[str, ...] = ()

    def __init__(self, denoiser: Denoiser, cut: Cut) -> None:
        self._denoiser, self._stages, self._cut = denoiser, _Stages(denoiser), cut
        self._first_up = len(_layers(self._stages.ups[cut.stage])) - 1 - cut.layers
        self._keeping = self._reusing = self._served = False
        self._feature: torch.Tensor | None = None
        self._judge: Judge | None = None
        self._entered: torch.Tensor | None = None

    @property
    def kept(self) -> torch.Tensor | None:
        """The input of the first up layer outside the cut."""
        return self._feature

    @property
    def served(self) -> bool:
        """Did the latest call really start from the feature it was given?"""
        return self._served

    def keep(self) -> None:
        """Run in full and keep the deep feature."""
        self._keeping = True

    def reuse(self, value: torch.Tensor) -> None:
        """Run outside the cut only."""
        self._reusing, self._feature = True, value

    def ask(self, judge: Judge) -> None:
        """Decide when the outer down layers have run."""
        self._keeping, self._judge = True, judge

    def rest(self) -> None:
        """Forget the feature and leave calls alone."""
        self._keeping = self._reusing = self._served = False
        self._feature = self._judge = self._entered = None

    def run(self, call: Callable[..., Any], given: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
        """Make the call."""
        if _has_adapter(given):
            self.rest()
        return call(*args, **kwargs)

    def _decide(self, hidden: torch.Tensor) -> None:
        """Once a call, at the end of the outer down layers: reuse, or go on in full."""
        if self._judge is None:
            return
        judge, self._judge = self._judge, None
        before = self._entered if self._entered is not None and self._entered.shape == hidden.shape else None
        if (value := judge(hidden, before)) is not None:
            self._keeping, self._reusing, self._feature = False, True, value

    def install(self, patch: Patch) -> None:
        """Intercept the stages at and inside the cut, and the layer lists of the pair of stages that is cut."""
        stages, cut = self._stages, self._cut
        for down in stages.downs[cut.stage + (cut.layers > 0) :]:
            patch.around(down, self._skipped_down(down), "is left out on reused steps")
        for up in stages.ups[cut.stage + 1 :]:
            patch.around(up, self._passing, "is left out on reused steps")
        if stages.mid is not None:
            patch.around(stages.mid, self._passing, "is left out on reused steps")
        if cut.layers:
            self._install_down(stages.downs[cut.stage], patch)
        self._install_up(stages.ups[cut.stage], patch)
        self._deep = {id(part) for module in self._inside_the_cut() for part in module.modules()}
        patch.foretell(self._denoiser.module, self._will_run)

    def _will_run(self, module: nn.Module) -> bool | None:
        if id(module) not in self._deep:
            return True
        return None if self._judge is not None else not self._reusing

    def _inside_the_cut(self) -> Iterator[nn.Module]:
        """What a shallow run leaves out: deeper stages, and deeper layers of the pair of stages that is cut."""
        stages, cut = self._stages, self._cut
        down, up = stages.downs[cut.stage], stages.ups[cut.stage]
        yield from (*stages.downs[cut.stage + 1 :], *stages.ups[cut.stage + 1 :], *filter(None, [stages.mid]))
        yield from (layer for layers in _lists(down) for layer in layers[cut.layers :])
        yield from _list(down, "downsamplers") or ()
        yield from (layer for layers in _lists(up) for layer in layers[: self._first_up])

    def _install_down(self, down: nn.Module, patch: Patch) -> None:
        patch.around(down, self._partial_down(down), "runs its first layers on reused steps")
        *earlier, last = _lists(down)
        for layers in earlier:
            patch.around(layers, self._outer, "is iterated lazily", method="__iter__")
        patch.around(last, self._outer_and_seen, "is iterated lazily", method="__iter__")
        if (samplers := _list(down, "downsamplers")) is not None:
            patch.around(samplers, self._none_on_reuse, "is iterated lazily", method="__iter__")

    def _install_up(self, up: nn.Module, patch: Patch) -> None:
        patch.around(up, self._partial_up, "runs its last layers on reused steps")
        *earlier, last = _lists(up)
        for layers in earlier:
            patch.around(layers, self._later, "is iterated lazily", method="__iter__")
        patch.around(last, self._later_and_kept, "is iterated lazily", method="__iter__")

    def _skipped_down(self, down: nn.Module) -> Callable[..., Any]:
        outputs = _outputs(down)

        def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._decide(_hidden(args, kwargs))
            if not self._reusing:
                return call(*args, **kwargs)
            placeholder = _placeholder(_hidden(args, kwargs))
            return placeholder, (placeholder,) * outputs

        return run

    def _partial_down(self, down: nn.Module) -> Callable[..., Any]:
        outputs, layers = _outputs(down), self._cut.layers

        def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._entered = _hidden(args, kwargs)
            hidden, found = call(*args, **kwargs)
            if not self._reusing:
                return hidden, found
            placeholder = _placeholder(hidden)
            # The stage appends its last state where the down-sampled one belongs; a ControlNet would clash with it.
            return placeholder, (*found[:layers], *(placeholder,) * (outputs - layers))

        return run

    def _passing(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _hidden(args, kwargs) if self._reusing else call(*args, **kwargs)

    def _partial_up(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._keeping and self._first_up == 0:
            self._feature = self._unshared(_hidden(args, kwargs))
        if not self._reusing:
            return call(*args, **kwargs)
        self._served = True
        _, skips, *others = (*args, *map(kwargs.pop, ("hidden_states", "res_hidden_states_tuple")[len(args) :]))
        assert self._feature is not None
        return call(self._unshared(self._feature), skips[: self._cut.layers + 1], *others, **kwargs)

    def _outer(self, call: Callable[..., Iterator[Any]]) -> Iterator[Any]:
        """The down layers outside the cut and, unless the feature is reused, the others: decided in between."""
        for index, layer in enumerate(list(call())):
            if index >= self._cut.layers and self._reusing:
                return
            yield layer

    def _outer_and_seen(self, call: Callable[..., Iterator[Any]]) -> Iterator[Any]:
        if self._judge is None:
            return self._outer(call)
        layers, edge = list(call()), self._cut.layers - 1
        seen = self._passing_on(layers[edge], self._decide)
        return self._outer(lambda: iter([*layers[:edge], seen, *layers[edge + 1 :]]))

    def _none_on_reuse(self, call: Callable[..., Iterator[Any]]) -> Iterator[Any]:
        return iter(()) if self._reusing else call()

    def _later(self, call: Callable[..., Iterator[Any]]) -> Iterator[Any]:
        return iter(list(call())[self._first_up :]) if self._reusing else call()

    def _later_and_kept(self, call: Callable[..., Iterator[Any]]) -> Iterator[Any]:
        if not self._keeping or self._first_up == 0:
            return self._later(call)
        layers = list(call())
        before = self._passing_on(layers[self._first_up - 1], self._keep_feature)
        return iter([*layers[: self._first_up - 1], before, *layers[self._first_up :]])

    def _keep_feature(self, hidden: torch.Tensor) -> None:
        self._feature = self._unshared(hidden)

    def _passing_on(self, layer: nn.Module, see: Callable[[torch.Tensor], None]) -> Callable[..., Any]:
        """The layer, with its output shown to `see`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            output = layer(*args, **kwargs)
            see(output[0] if isinstance(output, tuple) else output)
            return output

        return run

    def _unshared(self, feature: torch.Tensor) -> torch.Tensor:
        """A copy where the stage would change the feature: FreeU scales what enters a layer in place."""
        has_freeu = getattr(self._stages.ups[self._cut.stage], "b1", None) is not None
        return feature.clone() if has_freeu else feature


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _placeholder(like: torch.Tensor) -> torch.Tensor:
    return like if like.dim() == 0 else like.new_zeros(())


def _list(stage: nn.Module, name: str) -> nn.ModuleList | None:
    return cast("nn.ModuleList | None", getattr(stage, name, None))


def _layers(stage: nn.Module) -> nn.ModuleList:
    return cast(nn.ModuleList, stage.resnets)


def _lists(stage: nn.Module) -> list[nn.ModuleList]:
    """The lists a stage walks through side by side; the last one's member ends a layer."""
    attentions = _list(stage, "attentions")
    return [_layers(stage)] if attentions is None else [_layers(stage), attentions]


def _outputs(down: nn.Module) -> int:
    """How many skip connections a down stage makes."""
    return len(_layers(down)) + (_list(down, "downsamplers") is not None)


def _has_adapter(given: Mapping[str, Any]) -> bool:
    """A T2I-Adapter adds to the output of every down stage, in its present or its older form."""
    if given.get("down_intrablock_additional_residuals") is not None:
        return True
    residuals, middle = given.get("down_block_additional_residuals"), given.get("mid_block_additional_residual")
    return residuals is not None and middle is None
