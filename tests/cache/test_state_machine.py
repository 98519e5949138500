"""Any sequence of requests, of any kind, gives what each gives alone: for every cache."""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from hasten.cache.engine.preset import Cache
from hasten.cache.engine.statistics import Statistics
from hasten.core.registry import techniques
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.technique import Technique
from tests.cache.service import SCHEDULERS, Request, check, pipeline, served_afresh

CACHES = [name for name, technique in techniques().items() if issubclass(technique, Cache)]
ARCHITECTURES = ("flux", "stable_diffusion")

REQUESTS = st.builds(
    Request,
    steps=st.sampled_from([1, 2, 4, 5, 6, 6]),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    guidance=st.sampled_from(["none", "batched", "named", "unnamed"]),
    uncond_first=st.booleans(),
    unguided=st.sampled_from([(), (), (0,), (1, 2), (2,), (2, 3, 4, 5)]),
    batch=st.integers(1, 2),
    size=st.sampled_from([8, 16]),
    begin=st.sampled_from([0, 0, 1]),
    lora=st.sampled_from([0.0, 0.0, 1.0]),
    lora_later=st.sampled_from([(0, 0.0), (0, 0.0), (1, 0.5), (3, 0.5), (3, 0.0)]),
    fails_at=st.sampled_from([None, None, None, None, None, 0, 1, 2]),
    prompt=st.integers(0, 1),
)


class Served:
    """One accelerated pipeline that lives long, and the request it is working on."""

    def __init__(self, architecture: str, seed: int, technique: Technique, truth: Technique | None) -> None:
        self.service = pipeline(architecture, seed, "long-lived").renew()
        self.session = accelerate(self.service, technique)
        self.technique = technique
        self.expected = functools.partial(served_afresh, architecture, seed, truth)
        self.request = Request()
        self.left: list[torch.Tensor] = []
        self.running: Generator[list[torch.Tensor]] | None = None

    def begin(self, request: Request) -> None:
        """Start a request; one that is running is left where it is."""
        self.request, self.left = request, list(self.expected(request))
        self.running = self.service.steps(request)

    def advance(self, steps: int) -> None:
        """Go on with the running request, and compare."""
        for _ in range(steps):
            outputs = next(self.running, None) if self.running is not None else None
            if outputs is None:
                self.running = None
                return
            for output in outputs:
                assert torch.equal(output, self.left.pop(0)), self.request
        check(self.service.calls)

    def check_counts(self) -> None:
        """Every call is counted once, and as what it was."""
        counted = self.session.state(self.technique, Statistics)
        assert counted.full + counted.reused == self.service.served
        assert sum(counted.reasons.values()) <= counted.full


class AnySequence(RuleBasedStateMachine):
    """Two pipelines serve requests, step by step in any order."""

    def __init__(self, architecture: str, technique: Technique, truth: Technique | None) -> None:
        super().__init__()
        self.pipelines = [Served(architecture, seed, technique, truth) for seed in range(2)]

    @rule(which=st.integers(0, 1), request=REQUESTS)
    def whole(self, which: int, request: Request) -> None:
        """A request from beginning to end."""
        self.pipelines[which].begin(request)
        self.pipelines[which].advance(99)

    @rule(which=st.integers(0, 1), request=REQUESTS, steps=st.integers(1, 3))
    def part(self, which: int, request: Request, steps: int) -> None:
        """The first steps of a request, which may be gone on with later or never."""
        self.pipelines[which].begin(request)
        self.pipelines[which].advance(steps)

    @rule(which=st.integers(0, 1), steps=st.integers(1, 3))
    def go_on(self, which: int, steps: int) -> None:
        """Further steps of whatever is running."""
        self.pipelines[which].advance(steps)

    def teardown(self) -> None:
        """The counts are right, and leaving works."""
        for served in self.pipelines:
            served.check_counts()
            served.session.close()


def drive(architecture: str, technique: Technique, truth: Technique | None, examples: int) -> None:
    bounds = settings(
        max_examples=examples,
        stateful_step_count=8,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    machine: Any = functools.partial(AnySequence, architecture, technique, truth)
    # Each technique sees other requests, the same at each run: what they share is tested by all of them.
    run_state_machine_as_test(seed(crc32(repr((architecture, technique, examples)).encode()))(machine), settings=bounds)


def accepted(technique: Technique | None, architecture: str) -> Technique:
    if technique is None or list(technique.problems(Target.of(pipeline(architecture, 0, "long-lived")))):
        pytest.skip("no such setting, or refused")
    return technique


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CACHES)
def test_any_sequence_of_requests_gives_what_each_gives_alone(name: str, architecture: str) -> None:
    technique = accepted(techniques()[name].trial(), architecture)
    drive(architecture, technique, technique, examples=6 if architecture == "flux" else 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_always_computes_is_the_plain_pipeline(name: str, architecture: str) -> None:
    technique = accepted(techniques()[name].trial().inert(), architecture)
    drive(architecture, technique, None, examples=1)
