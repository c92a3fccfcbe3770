"""Test images that are no longer new: among the images that teach a classifier, or those of the pretraining, as far as
the runs of this library tell."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mpp.config.files import load_yaml
from mpp.data.sources.base import Source, SourceError, Subset
from mpp.data.sources.opening import open_source
from mpp.data.sources.overlap import MOST_IMAGES, shared
from mpp.data.sources.patterns import shown
from mpp.errors import UserError


def notes_on_labelled(
    test: Source, tested: np.ndarray, others: Mapping[str, tuple[Source | None, np.ndarray | None]]
) -> list[str]:
    """Compares test images with the other labelled images; one sentence a finding.

    Args:
        test: their source.
        tested: int64 (n,), which of its images are tested.
        others: "training" and "validation" -> a source and the label of each of its images, below 0 for those that are
            not used; None where there are none. A kind of more than `overlap.MOST_IMAGES` is not compared: on a network
            file system the sizes of so many files alone take minutes, at each start.

    Raises:
        SourceError: all test images are among the others of a kind.
    """
    notes: list[str] = []
    for kind, (there, labels) in others.items():
        if there is None or labels is None:
            continue
        used = np.flatnonzero(labels >= 0)
        if len(used) > MOST_IMAGES:
            continue
        found = shared(test, tested, Subset(there, used))
        if found.all_of_them:
            what = f"all {found.tested:,} test images of {test.name} are among the {kind} images of {there.name}"
            raise SourceError(f"{what}: name other images for the test")
        sentences = found.sentences(f"the {kind} images")
        if found.found:
            sentences[0] = f"WARNING: {sentences[0]}: figures will be too good"
        notes += sentences
    return notes


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
