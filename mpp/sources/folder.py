"""Folders of images, at any depth; first-level sub-folders are classes, train/ with test/ or val/ are splits."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpp.sources.base import FileSource, SourceError, Split
from mpp.sources.names import IMAGE_EXTENSIONS, is_hidden


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]], ignored: Counter[str]) -> Iterator[str]:
    """Paths of the images under a folder, sorted; counts what it passes over.

    `above` holds the folders on the way down, by device and inode: a link back to one of them would never end.
    """
    info = Path(folder).stat()
    here = (info.st_dev, info.st_ino)
    if here in above:
        ignored["other"] += 1
        return
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if is_hidden(entry.name):
            ignored["hidden"] += 1
        elif is_folder:
            yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {here}, ignored)
        elif is_file and entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in entry.name:
            yield prefix + entry.name
        else:
            ignored["other"] += 1


def _images_under(folder: Path, ignored: Counter[str] | None = None) -> Iterator[str]:
    return _walk(str(folder), "", frozenset(), Counter() if ignored is None else ignored)


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the two splits; empty where a folder is not split."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not is_hidden(entry.name))
        held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
        if held_out is None or not (folder / "train").is_dir():
            return {}
        for name in set(names) - {"train", "test", "val"}:
            path = folder / name
            if path.is_dir() and next(_images_under(path), None):
                return {}
            if path.is_file() and path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS:
                return {}
    except OSError:
        return {}
    return {"train": folder / "train", "test": folder / held_out}


def _class_names(folder: Path) -> tuple[str, ...]:
    """First-level sub-folders that hold an image, sorted."""
    with os.scandir(folder) as found:
        names = sorted(entry.name for entry in found if not is_hidden(entry.name) and Path(entry).is_dir())
    return tuple(name for name in names if next(_images_under(folder / name), None))


def open_folder(spec: str, folder: Path, split: Split = "train", expected: Sequence[str] = ()) -> FileSource:
    """The images under a folder, at any depth, labelled by first-level sub-folder where all lie in two or more.

    The classes of a test split are those of the train split, and after them those that it alone has. A single
    sub-folder is a class, too, where it has one of the `expected` names, as of the images that a test belongs to.

    Raises:
        SourceError: missing, not a folder, unreadable, or no image in it.
    """
    if not folder.exists():
        raise SourceError(f"{spec}: there is no folder {folder}; check the path")
    if not folder.is_dir():
        raise SourceError(f"{spec}: {folder} is a file; give the folder that it lies in, folder:{folder.parent}")
    splits = split_folders(folder)
    root = splits.get(split, folder)
    ignored: Counter[str] = Counter()
    try:
        paths = list(_images_under(root, ignored))
        folders = [path.rpartition("/")[0].partition("/")[0] for path in paths]
        own = sorted({name for name in folders if name})
        # A test split counts by the train split's classes, for it may lack some, then by those that it alone has.
        held_out = root != splits.get("train", root)
        known = _class_names(splits["train"]) if held_out else tuple(own)
    except OSError as error:
        raise SourceError(f"{spec}: cannot list {error.filename} ({error.strerror}); check its permissions") from error
    parts = [f"{root.name}/ alone, as its sub-folders are splits"] if splits else []
    passed = [f"{number:,} {kind}" for kind in ("hidden", "other") if (number := ignored[kind])]
    if passed:
        parts.append(f"ignored {' and '.join(passed)} {'file' if sum(ignored.values()) == 1 else 'files'}")
    note = "; ".join(parts)
    if not paths:
        extensions = " ".join(IMAGE_EXTENSIONS)
        raise SourceError(
            f"{spec}: no image in {root}{f' ({note})' if note else ''}; expected files that end in {extensions}"
        )
    if not all(folders) or (len(known) < 2 and not set(own) <= set(expected)):
        return FileSource(spec, root, paths, note=note)
    classes = tuple(dict.fromkeys((*known, *own)))
    numbers = {name: label for label, name in enumerate(classes)}
    return FileSource(spec, root, paths, [numbers[name] for name in folders], classes, note)
