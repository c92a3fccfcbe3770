"""What a person sees of a pretraining run: rows of figures, pictures of reconstructions, measures of the features."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mpp.data.loader import sequential
from mpp.data.reader import Batch
from mpp.data.sources.base import Source, count
from mpp.data.transform import EvalTransform, normalise
from mpp.downstream import rankme
from mpp.downstream.features import EVALUATION_BATCH, extract_by_all, pool
from mpp.downstream.fewshot import evaluations
from mpp.errors import RunError
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.reconstruction import TEXT_KEY, draw_sheet, reconstruct, to_rgb
from mpp.pretraining.build import PretrainingRun
from mpp.pretraining.step import draw
from mpp.training.loop import Every, State
from mpp.training.parallel import autocast
from mpp.training.rows import FILE as ROWS
from mpp.training.rows import read_rows
from mpp.training.run_monitor import RunMonitor
from mpp.training.sharded import whole

_PROJECTED = 1000  # images in TensorBoard's projector: of more, thumbnails would not fit on its one picture


class Monitor(RunMonitor):
    """Follows a pretraining run. Only rank 0 writes; a dry run writes nothing."""

    run: PretrainingRun

    def __init__(self, run: PretrainingRun, dry: bool = False) -> None:
        super().__init__(run, run.model.target.score_name, dry)
        self.evaluation_seconds = 0.0
        """Spent on evaluations of the features."""

    def every(self) -> list[Every]:
        """What is due how often."""
        due: list[Every] = [(self.run.steps("log.every"), self.row)]
        if self.run.config.log.pictures:
            due.append((self.run.steps("log.pictures"), self.picture))
        if self.evaluates:
            due.append((self.evaluation_period, self.evaluate))
        return due

    @property
    def evaluates(self) -> bool:
        """Whether the features are measured."""
        return self.run.fewshot is not None or self.run.config.log.effective_rank

    @property
    def evaluation_period(self) -> int:
        """Steps between evaluations; 0: only before the first and after the last step."""
        run, schedule = self.run, self.run.schedule
        images = (run.fewshot.num_images if run.fewshot else 0) + len(self.ranked_images)
        return evaluations(run.config.fewshot.every, schedule.total_steps, schedule.batch_size, images, len(run.source))

    def initial(self) -> None:
        """Shows the untrained model."""
        if self.run.config.log.pictures:
            self.picture(self.run.state)
        if self.evaluates:
            self.evaluate(self.run.state)

    def picture(self, state: State) -> None:
        """Draws reconstructions of the same images with the same corruption each time."""
        run, began = self.run, time.perf_counter()
        with evaluating(run) as model:
            if run.world.main and len(images := self.pictured_images):
                pixels = normalise(images, run.config.data.mean, run.config.data.std)
                with autocast(run.precision, run.device):
                    sheet, layout = draw_sheet(reconstruct(model, images, pixels, draw(run, 0, len(images))))
                self.log.picture("reconstruction", self.step(state), sheet, {TEXT_KEY: layout})
        state.clock.paused(time.perf_counter() - began)

    @cached_property
    def pictured_images(self) -> Tensor:
        """uint8 (n, C, h, w), drawn by the seed; without those that cannot be decoded."""
        source, config = self.run.source, self.run.config
        number = min(config.log.num_pictures, len(source))
        indices = np.random.default_rng(config.train.seed).choice(len(source), number, replace=False)
        images = torch.cat([batch["images"] for batch in self._read(source, indices)])
        if not len(images):
            self.say(f"note: no pictures: none of the {number} images drawn for them could be decoded")
        return images.to(self.run.device)

    def _read(self, source: Source, indices: Sequence[int] | np.ndarray) -> Iterator[Batch]:
        transform = EvalTransform(self.run.model.encoder.image_hw)
        return sequential(source, transform, self.run.reading, indices, batch_size=EVALUATION_BATCH)

    @cached_property
    def ranked_images(self) -> Int64[np.ndarray, " n"]:
        """Indices of the training images whose features have their effective rank followed, drawn by the seed."""
        run = self.run
        number = rankme.IMAGES_A_DIMENSION * run.model.encoder.embed_dim if run.config.log.effective_rank else 0
        number = min(number, len(run.source))
        return np.sort(np.random.default_rng(run.config.train.seed).choice(len(run.source), number, replace=False))

    def evaluate(self, state: State) -> None:
        """Measures the frozen features, by all ranks together: few-shot accuracy, effective rank."""
        step, figures = self.step(state), dict[str, Any]()
        with evaluating(self.run) as model:
            for name, measure in (("fewshot", self._fewshot), ("rank", self._rank)):
                began = time.perf_counter()
                if found := measure(model, step):
                    seconds = time.perf_counter() - began
                    self.evaluation_seconds += seconds
                    state.clock.paused(seconds)
                    figures |= {**found, f"time/{name}_seconds": seconds}
        self.log.row(step, state.images_seen, figures)
        followed = rankme.RANK in figures and self.run.world.main and not self.dry
        if followed and (collapsed := rankme.collapse(read_rows(self.run.folder / ROWS))):
            self.say(f"WARNING: {collapsed}")

    def _fewshot(self, model: MaskedPatchPrediction, step: int) -> dict[str, Any]:
        """Few-shot accuracy; nothing without labelled images."""
        fewshot = self.run.fewshot
        if fewshot is None:
            return {}
        try:
            result = fewshot.run(lambda source, indices: self._extract(model, source, indices))
        except ValueError as error:
            raise RunError(f"few-shot evaluation: {error}") from error
        accuracies = [
            f"{count(shots, 'shot')} {of.mean:.1%}" + ("" if of.spread is None else f" ± {of.spread:.1%}")
            for shots, of in result.estimates.items()
        ]
        self.say(f"step {step}  few-shot accuracy: {', '.join(accuracies)}")
        if step == 0:
            for note in fewshot.labelled.notes:
                self.say(f"note: {note}")
            for shots, classes in result.short_classes.items():
                if classes:
                    self.say(f"note: {classes} classes have fewer than {shots} labelled images; all of them are used")
        return result.figures()

    def _rank(self, model: MaskedPatchPrediction, step: int) -> dict[str, Any]:
        """The effective rank of the features of some training images; nothing where it is not asked for."""
        if not len(self.ranked_images):
            return {}
        features, _ = self._extract(model, self.run.source, self.ranked_images)
        figures = rankme.figures(features)
        rank, largest = figures.values()
        self.say(f"step {step}  effective rank of the features: {rank:.1f} of {largest}")
        return figures

    def _extract(
        self, model: MaskedPatchPrediction, source: Source, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean-pooled features of all images, read by all ranks together, in order of index, and their indices."""
        run, encoder = self.run, model.encoder

        def encode(images: Tensor) -> Tensor:
            with autocast(run.precision, run.device):
                tokens = encoder(normalise(images, run.config.data.mean, run.config.data.std))
            return pool(tokens.float(), encoder.num_prefix_tokens, "mean")

        transform = EvalTransform(encoder.image_hw)
        return extract_by_all(encode, source, indices, transform, run.reading, run.device, workers=run.workers)

    def project_features(self) -> None:
        """Shows the features of some images in TensorBoard's projector, at the end of a run."""
        run = self.run
        if "tensorboard" not in run.config.log.to:
            return
        source, among = run.source, np.arange(len(run.source))
        if run.fewshot is not None:  # these images have labels
            source, among = run.fewshot.labelled.test, run.fewshot.test_indices
        rng = np.random.default_rng(run.config.train.seed)
        indices = np.sort(rng.choice(among, min(_PROJECTED, len(among)), replace=False))
        with evaluating(run) as model:
            features, decoded = self._extract(model, source, indices)
        if run.world.main:
            batches = list(self._read(source, decoded))
            labels = torch.cat([batch["label"] for batch in batches]).tolist()
            thumbnails = to_rgb(torch.cat([batch["images"] for batch in batches]))
            names = [source.classes[i] if i >= 0 else "" for i in labels] if source.classes else None
            self.log.features("features", features, names, thumbnails)


@contextlib.contextmanager
def evaluating(run: PretrainingRun) -> Iterator[MaskedPatchPrediction]:
    """The model that would be exported, whole and in evaluation mode for a while; on all ranks together."""
    with whole(run.exported) as model:
        model.eval()
        try:
            yield model
        finally:
            model.train()
