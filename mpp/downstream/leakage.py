"""Test images that are not new: among those that teach a classifier or choose its settings, or among those of the
pretraining, as far as the runs of this library tell."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from mpp.config.files import load_yaml
from mpp.data.sources.base import Source, SourceError, Subset
from mpp.data.sources.opening import open_source
from mpp.data.sources.overlap import MOST_IMAGES, shared
from mpp.data.sources.patterns import shown
from mpp.downstream.labelled import Labelled
from mpp.errors import UserError


def notes_on_test(
    labelled: Labelled,
    inits: Sequence[str],
    train: Int64[np.ndarray, " n"] | None = None,
    test: Int64[np.ndarray, " m"] | None = None,
) -> list[str]:
    """Compares test images with the images that they are to be new beside; one sentence a finding.

    These are the training and validation images, and those of the pretraining of `inits`. More than
    `overlap.MOST_IMAGES` of a kind are not compared: on a network file system the sizes of so many files alone take
    minutes, at each start.

    Args:
        labelled: the labelled images.
        inits: weights, as `open_weights` takes them.
        train: images to train on, those of the training pool if None.
        test: images to test, all if None.

    Raises:
        SourceError: all test images are among the training images.
    """
    train = labelled.train_indices if train is None else train
    test = labelled.test_indices if test is None else test
    kinds = [("training", labelled.train, train)]
    if labelled.val is not None and labelled.val_labels is not None:
        kinds.append(("validation", labelled.val, np.flatnonzero(labelled.val_labels >= 0)))
    notes: list[str] = []
    for kind, there, used in kinds:
        if len(used) > MOST_IMAGES:
            continue
        found = shared(labelled.test, test, Subset(there, used))
        if found.all_of_them and kind == "training":
            what = f"all {found.tested:,} test images of {labelled.test.name} are among the training images"
            raise SourceError(f"{what} of {there.name}: name other images for the test")
        sentences = found.sentences(f"the {kind} images")
        if found.found:
            sentences[0] = f"WARNING: {sentences[0]}: figures will be too good"
        notes += sentences
    return notes + [note for init in inits for note in notes_on_pretraining(init, labelled.test, test)]


def notes_on_pretraining(init: str, test: Source, indices: np.ndarray) -> list[str]:
    """Compares test images with the images that an encoder was pretrained on; one sentence a finding.

    Args:
        init: weights, as `open_weights` takes them. A run's own `init` is followed, too.
        test: source of the test images.
        indices: int64 (n,), which of its images are tested.
    """
    notes: list[str] = []
    known: set[Path] = set()
    while (run := _run_of(init)) is not None and run.resolve() not in known:
        known.add(run.resolve())
        try:
            config = load_yaml(run / "config.yaml")
            init = str(config.get("init") or "")  # missing in the oldest runs
            if "objective" not in config:  # a fine-tuning run: it held its own test images apart
                continue
            source = str(config["data"]["source"])
        except (UserError, KeyError, TypeError):
            break
        what = f"the pretraining data of {run}, {shown(source)}"
        if "://" in source:
            notes.append(f"the test images were not compared with {what}")
            continue
        try:
            notes += shared(test, indices, open_source(source)).sentences(what)
        except SourceError as error:
            notes.append(f"the test images were not compared with {what}: {error}")
    return notes


def _run_of(init: str) -> Path | None:
    """The run folder of weights that are named by it, its model or one of its checkpoints."""
    path = Path(init).expanduser()
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    elif path.name == "model":
        path = path.parent
    return path if init and (path / "config.yaml").is_file() else None
