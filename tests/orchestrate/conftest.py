"""One Ray session for all tests here: a process can read Ray's access token only once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.orchestrate.ray_session import RaySession, ray_session


@pytest.fixture(scope="session")
def session() -> Iterator[RaySession]:
    with ray_session(cpus=3, gpus=0) as session:
        yield session


@pytest.fixture
def ray_workers(session: RaySession, request: pytest.FixtureRequest) -> None:
    """Ray, with the functions of the test module pickled by value: workers cannot import it."""
    import ray

    ray.cloudpickle.register_pickle_by_value(request.module)
