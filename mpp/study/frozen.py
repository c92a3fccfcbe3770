"""Reads frozen encoders: few-shot accuracy by layer and pooling, effective rank, linear probe.

weights -> features (cached) -> figures -> frozen/SIDE/seed_N.json, so that no figure is computed twice
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mpp.config import to_dict
from mpp.data.workers import worker_count
from mpp.dist import World
from mpp.downstream.features import FrozenEncoder, read_splits
from mpp.downstream.fewshot import Fewshot
from mpp.downstream.finetune_result import Inputs
from mpp.downstream.probe import ProbeResult, sweep_linear
from mpp.downstream.settings import Pool
from mpp.downstream.start import with_input_settings
from mpp.errors import RunError
from mpp.report.features import effective_rank
from mpp.study.plan import Plan, StartPoint
from mpp.study.settings import StudyConfig, folder_name
from mpp.system.files import write_whole
from mpp.training.parallel import choose_device, choose_precision
from mpp.weights.base import Weights
from mpp.weights.opening import open_weights

_RANKED = 2000  # images that the rank is measured on
_CHOOSING = 10_000  # training images that choose how the probe reads: all, for each layer and pooling, would take hours

Figures = dict[str, Any]
"""{"fewshot": one entry a layer, pooling and number of shots, "probe": top-1 or None, "probe_chosen": of the layer and
pooling that held-out training images chose, None of one alone, missing in older files}."""


def open_encoder(init: str, config: StudyConfig) -> Weights:
    """Opens the weights that `init` names, with the input that fine-tuning gives them. Raises as the two functions."""
    return with_input_settings(open_weights(init), config.finetune.data)


def read_frozen(plan: Plan, start: StartPoint, inputs: Inputs) -> Figures:
    """Reads an encoder, and saves its figures.

    Raises:
        RunError: images or features that cannot be used.
    """
    config, (side, seed) = plan.config, plan.encoders[start]
    train = config.finetune.train
    device = choose_device(train.device, World(), "finetune.train.device")
    frozen = FrozenEncoder(
        open_encoder(plan.inits[start], config),
        layers=(*config.layers, *((-1,) if config.probe else ())),
        device=device,
        precision=choose_precision(train.precision, device, "finetune.train.precision"),
        workers=worker_count(config.finetune.data.workers, 1),
        cache=True,
        quarters="quarters" in config.pool,
    )
    try:
        figures: Figures = {"fewshot": _fewshot(plan, frozen, side, seed), "probe": None, "probe_chosen": None}
        if config.probe:
            figures["probe"], figures["probe_chosen"] = _probe(plan, frozen)
    except ValueError as error:
        raise RunError(f"the frozen encoder of {side}: {error}") from error
    content = {"of": asdict(inputs) | _settings(config), "figures": figures}
    write_whole(figures_path(config, side, seed), json.dumps(content, indent=1) + "\n")
    return figures


def _probe(plan: Plan, frozen: FrozenEncoder) -> tuple[float, dict[str, Any] | None]:
    """Linear classifiers of all labelled images: top-1 of the mean of the last layer's patches, and of the layer and
    pooling, among those of the study, that do best on held-out training images, of equals the first; None where there
    is one only."""
    usual: tuple[int, Pool] = (-1, "mean")
    asked = _readings(plan.config, frozen)
    readings = dict.fromkeys([usual, *asked])
    if len(readings) < 2:
        return _sweep(plan, frozen, usual).top1, None
    most = max(_CHOOSING, 10 * len(plan.labelled.classes))  # so that classes keep images to hold out
    sweeps = {reading: _sweep(plan, frozen, reading, most) for reading in readings}
    layer, pool = best = max(asked, key=lambda reading: (sweeps[reading].held_out or 0, reading == usual))
    if len(plan.labelled.train_indices) > most:
        sweeps = {reading: _sweep(plan, frozen, reading) for reading in {usual, best}}
    chosen = {"layer": layer, "pool": pool, "held_out": sweeps[best].held_out, "top1": sweeps[best].top1}
    return sweeps[usual].top1, chosen


def _sweep(plan: Plan, frozen: FrozenEncoder, reading: tuple[int, Pool], most: int | None = None) -> ProbeResult:
    """Fits a linear classifier to what is read of the training images, of `most` drawn ones if there are more."""
    layer, pool = reading
    (features, labels), test, val, groups = read_splits(frozen.extract(pool, layer), plan.labelled)
    if most is not None and len(labels) > most:
        drawn = np.sort(np.random.default_rng(0).permutation(len(labels))[:most])
        features, labels, groups = features[drawn], labels[drawn], groups if groups is None else groups[drawn]
    return sweep_linear((features, labels), test, len(plan.labelled.classes), val=val, groups=groups)


def _readings(config: StudyConfig, frozen: FrozenEncoder) -> list[tuple[int, Pool]]:
    """Layers, counted from the last, and poolings of the study that the encoder has."""
    asked = {layer if layer == "all" or layer < 0 else layer - frozen.depth for layer in config.layers}
    layers = [layer for layer in frozen.layers if layer in asked or "all" in asked]
    return [(layer, pool) for layer in layers for pool in config.pool if pool in frozen.pools]


def _fewshot(plan: Plan, frozen: FrozenEncoder, side: str, pretrain_seed: int | None) -> list[dict[str, Any]]:
    config = plan.config
    l2 = "cv" if config.l2 == "cv" else float(config.l2)
    fewshot = Fewshot(plan.labelled, config.shots, tuple(range(config.draws)), l2)
    found = []
    for layer, pool in _readings(config, frozen):
        extract = frozen.extract(pool, layer)
        result = fewshot.run(extract, choosing=True)
        features, _ = extract(plan.labelled.test, fewshot.test_indices)
        some = np.unique(np.linspace(0, len(features) - 1, _RANKED).astype(np.int64))
        rank = effective_rank(features[some])
        for column, shots in enumerate(result.shots):
            held_out = [] if result.held_out is None else result.held_out[:, column].tolist()
            entry = {"side": side, "pretrain_seed": pretrain_seed, "layer": layer, "pool": pool}
            entry |= {"depth": frozen.depth, "shots": shots, "accuracy": result.accuracy[:, column].tolist()}
            entry |= {"held_out": [None if np.isnan(share) else share for share in held_out], "rank": rank}
            found.append(entry)
    return found


def saved_figures(config: StudyConfig, side: str, pretrain_seed: int | None, inputs: Inputs | None) -> Figures | None:
    """The figures that were saved of an encoder, if they are of these settings and inputs.

    Without `inputs`, whether weights and images are still the same is not asked, which would open them.
    """
    of = _settings(config) | ({} if inputs is None else asdict(inputs))
    try:
        saved = json.loads(figures_path(config, side, pretrain_seed).read_text("utf-8"))
        return saved["figures"] if saved["of"] == {**saved["of"], **of} else None
    except (OSError, ValueError, TypeError, KeyError):  # whatever is wrong with it, it can be made again
        return None


def figures_path(config: StudyConfig, side: str, pretrain_seed: int | None) -> Path:
    """The file of an encoder's figures."""
    seed = "weights" if pretrain_seed is None else f"seed_{pretrain_seed}"
    return Path(config.run_dir) / "frozen" / folder_name(side) / f"{seed}.json"


def _settings(config: StudyConfig) -> dict[str, Any]:
    """The settings that figures depend on, as JSON has them."""
    values, train = to_dict(config), config.finetune.train
    settings = {key: values[key] for key in ("shots", "draws", "l2", "layers", "pool", "probe")}
    return {**settings, "device": train.device, "precision": train.precision}
