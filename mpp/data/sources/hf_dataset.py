"""Opens Hugging Face datasets: saved with `save_to_disk`, as Parquet files in a folder, or by name from the hub."""

import json
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpp.data.sources.base import SourceError
from mpp.data.sources.hf import HfSource, image_column, label_column, read_labels
from mpp.data.sources.names import Split, home_expanded, printable, splits_among
from mpp.data.sources.specs import spec_of
from mpp.errors import install
from mpp.system.cache import make_room, use
from mpp.system.files import cache_folder
from mpp.system.process import shared, without_warnings

if TYPE_CHECKING:
    from datasets import Dataset

_REMOTE = ("hf://", "http://", "https://")
_OWN_PATHS = ("imagefolder", "cache")  # builders of `datasets` that write paths; the latter is of any, prepared before


@shared
@contextmanager
def _log_lines_off() -> Generator[None]:
    """Without the progress bars and log lines of the two packages."""
    import datasets
    import huggingface_hub.utils as hub

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = [each for each in (datasets.utils, hub) if not each.are_progress_bars_disabled()]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        for each in bars:
            each.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for each in bars:
            each.enable_progress_bars()


class HfDataset:
    """A dataset by the string `NAME_OR_DIR[:SPLIT]`: saved, a folder of Parquet files, or of the hub.

    Raises SourceError: nothing there or readable, or no split that must be meant.
    """

    def __init__(self, spec: str, argument: str) -> None:
        self.spec, self._builder = spec, None
        self._opened: dict[str, Dataset] = {}
        name, colon, asked = argument.rpartition(":")
        if not colon or os.path.exists(home_expanded(argument)):  # noqa: PTH110 - Path.exists raises for a long name
            name, asked = argument, ""
        self._name, self._path = name, home_expanded(name)
        try:
            import datasets  # noqa: F401
        except ImportError as error:
            raise SourceError(f"{spec}: the package datasets is missing ({error}): {install('hf')}") from None
        with self._one_line():
            self._split_names = names = self._find_splits()
        if asked and asked not in names:
            there = f"the splits {', '.join(names)}" if names else "no splits"
            raise SourceError(f"{spec}: {name} has no split {asked!r} but {there}; choose one of them")
        found = {} if asked else splits_among(names)
        if not asked and len(names) > 1 and not found and "train" not in names:
            write = f"{spec_of('hf', name)}:SPLIT"
            raise SourceError(f"{spec}: has the splits {', '.join(names)} and none called train; write {write}")
        self.splits: dict[Split, str] = found or {"train": asked or ("train" if "train" in names else "")}

    @contextmanager
    def _one_line(self) -> Generator[None]:
        """Without progress bars, log lines and warnings; any error becomes a SourceError."""
        try:
            with _log_lines_off(), without_warnings():
                yield
        except SourceError:
            raise
        except Exception as error:  # pyarrow, fsspec, requests and the two packages each raise their own
            cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
            reason = printable(str(cause).strip().partition("\n")[0]) or type(cause).__name__
            if os.path.exists(self._path):  # noqa: PTH110 - as above
                what, hint = f"cannot read {self._path}", f"check the files, and the room in {cache_folder()}"
            else:
                what = f"there is no folder {self._name}, nor can it be had from the Hugging Face hub"
                hint = "check the name and the connection"
            raise SourceError(f"{self.spec}: {what} ({reason}); {hint}") from error

    def _find_splits(self) -> list[str]:
        """The names of the splits; none of a single saved dataset."""
        import datasets

        if (self._path / "dataset_dict.json").is_file():
            return list(json.loads((self._path / "dataset_dict.json").read_text("utf-8"))["splits"])
        if (self._path / "state.json").is_file():
            return []
        if self._path.is_dir():
            if next(self._path.rglob("*.parquet"), None) is None:
                what = f"{self._path} holds neither Parquet files nor a saved dataset"
                raise SourceError(f"{self.spec}: {what}; check it")
            cache = str(cache_folder() / "hf")
            self._builder = datasets.load_dataset_builder("parquet", data_dir=str(self._path), cache_dir=cache)
        elif self._name.startswith(("/", ".", "~")):
            raise SourceError(f"{self.spec}: there is no folder {self._path}; check the path")
        else:
            self._builder = datasets.load_dataset_builder(self._name)
            for files in (self._builder.config.data_files or {}).values():
                for file in files:
                    if not str(file).rpartition("::")[2].startswith(_REMOTE):
                        raise SourceError(f"{self.spec}: it lists {file}, a file of this machine, and is not read")
        return [str(name) for name in self._builder.config.data_files or self._builder.info.splits or ()]

    def open(self, split: Split = "train") -> HfSource:
        """The images of a split. Raises SourceError: not readable, no rows, or no column that must be the images."""
        spec, name = self.spec, self.splits[split]
        dataset = self._dataset(name)
        if not len(dataset):
            raise SourceError(f"{spec}: {self._name} has no rows{f' in {name}' if name else ''}; check it")
        image = image_column(spec, dataset.features)
        notes = [f"the split {name} alone"] if len(self._split_names) > 1 else []
        column, note = label_column(dataset.features)
        notes += [note] if note else []
        labels, classes = None, None
        if column:
            train = self._dataset(self.splits["train"]) if split != "train" else None
            labels, classes = read_labels(spec, dataset, train, column)
            if labels is not None and (missing := int((labels < 0).sum())):
                notes.append(f"{missing:,} without a label")
        return HfSource(spec, dataset, image, self._folders(), labels, classes, "; ".join(notes))

    def _dataset(self, name: str) -> "Dataset":
        """One split, memory-mapped; "": all there is."""
        if name not in self._opened:
            with self._one_line():
                opened = self._load(name or next(iter(self._split_names), ""))
                self._opened[name] = opened.flatten_indices() if opened._indices is not None else opened
        return self._opened[name]

    def _load(self, name: str) -> Any:
        import datasets

        if self._builder is not None:
            if self._path.is_dir():  # room in our cache for the copy that `datasets` makes of Parquet files
                copy = Path(self._builder.cache_dir)
                use("/".join(copy.relative_to(cache_folder()).parts[:3]))
                if not copy.is_dir():  # Arrow does not compress images either
                    size = sum(file.stat().st_size for file in self._path.rglob("*.parquet"))
                    make_room(size, f"a copy of {self._path}")
            self._builder.download_and_prepare()
            return self._builder.as_dataset(split=name)
        folder = self._path / name
        files = json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]
        for each in (*self._split_names, *(str(file["filename"]) for file in files)):
            if each in ("", ".", "..") or "/" in each or "\\" in each:
                raise SourceError(f"{self.spec}: it names {each!r}, outside of its folder, and is not read")
        return datasets.load_from_disk(str(folder))

    def _folders(self) -> list[Path]:
        """Where images may lie that a row names by a path.

        Of a data set from the hub, its own part of the cache; and the downloads of `datasets`, where the paths are its
        own, not the author's.
        """
        if self._path.is_dir():
            return [self._path]
        import datasets.config
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folders = [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self._name, repo_type="dataset")]
        if self._builder is not None and self._builder.name in _OWN_PATHS:
            folders.append(Path(datasets.config.DOWNLOADED_DATASETS_PATH))
        return folders
