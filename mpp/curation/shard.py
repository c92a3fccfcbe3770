"""The recipe of packing: any source into tar shards, with an index, checksums and a manifest.

source -> the same order for every run -> tasks in several processes -> numbered shards -> manifest.json

A packing that was stopped in any way goes on by the same command and ends in the same bytes.
"""

import contextlib
import errno
import functools
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpp.config import to_dict
from mpp.curation.pack_image import PackOptions
from mpp.curation.pack_task import Figures, Plan, Shard, pack_task
from mpp.curation.packing_folder import PackingFolder
from mpp.curation.pool import count_images, in_processes
from mpp.curation.settings import ShardRecipe
from mpp.data.seeds import permutation
from mpp.data.settings import MAX_IMAGE_MB, flag_numbers
from mpp.data.sources.base import Source, count
from mpp.data.sources.names import printable
from mpp.data.sources.opening import open_source
from mpp.data.sources.patterns import literal, shown
from mpp.data.sources.specs import spec_of
from mpp.data.statistics import can_divide
from mpp.data.workers import worker_count
from mpp.errors import RunError, UserError, command
from mpp.system.process import handle
from mpp.system.progress import Progress
from mpp.training.bad_files import BadFiles, by_kind

_NO_PART_OF_THE_RESULT = ("data", "download", "out", "workers", "max_bad")
_AGAIN = "; the same command again goes on where this one stopped"


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; its text is the signal's name."""


