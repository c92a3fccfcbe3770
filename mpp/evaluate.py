"""What frozen features are worth: few-shot least squares and probes, for several encoders side by side.

open_weights -> Frozen -> features (cached)      each encoder, each pooling that it allows
Fewshot.run | sweep_linear | sweep_knn           accuracy on the test images
a table, a CSV, a picture
"""

import contextlib
import math
import sys
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp import dist
from mpp.data.loader import worker_count
from mpp.dist import World
from mpp.downstream.cache import FeatureCache
from mpp.downstream.config import FewshotConfig
from mpp.downstream.fewshot import Fewshot
from mpp.downstream.frozen import Frozen
from mpp.downstream.labelled import open_labelled, take_fraction, with_labels
from mpp.downstream.plots import plot_shots
from mpp.downstream.probe import L2_SWEEP, ProbeResult, sweep_knn, sweep_linear
from mpp.downstream.shots import FewshotResult
from mpp.errors import RunError, UserError
from mpp.files import make_folder, write_csv
from mpp.recipes import FewshotRecipe, FrozenConfig, ProbeRecipe
from mpp.train.parallel import choose_precision
from mpp.train.run_folder import once_a_machine, processes
from mpp.weights.opening import open_weights

_ALL = 2**40  # more test images than anybody has


def fewshot(config: FewshotRecipe) -> int:
    """Prints the few-shot tables and writes fewshot.csv and fewshot.png where `out` says so. Returns 0.

    Raises:
        UserError: bad input, before anything is written.
        RunError: images or features that cannot be used.
    """
    results = fewshot_results(config)
    if config.out and dist.world_from_environment().main:
        folder = Path(config.out).expanduser()
        _write(folder / "fewshot.csv", _fewshot_rows(results))
        plot_shots(folder / "fewshot.png", results)
        print(f"\nwritten: {folder / 'fewshot.csv'}, {folder / 'fewshot.png'}")
    return 0


def fewshot_results(config: FewshotRecipe) -> dict[str, FewshotResult]:
    """Prints the few-shot tables and returns them by encoder and pooling; writes nothing but the folder `out`.

    Raises:
        UserError, RunError: as `fewshot`.
    """
    with processes(config.encoder.device, "encoder.device") as (world, device):
        limit = config.max_test or _ALL
        told = FewshotConfig(config.data, config.test, shots=config.shots, seeds=config.seeds, max_test=limit)
        labelled = once_a_machine(world, lambda: open_labelled(config.data, config.test, config.download))
        of = Fewshot.of(told, labelled)
        encoders = _encoders(config.init, config.pool, config.encoder, world, device)
        if config.out and world.main:
            make_folder(Path(config.out).expanduser(), ("fewshot.csv", "fewshot.png"))
        _say(world, f"{len(of.train_indices):,} training and {len(of.test_indices):,} test images", of.notes)
        results: dict[str, FewshotResult] = {}
        for name, frozen, how in encoders:
            with _explained(name):
                result = of.run(frozen.extract(how), "cv" if config.l2 == "cv" else float(config.l2))
            results[name] = result
            if world.main:
                print(f"\n{name}\n{result.table()}", flush=True)
    return results


def _fewshot_rows(results: dict[str, FewshotResult]) -> Iterable[Sequence[Any]]:
    yield "model", "shots", "accuracy", "std", "interval95", "seeds", "l2"
    for name, result in results.items():
        for column, shots in enumerate(result.shots):
            half = float(result.interval[column])
            l2 = "" if result.l2 is None else " ".join(f"{value:g}" for value in result.l2[:, column])
            figures = f"{result.mean[column]:.6f}", f"{result.spread[column]:.6f}"
            yield name, shots, *figures, "" if math.isnan(half) else f"{half:.6f}", len(result.accuracy), l2


