"""A search in a file of features: the images that are most like a given one, or groups of images that are alike.

A given image is one of the file, or any other, which goes through the same encoder in the same way. Of both there is a
list, and a contact sheet as long as the images are where they were.
"""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source, Subset, count
from mpp.data.sources.dicom import with_frames
from mpp.data.sources.files import FileSource
from mpp.data.sources.names import printable
from mpp.data.sources.opening import open_splits
from mpp.data.sources.specs import check_outside_images
from mpp.data.workers import worker_count
from mpp.dist import World
from mpp.downstream.contact_sheet import COLUMNS, Tile, draw_rows
from mpp.downstream.feature_file import FeatureFile, Record, read_features
from mpp.downstream.feature_parts import changes
from mpp.downstream.feature_space import Space, groups_alike, nearest
from mpp.downstream.features import FrozenEncoder, stream_features
from mpp.downstream.inference_settings import EmbedRecipe
from mpp.downstream.predict import open_images
from mpp.errors import ConfigError, RunError, UserError
from mpp.system.files import make_folder, write_csv, write_whole
from mpp.training.parallel import choose_device, choose_precision
from mpp.weights.opening import open_weights

_FRAME = re.compile(r"(.+), frame \d+", re.DOTALL)
_SHOWN = 24  # rows of the contact sheet; groups that are printed


