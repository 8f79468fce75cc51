"""Joins a Ray cluster that others started: a site's own, or the one of a batch job.

The address and the access token come from the environment of this process: PIPELINE_RAY_ADDRESS,
and RAY_AUTH_MODE with RAY_AUTH_TOKEN_PATH. Ray reads the token once per process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from pipeline.errors import ConfigError, StageError
from pipeline.orchestrate.machines import ID_LABEL, Machine
from pipeline.orchestrate.ray_connection import ray_connection
from pipeline.orchestrate.ray_loss import RayLost
from pipeline.orchestrate.ray_session import RaySession
from pipeline.orchestrate.ray_tasks import Item, Result, map_tasks
from pipeline.orchestrate.user_errors import RERUN
from pipeline.runtime import environment

ADDRESS = "PIPELINE_RAY_ADDRESS"
_KNOCK_S = 2.0  # between looks whether the cluster's control process answers
_SILENCE_S = 20.0
_ASK_S = 2.0


class JoinedRay(RaySession):
    """The connection of this process with a Ray cluster at ``address`` (HOST:PORT)."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.left_out: list[Machine] = []  # they get no tasks
        self.shares: Counter[str] = Counter()  # tasks by address of the machine
        self._heard = self._knocked = time.monotonic()

    def map_tasks(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """``ray_tasks.map_tasks`` on all machines."""
        options: dict[str, object] = {"scheduling_strategy": "SPREAD"}
        if self.left_out:
            ids = ",".join(machine.id for machine in self.left_out)
            options["label_selector"] = {ID_LABEL: f"!in({ids})"}
        return map_tasks(function, items, self.check, options=options, shares=self.shares)

    @property
    def head(self) -> str:
        """The address of the machine with Ray's control process."""
        return self.address.rpartition(":")[0]

    def check(self) -> None:
        """Call it several times per second.

        Raises:
            RayLost: the control process of the cluster does not answer any more. Ray itself would
                end this process after a minute, without a message.
        """
        now = time.monotonic()
        if now - self._knocked < _KNOCK_S:
            return
        self._knocked = now
        try:
            _knock(self.address)
            self._heard = time.monotonic()
        except OSError as error:
            if now - self._heard > _SILENCE_S or isinstance(error, ConnectionRefusedError):
                raise RayLost(
                    f"the head of the Ray cluster ({self.address}) is gone: {error}", remedy=RERUN
                ) from None


@contextlib.contextmanager
def joined_ray(address: str, check: Callable[[], None] = lambda: None) -> Iterator[JoinedRay]:
    """Be connected with the cluster at ``address`` while the context is open.

    Args:
        check: called several times per second while it connects; may raise.

    Raises:
        ConfigError: the cluster does not accept the access token.
        StageError: nothing answers at the address, or this machine is not part of the cluster.
    """
    os.environ.update(environment.ray_client())
    _ask(address)

    def not_connected(cause: str) -> StageError:
        return StageError(
            f"cannot join the Ray cluster: {cause}",
            place=address,
            remedy="run the driver on a machine of the cluster, with the same version of Ray",
        )

    session = JoinedRay(address)
    with ray_connection(address, check, not_connected):
        check()
        yield session


def _ask(address: str) -> None:
    """Ask the cluster a question first: with a wrong token, ray.init is silent for 20 s."""
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if token:
        try:
            with open(token) as file:
                file.read(1)
        except OSError as error:  # Ray would end this process
            raise ConfigError(
                f"the access token cannot be read ({error.strerror})",
                place=token,
                remedy="set RAY_AUTH_TOKEN_PATH to the file with the token of the cluster",
            ) from None
    try:
        _knock(address)
    except (OSError, ValueError) as error:
        raise StageError(
            f"no Ray cluster answers: {error}",
            place=address,
            remedy=f"start it, or correct {ADDRESS}",
        ) from None
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address).get_all_node_info(timeout=_ASK_S)
    except AuthenticationError:
        used = f"the token in {token}" if token else "no token was given"
        raise ConfigError(
            f"the Ray cluster refused the access token ({used})",
            place=address,
            remedy="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with its token",
        ) from None


def _knock(address: str) -> None:
    """Connect, and hang up. Raises OSError if nothing answers."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_ASK_S):
        pass
