"""What one sees of a pretraining run: rows of figures, pictures of reconstructions, few-shot accuracy, bad files."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpp.data.loader import sequential
from mpp.data.sources.base import Source, count
from mpp.data.transform import EvalTransform, normalise
from mpp.downstream.features import EVALUATION_BATCH, extract_by_all, pool
from mpp.downstream.fewshot import FewshotResult, evaluations
from mpp.errors import RunError
from mpp.model.encoder import Encoder
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.picture import reconstruct, to_rgb
from mpp.objective.sheet import TEXT_KEY, draw_sheet
from mpp.pretraining.build import Run, draw
from mpp.training.bad_files import BadFiles
from mpp.training.log import RunLog, Terminal
from mpp.training.loop import Every, State
from mpp.training.parallel import autocast
from mpp.training.sharded import whole

_PROJECTED = 1000  # images in TensorBoard's projector: of more, thumbnails would not fit on its one picture


class Watch:
    """Everything that looks at a run while it trains. Only rank 0 writes; a dry run writes nothing."""

    def __init__(self, parts: Run, resumed: int, dry: bool = False) -> None:
        config, main = parts.config, parts.world.main
        self._parts = parts
        self._terminal = Terminal(parts.schedule.total_steps, resumed, on=main)
        folder = parts.folder if main and not dry else None
        self._log = RunLog(folder, resumed, config.log.to, config)
        # Each rank reads its own share of the images, so each keeps its own list and judges by its own share.
        name = "bad_files.csv" if main else f"bad_files.rank{parts.world.rank}.csv"
        read = parts.state.images_seen // parts.world.size
        self.bad_files = BadFiles(None if dry else parts.folder / name, config.data.max_bad_share, read)
        self.evaluation_seconds = 0.0
        self._pictured: Tensor | None = None

    def every(self) -> list[Every]:
        """What is due how often."""
        parts, config = self._parts, self._parts.config
        due: list[Every] = [(parts.steps(config.log.every, "log.every"), self._row)]
        if config.log.pictures:
            due.append((parts.steps(config.log.pictures, "log.pictures"), self._picture))
        if parts.fewshot is not None:
            due.append((self.fewshot_period, self._fewshot))
        return due

    @property
    def fewshot_period(self) -> int:
        """Steps between few-shot evaluations; 0: only before the first and after the last step."""
        assert self._parts.fewshot is not None
        schedule, every = self._parts.schedule, self._parts.config.fewshot.every
        images = self._parts.fewshot.num_images
        return evaluations(every, schedule.total_steps, schedule.batch_size, images, len(self._parts.source))

    def initial(self) -> None:
        """Looks at the untrained model."""
        if self._parts.config.log.pictures:
            self._picture(self._parts.state)
        if self._parts.fewshot is not None:
            self._fewshot(self._parts.state)

    def say(self, text: str) -> None:
        self._terminal.say(text)

    def event(self, figures: dict[str, Any], step: int) -> None:
        """Writes down something that is not a figure."""
        self._log.row(step, self._parts.state.images_seen, figures)

    def flush(self) -> None:
        self._log.flush()

    def finish(self, text: str) -> None:
        """The last words of a run, on standard output; for rank 0 to say."""
        self._terminal.close()
        print(text)

    def close(self) -> None:
        self._terminal.close()
        self._log.close()

    def _step(self, state: State) -> int:
        return self._parts.schedule.step(state.images_seen)

    def advance(self, state: State) -> None:
        """Shows how far the run is."""
        self._terminal.advance(self._step(state))

    def _row(self, state: State) -> None:
        parts, step = self._parts, self._step(state)
        figures = state.meter.read()
        figures["epoch"] = state.images_seen / len(parts.source)
        figures["lr"] = parts.schedule.rate(step - 1)
        if len(self.bad_files):
            figures["time/bad_files"] = len(self.bad_files)
        total = parts.schedule.total_steps * parts.schedule.batch_size
        figures |= state.clock.read(state.images_seen, total)
        self._log.row(step, state.images_seen, figures)
        self._terminal.row(step, figures, parts.model.target.score_name)

    def _picture(self, state: State) -> None:
        """The same images with the same corruption each time."""
        parts, began = self._parts, time.perf_counter()
        with evaluating(parts) as model:
            if parts.world.main:
                images = self._pictured_images()
                pixels = normalise(images, parts.config.data.mean, parts.config.data.std)
                with autocast(parts.precision, parts.device):
                    rows = reconstruct(model, images, pixels, draw(parts, 0, len(images)))
                sheet = draw_sheet(rows)
                self._log.picture("reconstruction", self._step(state), sheet.picture, {TEXT_KEY: sheet.layout})
        state.clock.paused(time.perf_counter() - began)

    def _pictured_images(self) -> Tensor:
        parts = self._parts
        if self._pictured is None:
            number = min(parts.config.log.num_pictures, len(parts.source))
            indices = np.random.default_rng(parts.config.train.seed).choice(len(parts.source), number, replace=False)
            transform = EvalTransform(parts.model.encoder.image_hw)
            batches = sequential(parts.source, transform, parts.reading, indices, batch_size=EVALUATION_BATCH)
            self._pictured = torch.cat([batch["images"] for batch in batches]).to(parts.device)
        return self._pictured

    def _fewshot(self, state: State) -> None:
        fewshot = self._parts.fewshot
        assert fewshot is not None
        began = time.perf_counter()
        with evaluating(self._parts) as model:
            try:
                result = fewshot.run(lambda source, indices: self._extract(model, source, indices))
            except ValueError as error:
                raise RunError(f"few-shot evaluation: {error}") from error
        seconds = time.perf_counter() - began
        self.evaluation_seconds += seconds
        state.clock.paused(seconds)
        step = self._step(state)
        self._log.row(step, state.images_seen, {**result.figures(), "time/fewshot_seconds": seconds})
        self.say(f"step {step}  few-shot accuracy: {_fewshot_line(result)}")
        if step == 0:
            for note in fewshot.notes:
                self.say(f"note: {note}")
            for shots, classes in result.short_classes.items():
                if classes:
                    self.say(f"note: {classes} classes have fewer than {shots} labelled images; all of them are used")

    def _extract(
        self, model: MaskedPatchPrediction[Encoder], source: Source, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean-pooled features of all images, read by all ranks together, in order of index."""
        parts, encoder = self._parts, model.encoder

        def encode(images: Tensor) -> Tensor:
            with autocast(parts.precision, parts.device):
                tokens = encoder(normalise(images, parts.config.data.mean, parts.config.data.std))
            return pool(tokens.float(), encoder.num_prefix_tokens, "mean")

        transform = EvalTransform(encoder.image_hw)
        return extract_by_all(encode, source, indices, transform, parts.reading, parts.device, workers=parts.workers)

    def features(self) -> None:
        """Shows the features of some images in TensorBoard's projector, at the end of a run."""
        parts, fewshot = self._parts, self._parts.fewshot
        if "tensorboard" not in parts.config.log.to:
            return
        source, among = parts.source, np.arange(len(parts.source))
        if fewshot is not None:  # whose images have labels
            source, among = fewshot.test, fewshot.test_indices
        rng = np.random.default_rng(parts.config.train.seed)
        indices = np.sort(rng.choice(among, min(_PROJECTED, len(among)), replace=False))
        with evaluating(parts) as model:
            features, kept = self._extract(model, source, indices)
        if parts.world.main:
            transform = EvalTransform(parts.model.encoder.image_hw)
            held = list(sequential(source, transform, parts.reading, kept, batch_size=EVALUATION_BATCH))
            labels = torch.cat([batch["label"] for batch in held])
            thumbnails = to_rgb(torch.cat([batch["images"] for batch in held]))
            names = [source.classes[i] if i >= 0 else "" for i in labels.tolist()] if source.classes else None
            self._log.features("features", features, names, thumbnails)

    def stopwatch(self, seconds: list[float]) -> Callable[[State], None]:
        """Collects the moments at which steps end, for a dry run."""

        def note(state: State) -> None:
            if self._parts.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter())

        return note


@contextlib.contextmanager
def evaluating(parts: Run) -> Iterator[MaskedPatchPrediction[Encoder]]:
    """The model that would be exported, whole and in evaluation mode for a while; on all ranks together."""
    with whole(parts.exported) as model:
        model.eval()
        try:
            yield model
        finally:
            model.train()


def _fewshot_line(result: FewshotResult) -> str:
    told = ((count(k, "shot"), of) for k, of in result.estimates.items())
    return ", ".join(f"{k} {of.mean:.1%}" + ("" if of.spread is None else f" ± {of.spread:.1%}") for k, of in told)