def probe(config: ProbeRecipe) -> int:
    """Prints the accuracy of the probes and writes probe.csv where `out` says so. Returns 0.

    Raises:
        UserError: bad input, before anything is written.
        RunError: images or features that cannot be used.
    """
    with processes(config.encoder.device, "encoder.device") as (world, device):
        of = once_a_machine(world, lambda: open_labelled(config.data, config.test, config.download))
        labels = take_fraction(of.train_labels, len(of.classes), config.labels, config.labels_seed)
        of = with_labels(of, labels)
        _check_neighbours(config, len(of.train_indices))
        encoders = _encoders(config.init, config.pool, config.encoder, world, device)
        if config.out and world.main:
            make_folder(Path(config.out).expanduser(), ("probe.csv",))
        _say(world, f"{len(of.train_indices):,} training and {len(of.test_indices):,} test images", of.notes)
        results: dict[str, ProbeResult] = {}
        for name, frozen, how in encoders:
            extract = frozen.extract(how)
            with _explained(name):
                train, kept = extract(of.train, of.train_indices)
                test, tested = extract(of.test, of.test_indices)
                images = train, of.train_labels[kept], test, of.test_labels[tested], len(of.classes)
                results[name] = _probe(config, *images)
            if world.main:
                lost = len(of.train_indices) + len(of.test_indices) - len(kept) - len(tested)
                print(f"\n{name}\n{_probe_text(results[name], lost)}", flush=True)
        if world.main and config.out:
            path = Path(config.out).expanduser() / "probe.csv"
            _write(path, _probe_rows(config, results))
            print(f"\nwritten: {path}")
    return 0


def _check_neighbours(config: ProbeRecipe, images: int) -> None:
    """Of several numbers those that are too large are passed over; one at least must be left."""
    if config.kind == "knn" and min(config.k) > images:
        told = ", ".join(map(str, config.k))
        raise UserError(f"--k {told}: there are only {images:,} training images to be neighbours; take at most that")


def _probe(
    config: ProbeRecipe, train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray, classes: int
) -> ProbeResult:
    if config.kind == "knn":
        return sweep_knn(train, labels, test, truth, classes, ks=config.k, temperature=config.temperature)
    return sweep_linear(train, labels, test, truth, classes, l2s=config.l2 or L2_SWEEP)


def _probe_text(result: ProbeResult, lost: int) -> str:
    """Accuracy on the test images, and the values tried."""
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.1%}"
    lines = [f"top-1 {result.top1:.1%}{top5} of {len(result.predicted):,} test images"]
    if result.table:
        lines.append(f"{result.setting:>12}  held-out training images")
        for value, accuracy in result.table:
            mark = "   chosen" if value == result.chosen else ""
            lines.append(f"{value:>12g}  {accuracy:8.1%}{mark}")
    else:
        lines.append(f"{result.setting} {result.chosen:g}")
    if lost:
        lines.append(f"images that could not be decoded and are left out: {lost:,}")
    return "\n".join(lines)


def _probe_rows(config: ProbeRecipe, results: dict[str, ProbeResult]) -> Iterable[Sequence[Any]]:
    yield "model", "kind", "labels", "top1", "top5", "setting", "chosen"
    for name, result in results.items():
        top5 = "" if result.top5 is None else f"{result.top5:.6f}"
        yield name, config.kind, config.labels, f"{result.top1:.6f}", top5, result.setting, f"{result.chosen:g}"


def _encoders(
    inits: Sequence[str], pools: str, config: FrozenConfig, world: World, device: torch.device
) -> list[tuple[str, Frozen, str]]:
    """Name, encoder and pooling of everything that is asked for, all of them built: what is wrong shows at once."""
    precision = choose_precision(config.precision, device, "encoder.precision")
    cache = FeatureCache() if config.cache else None
    layer = "" if config.layer == -1 else f", layer {config.layer}"
    found: list[tuple[str, Frozen, str]] = []
    for init in inits:
        frozen = Frozen(
            once_a_machine(world, lambda init=init: open_weights(init)),
            layer=config.layer,
            image_hw=(config.img_size[0], config.img_size[-1]) if config.img_size else None,
            device=device,
            precision=precision,
            workers=worker_count(config.workers, world.local_size),
            cache=cache,
            seed=config.seed,
        )
        if pools == "token" and "token" not in frozen.pools:
            raise UserError(f"--pool token: {init} has no class token; take mean or both")
        wanted = frozen.pools if pools == "both" else (pools,)
        found += [(f"{init} ({how}{layer})", frozen, how) for how in wanted]
    return found


@contextlib.contextmanager
def _explained(name: str) -> Generator[None]:
    """Says of which encoder a complaint about features is."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise RunError(f"{name}: {error}") from error


def _say(world: World, first: str, notes: Iterable[str]) -> None:
    if world.main:
        print("\n".join([first, *(f"note: {note}" for note in notes)]), file=sys.stderr)


def _write(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    try:
        write_csv(path, rows)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
