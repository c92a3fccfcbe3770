"""Images that are alike: against scikit-learn and brute force, and what the embed tool says and writes of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

import mpp
from mpp.cli import embed
from mpp.downstream import feature_space
from mpp.downstream.contact_sheet import CAPTION, MARGIN, TILE
from mpp.downstream.feature_space import Space, groups_alike, nearest
from tests.data.picture_files import as_dicom
from tests.downstream.tuned import read_csv

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(3, [0.1, 1, 1, 1, 5, 1, 1, 1], (60, 8)).astype(np.float32)
FEATURES[:, 3] = 0.7  # says nothing
FEATURES[40:44] = FEATURES[[1, 1, 2, 40]] + RNG.normal(0, 0.02, (4, 8)) * [0.1, 1, 1, 0, 5, 1, 1, 1]
FEATURES[44] = FEATURES[2]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_space, "_ROWS", 7)
    monkeypatch.setattr(feature_space, "_COLUMNS", 16)


def cosines() -> np.ndarray:
    rows = StandardScaler().fit_transform(FEATURES.astype(np.float64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_neighbours_are_those_of_scikit_learn() -> None:
    queries = RNG.normal(3, 1, (20, 8)).astype(np.float32)
    queries[:, 3] = 0.7
    features = FEATURES[:44]  # no two alike
    space, scaler = Space(features), StandardScaler().fit(features.astype(np.float64))
    model = NearestNeighbors(n_neighbors=9, metric="cosine").fit(scaler.transform(features))
    distances, expected = model.kneighbors(scaler.transform(queries))
    found, rows = nearest(space, space.of(queries), np.full(20, -1), 9)
    assert np.array_equal(rows, expected)
    np.testing.assert_allclose(found, 1 - distances, rtol=0, atol=1e-5)
    itself = np.array([5, 40])
    found, rows = nearest(space, space.rows[itself], itself, 9)
    distances, expected = model.kneighbors(scaler.transform(features[itself]), n_neighbors=10)
    assert np.array_equal(rows, expected[:, 1:])
    found, rows = nearest(space, space.rows[itself], itself, 100)
    assert rows[:, -1].tolist() == [5, 40]
    assert found[:, -1].tolist() == [-2, -2]
    assert np.array_equal(np.sort(rows), np.tile(np.arange(44), (2, 1)))


@pytest.mark.parametrize("least", [0.9, 0.95, 0.995, 1.0])
def test_groups_are_those_of_all_pairs(least: float) -> None:
    alike = cosines() >= least - 1e-6
    np.fill_diagonal(alike, val=False)
    number, component = connected_components(alike, directed=False)
    expected = [np.flatnonzero(component == each).tolist() for each in range(number)]
    groups, highest = groups_alike(Space(FEATURES), least)
    assert [group.tolist() for group in groups] == [group for group in expected if len(group) > 1]
    assert len(groups) > (least < 1)
    best = np.where(alike, cosines(), -2).max(axis=1)
    np.testing.assert_allclose(highest, best, rtol=0, atol=1e-5)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Features of a folder of 12 images in two classes, of which three are the same."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64)).save(path)
    for name in ("a/4", "b/5"):
        shutil.copy("images/a/0.png", f"images/{name}.png")
    assert embed(["--init", "random:test_vit", "--data", "folder:images", "--out", "f.npz", *CPU]) == 0
    return tmp_path / "f.npz"


def test_what_is_like_an_image_of_the_index_or_another(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("images/a/0.png", "other.png")
    Path("bad.png").write_text("no image")
    images = ["a/0.png", "other.png", "bad.png"]
    capsys.readouterr()
    assert embed(["--index", "f.npz", "--images", *images, "--top", "3", "--out", "look", *CPU[:2]]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == ["cannot be decoded: ./bad.png: not an image in a known format"]
    first, *lines = told.out.splitlines()
    assert first == "images/a/0.png"
    assert {line.split()[1] for line in lines[:2]} == {"images/a/4.png", "images/b/5.png"}
    assert lines[3] == "other.png"
    assert "   1.000  images/a/0.png (a)" in lines[4:]
    table = read_csv(Path("look/alike.csv"))
    assert [row["image"] for row in table] == ["images/a/0.png"] * 3 + ["other.png"] * 3
    assert list(table[3]) == ["image", "cosine", "name", "label", "split", "index"]
    assert ["other.png", "1.000000", "images/a/0.png", "a", "train", "0"] in [list(row.values()) for row in table]
    sheet = np.asarray(Image.open("look/alike.png"))
    assert sheet.shape == (2 * (TILE + CAPTION + MARGIN) + MARGIN, 4 * (TILE + MARGIN) + MARGIN, 3)
    asked = [sheet[top:, MARGIN:][:TILE, :TILE] for top in (MARGIN, 2 * MARGIN + TILE + CAPTION)]
    assert np.array_equal(*asked)
    assert embed(["--index", "f.npz", "--images", "bad.png", *CPU[:2]]) == 1
    assert "none of the 1 image to look for could be decoded" in capsys.readouterr().err


def test_duplicates_and_images_that_are_gone(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert embed(["--index", "f.npz", "--duplicates", "0.9999", "--out", "look", *CPU[:2]]) == 0
    first, group, written = capsys.readouterr().out.splitlines()
    assert first == "1 group of images that are alike by 0.9999, 3 images in all"
    assert group.endswith("  images/a/0.png (a) = images/a/4.png (a) = images/b/5.png (b)")
    assert written == "written: look/duplicates.csv, look/duplicates.png"
    assert [(row["group"], row["name"]) for row in read_csv(Path("look/duplicates.csv"))] == [
        ("0", "images/a/0.png"), ("0", "images/a/4.png"), ("0", "images/b/5.png")
    ]  # fmt: skip
    Path("images").rename("moved")
    assert embed(["--index", "f.npz", "--duplicates", "0.9999", "--out", "gone", *CPU[:2]]) == 0
    told = capsys.readouterr()
    why = f"the images cannot be opened as they were in {index.parent}: "
    assert told.err.startswith(f"note: no contact sheet, for {why}")
    assert [path.name for path in Path("gone").iterdir()] == ["duplicates.csv"]


def test_images_of_the_working_folder_have_a_contact_sheet(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("images")
    assert embed(["--init", "random:test_vit", "--data", "folder:.", "--out", "../g.npz", *CPU]) == 0
    assert embed(["--index", "../g.npz", "--duplicates", "0.9999", "--out", "../look", *CPU[:2]]) == 0
    assert (index.parent / "look" / "duplicates.png").exists()


def test_each_frame_of_a_dicom_file_is_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("pydicom")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    values = np.random.default_rng(0).integers(0, 4096, (3, 16, 16))
    Path("a.dcm").write_bytes(as_dicom(values))
    Path("b.dcm").write_bytes(as_dicom(values[2]))
    frames = [f"a.dcm, frame {number}" for number in range(3)]
    assert embed(["--init", "random:test_vit", "--images", "a.dcm", "b.dcm", "--out", "f.npz", *CPU]) == 0
    assert mpp.read_features("f.npz").names == [*frames, "b.dcm"]
    shutil.copy("a.dcm", "c.dcm")
    capsys.readouterr()
    look = ["--index", "f.npz", "--images", "b.dcm", "c.dcm", frames[2], "--top", "1", "--out", "look", *CPU[:2]]
    assert embed(look) == 0
    best = [(row["image"], row["name"]) for row in read_csv(Path("look/alike.csv"))]
    assert best[0] == ("b.dcm", frames[2])
    assert best[1:3] == [("c.dcm, frame 0", frames[0]), ("c.dcm, frame 1", frames[1])]
    assert best[4] == (frames[2], "b.dcm")
    assert Path("look/alike.png").exists()
    Path("a.dcm").write_bytes(as_dicom(values[:2]))
    assert embed([*look[:3], "b.dcm", "--out", "gone", *CPU[:2]]) == 0
    assert "a.dcm, frame 2 is not there any more" in capsys.readouterr().err


def test_an_index_that_is_searched_by_one_process(index: Path, monkeypatch, capsys) -> None:
    result = mpp.embed(index="f.npz", images=["a/0.png"], top=2, out="look", **{"encoder.device": "cpu"})
    assert [path.name for path in result.pictures] == ["alike.png"]
    assert mpp.read_features(index).settings["layer"] == -1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert embed(["--index", "f.npz", "--duplicates", "0.9"]) == 2
    assert "is one process: start it without torchrun" in capsys.readouterr().err
