"""The cores and the memory that this process may use: of the machine, and by the limits of its container."""

import math
import os
import platform
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path

_PROCESS = Path("/proc/self")


def count_cores() -> int:
    """The cores that this process may use, at least 1.

    Of a quota of CPU time (Docker's --cpus, Kubernetes' limits), a part of a core counts as one.
    """
    return max(1, math.ceil(min(_by_affinity(), quota())))


THREADS = "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"
"""Variables of the environment that say how many threads are started."""


def limit_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where there is a quota, has torch, NumPy and the compiler start no more threads; call it before their import.

    By themselves they count the cores of the machine. Variables that the user has set stay.
    """
    cores = count_cores()
    if cores < _by_affinity():
        for name in THREADS:
            environment.setdefault(name, str(cores))


def _by_affinity() -> int:
    """As `taskset`, Slurm and cpusets limit it."""
    process_cpu_count = getattr(os, "process_cpu_count", None)  # Python 3.13
    if process_cpu_count is not None:
        return process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(process: Path = _PROCESS) -> float:
    """The smallest quota of CPU time of the process's control groups, in cores; infinite where there is none."""
    limits = [math.inf]
    for group in _groups(process, "cpu"):  # version 2, or 1
        numbers = _numbers(group / "cpu.max") or [
            number for name in ("quota", "period") for number in _numbers(group / f"cpu.cfs_{name}_us")
        ]
        if len(numbers) == 2 and min(numbers) > 0:
            limits.append(numbers[0] / numbers[1])
    return min(limits)


def memory(process: Path = _PROCESS) -> int:
    """Bytes of memory that this process may use: of the machine, and by the limits of its control groups."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _groups(process, "memory"):
        limits += _numbers(group / "memory.max") or _numbers(group / "memory.limit_in_bytes")
    return min(limits)


def processor() -> str:
    """The model of the processor, as well as the system knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text("utf-8").split()]
    except (OSError, ValueError):  # no such file, or "max"
        return []


def _groups(process: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's control groups with this controller, and of those that they lie in."""
    try:
        # A mounted memory stick may have a name in any encoding.
        groups, mounts = (
            [os.fsdecode(line) for line in (process / name).read_bytes().splitlines()]
            for name in ("cgroup", "mountinfo")
        )
    except OSError:  # another system
        return
    for line in mounts:
        left, _, right = line.partition(" - ")
        root, mount = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), field) for field in left.split(" ")[3:5])
        kind, _, options = right.split(" ")[:3]
        for _, names, path in (group.split(":", 2) for group in groups):
            version_1 = kind == "cgroup" and controller in options.split(",") and controller in names.split(",")
            if version_1 or (kind == "cgroup2" and not names):
                inner = os.path.relpath(path, root)
                # Of a container that sees another tree than its own, the mount itself is its group.
                folder = Path(mount) if inner.startswith("..") else Path(mount) / inner
                yield folder
                yield from (parent for parent in folder.parents if parent.is_relative_to(mount))
