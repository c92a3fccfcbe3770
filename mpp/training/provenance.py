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
_PATIENCE = 10  # seconds for git, which may have a slow disk to read


def record_start(folder: Path, step: int, device: torch.device, facts: Mapping[str, Any]) -> None:
    """Adds a start of the run to environment.json in its folder. To be called on all ranks; rank 0 alone writes.

    Args:
        folder: of the run.
        step: that it goes on from; 0 for a fresh one.
        device: that this rank computes on.
        facts: what the run itself knows, as JSON takes it: precision, seed, data.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    hosts = dist.gather(socket.gethostname())
    devices = dist.gather(describe_device(device))
    if dist.rank_and_size()[0]:
        return
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(shown(word) for word in sys.argv),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware() | {"hosts": len(set(hosts)), "devices": devices},
        **facts,
    }
    text = json.dumps([*read_starts(folder), entry], indent=2) + "\n"
    write_whole(folder / FILE, lambda file: file.write(text.encode()))


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, in order; none of an older version's, or where the file is damaged."""
    try:
        starts = json.loads((folder / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    starts = starts if isinstance(starts, list) else []
    return [start for start in starts if isinstance(start, dict) and isinstance(start.get("step", 0), int)]


def commit() -> str:
    """Git commit of the checkout that this package is run from, with "-dirty" where files of it were changed.

    Empty where there is no git, or the package was installed and is no part of a repository.
    """
    folder = Path(__file__).parents[1]
    # A hook's variables would name another repository; and nothing is to be written into this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], env=env, capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # site-packages may lie within somebody's repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """Of Python and of what a run computes with; without importing anything."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    driver = Path("/sys/module/nvidia/version")
    if driver.exists():
        found["nvidia driver"] = driver.read_text("utf-8").strip()
    return found


def hardware() -> dict[str, Any]:
    """System, processor, cores that this process may use, memory in GiB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": count_cores(),
        "memory_gib": round(memory, 1),
    }


def describe_device(device: torch.device) -> str:
    """`cpu`, or a GPU's name with its memory: `NVIDIA H200 (139.8 GiB)`."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.total_memory / 2**30:.1f} GiB)"
