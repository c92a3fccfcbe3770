"""What a study reads from frozen encoders: few-shot accuracy by layer and pooling, effective rank, linear probe.

weights -> FrozenEncoder -> features (cached) -> figures -> frozen/SIDE/seed_N.json, so that no figure is made twice
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mpp.config import to_dict
from mpp.data.workers import worker_count
from mpp.dist import World
from mpp.downstream.features import FrozenEncoder, read_splits
from mpp.downstream.fewshot import Fewshot
from mpp.downstream.finetune_result import Inputs
from mpp.downstream.labelled import Labelled
from mpp.downstream.probe import sweep_linear
from mpp.downstream.start import with_input_settings
from mpp.errors import RunError
from mpp.report.features import effective_rank
from mpp.report.settings import folder_name
from mpp.study.settings import StudyConfig
from mpp.system.files import write_whole
from mpp.training.parallel import choose_device, choose_precision
from mpp.weights.base import Weights
from mpp.weights.opening import open_weights

_RANKED = 2000  # images that the rank is measured on

Figures = dict[str, Any]
"""{"fewshot": one entry a layer, pooling and number of shots, "probe": top-1 or None}."""


@dataclass(frozen=True)
class Reading:
    """An encoder of the study, to be read frozen."""

    config: StudyConfig
    side: str
    pretrain_seed: int | None
    init: str
    inputs: Inputs
    labelled: Labelled

    def kept(self) -> Figures | None:
        """What its file says, if that is of the same weights, images and settings."""
        return _figures(self._path, self._told())

    def figures(self) -> Figures:
        """Reads the encoder, and keeps what that says.

        Raises:
            RunError: images or features that cannot be used.
        """
        try:
            figures = {"fewshot": self._fewshot(), "probe": self._probe() if self.config.probe else None}
        except ValueError as error:
            raise RunError(f"the frozen encoder of {self.side}: {error}") from error
        text = json.dumps({"of": self._told(), "figures": figures}, indent=1) + "\n"
        write_whole(self._path, lambda file: file.write(text.encode()))
        return figures

    @property
    def _path(self) -> Path:
        return reading_path(self.config, self.side, self.pretrain_seed)

    def _told(self) -> dict[str, Any]:
        """All that the figures depend on, as JSON has it."""
        return asdict(self.inputs) | _settings(self.config)

    def _frozen(self, layers: tuple[int | Literal["all"], ...]) -> FrozenEncoder:
        """The encoder, read at these layers."""
        train = self.config.finetune.train
        device = choose_device(train.device, World(), "finetune.train.device")
        return FrozenEncoder(
            encoder(self.init, self.config),
            layers=layers,
            device=device,
            precision=choose_precision(train.precision, device, "finetune.train.precision"),
            workers=worker_count(self.config.finetune.data.workers, 1),
            cache=True,
        )

    def _fewshot(self) -> list[dict[str, Any]]:
        config = self.config
        draws = tuple(range(config.draws))
        task = Fewshot.of(self.labelled, config.shots, draws, "cv" if config.l2 == "cv" else float(config.l2))
        frozen = self._frozen(config.layers)
        found = []
        for layer in frozen.layers:
            for pool in (pool for pool in config.pool if pool in frozen.pools):
                extract = frozen.extract(pool, layer)
                result = task.run(extract, choosing=True)
                features, _ = extract(self.labelled.test, task.test_indices)
                some = np.unique(np.linspace(0, len(features) - 1, _RANKED).astype(np.int64))
                rank = effective_rank(features[some])
                place = {"side": self.side, "pretrain_seed": self.pretrain_seed, "layer": layer, "pool": pool}
                for column, shots in enumerate(result.shots):
                    held = [] if result.held_out is None else result.held_out[:, column].tolist()
                    measured = {
                        "accuracy": result.accuracy[:, column].tolist(),
                        "held_out": [None if np.isnan(share) else share for share in held],
                        "rank": rank,
                    }
                    found.append({**place, "depth": frozen.depth, "shots": shots, **measured})
        return found

    def _probe(self) -> float:
        """Top-1 on the test images of a linear classifier on the mean of the patches, trained on all labels."""
        extract = self._frozen((-1,)).extract("mean")
        return sweep_linear(*read_splits(extract, self.labelled), len(self.labelled.classes)).top1


def earlier(config: StudyConfig, side: str, pretrain_seed: int | None) -> Figures | None:
    """What was read of an encoder with these settings, if it was; whether its weights and images are still the same
    is not asked, which would open them."""
    return _figures(reading_path(config, side, pretrain_seed), _settings(config))


def _figures(path: Path, of: Mapping[str, Any]) -> Figures | None:
    """What a file says, if it says that it is of this."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        return kept["figures"] if kept["of"] == {**kept["of"], **of} else None
    except (OSError, ValueError, TypeError, KeyError):  # whatever is wrong with it, it can be made again
        return None


def reading_path(config: StudyConfig, side: str, pretrain_seed: int | None) -> Path:
    """The file of an encoder's figures."""
    seed = "weights" if pretrain_seed is None else f"seed_{pretrain_seed}"
    return Path(config.run_dir) / "frozen" / folder_name(side) / f"{seed}.json"


def _settings(config: StudyConfig) -> dict[str, Any]:
    """Of the study, all that figures depend on."""
    told, train = to_dict(config), config.finetune.train
    settings = {key: told[key] for key in ("shots", "draws", "l2", "layers", "pool", "probe")}
    return {**settings, "device": train.device, "precision": train.precision}


def encoder(init: str, config: StudyConfig) -> Weights:
    """The weights that `init` names, with the input that fine-tuning gives them.

    Raises:
        UserError: as `open_weights` and `with_input_settings`.
    """
    return with_input_settings(open_weights(init), config.finetune.data)


def check_layers(config: StudyConfig, weights: Weights) -> None:
    """Refuses layers that an encoder does not have, before it is trained.

    Raises:
        UserError: naming the layer and those that there are.
    """
    FrozenEncoder(weights, layers=config.layers, device=torch.device("cpu"))
