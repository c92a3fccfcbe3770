"""Where a Hugging Face dataset lies and which splits it has: saved, as Parquet files, or on the hub."""

import json
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpp.data.sources.base import SourceError
from mpp.data.sources.names import home_expanded, printable
from mpp.errors import install
from mpp.system.cache import drop, make_room, use
from mpp.system.files import cache_folder
from mpp.system.process import shared, without_warnings

if TYPE_CHECKING:
    from datasets import Dataset

_AWAY = ("hf://", "http://", "https://")
_PATHS_OF_ITS_OWN = ("imagefolder", "cache")  # builders of `datasets`; the latter is of any kind, prepared before
_SOURCE = "source.txt"  # in a copy in our cache, the folder that it is of
_HELD_OUT = ("test", "validation", "val")


@shared
@contextmanager
def _log_lines_off() -> Generator[None]:
    """Without the progress bars and log lines of the two packages."""
    import datasets
    import huggingface_hub.utils as hub

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = [(each, each.are_progress_bars_disabled()) for each in (datasets.utils, hub)]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        for each, _ in bars:
            each.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for each, disabled in bars:
            if not disabled:
                each.enable_progress_bars()


@contextmanager
def _quietly() -> Generator[None]:
    """Without the progress bars, log lines and warnings of the two packages."""
    with _log_lines_off(), without_warnings():
        yield


