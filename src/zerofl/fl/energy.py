"""The energy of local training: what the processors count of it themselves (RAPL), or an estimate from CPU seconds.

Linux has the counters of Intel's and AMD's processors in /sys/class/powercap, in microjoules: one for each package,
which is all of a socket's cores and caches, and on servers one for the memory beside it (dram). They count whatever
runs there, so a client gets the part of it that its CPU seconds are of all that were spent meanwhile. Nothing
that has to be the same bit for bit depends on these figures.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

from zerofl.experiment import Experiment

POWERCAP = Path("/sys/class/powercap")
STAT = Path("/proc/stat")
MOST_WATTS = 500
"""More than any package takes: a counter that could have come round twice in the time tells nothing."""


class Counter(NamedTuple):
    """One counter, which begins again at 0 after `most_microjoules`."""

    name: str
    microjoules: int
    most_microjoules: int


class Reading(NamedTuple):
    """All counters, and the seconds that all cores together were busy since the machine started, at a time."""

    counters: tuple[Counter, ...]
    busy_seconds: float
    at_seconds: float


def read() -> Reading | None:
    """The counters now; None where there are none that can be read (`why_not` says why)."""
    try:
        return _read()
    except (OSError, ValueError):
        return None


def why_not() -> str:
    """Why the energy cannot be measured here, and what to do about it; "" where it can."""
    try:
        _read()
    except PermissionError as error:
        return f"only root may read {error.filename}: sudo chmod a+r {POWERCAP}/*/energy_uj lets everybody, until boot"
    except (OSError, ValueError) as error:
        return f"this machine shows no counters of its processors' energy: {error}"
    return ""


def joules(before: Reading | None, after: Reading | None, cpu_seconds: float | None) -> float | None:
    """The energy between two readings that is due to work of `cpu_seconds`, which was all or part of the work then.

    None where the counters, or those seconds, are not known, the counters are not the same ones, or one could have come
    round twice.
    """
    if before is None or after is None or cpu_seconds is None:
        return None
    if [counter.name for counter in before.counters] != [counter.name for counter in after.counters]:
        return None  # one came or went meanwhile
    seconds, microjoules = after.at_seconds - before.at_seconds, 0
    for old, new in zip(before.counters, after.counters, strict=True):
        if seconds * MOST_WATTS > old.most_microjoules / 1e6:
            return None
        counted = new.microjoules - old.microjoules
        microjoules += counted if counted >= 0 else counted + old.most_microjoules
    busy_seconds = after.busy_seconds - before.busy_seconds
    # What is busy is counted in hundredths of seconds, so short work alone on the machine may seem more than all.
    return microjoules / 1e6 * (min(1.0, cpu_seconds / busy_seconds) if busy_seconds > 0 else 1.0)


def joules_estimate(cpu_seconds: float | None, watts_per_core: float) -> float | None:
    """CPU seconds times what the user says that a busy core takes; None where either is not known (0 watts)."""
    return cpu_seconds * watts_per_core if cpu_seconds is not None and watts_per_core else None


MEASURED = (
    "measured by the processors' own counters (RAPL: whole packages, idle cores too, and memory where it has one), of "
    "which training gets the share that it has of the CPU time"
)
NOT_COVERED = (
    "not covered are evaluation, the wire and the server, disks, network, GPUs, fans and the power supply's losses"
)


def described(measured: float | None, estimate: float | None, watts_per_core: float, why: str) -> str:
    """What joules are and what they cover; or, without any, `why`."""
    kinds = [] if measured is None else [MEASURED]
    if estimate is not None:
        kinds.append(f"estimate, not measured: CPU seconds of training x {watts_per_core:g} W, which the user gave")
    return "; ".join([*kinds, NOT_COVERED]) if kinds else f"not measured: {why}"


def why_not_of_run(experiment: Experiment, cpu_seconds: float | None) -> str:
    """Why the energy of a whole run is not known, of whose clients all took `cpu_seconds`."""
    if experiment.device != "cpu":
        return f"nothing here counts what {experiment.device} takes"
    if cpu_seconds is None:
        return "clients with several threads side by side cannot be told apart; clients_at_once = 1 measures each alone"
    return f"{why_not() or 'not by every client'}; watts_per_core gives an estimate"


def _read() -> Reading:
    """Raises OSError or ValueError where there is nothing to read."""
    zones = sorted(POWERCAP.glob("intel-rapl:*"))  # AMD's have this name too; "psys" counts the packages once more
    found = {zone: (zone / "name").read_text(encoding="ascii").strip() for zone in zones}
    counted = {zone: name for zone, name in found.items() if name.startswith("package") or name == "dram"}
    if not counted:
        raise ValueError(f"no intel-rapl of a package in {POWERCAP}")
    counters = tuple(
        Counter(name, *(int((zone / file).read_text()) for file in ("energy_uj", "max_energy_range_uj")))
        for zone, name in counted.items()
    )
    return Reading(counters, _busy_seconds(), time.monotonic())


def _busy_seconds() -> float:
    """The first line of /proc/stat: user, nice, system, idle, iowait, irq and softirq in ticks, and more."""
    user, nice, system, _, _, irq, softirq = map(int, STAT.read_text(encoding="ascii").split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