def shard(config: ShardRecipe) -> int:
    """Packs as the recipe says; prints the shards and what they hold on stdout.

    Raises:
        UserError: settings or a source that cannot be packed, or a folder that holds something else.
        RunError: too many bad images, no room, or stopped by a signal; the same command goes on.
    """
    source = open_source(config.data, download=config.download)
    _check_source(source)
    settings = {key: value for key, value in to_dict(config).items() if key not in _NO_PART_OF_THE_RESULT}
    if config.max_image_mb == MAX_IMAGE_MB:  # so that packings from before there was such a setting can go on
        del settings["max_image_mb"]
    identity = {"source": printable(shown(config.data)), "fingerprint": source.fingerprint(), "settings": settings}
    folder = PackingFolder(Path(config.out).expanduser(), identity)
    if folder.manifest is not None:
        return _report_complete(config, folder)
    print(f"source: {source.describe()}", file=sys.stderr)
    for warning in source.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    if source.label_sets() is not None:
        print("WARNING: a shard holds one label an image: the several of these are left behind", file=sys.stderr)
    order = permutation(config.seed, 0, len(source)) if config.shuffle else np.arange(len(source))
    plan = Plan(order, config.shard_images, config.shard_mb * 10**6, _options(config))
    begun = time.monotonic()
    try:
        with _stoppable(), folder.locked():
            if folder.manifest is not None:  # another process has finished it meanwhile
                return _report_complete(config, folder)
            packed = _pack(config, source, plan, folder)
    except Stopped as stopped:
        raise RunError(f"stopped by {stopped}{_AGAIN}") from None
    except OSError as error:
        what = f"cannot write to {folder.out} ({error.strerror or error})"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        todo = "make room" if full else "check the path and its permissions"
        raise RunError(f"{what}; {todo}, and run the same command again, which goes on") from error
    print(f"{count(packed, 'image')} read at {packed / (time.monotonic() - begun):,.0f} images/s")
    _report(config, folder)
    return 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Has SIGINT and SIGTERM raise `Stopped`, in the main thread (see `handle`)."""

    def stop(number: int, _: object) -> None:
        raise Stopped(signal.Signals(number).name)

    restore = handle((signal.SIGINT, signal.SIGTERM), stop)
    try:
        yield
    finally:
        restore()


def _options(config: ShardRecipe) -> PackOptions:
    return PackOptions(config.data_config.decode_options(config.in_chans), config.resize, config.encode, config.quality)


def _report_complete(config: ShardRecipe, folder: PackingFolder) -> int:
    folder.check_complete()
    folder.clean_up()
    print(f"{folder.out} is complete: nothing to do")
    _report(config, folder)
    return 0


def _check_source(source: Source) -> None:
    if source.weights is not None:
        raise UserError(
            f"{source.name} has weights, which shards cannot have: leave them out, and give them in training"
        )
    for name in source.classes or ():
        # As the shards will be read.
        is_utf8 = name.encode("utf-8", "ignore").decode() == name
        if not name.strip() or name.strip() != name or len(name.splitlines()) != 1 or not is_utf8:
            raise UserError(
                f"{source.name} has a class called {name!r}, which cannot stand in a line of classes.txt; rename it"
            )


def _pack(config: ShardRecipe, source: Source, plan: Plan, folder: PackingFolder) -> int:
    """Packs what is not there yet and finishes the folder; returns how many images were read for it."""
    done = folder.done(plan.tasks)
    tasks = [task for task in range(plan.tasks) if task not in done]
    before = sum(plan.images(task) for task in done)
    if done:
        print(f"goes on after {before:,} of {count(len(plan.order), 'image')}", file=sys.stderr)
    bad = BadFiles(folder.bad_files, config.data_config.max_bad_share, setting="--max-bad")
    figures, shards = Figures(len(source.classes or ()), config.in_chans), []
    workers = max(1, worker_count(config.workers, 1))
    work = functools.partial(_pack_and_save, source, plan, folder)
    with (
        Progress("packing", len(plan.order), done=before) as progress,
        contextlib.closing(
            in_processes(work, tasks, workers, lambda images: progress.to(before + images), _AGAIN)
        ) as running,
    ):
        for task in range(plan.tasks):  # in order, so that whether there are too many bad ones depends on no timing
            if task not in done:
                next(running)
            record = folder.record(task)
            bad.add(record.bad, plan.images(task))
            figures.merge(record.figures)
            shards += record.shards
    _finish(source, folder, figures, bad, shards)
    return len(plan.order) - before


def _pack_and_save(source: Source, plan: Plan, folder: PackingFolder, task: int) -> None:
    record = pack_task(source, plan, folder.work, task)
    count_images(0)  # a process that lost its parent must not write into what another run may have finished
    folder.save(task, record)


def _finish(source: Source, folder: PackingFolder, figures: Figures, bad: BadFiles, shards: list[Shard]) -> None:
    images = figures.colours.images
    if not images:
        raise RunError(f"no image of {source.name} could be packed ({by_kind(bad.kinds())}); see {folder.bad_files}")
    mean, std = (values.round(6).tolist() for values in figures.colours.mean_std())
    counts = figures.class_counts.tolist()
    classes = source.classes if source.label_sets() is None else None  # a shard has no room for several labels
    manifest = {
        "images": images,
        "classes": dict(zip(classes, counts, strict=True)) if classes is not None else None,
        "unlabelled": images - sum(counts),
        "bad_files": dict(bad.kinds()),
        "mean": mean,
        "std": std,
        "sizes": figures.sizes(),
    }
    folder.finish(shards, classes, manifest)
    folder.check_complete()
    folder.clean_up()


def _report(config: ShardRecipe, folder: PackingFolder) -> None:
    """Prints what the folder holds, and how to train on it."""
    manifest: dict[str, Any] = folder.manifest or {}
    size = sum(each["bytes"] for each in manifest["shards"])
    shards = count(len(manifest["shards"]), "shard")
    print(f"{folder.out}: {count(manifest['images'], 'image')} in {shards}, {size:,} bytes; figures in manifest.json")
    if manifest["bad_files"]:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in manifest["bad_files"].items())
        print(f"left out, named in {folder.bad_files}: {kinds}")
    if manifest["classes"] is not None and manifest["unlabelled"]:
        print(f"{manifest['unlabelled']:,} have no label, and so a training will see none of the labels")
    words = [f"--data {shlex.quote(spec_of('shards', f'{literal(str(folder.out))}/*.tar'))}"]
    if can_divide(manifest["std"]):
        words += [f"--data.{key} {flag_numbers(manifest[key])}" for key in ("mean", "std")]
    words += _options(config).packed_reading.flags()
    words.append(f"--run-dir {shlex.quote(f'runs/{folder.out.resolve().name}')}")  # runs/first may be there already
    print(f"train on it: {command('pretrain')} {' '.join(words)}")
