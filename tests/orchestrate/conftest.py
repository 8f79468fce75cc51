"""One Ray session for all tests here: Ray's core reads the access token once in the life of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.orchestrate.ray_session import ray_session


@pytest.fixture(scope="session")
def session() -> Iterator[None]:
    with ray_session(cpus=3, gpus=0, started=lambda: None):
        yield


@pytest.fixture(autouse=True)
def by_value(session: None, request: pytest.FixtureRequest) -> None:
    """Functions of test modules, which Ray's workers cannot import, travel whole."""
    import ray

    ray.cloudpickle.register_pickle_by_value(request.module)
