from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mpp.downstream.features import FrozenEncoder
from mpp.study.frozen import _probe
from mpp.study.plan import Plan


def test_held_out_training_images_choose_how_the_probe_reads_and_no_test_image(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = {"train": np.arange(200) % 2, "test": np.arange(100) % 2}
    known = {("mean", "train"): False, ("mean", "test"): True, ("quarters", "train"): True, ("quarters", "test"): False}

    def extract(pool: str, layer: int) -> Any:
        def of(split: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            told = labels[split][indices] if known[pool, split] else rng.integers(0, 2, len(indices))
            return np.stack([told, rng.random(len(indices))], axis=1).astype(np.float32), np.arange(len(indices))

        return of

    labelled = {"train": "train", "test": "test", "val": None, "val_labels": None, "train_groups": None}
    labelled |= {
        "train_labels": labels["train"],
        "train_indices": range(200),
        "test_labels": labels["test"],
        "classes": ("a", "b"),
    }
    taught: list[int] = []

    def fitted(images: int) -> SimpleNamespace:
        taught.append(images)
        return SimpleNamespace(held_out=len(taught), top1=0.5)

    config = SimpleNamespace(layers=(-1,), pool=("mean", "quarters"))
    plan = SimpleNamespace(config=config, labelled=SimpleNamespace(**labelled, truth=lambda of: of))
    frozen = SimpleNamespace(layers=(-1,), depth=4, pools=("mean", "quarters"), extract=extract)
    mean, chosen = _probe(cast(Plan, plan), cast(FrozenEncoder, frozen))
    assert chosen is not None
    assert (chosen["pool"], chosen["held_out"]) == ("quarters", 1)
    assert mean != chosen["top1"] < 0.7
    # A part of the images chooses, all of them teach the chosen one.
    monkeypatch.setattr("mpp.study.frozen._CHOOSING", 50)
    monkeypatch.setattr("mpp.study.frozen.sweep_linear", lambda train, *_, **__: fitted(len(train[1])))
    _probe(cast(Plan, plan), cast(FrozenEncoder, frozen))
    assert taught == [50, 50, 200, 200]
    # What the study does not read is not chosen, be it the best.
    config.pool, known["mean", "train"], known["quarters", "train"] = ("quarters",), True, False
    monkeypatch.undo()
    _, chosen = _probe(cast(Plan, plan), cast(FrozenEncoder, frozen))
    assert chosen is not None
    assert chosen["pool"] == "quarters"
    config.pool = ("mean",)
    assert _probe(cast(Plan, plan), cast(FrozenEncoder, frozen))[1] is None
