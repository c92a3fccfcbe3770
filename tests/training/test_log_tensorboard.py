"""TensorBoard's files: the layout of its charts, settings, and the projector."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpp.training.log_tensorboard import TensorBoard, charts, sprite
from mpp.training.loggers import Setting


def test_the_layout_has_a_chart_for_what_there_is_and_no_other() -> None:
    assert charts([]) == {}
    assert charts(["accuracy/masked", "accuracy/all", "train/grad_norm", "schedule/epoch"]) == {
        "What it learns": {"accuracy in training": ["Multiline", ["accuracy/all", "accuracy/masked"]]}
    }
    spread = [f"fewshot_spread/{shots}shot_{end}" for shots in (10, 5) for end in ("std", "low", "high")]
    (of_rank,) = charts(["features/effective_rank", "features/largest_rank"])["What it learns"].values()
    assert of_rank == ["Multiline", ["features/effective_rank"]]
    found = charts(["fewshot/5shot", "fewshot/10shot", *spread, "time/data_wait", "mse/all"])
    assert list(found) == ["What it learns", "What it is worth", "How it runs"]
    assert list(found["What it is worth"].values()) == [
        ["Margin", [f"fewshot/{shots}shot", f"fewshot_spread/{shots}shot_low", f"fewshot_spread/{shots}shot_high"]]
        for shots in (5, 10)
    ]


@pytest.mark.parametrize(
    ("number", "height", "width", "most", "one"),
    [(5, 8, 6, 8192, (8, 6)), (4, 128, 96, 8192, (64, 48)), (25, 32, 16, 104, (20, 10))],
)
def test_a_sprite_holds_the_thumbnails_row_by_row_and_is_no_larger_than_browsers_take(
    number: int, height: int, width: int, most: int, one: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpp.training.log_tensorboard._SPRITE", most)
    colours = np.random.default_rng(0).integers(0, 256, (number, 1, 1, 3), dtype=np.uint8)
    sheet, size = sprite(np.broadcast_to(colours, (number, height, width, 3)))
    places = math.ceil(math.sqrt(number))
    assert size == one
    assert sheet.shape == (places * one[0], places * one[1], 3)
    cells = sheet.reshape(places, one[0], places, one[1], 3).transpose(0, 2, 1, 3, 4).reshape(-1, *one, 3)
    np.testing.assert_array_equal(cells[:number], np.broadcast_to(colours, (number, *one, 3)))
    assert not cells[number:].any()


def test_an_embedding_takes_the_place_of_the_earlier_one_of_its_name(tmp_path: Path) -> None:
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    rng = np.random.default_rng(0)
    for start in range(2):
        board = TensorBoard(tmp_path, start, [])
        features = rng.normal(size=(3, 4)).astype(np.float32)
        board.features("features", features, ["a\tb", "", "c"], None)
        board.features(f"other{start}", features, None, np.zeros((3, 8, 8, 3), np.uint8))
        board.close(False)
    folder = tmp_path / "tensorboard"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [entry.tensor_name for entry in config.embeddings] == ["other0", "features", "other1"]
    entry = config.embeddings[1]
    assert list(entry.tensor_shape) == [3, 4]
    np.testing.assert_array_equal(np.fromfile(folder / entry.tensor_path, np.float32).reshape(3, 4), features)
    assert (folder / entry.metadata_path).read_text().splitlines() == ["a b", "-", "c"]
    with Image.open(folder / config.embeddings[2].sprite.image_path) as image:
        assert image.size == (16, 16)


def test_settings_that_may_change_are_no_hparams(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    board = TensorBoard(tmp_path, 0, [])
    board.settings([Setting("lr", 0.1, False), Setting("on", True, False), Setting("empty", "", False)])
    board.settings([Setting("lr", 0.2, False)])  # a resumption by force: TensorBoard keeps what it was told first
    board.close(False)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    content = multiplexer.PluginRunToTagToContent("hparams")["tensorboard"]
    told = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in told.items()} == {"lr": 0.1, "on": "True"}