def search(config: EmbedRecipe) -> int:
    """Prints what `EmbedRecipe` asks of its index, and writes a list and a contact sheet into `out`. Returns 0.

    Raises:
        UserError: a file that is no index, images that are neither files nor in it, other weights than it was made by.
        RunError: none of the images can be decoded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a search in an --index is one process: start it without torchrun")
    index = read_features(config.index)
    if index.features.ndim != 2:
        raise UserError(f"--index {config.index} has patch tokens (--pool none); make one of another --pool")
    device = choose_device(config.encoder.device, World(), "encoder.device")
    name = "duplicates" if config.duplicates else "alike"
    check_outside_images("--out", config.out, [index.settings["data"]])
    queries = [] if config.duplicates else _queries(config, index)
    others = _features_of(config, index, [name for name, row in queries if row < 0], device)
    if config.out:
        make_folder(Path(config.out).expanduser(), (f"{name}.csv", f"{name}.png"))
    space = Space(index.features)
    if config.duplicates:
        hits = _duplicates(config, index, space, device)
    else:
        queries = [(name, row) for name, row in queries if row >= 0 or name in others]
        if not queries:
            raise RunError(f"none of the {count(len(config.images), 'image')} to look for could be decoded")
        hits = _neighbours(config, index, space, queries, others, device)
    if config.out:
        _write(Path(config.out).expanduser(), name, "group" if config.duplicates else "image", hits, index)
    return 0


def _queries(config: EmbedRecipe, index: FeatureFile) -> list[tuple[str, int]]:
    """The images to look for: their names, and their rows in the index, -1 for other files."""
    row_of = {name: row for row, name in enumerate(index.names)}
    queries = []
    for image in config.images:
        if image in row_of:
            paths = [image]
        elif Path(image).expanduser().exists():
            found = open_images([image])
            paths = [_name(found, number) for number in range(len(found))]
        else:
            paths = [name for name in index.names if name.endswith(f"/{image}")]
            if len(paths) != 1:
                what = f"{len(paths):,} images of the index end so; give more of the path" if paths else "not there"
                raise UserError(f"--images {printable(image)}: neither a file nor an image of {config.index}: {what}")
        queries += [(path, row_of.get(path, -1)) for path in paths]
    return queries


def _features_of(
    config: EmbedRecipe, index: FeatureFile, paths: list[str], device: torch.device
) -> dict[str, np.ndarray]:
    """Features of other files, made as those of the index were; files that do not decode are named on stderr."""
    if not paths:
        return {}
    made_by = index.settings
    try:
        weights = open_weights(config.init or made_by["init"])
    except UserError as error:
        raise UserError(
            f"{error}; {config.index} was made in {made_by['folder']}: say by --init where they are"
        ) from error
    precision = config.encoder.precision if config.encoder.precision != "auto" else made_by["precision"]
    frozen = FrozenEncoder(
        replace(weights, max_image_mb=made_by["max_image_mb"]),
        layers=(made_by["layer"],),
        image_hw=tuple(made_by["image_hw"]),
        device=device,
        precision=choose_precision(precision, device, "encoder.precision"),
        workers=worker_count(-1, 1) if len(paths) > 128 else 0,
        seed=made_by["seed"],
        quarters=made_by["pool"] == "quarters",
    )
    if changed := changes({name: made_by[name] for name in frozen.identity()}, frozen.identity()):
        now = f"{config.init or made_by['init']} has changed since"
        raise UserError(f"--index {config.index}: {now} ({changed}); make the index again, or give the old by --init")
    frozen.settle()
    features = dict[str, np.ndarray]()
    with contextlib.closing(frozen.batches(_files(paths), np.arange(len(paths)))) as batches:
        for rows, numbers, bad in stream_features(lambda images: frozen.read(images, made_by["pool"]), batches, device):
            for each in bad:
                print(f"cannot be decoded: {each}", file=sys.stderr)
            features |= {paths[number]: row for number, row in zip(numbers.tolist(), rows, strict=True)}
    return features


class _Hit(NamedTuple):
    """A row of the list: an image of the index, and what it belongs to: an image to look for, or a group."""

    of: str
    cosine: float
    row: int


def _neighbours(
    config: EmbedRecipe,
    index: FeatureFile,
    space: Space,
    queries: list[tuple[str, int]],
    others: dict[str, np.ndarray],
    device: torch.device,
) -> list[_Hit]:
    """The neighbours of each image, which are printed, too."""
    itself = np.array([row for _, row in queries], dtype=np.int64)
    asked = torch.stack([space.rows[row] if row >= 0 else space.of(others[name][None])[0] for name, row in queries])
    hits = list[_Hit]()
    cosines, rows = nearest(space, asked, itself, config.top, device)
    for (name, _), best, those in zip(queries, cosines.tolist(), rows.tolist(), strict=True):
        print(printable(name))
        for cosine, row in zip(best, those, strict=True):
            if cosine >= -1.5:
                print(f"  {cosine:6.3f}  {_shown(index, row)}")
                hits.append(_Hit(name, cosine, row))
    return hits


def _duplicates(config: EmbedRecipe, index: FeatureFile, space: Space, device: torch.device) -> list[_Hit]:
    """The images that are in a group, group by group; the first groups are printed, too."""
    groups, highest = groups_alike(space, config.duplicates, device)
    images = count(sum(map(len, groups)), "image")
    print(f"{count(len(groups), 'group')} of images that are alike by {config.duplicates:g}, {images} in all")
    for group in groups[:_SHOWN]:
        names = " = ".join(_shown(index, row) for row in group[:4].tolist())
        more = f" and {len(group) - 4:,} more" if len(group) > 4 else ""
        print(f"  {highest[group].max():.3f}  {names}{more}")
    if groups[_SHOWN:]:
        print(f"  and {len(groups) - _SHOWN:,} groups more{'' if config.out else ', which --out FOLDER lists'}")
    return [_Hit(str(n), float(highest[row]), row) for n, group in enumerate(groups) for row in group.tolist()]


def _shown(index: FeatureFile, row: int) -> str:
    label = index.labels[row]
    return printable(f"{index.names[row]} ({label})" if label else index.names[row])


def _write(folder: Path, name: str, of: str, hits: list[_Hit], index: FeatureFile) -> None:
    """Writes the list and, where the pictures can be opened, the contact sheet."""
    head = (of, "cosine", *Record._fields)
    table = ((hit.of, f"{hit.cosine:.6f}", *index.record(hit.row)) for hit in hits)
    rows = [list(group) for _, group in itertools.groupby(hits, lambda hit: hit.of)][:_SHOWN]
    written = [folder / f"{name}.csv"]
    try:
        write_csv(written[0], itertools.chain([head], table))
        try:
            pictures = _Pictures(index)
            tiles = [pictures.row(group, asked=of == "image") for group in rows]
        except UserError as error:
            made_in = index.settings["folder"]
            print(
                f"note: no contact sheet, for the images cannot be opened as they were in {made_in}: {error}",
                file=sys.stderr,
            )
        else:
            sheet = draw_rows(tiles, pictures.reading, tuple(index.settings["image_hw"]))
            written.append(folder / f"{name}.png")
            write_whole(written[1], lambda file: sheet.save(file, "PNG"))
    except OSError as error:
        raise RunError(f"cannot write to --out {folder}: {error.strerror or error}") from error
    print(f"written: {', '.join(map(str, written))}")


class _Pictures:
    """The images of an index, opened again. Raises UserError where they are not what they were."""

    def __init__(self, index: FeatureFile) -> None:
        self._index, spec = index, index.settings["data"]
        self._splits: Mapping[Any, Source] = open_splits(spec) if spec else {"": _files(index.names)}
        _, _, _, _, reading, _ = index.settings["input"]
        lists = {name: tuple(reading[name]) for name in ("value_range", "background")}
        self.reading = DecodeOptions(**{**reading, **lists})

    def row(self, hits: list[_Hit], asked: bool) -> list[Tile]:
        """A row of the sheet: these images, with the one that was asked for before them."""
        first = [Tile(*self._asked(hits[0].of), Path(hits[0].of).name)] if asked else []
        tiles = [Tile(*self._place(hit.row), f"{hit.cosine:.3f} {self._index.labels[hit.row]}") for hit in hits]
        return [*first, *tiles][:COLUMNS]

    def _asked(self, name: str) -> tuple[Source, int]:
        if name in self._index.names:
            return self._place(self._index.names.index(name))
        return _files([name]), 0

    def _place(self, row: int) -> tuple[Source, int]:
        name, _, split, number = self._index.record(row)
        if not split:
            return self._splits[split], row
        source = self._splits.get(split)
        if source is None or number >= len(source) or _name(source, number) != name:
            raise UserError(f"{name} is no longer image {number:,} of {split} of {self._index.settings['data']}")
        return source, number


def _name(source: Source, number: int) -> str:
    return source.location(number).removeprefix("./")


def _files(names: list[str]) -> Source:
    """Opens the images of these names: of files, or "PATH, frame N". Raises UserError for a frame that is not there."""
    frames = {name: of[1] for name in names if (of := _FRAME.fullmatch(name)) and not Path(name).exists()}
    paths = list(dict.fromkeys(frames.get(name, name) for name in names)) if frames else names
    files = FileSource("images", Path(), paths)
    if not frames:
        return files
    source = with_frames(files)
    number_of = {_name(source, number): number for number in range(len(source))}
    if gone := [name for name in names if name not in number_of]:
        raise UserError(f"{printable(gone[0])} is not there any more")
    return Subset(source, [number_of[name] for name in names])
