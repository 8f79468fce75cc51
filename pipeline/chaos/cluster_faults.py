"""Faults of a run on the machines of a cluster. Nothing of other runs is touched."""

from __future__ import annotations

import random
from functools import partial

from pipeline.chaos.cluster_driver import ClusterDriver
from pipeline.chaos.faults import Fault, flip_bit, stopped

CUT_S = 60  # longer than Ray and the collectives wait for a machine that does not answer
_ENDED = "ended"

# The number may belong to another process by now.
_SIGNAL = """
if tr '\\0' ' ' </proc/{pid}/cmdline 2>/dev/null | grep -q '^ray::'
then kill -s {signal} {pid}
else echo {ended}
fi
"""

# Routes to the other machines of the run lead nowhere for some time: packets vanish as on a cut
# link. The shared file system and the caller still reach the machine, and what heals the link is
# on its way before the link is cut: nothing stays cut if this script or the caller is killed. Two
# names may be one address, and the route of an earlier fault may still be there.
_CUT = """
addresses=
for peer in {peers}; do
    found=$(getent hosts "$peer") || {{ echo "no address of $peer" >&2; exit 1; }}
    addresses="$addresses ${{found%% *}}"
done
heal="sleep {seconds}"
for address in $addresses; do heal="$heal; ip route del blackhole $address"; done
setsid sh -c "$heal" </dev/null >/dev/null 2>&1 &
for address in $addresses; do ip route replace blackhole "$address" || exit 1; done
"""


def cluster_faults(driver: ClusterDriver) -> list[Fault]:
    """The kinds."""
    return [
        Fault(name="kill rank", apply=partial(_signal_rank, driver, "KILL", "killed")),
        Fault(name="stop rank", apply=partial(_signal_rank, driver, "STOP", "stopped")),
        Fault(name="cut link", apply=partial(_cut_link, driver)),
        Fault(name="stop request", apply=partial(_stop, driver)),
        flip_bit(driver),
    ]


def _signal_rank(driver: ClusterDriver, signal: str, verb: str, choices: random.Random) -> str:
    ranks = driver.ranks()
    if not ranks:
        return ""
    rank = choices.choice(ranks)
    script = _SIGNAL.format(pid=rank.pid, signal=signal, ended=_ENDED)
    if _ENDED in driver.on_machine(rank.host, script):
        return ""
    return f"{verb} rank {rank.number} on {rank.host} (SIG{signal})"


def _cut_link(driver: ClusterDriver, choices: random.Random) -> str:
    names = [rank.host for rank in driver.ranks()]
    # Ranks that only lose each other would look for a fault of theirs; a lost machine loses Ray.
    names += [driver.head] if driver.head else []
    machines = list(dict.fromkeys(names))
    if len(machines) < 2:
        return ""
    victim = choices.choice(machines)
    peers = [machine for machine in machines if machine != victim]
    driver.on_machine(victim, _CUT.format(peers=" ".join(peers), seconds=CUT_S))
    return f"cut {victim} off from {', '.join(peers)} for {CUT_S} s"


def _stop(driver: ClusterDriver, choices: random.Random) -> str:
    return stopped(driver.stop())
