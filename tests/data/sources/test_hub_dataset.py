"""Hugging Face datasets as they are opened: where they lie, their splits, and which files they may name."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from mpp.data.sources.base import SourceError
from mpp.data.sources.hub_dataset import OpenedDataset
from mpp.data.sources.opening import open_source, open_splits
from mpp.errors import install
from mpp.system.cache import entries
from tests.data.sources.parquet import write_parquet
from tests.data.sources.reading import all_read, refused

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("no_progress_bars")


def test_splits(split_in_two, pictures):
    assert "test" in open_splits(split_in_two)
    train, test = open_source(split_in_two), open_source(split_in_two, "test")
    assert all_read(train) == [(pictures[n], n % 3) for n in range(11, -1, -1)]
    assert all_read(test) == [(pictures[n], n % 3) for n in range(19, 11, -1)]
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert test.labels().tolist() == [n % 3 for n in range(19, 11, -1)]
    assert test.labels().dtype == np.int64
    assert train.describe() == "12 images in 3 classes; the split train alone"
    saved, parquet = (Path(split_in_two[3:]).glob(name) for name in ("train/*.arrow", "train-*"))
    (file,) = (*saved, *parquet)
    assert train.where(3) == f"row 3 of {file} (8.png)"
    for index in (-1, 12):
        with pytest.raises(IndexError):
            train.read(index)


def test_a_data_set_is_opened_once_for_both_splits(split_in_two, monkeypatch):
    opened = []
    for name in ("load_from_disk", "load_dataset_builder"):
        real = getattr(datasets, name)
        monkeypatch.setattr(datasets, name, lambda *args, real=real, **more: opened.append(args) or real(*args, **more))
    splits = open_splits(split_in_two)
    assert (len(splits["train"]), len(splits["test"])) == (12, 8)
    assert len(opened) == (
        1 if opened[0][0] == "parquet" else 2
    )  # the builder of both splits, or each of the saved ones


def test_one_split_by_name(split_in_two):
    source = open_source(f"{split_in_two}:test")
    assert all_read(source) == all_read(open_source(split_in_two, "test"))
    assert "test" not in open_splits(f"{split_in_two}:test")
    assert "has no test split of its own" in refused(f"{split_in_two}:test", "test")
    assert "has no split 'tset' but the splits train, test; choose one of them" in refused(f"{split_in_two}:tset")


def test_one_saved_dataset(made, tmp_path, pictures):
    made().save_to_disk(str(tmp_path / "one"))
    spec = f"hf:{tmp_path / 'one'}"
    assert "test" not in open_splits(spec)
    source = open_source(spec)
    assert source.describe() == "20 images in 3 classes"
    assert source.read(0) == (pictures[19], 1)
    assert "has no split 'test' but no splits" in refused(f"{spec}:test")


def test_validation_is_held_out_where_there_is_no_test(made, tmp_path):
    datasets.DatasetDict(train=made(0, 12), validation=made(12, 20)).save_to_disk(str(tmp_path / "v"))
    assert len(open_source(f"hf:{tmp_path / 'v'}", "test")) == 8
    datasets.DatasetDict(one=made(0, 12), two=made(12, 20)).save_to_disk(str(tmp_path / "w"))
    assert "test" not in open_splits(f"hf:{tmp_path / 'w'}")
    assert "has the splits one, two and none called train" in refused(f"hf:{tmp_path / 'w'}")
    datasets.DatasetDict(one=made(0, 12)).save_to_disk(str(tmp_path / "x"))
    assert open_source(f"hf:{tmp_path / 'x'}").describe() == "12 images in 3 classes"


def test_a_copy_of_parquet_that_was_touched_makes_room_for_the_next(made, tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mpp.data.sources.hub_dataset.use", lambda *names: None)  # by another process, that is
    folder = write_parquet(tmp_path / "rows", train=made())
    (tmp_path / "more").mkdir()
    write_parquet(tmp_path / "more" / "rows", train=made())
    open_source(f"hf:{tmp_path}/more/rows")
    for second in range(1, 4):
        for path in folder.rglob("*.parquet"):
            os.utime(path, (second, second))
        assert len(open_source(f"hf:{folder}")) == len(pictures)
        assert [entry.kind for entry in entries()] == ["datasets"] * 2
    monkeypatch.setenv("MPP_CACHE_LIMIT", "1kB")
    os.utime(path)
    with pytest.raises(SourceError, match=r"a copy of .*rows takes .*, of the 1 kB that MPP_CACHE_LIMIT allows"):
        open_source(f"hf:{folder}")


def test_parquet_that_is_written_again_is_read_again(made, tmp_path, pictures):
    folder = write_parquet(tmp_path / "p", train=made(0, 12))
    first = open_source(f"hf:{folder}")
    write_parquet(folder, train=made(0, 20))
    os.utime(folder / "train-00000-of-00001.parquet", ns=(0, 10**9))
    second = open_source(f"hf:{folder}")
    assert [len(first), len(second)] == [12, 20]
    assert second.read(0)[0] == pictures[19]


def test_a_saved_data_set_names_no_file_outside_its_folder(made, tmp_path):
    datasets.DatasetDict(train=made(0, 12), test=made(12, 20)).save_to_disk(str(tmp_path / "d"))
    made().save_to_disk(str(tmp_path / "other"))
    listed = (tmp_path / "d" / "dataset_dict.json").read_text()
    (tmp_path / "d" / "dataset_dict.json").write_text(listed.replace('"test"', '"../other"'))
    assert "names '../other', outside of its folder" in refused(f"hf:{tmp_path / 'd'}:../other")
    (tmp_path / "d" / "dataset_dict.json").write_text(listed)
    state = tmp_path / "d" / "train" / "state.json"
    other = next((tmp_path / "other").glob("*.arrow"))
    for name in (str(other), f"../../other/{other.name}"):
        held = json.loads(state.read_text())
        held["_data_files"] = [{"filename": name}]
        state.write_text(json.dumps(held))
        assert f"names '{name}', outside of its folder, and is not read" in refused(f"hf:{tmp_path / 'd'}")


def test_a_data_set_of_the_hub_reads_nothing_of_this_machine(pictures, tmp_path, monkeypatch):
    """As `datasets` opens one by name, whose author lists files or writes paths."""
    private, downloads = tmp_path / "private", tmp_path / "downloads"
    for folder in (private, downloads):
        folder.mkdir()
        (folder / "a.png").write_bytes(pictures[0])
    load = datasets.load_dataset_builder
    cache = {"cache_dir": str(tmp_path / "cache")}
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", downloads)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name: load("imagefolder", data_dir=str(private), **cache)
    )
    assert f"lists {private / 'a.png'}, a file of this machine, and is not read" in refused("hf:somebody/some")
    monkeypatch.setattr(OpenedDataset, "_check_files", lambda self: None)  # the files stand for those that are fetched
    with pytest.raises(OSError, match="outside of the data set"):
        open_source("hf:somebody/some").read(0)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name: load("imagefolder", data_dir=str(downloads), **cache)
    )
    assert open_source("hf:somebody/some").read(0) == (pictures[0], None)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    held = pa.array([{"bytes": None, "path": str(downloads / "a.png")}, {"bytes": None, "path": "private/a.png"}], kind)
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"image": held}), tmp_path / "rows" / "train.parquet")
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name: load("parquet", data_dir=str(tmp_path / "rows"), **cache)
    )
    monkeypatch.chdir(tmp_path)
    # An author's own paths lead neither there nor into the working folder.
    for index, text in enumerate(
        ("outside of the data set", r"No such file .*datasets--somebody--some/private/a\.png")
    ):
        with pytest.raises(OSError, match=text):
            open_source("hf:somebody/some").read(index)


def test_folders_that_are_no_dataset(made, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds neither Parquet files nor a saved dataset" in refused(f"hf:{tmp_path / 'empty'}")
    assert f"there is no folder {tmp_path / 'none'}; check the path" in refused(f"hf:{tmp_path / 'none'}")
    folder = write_parquet(tmp_path / "cut", train=made())
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"cannot read {folder} (" in refused(f"hf:{folder}")
    made().save_to_disk(str(tmp_path / "saved"))
    for arrow in (tmp_path / "saved").glob("*.arrow"):
        arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"cannot read {tmp_path / 'saved'} (" in refused(f"hf:{tmp_path / 'saved'}")
    made().select([]).save_to_disk(str(tmp_path / "none-left"), num_shards=1)
    assert "has no rows; check it" in refused(f"hf:{tmp_path / 'none-left'}")
    made(label=(datasets.Value("int32"), [-7] * 20)).save_to_disk(str(tmp_path / "below"))
    assert "column label: there is a label -7; labels count classes from 0" in refused(f"hf:{tmp_path / 'below'}")


def test_a_name_without_a_connection(monkeypatch, capfd):
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = refused("hf:somebody/some-pictures:train")
    assert "there is no folder somebody/some-pictures, nor can it be had from the Hugging Face hub" in text
    assert text.endswith("; check the name and the connection")
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed(made, tmp_path, capfd):
    datasets.enable_progress_bars()
    folder = write_parquet(tmp_path / "p", train=made())
    capfd.readouterr()
    open_source(f"hf:{folder}")
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "the package datasets is missing (" in refused(f"hf:{tmp_path}")
    assert refused(f"hf:{tmp_path}").endswith(f": {install('hf')}")


def test_home_is_expanded(made, tmp_path, monkeypatch):
    made().save_to_disk(str(tmp_path / "pictures"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("hf:~/pictures")) == 20
    assert not Path("~").exists()
