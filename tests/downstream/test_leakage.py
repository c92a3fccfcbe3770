"""Test images that were seen before, in labelled images and in those of a pretraining."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpp.config import to_yaml
from mpp.data.settings import DataConfig
from mpp.data.sources.base import SourceError
from mpp.data.sources.opening import open_source
from mpp.downstream.labelled import open_labelled
from mpp.downstream.leakage import notes_on_pretraining, notes_on_test
from mpp.downstream.settings import FinetuneConfig
from mpp.pretraining.settings import PretrainConfig


def write(folder: Path, config: PretrainConfig | FinetuneConfig) -> str:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    return str(folder)


def test_test_images_that_weights_were_pretrained_on(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images[:6])
    np.save(tmp_path / "b.npy", images[4:])
    test = open_source(f"array:{tmp_path}/b.npy")
    first = write(tmp_path / "first", PretrainConfig(data=DataConfig(source=f"array:{tmp_path}/a.npy")))
    second = write(tmp_path / "second", PretrainConfig(data=DataConfig(source=f"array:{tmp_path}/b.npy"), init=first))
    tuned = write(tmp_path / "tuned", FinetuneConfig(init=f"{second}/model"))

    def notes(init: str, *indices: int) -> list[str]:
        return notes_on_pretraining(init, test, np.array(indices))

    told = "are in the pretraining data of {}, array:{}/{}.npy"
    (one,) = notes(first, 0, 1, 2)
    said = f"2 of the 3 test images {told.format(first, tmp_path, 'a')}, 2 byte for byte, such as image 0"
    assert one.startswith(said)
    assert notes(first, 2, 3) == []
    oldest = write(tmp_path / "oldest", PretrainConfig(data=DataConfig(source=f"array:{tmp_path}/a.npy")))
    lines = (tmp_path / "oldest" / "config.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "oldest" / "config.yaml").write_text("".join(line for line in lines if not line.startswith("init:")))
    assert notes(oldest, 0, 1, 2)[0].startswith(f"2 of the 3 test images {told.format(oldest, tmp_path, 'a')}")
    for init in (second, f"{second}/model", f"{second}/checkpoints/step_000000001.pt", tuned, f"{tuned}/"):
        both = notes(init, 0, 1, 2)
        assert both[0].startswith(f"3 of the 3 test images {told.format(second, tmp_path, 'b')}, 3 as the same files")
        assert both[1:] == [one]
    for init in ("resnet18", "none", "", f"random:{first}", str(tmp_path)):
        assert notes(init, 0, 1, 2) == []
    (tmp_path / "a.npy").unlink()
    assert "the test images were not compared with the pretraining data of" in notes(first, 0)[0]
    remote = write(tmp_path / "remote", PretrainConfig(data=DataConfig(source="shards:s3://somewhere/a.tar")))
    assert f"pretraining data of {remote}, shards:s3://somewhere/a.tar" in notes(remote, 0)[0]
    itself = write(tmp_path / "itself", PretrainConfig(data=DataConfig(source="demo"), init=str(tmp_path / "itself")))
    assert notes(itself, 0) == []


def test_test_images_among_the_labelled_ones(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(12) % 2
    np.savez(tmp_path / "train.npz", images=images[:8], labels=labels[:8])
    np.savez(tmp_path / "test.npz", images=images[6:], labels=labels[6:])
    np.savez(tmp_path / "part.npz", images=images[2:6], labels=labels[2:6])
    train, test, part = (f"array:{tmp_path}/{name}.npz" for name in ("train", "test", "part"))

    def notes(data: str, test: str = "", *inits: str) -> list[str]:
        return notes_on_test(open_labelled(data, test), inits)

    (note,) = notes(train, test)
    assert note.startswith("WARNING: 2 of the 6 test images are in the training images, 2 byte for byte, such as image")
    assert note.endswith(": figures will be too good")
    with pytest.raises(SourceError, match=r"all 4 test images of .*part.* are among the training images of .*train"):
        notes(train, part)
    assert notes(part, test) == []
    first = write(tmp_path / "first", PretrainConfig(data=DataConfig(source=part)))
    assert [line.partition(" in the ")[2][:11] for line in notes(train, test, first)] == ["training im"]
    assert [line.partition(" in the ")[2][:11] for line in notes(part, train, first)] == ["training im", "pretraining"]
    # A fifth that is held out of images of which some are there twice; none of it is compared with itself.
    again = np.repeat(np.arange(12), np.where(np.arange(12) < 8, 2, 1))
    np.savez(tmp_path / "twice.npz", images=images[again], labels=labels[again])
    (note,) = notes(f"array:{tmp_path}/twice.npz")
    assert note.startswith("WARNING: ")
    assert "of the 4 test images are in the training images" in note
    assert notes(train) == []
    # What is not trained on does not count, nor what is not tested.
    labelled = open_labelled(train, test)
    assert notes_on_test(labelled, [], train=np.arange(6)) == notes_on_test(labelled, [], test=np.arange(2, 6)) == []
    # Validation images only choose: to test on them is told, and not refused.
    val, val_labels = open_source(part), np.zeros(4, dtype=np.int64)
    chosen = replace(open_labelled(train, part), train_labels=np.full(8, -1), val=val, val_labels=val_labels)
    assert [line[9:60] for line in notes_on_test(chosen, [])] == ["4 of the 4 test images are in the validation images"]
