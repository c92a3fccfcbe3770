"""The embed tool: features of any images by any encoder, written to a file; or a search in such a file.

    images -> loader -> forward pass, pooled -> parts, in .NAME.parts/ beside the file -> the file, whole

A part holds the features of some images in a row. A command that was stopped goes on with the parts that are missing,
with as many processes as it likes; each process makes its share of them.
"""

import contextlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mpp import dist
from mpp.data.reader import Bad
from mpp.data.sources.base import Source, count
from mpp.data.sources.names import printable
from mpp.dist import World
from mpp.downstream.feature_file import Record, Rows, check_writable, read_settings, write_features
from mpp.downstream.feature_parts import Parts, changes
from mpp.downstream.feature_search import search
from mpp.downstream.features import FrozenEncoder, stream_features
from mpp.downstream.inference_settings import EmbedRecipe, check_embed
from mpp.downstream.predict import as_one, open_by_split
from mpp.downstream.start import open_frozen
from mpp.errors import RunError, Unreachable, UserError, without_credentials
from mpp.model.kernel_choice import EVALUATION_BATCH
from mpp.system.progress import Progress, say
from mpp.training.run_folder import on_main, once_a_machine, processes

_PART_BYTES = 2**28  # at most, and so the memory that they take
_PARTS = 1000  # about as many at most, so that a folder of them is no burden
T = TypeVar("T")
Found = tuple[np.ndarray, np.ndarray, list[Bad]]  # features, the index of each, and what is bad


def embed(config: EmbedRecipe) -> int:
    """Writes the features of images to `out`, or with `index` finds images that are alike. Returns 0.

    Raises:
        UserError: bad input, before anything is written; a file or parts of other features.
        RunError: too many images that cannot be decoded, features that are not finite, a full disk.
    """
    check_embed(config)
    if config.index:
        return search(config)
    with processes(config, "encoder.device") as (world, device):
        out = Path(config.out).expanduser()
        check_writable(out)
        images = once_a_machine(world, lambda: Images.opened(config))
        dist.agree(images.facts)
        frozen = open_frozen(
            config.init, config.encoder, (config.layer,), world, device, quarters=config.pool == "quarters"
        )
        if config.pool not in (pools := (*frozen.pools, *(("none",) if frozen.is_vit else ()))):
            raise UserError(f"--pool {config.pool}: of {config.init} take {' or '.join(pools)}")
        _embed(config, out, images, frozen, _settings(config, frozen, images), world)
    return 0


@dataclass(frozen=True, eq=False)
class Images:
    """The images of all splits, one after the other."""

    splits: Mapping[Any, Source]
    """By name; that of files is empty."""

    @classmethod
    def opened(cls, config: EmbedRecipe) -> "Images":
        """Those that the settings name. Raises UserError where there are none."""
        found = cls(open_by_split(config))
        if config.images and not len(found.source):
            raise UserError(f"there is no image in --images {printable(' '.join(config.images))}")
        return found

    @property
    def source(self) -> Source:
        """All of them as one."""
        return as_one(self.splits)

    def facts(self) -> dict[str, str]:
        """What must be the same for all ranks."""
        return {f"images {split}".strip(): source.listing() for split, source in self.splits.items()}

    def records(self, positions: np.ndarray) -> Iterator[Record]:
        """Names, classes (`;` between several) and splits of these images, ascending positions among all."""
        start = 0
        for split, source in self.splits.items():
            here = positions[(positions >= start) & (positions < start + len(source))] - start
            names = _label_names(source)
            for index in here.tolist():
                yield Record(source.location(index).removeprefix("./"), names(index), split, index)
            start += len(source)


def _label_names(source: Source) -> Callable[[int], str]:
    """Gives the class of an image by its number, several with `;` between, "" where it has none."""
    classes, sets = source.classes or (), source.label_sets()

    def of_one(index: int) -> str:
        label = source.label(index)
        return classes[label] if classes and label is not None else ""

    def of_set(index: int) -> str:
        number = -1 if sets is None else sets.number[index]
        return ";".join(itertools.compress(classes, sets.table[number])) if sets and number >= 0 else ""

    return of_one if sets is None else of_set


def _settings(config: EmbedRecipe, frozen: FrozenEncoder, images: Images) -> dict[str, Any]:
    """All that the features depend on, and how to make those of another image, as JSON values."""
    return {
        "format": 1,
        "init": config.init,
        "data": without_credentials(config.data),
        "folder": str(Path.cwd()),
        "layer": frozen.layers[0],
        "pool": config.pool,
        "dtype": config.dtype,
        "precision": frozen.precision,
        "seed": config.encoder.seed,
        "image_hw": list(frozen.image_hw),
        "max_image_mb": config.encoder.max_image_mb,
        **frozen.identity(),
        "images": {split: [len(source), source.fingerprint()] for split, source in images.splits.items()},
    }


