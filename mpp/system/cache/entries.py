"""What lies in the cache, by the names of its files.

    KEY.index  KEY.tar  KEY.part KEY.sums  KEY.pixels KEY.sizes.npy  features/KEY.npz  hf/NAME/NAME

Only what has such a name is ever removed: what else lies in the folder is none of ours.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpp.system.cache.users import busy, is_claimed
from mpp.system.files import cache_folder

KINDS = {
    "index": "where images lie in tars",
    "unpacked": "tars out of .tar.gz",
    "kept": "images fetched of remote shards (data.keep)",
    "pixels": "decoded pixels (data.cache)",
    "features": "features of frozen encoders",
    "datasets": "Parquet folders as Hugging Face's datasets read them",
    "left-over": "half written by processes that were killed",
}
_PIXELS = r"pixels|sizes\.npy|pixels\.(?:json|npy)|bad\.npy"  # .npy of pixels and bad: of older releases
_OURS = re.compile(rf"([0-9a-f]{{32}})\.(index|tar|part|sums|{_PIXELS}|lock)")
_FEATURES = re.compile(r"[0-9a-f]{64}\.npz")
_HALF = re.compile(rf"\.([0-9a-f]{{32}}\.(index|tar|{_PIXELS})|[0-9a-f]{{64}}\.npz)-[0-9a-f]{{12}}")
_KIND_OF = {"tar": "unpacked", "part": "kept", "sums": "kept", "index": "index"}


@dataclass(frozen=True)
class Entry:
    """One thing in the cache that goes as a whole.

    Attributes:
        kind: of KINDS.
        name: its key, or its path in the cache.
        paths: its files, or its folder.
        size: bytes on the disk.
        used: when it was written or used last, in seconds since 1970.
        busy: whether a living process uses it.
    """

    kind: str
    name: str
    paths: tuple[Path, ...]
    size: int
    used: float
    busy: bool


def entries(folder: Path | None = None) -> list[Entry]:
    """What lies in the cache, by kind, and of each kind what was used longest ago first."""
    folder = cache_folder() if folder is None else folder
    used = busy(folder)
    found = [*_keyed(folder, used), *_features(folder), *_datasets(folder, used), *_left_over(folder)]
    order = list(KINDS)
    return sorted(found, key=lambda entry: (order.index(entry.kind), entry.used, entry.name))


def _keyed(folder: Path, used: set[str]) -> Iterator[Entry]:
    by_key: dict[str, dict[str, Path]] = {}
    for path in _files(folder):
        if found := _OURS.fullmatch(path.name):
            by_key.setdefault(found[1], {})[found[2]] = path
    for key, files in by_key.items():
        groups: dict[str, list[Path]] = {}
        for suffix, path in files.items():
            kind = _KIND_OF.get(suffix, "pixels")
            if suffix == "index" and "tar" in files:  # without it the tar does not count as whole
                kind = "unpacked"
            if suffix == "lock":
                kind = "unpacked" if "tar" in files else "pixels" if "pixels" in files else "left-over"
            groups.setdefault(kind, []).append(path)
        for kind, paths in groups.items():
            with contextlib.suppress(OSError):
                yield _entry(kind, key, paths, is_claimed(paths[0]) if kind == "left-over" else key in used)


def _features(folder: Path) -> Iterator[Entry]:
    for path in _files(folder / "features"):
        if _FEATURES.fullmatch(path.name):
            yield _entry("features", f"features/{path.name}", [path], False)


def _datasets(folder: Path, used: set[str]) -> Iterator[Entry]:
    for path in folder.glob("hf/*/*"):
        if path.is_dir() and not path.is_symlink():
            name = path.relative_to(folder).as_posix()
            yield _entry("datasets", name, [path], name in used)


def _left_over(folder: Path) -> Iterator[Entry]:
    for path in (*_files(folder), *_files(folder / "features")):
        if _HALF.fullmatch(path.name):
            with contextlib.suppress(OSError):
                yield _entry("left-over", path.name, [path], is_claimed(path))


def _files(folder: Path) -> list[Path]:
    """The plain files of a folder; of one that is not there, none."""
    try:
        with os.scandir(folder) as found:
            return [Path(one.path) for one in found if one.is_file(follow_symlinks=False)]
    except OSError:
        return []


def _entry(kind: str, name: str, paths: list[Path], busy: bool) -> Entry:
    size, used = 0, 0.0
    for path in paths:
        inside = (Path(top, one) for top, _, files in os.walk(path) for one in files) if path.is_dir() else (path,)
        for one in inside:
            with contextlib.suppress(OSError):
                info = one.lstat()
                # The one with holes where nothing was fetched.
                held = 512 * info.st_blocks if one.suffix == ".part" else info.st_size
                size, used = size + held, max(used, info.st_mtime)
        with contextlib.suppress(OSError):
            used = max(used, path.lstat().st_mtime)
    return Entry(kind, name, tuple(sorted(paths)), size, used, busy)


def remove(entry: Entry) -> None:
    for path in entry.paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
