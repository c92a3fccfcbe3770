"""How many cores there are to use, in containers of all kinds."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpp.data.workers import worker_count
from mpp.system import cores

V1 = "30 25 0:26 {root} {mount} rw,nosuid - cgroup cgroup rw,{controllers}"
V2 = "30 25 0:26 / MOUNT rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
OTHER = "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw"
IN_LATIN_1 = b"36 22 8:1 / /media/caf\xe9\x85 rw,relatime shared:1 - vfat /dev/sdb1 rw\n"


def v1(root: str = "/", mount: str = "MOUNT", controllers: str = "cpu,cpuacct") -> str:
    return V1.format(root=root, mount=mount, controllers=controllers)


def cfs(folder: str, quota: int) -> dict[str, str]:
    return {f"{folder}cpu.cfs_quota_us": str(quota), f"{folder}cpu.cfs_period_us": "100000"}


@pytest.fixture
def system(tmp_path: Path):
    """`system(groups, mounts, files)` writes what Linux says of a process, `MOUNT` being where groups are mounted, and
    returns its folder."""

    def write(groups: list[str], mounts: list[str], files: dict[str, str]) -> Path:
        place, process = tmp_path / "sys fs", tmp_path / "proc"
        for name, text in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text + "\n")
        process.mkdir()
        (process / "cgroup").write_text("".join(f"{line}\n" for line in groups))
        written = str(place).replace(" ", "\\040")
        lines = "".join(f"{line.replace('MOUNT', written)}\n" for line in [OTHER, *mounts])
        (process / "mountinfo").write_bytes(IN_LATIN_1 + lines.encode())
        return process

    return write


TOP, LIMITED = ["0::/"], {"cpu.max": "200000 100000"}
OUTER = {"pod/main/cpu.max": "max 100000", "pod/cpu.max": "150000 50000", "cpu.max": "800000 100000"}
INNER = {"a/b/c/cpu.max": "100000 100000", "a/b/cpu.max": "200000 100000", "a/cpu.max": "max 100000"}
CASES = {
    "docker": (TOP, [V2], LIMITED, 2),
    "none": (TOP, [V2], {"cpu.max": "max 100000"}, math.inf),
    "no file at the top": (TOP, [V2], {"cgroup.procs": "1"}, math.inf),
    "part of a core": (TOP, [V2], {"cpu.max": "50000 100000"}, 0.5),
    "nested, the outer is smaller": (["0::/pod/main"], [V2], OUTER, 3),
    "nested, the inner is smaller": (["0::/a/b/c"], [V2], INNER, 1),
    "version 1": (
        ["5:memory:/x", "4:cpu,cpuacct:/jobs/7", "0::/"],
        [v1(mount="MOUNT/cpu"), V2.replace("MOUNT", "MOUNT/unified")],
        cfs("cpu/jobs/7/", 400_000) | cfs("cpu/jobs/", -1) | cfs("cpu/x/", 100_000),
        4,
    ),
    "version 1, a container that sees its own group as the top": (
        ["4:cpu,cpuacct:/docker/abc"],
        [v1(root="/docker/abc")],
        cfs("", 250_000),
        2.5,
    ),
    "a tree that is not its own": (["0::/../../other"], [V2], LIMITED, 2),
    "not limits of time": (["4:cpuset:/", "3:cpuacct:/"], [v1(controllers="cpuset")], cfs("", 100_000), math.inf),
    "what cannot be read": (TOP, [V2], {"cpu.max": "a b c"}, math.inf),
}


@pytest.mark.parametrize("case", CASES)
def test_the_smallest_quota_on_the_way_up(case: str, system: Callable[..., Path]) -> None:
    *written, expected = CASES[case]
    assert cores.quota(system(*written)) == expected


MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MEMORY = {
    "version 2, the outer is smaller": (
        ["0::/pod/main"],
        [V2],
        {"pod/main/memory.max": "max", "pod/memory.max": "1000000"},
        1_000_000,
    ),
    "version 1": (
        ["5:memory:/jobs/7", "4:cpu,cpuacct:/x", "0::/"],
        [v1(mount="MOUNT/m", controllers="memory")],
        {"m/jobs/7/memory.limit_in_bytes": "2000000", "m/memory.limit_in_bytes": "9223372036854771712"},
        2_000_000,
    ),
    "none": (TOP, [V2], {}, MACHINE),
}


@pytest.mark.parametrize("case", MEMORY)
def test_the_memory_of_a_container(case: str, system: Callable[..., Path]) -> None:
    *written, expected = MEMORY[case]
    assert cores.memory(system(*written)) == expected


def test_this_machine_and_one_without_control_groups(tmp_path: Path) -> None:
    assert cores.quota(tmp_path / "nowhere") == math.inf
    assert 1 <= cores.count_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("quota", "expected"), [(2.0, 2), (2.5, 3), (0.5, 1), (math.inf, 64), (100.0, 64)])
def test_workers_and_threads_keep_to_the_quota(quota: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores of 64 make two workers, and as many threads of torch, NumPy and its compiler, unless they are set."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: 64, raising=False)
    monkeypatch.setattr(cores, "quota", lambda: quota)
    assert cores.count_cores() == expected
    assert worker_count(-1, 1) == (expected if expected > 1 else 0)
    free: dict[str, str] = {}
    cores.limit_threads(free)
    names = [] if expected == 64 else ["OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"]
    assert free == dict.fromkeys(names, str(expected))
    fixed = {"OMP_NUM_THREADS": "5"}
    cores.limit_threads(fixed)
    assert fixed["OMP_NUM_THREADS"] == "5"


@pytest.mark.slow
def test_torch_starts_no_more_threads_than_the_quota_allows() -> None:
    code = (
        "import os; from mpp import cli; from mpp.system import cores\n"
        "os.process_cpu_count = lambda: 64; cores.quota = lambda: 1.0\n"
        "def ask(tool, config):\n  import torch; print(torch.get_num_threads()); return 0\n"
        "cli.run = ask; cli.check_data([])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "1\n", done.stderr