def _is_done(out: Path, made_by: dict[str, Any]) -> bool:
    """Whether the file has these very features; raises UserError where it has others."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file")
    was = read_settings(out)
    if was is None:
        raise UserError(f"--out {out} is there already; remove it, or give another --out")
    if changed := changes(was, made_by):
        raise UserError(f"--out {out} has other features ({changed}); remove it, or give another --out")
    return True


def _embed(
    config: EmbedRecipe, out: Path, images: Images, frozen: FrozenEncoder, settings: dict[str, Any], world: World
) -> None:
    source, dtype = images.source, np.dtype(config.dtype)
    blank = torch.zeros(1, frozen.weights.in_chans, *frozen.image_hw, dtype=torch.uint8, device=frozen.device)
    shape = tuple(frozen.read(blank, config.pool).shape[1:])
    row_bytes = dtype.itemsize * math.prod(shape)
    parts = Parts(out, len(source), _part_size(len(source), row_bytes))
    with contextlib.ExitStack() as stack:

        def start() -> bool:
            if out.exists() and _is_done(out, settings):
                return True
            _check_room(out, (len(source) + parts.size * len(parts.missing())) * row_bytes)
            stack.enter_context(parts.claimed(settings))
            return False

        if on_main(world, start):
            _say(world, f"{out} is complete: it has these features of these images")
            return
        numbers = f"{' x '.join(map(str, shape))} numbers ({config.dtype}), {len(source) * row_bytes / 1e6:,.1f} MB"
        splits = ", ".join(f"{len(of):,} {split}" for split, of in images.splits.items() if split)
        _say(world, f"{count(len(source), 'image')}{f' ({splits})' if splits else ''}; of each {numbers} in all")
        missing = parts.missing()
        if len(missing) < parts.number:
            _say(world, f"going on: {parts.number - len(missing):,} of {count(parts.number, 'part')} are there")
        with _explained(out):
            _make_parts(config, parts, missing, source, frozen, world)
            dist.barrier(patient=True)
            if world.main:  # the others leave: in a collective they would wait for $MPP_TIMEOUT seconds at most
                _finish(out, parts, images, shape, dtype, settings)


def _part_size(images: int, row_bytes: int) -> int:
    """Images of a part: whole batches."""
    most = min(math.ceil(images / _PARTS), _PART_BYTES // row_bytes)
    return max(1, math.ceil(most / EVALUATION_BATCH)) * EVALUATION_BATCH


def _check_room(out: Path, needed: int) -> None:
    folder = next(each for each in out.absolute().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write --out {out}; choose a file in a folder that can be written")
    if needed > (free := shutil.disk_usage(folder).free):
        less = "take --dtype float16, another --pool, or a disk with room"
        raise UserError(
            f"--out {out} takes {needed / 1e9:,.1f} GB while it is made, of {free / 1e9:,.1f} GB free: {less}"
        )


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except (UserError, Unreachable):
        raise
    except OSError as error:
        again = "make room and run the same command again, which goes on with what there is"
        raise RunError(f"cannot write {out}: {error.strerror or error}; {again}") from error


def _make_parts(
    config: EmbedRecipe, parts: Parts, missing: list[int], source: Source, frozen: FrozenEncoder, world: World
) -> None:
    """Makes this rank's share of the missing parts, in one pass over their images."""
    if missing:
        frozen.settle()  # of all ranks together, also those without a share
    mine = missing[world.rank :: world.size]
    if not mine:
        return
    positions = np.concatenate([parts.positions(part) for part in mine])
    dtype = getattr(torch, config.dtype)
    bad_files = parts.bad_files(world.rank, config.max_bad_share)

    def encode(images: Tensor) -> Tensor:
        return frozen.read(images, config.pool).to(dtype)

    with contextlib.closing(frozen.batches(source, positions)) as batches:
        found = _shown(stream_features(encode, batches, frozen.device), len(positions), world.main)
        waiting = iter(mine)
        part, rows, indices, bad = next(waiting), list[np.ndarray](), list[np.ndarray](), list[Bad]()
        for features, index, lost in found:
            if not np.isfinite(features).all():
                why = "overflow float16: take --dtype float32" if config.dtype == "float16" else "are not finite"
                raise RunError(f"features of {printable(source.location(int(index[0])))} or the next images {why}")
            rows, indices, bad = [*rows, features], [*indices, index], [*bad, *lost]
            bad_files.add(lost, len(index) + len(lost))
            if len(bad) + sum(map(len, indices)) == len(parts.positions(part)):  # batches never lie in two
                parts.write(part, np.concatenate([row for row in rows if len(row)] or rows), np.concatenate(indices))
                part, rows, indices, bad = next(waiting, -1), [], [], []


def _shown(found: Iterable[Found], total: int, on: bool) -> Iterator[Found]:
    """Passes on what is found, and shows how far it is."""
    began, done = time.monotonic(), 0
    with Progress("features", total, on=on) as progress:
        for each in found:
            yield each
            number = len(each[1]) + len(each[2])
            progress.add(number)
            done += number
    if on:
        say(f"{count(done, 'image')}, {done / max(time.monotonic() - began, 1e-9):,.0f} images/s")


def _finish(
    out: Path, parts: Parts, images: Images, shape: tuple[int, ...], dtype: np.dtype[Any], settings: dict[str, Any]
) -> None:
    """Writes the file from its parts, then removes them."""
    positions = parts.indices()
    if not len(positions):
        raise RunError(f"none of the {count(parts.images, 'image')} could be decoded; {parts.folder} has the list")
    rows = Rows(len(positions), shape, dtype, parts.features, lambda: images.records(positions), settings)
    write_features(out, rows)
    lost = parts.move_bad_files(out.with_name(f"{out.name}.bad_files.csv"))
    print(f"written: {out}, {count(len(positions), 'image')}{f'; {lost}' if lost else ''}")
    parts.remove()


def _say(world: World, text: str) -> None:
    if world.main:
        say(text)
