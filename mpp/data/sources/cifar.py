"""CIFAR-10 and CIFAR-100 in their authors' python archives, read by torchvision."""

import shutil
import tarfile
import tempfile
import urllib.error
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np

import mpp.system.torchvision_import  # noqa: F401
from mpp.data.sources.base import SourceError
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.names import Split
from mpp.system.files import cache_folder, claimed
from mpp.system.process import without_warnings

from torchvision.datasets import CIFAR10, CIFAR100  # isort: skip
from torchvision.datasets.utils import check_integrity  # isort: skip

_READERS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def open_cifar(kind: str, folder: Path, split: Split, download: bool = False) -> ListSource:
    """CIFAR-10 or CIFAR-100 in `folder`, packed or unpacked; with `download`, fetched where it is not there whole.

    Raises SourceError: it is not there, a file is not the official one, or the download failed.
    """
    spec, reader = f"{kind}:{folder}", _READERS[kind]
    # About how the official files were made: tarfile's, and numpy's.
    with without_warnings():
        try:
            return _read(spec, reader, folder, split)
        except SourceError:
            if not download:
                raise
        try:
            with claimed(cache_folder() / "download.lock", wait=True):
                reader(str(folder), download=True)
        except Exception as error:  # urllib, ssl, tarfile and torchvision each raise their own
            reason = str(error).partition("\n")[0]
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is the open answer, too
            raise SourceError(f"{spec}: the download of {reader.url} failed ({reason}); fetch it by hand") from error
        return _read(spec, reader, folder, split)


def _read(spec: str, reader: type[CIFAR10], folder: Path, split: Split) -> ListSource:
    with _unpacked(spec, reader, folder) as root:
        # torchvision unpickles, which runs what a file says, so every file must have the official checksum first.
        for name, checksum in [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]:
            if not (root / reader.base_folder / name).is_file():
                raise SourceError(f"{spec}: {name} is missing; delete the rest and fetch it again")
            if not check_integrity(str(root / reader.base_folder / name), checksum):
                what = f"{name} is not the official file (its MD5 differs)"
                raise SourceError(f"{spec}: {what}; delete it and fetch it again")
        whole = reader(str(root), train=split == "train")
    images = np.ascontiguousarray(whole.data)  # torchvision's is a view of planes
    return ListSource(images, whole.targets, tuple(whole.classes), name=spec, split=split)


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Writes the files of an archive to `folder`, by their names alone, so that none can leave it.

    tarfile's own filter for this came with Python 3.11.4, after Debian 12's.
    """
    folder.mkdir()
    for member in filter(tarfile.TarInfo.isreg, tar):
        packed = tar.extractfile(member)
        assert packed is not None  # of a regular file
        with packed, (folder / PurePosixPath(member.name).name).open("wb") as file:
            shutil.copyfileobj(packed, file)


@contextmanager
def _unpacked(spec: str, reader: type[CIFAR10], folder: Path) -> Generator[Path]:
    """A folder with the batches where torchvision expects them; what is made for that goes again."""
    if (folder / reader.base_folder).is_dir():
        yield folder
        return
    archive = folder / reader.filename
    with tempfile.TemporaryDirectory() as temporary:
        if (folder / reader.meta["filename"]).is_file():  # the folder of the batches itself
            (Path(temporary) / reader.base_folder).symlink_to(folder.resolve())
        elif archive.is_file():
            try:
                with tarfile.open(archive) as tar:
                    _unpack(tar, Path(temporary) / reader.base_folder)
            except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
                if isinstance(error, OSError) and error.errno is not None:  # the disk's, no fault of the archive
                    what = f"cannot unpack {archive} into {temporary} ({error.strerror})"
                    raise SourceError(f"{what}; check its permissions, and the room there (TMPDIR)") from error
                what = f"{archive} is not a complete archive ({error})"
                raise SourceError(f"{what}; delete it and fetch it again") from error
        else:
            what = f"found no {reader.filename}, packed or unpacked, in {folder}"
            raise SourceError(f"{spec}: {what}; --download true fetches it")
        yield Path(temporary)
