"""DICOM files of several frames: each one an image, against the frames that pydicom reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.data.decoding import decode
from mpp.data.settings import DecodeOptions
from mpp.data.sources import names
from mpp.data.sources.base import SourceError
from mpp.data.sources.opening import open_source
from tests.data.picture_files import as_dicom

pydicom = pytest.importorskip("pydicom")
GREY = DecodeOptions(1, (0.0, 4095.0))
FILES = Path(pydicom.__file__).parent / "data" / "test_files"
FRAMES = np.arange(3 * 64).reshape(3, 8, 8).astype(np.uint16) * 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of class a a plain file and a file of three frames, of class b one by its content, and what has no pixels."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data/a/1.dcm").write_bytes(as_dicom(FRAMES[0]))
    (tmp_path / "data/a/2.dcm").write_bytes(as_dicom(FRAMES))
    (tmp_path / "data/b/IM0001").write_bytes(as_dicom(FRAMES[2]))
    (tmp_path / "data/b/report.dcm").write_bytes((FILES / "test-SR.dcm").read_bytes())
    (tmp_path / "data/b/README").write_text("not an image")
    return tmp_path / "data"


def test_each_frame_is_an_image(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # the second time out of the cache
        source = open_source(f"folder:{folder}")
        found = source.labels()
        assert found is not None
        assert found.tolist() == [0, 0, 0, 0, 1]
        expected = [FRAMES[0], *FRAMES, FRAMES[2]]
        for index, values in enumerate(expected):
            data, label = source.read(index)
            assert label == found[index]
            assert np.array_equal(decode(data, GREY)[:, :, 0], decode(values, GREY)[:, :, 0])
        assert source.describe() == (
            "5 images in 2 classes; ignored 1 other file; 1 DICOM file of several frames; "
            "1 DICOM file without pixels passed over"
        )
        assert [source.location(index).rpartition("data/")[2] for index in (0, 2)] == ["a/1.dcm", "a/2.dcm, frame 1"]
        assert len({*source.placement(np.arange(5)).place.tolist()}) == 5
        assert len([*source.read_many([1, 3])]) == 2
        assert len([*cache.glob("*.index")]) == 1
        monkeypatch.setattr("mpp.data.sources.dicom._frames_of", None)


@pytest.mark.parametrize(
    "name", ["SC_rgb_rle_2frame.dcm", "SC_rgb_rle_16bit_2frame.dcm", "rtdose.dcm", "rtdose_expb.dcm", "rtdose_rle.dcm"]
)
def test_frames_of_other_syntaxes(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes((FILES / name).read_bytes())
    expected = pydicom.pixels.pixel_array(FILES / name)
    source = open_source(f"folder:{tmp_path / 'data'}")
    assert len(source) == len(expected)
    options = DecodeOptions(expected.shape[3] if expected.ndim == 4 else 1, (0.0, 2e6))
    for index in range(len(source)):
        data, _ = source.read(index)
        native = expected[index].astype(expected.dtype.newbyteorder("="))
        assert np.array_equal(decode(data, options), decode(native, options))


def test_many_frames_are_read_alone(tmp_path: Path) -> None:
    """A frame of a JPEG video is taken from where it lies."""
    path = tmp_path / "examples_ybr_color.dcm"
    path.write_bytes((FILES / path.name).read_bytes())
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == 30
    data, _ = source.read(17)
    assert len(data) < path.stat().st_size / 4
    assert np.array_equal(decode(data, DecodeOptions()), pydicom.pixels.pixel_array(path, index=17))


def test_a_table_of_files_has_frames_too(folder: Path) -> None:
    (folder / "list.csv").write_text("path,label\na/2.dcm,x\nb/IM0001,y\n")
    source = open_source(f"csv:{folder / 'list.csv'}")
    labels: Any = source.labels()
    assert (len(source), labels.tolist()) == (4, [0, 0, 0, 1])


def test_files_named_by_uid_are_told_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "1.2.840.113.55").write_bytes(as_dicom(FRAMES[0]))
    (tmp_path / "notes.1").write_text("not an image")
    source = open_source(f"folder:{tmp_path}")
    assert (len(source), source.location(0)) == (1, f"{tmp_path}/1.2.840.113.55")


def test_files_without_pixels_alone_are_no_source(folder: Path) -> None:
    (folder / "list.csv").write_text("path,label\nb/report.dcm,x\n")
    for name in ("a/1.dcm", "a/2.dcm", "b/IM0001"):
        (folder / name).unlink()
    for spec in (f"csv:{folder / 'list.csv'}", f"folder:{folder}"):
        with pytest.raises(SourceError, match="no image, 1 DICOM file without pixels"):
            open_source(spec)


def test_frames_that_are_gone_are_bad_images(folder: Path) -> None:
    source = open_source(f"folder:{folder}")
    path = folder / "a/2.dcm"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OSError, match="frame 2"):
        source.image(3)


def test_without_the_package_files_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.data.sources.folder.lacking", lambda extra: f"pip install {extra}")
    (folder / "a/1.jpg").touch()
    (warning,) = open_source(f"folder:{folder}").warnings
    assert warning == "4 files ignored, such as 1.dcm: to read them, pip install dicom"
    (folder / "a/1.jpg").unlink()
    with pytest.raises(SourceError, match=r"no image in .*to read them, pip install dicom"):
        open_source(f"folder:{folder}")


def test_what_is_lacking_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    names.lacking.cache_clear()
    monkeypatch.setattr(names, "find_spec", lambda _: None)
    assert " -m pip install " in names.lacking("dicom")
    names.lacking.cache_clear()
    monkeypatch.undo()
    assert names.lacking("dicom") == ""