class OpenedDataset:
    """What a string `NAME_OR_DIR[:SPLIT]` leads to, by split; nothing is read before it is asked for."""

    def __init__(self, spec: str, argument: str) -> None:
        self.spec, self.builder = spec, None
        self._opened: dict[str, Dataset] = {}
        self.copy: Path | None = None  # of a folder of Parquet files, in our cache
        self.place, self.asked = _place(argument)
        self.path = home_expanded(self.place)
        try:
            import datasets
        except ImportError as error:
            raise SourceError(f"{spec}: the package datasets is missing ({error}): {install('hf')}") from None
        with self._one_line(), _quietly():
            if (self.path / "dataset_dict.json").is_file():
                self.splits = list(json.loads((self.path / "dataset_dict.json").read_text("utf-8"))["splits"])
            elif (self.path / "state.json").is_file():
                self.splits = []
            elif self.path.is_dir():
                if next(self.path.rglob("*.parquet"), None) is None:
                    raise SourceError(f"{spec}: {self.path} holds neither Parquet files nor a saved dataset; check it")
                cache = str(cache_folder() / "hf")
                self.builder = datasets.load_dataset_builder("parquet", data_dir=str(self.path), cache_dir=cache)
                self.copy = Path(self.builder.cache_dir)
            elif self.place.startswith(("/", ".", "~")):
                raise SourceError(f"{spec}: there is no folder {self.path}; check the path")
            else:
                self.builder = datasets.load_dataset_builder(self.place)
                self._check_files()
            if self.builder is not None:
                self.splits = [str(name) for name in self.builder.config.data_files or self.builder.info.splits or ()]
        if self.asked and self.asked not in self.splits:
            held = f"the splits {', '.join(self.splits)}" if self.splits else "no splits"
            raise SourceError(f"{spec}: {self.place} has no split {self.asked!r} but {held}; choose one of them")

    @contextmanager
    def _one_line(self) -> Generator[None]:
        try:
            yield
        except SourceError:
            raise
        except Exception as error:  # pyarrow, fsspec, requests and the two packages each raise their own
            told = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
            reason = printable(str(told).strip().partition("\n")[0]) or type(told).__name__
            if os.path.exists(self.path):  # noqa: PTH110 - as below
                what, hint = f"cannot read {self.path}", f"check the files, and the room in {cache_folder()}"
            else:
                what = f"there is no folder {self.place}, nor can it be had from the Hugging Face hub"
                hint = "check the name and the connection"
            raise SourceError(f"{self.spec}: {what} ({reason}); {hint}") from error

    def names(self) -> dict[str, str]:
        """What the two splits are called; empty where there are no two, or one was asked for."""
        held_out = next((name for name in _HELD_OUT if name in self.splits), None)
        if self.asked or held_out is None or "train" not in self.splits:
            return {}
        return {"train": "train", "test": held_out}

    def _prepare(self, builder: Any, copy: Path) -> None:
        """Makes the copy of a folder of Parquet files in our cache, where it is missing, in place of an older one's."""
        root = cache_folder()
        entry = root.joinpath(*copy.relative_to(root).parts[:3])
        use(entry.relative_to(root).as_posix())
        if copy.is_dir():
            return
        source = str(self.path.resolve())
        marks = [
            mark for mark in root.glob(f"hf/*/*/{_SOURCE}") if mark.read_text("utf-8", "surrogateescape") == source
        ]
        drop(mark.parent.relative_to(root).as_posix() for mark in marks)
        # Arrow does not compress images either.
        make_room(sum(file.stat().st_size for file in self.path.rglob("*.parquet")), f"a copy of {self.path}")
        builder.download_and_prepare()
        (entry / _SOURCE).write_text(source, "utf-8", "surrogateescape")

    def folders(self) -> list[Path]:
        """Where images may lie that a row names by a path.

        Of a data set from the hub, its own part of the cache; and what `datasets` downloaded or unpacked, where the
        paths are its own, not the author's.
        """
        if self.path.is_dir():
            return [self.path]
        import datasets.config
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folders = [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.place, repo_type="dataset")]
        if self.builder is not None and self.builder.name in _PATHS_OF_ITS_OWN:
            folders.append(Path(datasets.config.DOWNLOADED_DATASETS_PATH))
        return folders

    def _check_files(self) -> None:
        """That the files of a data set from the hub, as its author lists them, are none of this machine."""
        assert self.builder is not None
        for files in (self.builder.config.data_files or {}).values():
            for file in files:
                if not str(file).rpartition("::")[2].startswith(_AWAY):
                    raise SourceError(f"{self.spec}: it lists {file}, a file of this machine, and is not read")

    def _check_names(self, folder: Path) -> None:
        """That what a saved dataset says of its own files stays within its folder."""
        state = json.loads((folder / "state.json").read_text("utf-8"))
        for name in [*self.splits, *(str(file["filename"]) for file in state["_data_files"])]:
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                raise SourceError(f"{self.spec}: it names {name!r}, outside of its folder, and is not read")

    def files(self, split: str) -> list[tuple[str, int]]:
        """The files on the disk that a split lies in, in the order of their rows, and how many rows each has."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._one_line():
            if self.builder is None:
                state = json.loads((self.path / split / "state.json").read_text("utf-8"))
                files = [str(self.path / split / file["filename"]) for file in state["_data_files"]]
                return [(file, pa.ipc.open_stream(pa.memory_map(file)).read_all().num_rows) for file in files]
            if not self.path.is_dir():
                return []
            files = [str(file) for file in (self.builder.config.data_files or {}).get(split, ())]
            return [(file, pq.read_metadata(file).num_rows) for file in files]

    def dataset(self, split: str) -> "Dataset":
        """One split, memory-mapped; "": all there is."""
        if split not in self._opened:
            self._opened[split] = self._open(split)
        return self._opened[split]

    def _open(self, split: str) -> "Dataset":
        import datasets

        with self._one_line(), _quietly():
            if self.builder is None:
                self._check_names(self.path / split)
                held: Any = datasets.load_from_disk(str(self.path / split))
            else:
                if self.copy is not None:
                    self._prepare(self.builder, self.copy)
                self.builder.download_and_prepare()
                held = self.builder.as_dataset(split=split)
            return held.flatten_indices() if held._indices is not None else held


def _place(argument: str) -> tuple[str, str]:
    """The folder or name, and the split, if one is named."""
    place, colon, split = argument.rpartition(":")
    if not colon or os.path.exists(home_expanded(argument)):  # noqa: PTH110 - Path.exists raises for a long name
        return argument, ""
    return place, split
