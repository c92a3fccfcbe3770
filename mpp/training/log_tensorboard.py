"""TensorBoard: scalars, pictures, a layout of charts, hparams and embeddings, all in run_dir/tensorboard."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mpp.system.files import write_whole
from mpp.training.loggers import EarlierRows, Logger, Setting

_WORTH = "What it is worth"
# Category, title and what the tags of a chart begin with.
_CHARTS = (
    ("What it learns", "accuracy in training", "accuracy/"),
    ("What it learns", "squared error in training", "mse/"),
    ("What it learns", "loss in training", "loss/"),
    ("What it learns", "effective rank of the features", "features/effective_rank"),
    (_WORTH, "accuracy on the test images", "test/"),
    ("How it runs", "learning rate", "schedule/lr"),
    ("How it runs", "images per second", "time/images_per_second"),
    ("How it runs", "share of the time spent waiting for data", "time/data_wait"),
)
_SPREAD = "fewshot_spread/"
_SPRITE, _THUMBNAIL = 8192, 64  # most pixels a side: of the projector's sheet of thumbnails, and of one in it


class TensorBoard(Logger):
    """The event files of one run, which TensorBoard finds below `--logdir run_dir`."""

    def __init__(self, folder: Path, resume_step: int, kept: EarlierRows) -> None:
        """`kept`: what an earlier start wrote up to `resume_step`; what it wrote after that is hidden."""
        self._folder = folder / "tensorboard"
        self._tags = {name for _, figures in kept for name in _with_margins(figures)}
        self._writer = SummaryWriter(str(self._folder), purge_step=resume_step + 1 if resume_step else 0)

    def settings(self, settings: Sequence[Setting]) -> None:
        """Write those that make the run what it is, as hparams, beside which TensorBoard sets the last figures.

        No experiment and no end of the session are written: of several runs TensorBoard would take the first one's
        list of columns for all, and of one run the first end, though it goes on.
        """
        shown = [setting for setting in settings if not setting.free and setting.value != ""]
        values = {name: str(value) if isinstance(value, bool) else value for name, value, _ in shown}  # True is not 1.0
        self._writer._get_file_writer().add_summary(hparams(values, {})[1])

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        figures = _with_margins(figures)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        if not figures.keys() <= self._tags:
            self._tags.update(figures)
            self._writer.add_custom_scalars(charts(self._tags))  # TensorBoard takes the newest

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def features(
        self, name: str, features: np.ndarray, labels: Sequence[str] | None, thumbnails: np.ndarray | None
    ) -> None:
        """Write what the projector reads; an earlier embedding of that name is replaced."""
        # Not add_embedding: it forgets those of an earlier start, and writes a number at a time as text.
        folder, path = self._folder / name, self._folder / "projector_config.pbtxt"
        folder.mkdir(exist_ok=True)
        config = ProjectorConfig()
        if path.exists():
            text_format.Parse(path.read_text("utf-8"), config)
        others = [known for known in config.embeddings if known.tensor_name != name]
        del config.embeddings[:]
        config.embeddings.extend(others)
        entry = config.embeddings.add(tensor_name=name, tensor_path=f"{name}/features.bytes")
        entry.tensor_shape.extend(features.shape)
        write_whole(folder / "features.bytes", features.astype(np.float32).tobytes())
        if labels is not None:
            write_whole(folder / "labels.tsv", "".join(f"{' '.join(label.split()) or '-'}\n" for label in labels))
            entry.metadata_path = f"{name}/labels.tsv"
        if thumbnails is not None:
            sheet, (height, width) = sprite(thumbnails)
            write_whole(folder / "sprite.png", lambda file: Image.fromarray(sheet).save(file, "PNG"))
            entry.sprite.image_path = f"{name}/sprite.png"
            entry.sprite.single_image_dim.extend([width, height])
        write_whole(path, text_format.MessageToString(config))

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        with contextlib.suppress(OSError):  # a full disk has been reported before
            self._writer.close()


def _with_margins(figures: Mapping[str, float]) -> dict[str, float]:
    """Add to the few-shot accuracies the mean minus and plus one standard deviation, for a margin chart."""
    margins: dict[str, float] = {}
    for name, spread in figures.items():
        shots = name.removeprefix(_SPREAD).removesuffix("_std")
        if name.startswith(_SPREAD) and f"fewshot/{shots}" in figures:
            mean = figures[f"fewshot/{shots}"]
            margins |= {f"{_SPREAD}{shots}_low": mean - spread, f"{_SPREAD}{shots}_high": mean + spread}
    return {**figures, **margins}


def charts(tags: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """Return the layout of TensorBoard's custom scalars for a run with these tags, for `add_custom_scalars`."""
    found = sorted(tags)
    layout: dict[str, dict[str, list[object]]] = {category: {} for category, _, _ in _CHARTS}
    for category, title, start in _CHARTS:
        if lines := [name for name in found if name.startswith(start)]:
            layout[category][title] = ["Multiline", lines]
    lows = [name.removeprefix(_SPREAD).removesuffix("shot_low") for name in found if name.endswith("shot_low")]
    for shots in sorted(lows, key=int):
        title = f"few-shot accuracy, {shots} image{'s' * (shots != '1')} a class, ± standard deviation"
        band = [f"fewshot/{shots}shot", f"{_SPREAD}{shots}shot_low", f"{_SPREAD}{shots}shot_high"]
        layout[_WORTH][title] = ["Margin", band]
    return {category: found for category, found in layout.items() if found}


def sprite(thumbnails: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Lay out thumbnails (M, H, W, 3) row by row in a square, as the projector wants them; also the size of one."""
    number, height, width = thumbnails.shape[:3]
    side = math.ceil(math.sqrt(number))
    scale = min(1.0, min(_THUMBNAIL, _SPRITE // side) / max(height, width))
    height, width = max(1, round(scale * height)), max(1, round(scale * width))
    sheet = np.zeros((side * height, side * width, 3), np.uint8)
    for index, thumbnail in enumerate(thumbnails):
        top, left = index // side * height, index % side * width
        resized = Image.fromarray(thumbnail).resize((width, height), Image.Resampling.BOX)
        sheet[top : top + height, left : left + width] = np.asarray(resized)
    return sheet, (height, width)
