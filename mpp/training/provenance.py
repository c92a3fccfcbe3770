"""Where a run comes from: one entry of environment.json for each of its starts.

Nothing here changes what a run computes, and a run that was stopped and resumed has more entries than one that was not.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mpp import dist
from mpp.data.sources.patterns import shown
from mpp.system.cores import count_cores, processor
from mpp.system.files import write_whole

FILE = "environment.json"
_PACKAGES = ("mpp", "torch", "torchvision", "timm", "numpy", "xformers")
_GIT_SECONDS = 10  # for git, which may have a slow disk to read


def record_start(folder: Path, step: int, device: torch.device, facts: Mapping[str, Any]) -> None:
    """Add a start of the run to environment.json in its folder. For all ranks to call; rank 0 alone writes.

    Args:
        step: that it goes on from; 0 for a fresh one.
        device: that this rank computes on.
        facts: what the run itself knows, as JSON takes it: precision, seed, data.
    """
    hosts = dist.gather(socket.gethostname())
    name = device.type
    if name == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name} ({properties.total_memory / 2**30:.1f} GiB)"
    devices = dist.gather(name)
    if dist.rank_and_size()[0]:
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(shown(word) for word in sys.argv),
        "commit": commit(),
        "versions": _versions(),
        "hardware": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": count_cores(),
            "memory_gib": round(memory, 1),
            "hosts": len(set(hosts)),
            "devices": devices,
        },
        **facts,
    }
    write_whole(folder / FILE, json.dumps([*read_starts(folder), entry], indent=2) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the starts of a run, in order; none of an older version's, or where the file is damaged."""
    try:
        starts = json.loads((folder / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    starts = starts if isinstance(starts, list) else []
    return [start for start in starts if isinstance(start, dict) and isinstance(start.get("step", 0), int)]


def commit() -> str:
    """Return the git commit of the checkout that this package is run from, with "-dirty" where files were changed.

    Empty where there is no git, or the package was installed and is no part of a repository.
    """
    # A hook's variables would name another repository; and nothing is to be written into this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_OPTIONAL_LOCKS"] = "0"
    git = ["git", "-C", str(Path(__file__).parents[1])]
    options: Any = {"env": env, "capture_output": True, "text": True, "timeout": _GIT_SECONDS, "check": True}
    try:
        # site-packages may lie within somebody's repository
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], **options)
        described = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], **options)
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip()


def _versions() -> dict[str, str]:
    """Look up the versions of Python and of what a run computes with, without importing anything."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = str(torch.__version__)  # tells the build, such as +cu130, which the package's may not
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    driver = Path("/sys/module/nvidia/version")
    if driver.exists():
        versions["nvidia driver"] = driver.read_text("utf-8").strip()
    return versions
