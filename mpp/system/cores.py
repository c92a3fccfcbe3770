"""How many cores and how much memory this process may use: of the machine, and by the limits of its container."""

import math
import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path

_THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
_PROCESS = Path("/proc/self")


def count_cores() -> int:
    """The cores that this process may use, at least 1.

    A quota of CPU time (Docker's --cpus, Kubernetes' limits) counts in cores, and a part of one as one: with fewer
    processes some of it would go unused.
    """
    return max(1, math.ceil(min(_allowed(), quota())))


def limit_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where there is a quota, has torch, NumPy and the compiler start no more threads; for before they are imported.

    By themselves they count the cores of the machine, and threads beyond the quota only stop each other. What the user
    has set stays.
    """
    cores = count_cores()
    if cores < _allowed():
        for name in _THREADS:
            environment.setdefault(name, str(cores))


def _allowed() -> int:
    """By affinity, as `taskset`, Slurm and cpusets set it."""
    of_process = getattr(os, "process_cpu_count", None)  # Python 3.13, which knows PYTHON_CPU_COUNT, too
    if of_process is not None:
        return of_process() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(process: Path = _PROCESS) -> float:
    """The smallest quota of CPU time of the process's control groups, in cores; infinite where there is none.

    Args:
        process: the folder that Linux keeps about the process.
    """
    return min(map(_limit, _folders(process, "cpu")), default=math.inf)


def memory(process: Path = _PROCESS) -> int:
    """Bytes of memory that this process may use, in all: of the machine, and by the limits of its control groups."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(_most_bytes(folder, machine) for folder in _folders(process, "memory"))])


def _folders(process: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's control groups that may limit this, and of those that they lie in."""
    try:
        groups, mounts = (_lines(process / name) for name in ("cgroup", "mountinfo"))
    except OSError:  # another system
        return
    for root, mount, controllers in _mounted(mounts):
        for group in groups:
            _, names, path = group.split(":", 2)
            if controllers == names == "" or (controller in controllers.split(",") and controller in names.split(",")):
                yield from _upwards(Path(mount), root, path)


def _lines(path: Path) -> list[str]:
    """Names in them, as of a memory stick's folder, are bytes in whatever encoding."""
    return [os.fsdecode(line) for line in path.read_bytes().splitlines()]


def _mounted(mounts: list[str]) -> Iterator[tuple[str, str, str]]:
    """Root, mount point and controllers of each file system of control groups; version 2 names none."""
    for line in mounts:
        left, _, right = line.partition(" - ")
        root, mount = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), field) for field in left.split(" ")[3:5])
        kind, _, options = right.split(" ")[:3]
        if kind == "cgroup2":
            yield root, mount, ""
        elif kind == "cgroup":
            yield root, mount, options


def _upwards(mount: Path, root: str, path: str) -> Iterator[Path]:
    """The folders of a group and of those that it lies in, as far as they can be seen."""
    inner = os.path.relpath(path, root)
    # Of a container that sees another tree than its own, the mount itself is its group.
    folder = mount if inner.startswith("..") else mount / inner
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder


def _limit(folder: Path) -> float:
    """A group's own quota: version 2 and version 1."""
    try:
        if (folder / "cpu.max").is_file():
            most, period = (folder / "cpu.max").read_text("utf-8").split()
        else:
            most, period = ((folder / f"cpu.cfs_{name}_us").read_text("utf-8") for name in ("quota", "period"))
        return float(most) / float(period) if float(most) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such file: the group at the top has none
        return math.inf


def _most_bytes(folder: Path, machine: int) -> int:
    """A group's own limit of memory, or all of the machine's: version 2 and version 1."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((folder / name).read_text("utf-8"))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return machine
