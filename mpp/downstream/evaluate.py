"""What frozen features are worth: few-shot least squares and probes, for several encoders side by side.

open_weights -> Frozen -> features (cached)      each encoder, layer and pooling asked for, all from one pass
Fewshot.run | sweep_linear | sweep_knn           accuracy on the test images
choose_readout | held-out images                 which layer and pooling, of several; never by test images
a table, a CSV, a picture
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mpp import dist
from mpp.data.loader import worker_count
from mpp.data.sources.base import count
from mpp.dist import World
from mpp.downstream.cache import FeatureCache
from mpp.downstream.fewshot import Extract, Fewshot
from mpp.downstream.frozen import Frozen
from mpp.downstream.labelled import Labelled, open_labelled, take_fraction, with_labels
from mpp.downstream.plots import plot_layers, plot_shots
from mpp.downstream.pretrained_on import notes_on_pretraining
from mpp.downstream.probe import L2_SWEEP, ProbeResult, sweep_knn, sweep_linear
from mpp.downstream.recipes import FewshotRecipe, FrozenConfig, ProbeRecipe
from mpp.downstream.settings import FewshotConfig
from mpp.downstream.shots import FewshotResult, Readout, choose_readout
from mpp.errors import RunError, UserError
from mpp.system.files import make_folder, write_csv
from mpp.training.parallel import choose_precision
from mpp.training.run_folder import once_a_machine, processes
from mpp.weights.opening import open_weights

_ALL = 2**40  # more test images than anybody has
_CHOSEN = "chosen by cross-validation on the shots"


def fewshot(config: FewshotRecipe) -> int:
    """Prints the few-shot tables and writes them where `out` says so. Returns 0.

    There are fewshot.csv and fewshot.png, which shows of each encoder the last layer that was read and, where it was
    read in several ways, the one that cross-validation chose; of encoders read at several layers layers.png, too.

    Raises:
        UserError: bad input, before anything is written.
        RunError: images or features that cannot be used.
    """
    results = fewshot_results(config)
    if config.out and dist.world_from_environment().main:
        folder, chosen = Path(config.out).expanduser(), _chosen(results)
        _write(folder / "fewshot.csv", _fewshot_rows(results, chosen))
        last = {of.init: of.layer for of in results}  # ascending within each encoder
        shown = {of.name: result.estimates for of, result in results.items() if of.layer == last[of.init]}
        plot_shots(
            folder / "fewshot.png", shown | {f"{init} (chosen)": of.estimates for init, (of, _) in chosen.items()}
        )
        files = _fewshot_files(config)
        if "layers.png" in files:
            plot_layers(folder / "layers.png", {of: result.estimates for of, result in results.items()})
        print(f"\nwritten: {', '.join(str(folder / name) for name in files)}")
    return 0


def _fewshot_files(config: FewshotRecipe) -> tuple[str, ...]:
    several = len(config.layers) > 1 or config.layers == ("all",)
    return ("fewshot.csv", "fewshot.png", *(("layers.png",) if several else ()))


def fewshot_results(config: FewshotRecipe) -> dict[Readout, FewshotResult]:
    """Prints the few-shot tables and returns them by encoder, layer and pooling; writes nothing but the folder `out`.

    Raises:
        UserError, RunError: as `fewshot`.
    """
    with processes(config, "encoder.device") as (world, device):
        limit = config.max_test or _ALL
        told = FewshotConfig(config.data, config.test, shots=config.shots, seeds=config.seeds, max_test=limit)
        labelled = once_a_machine(world, lambda: open_labelled(config.data, config.test, config.download))
        dist.agree(labelled.facts)
        of = Fewshot.of(told, labelled)
        encoders = _encoders(config.init, config.pool, config.layers, config.encoder, world, device)
        if config.out and world.main:
            make_folder(Path(config.out).expanduser(), _fewshot_files(config))
        _say(world, f"{len(of.train_indices):,} training and {len(of.test_indices):,} test images", of.notes)
        several = any(_ways(frozen, config.pool) > 1 for _, frozen in encoders)
        _say_seen(world, config.init, of)
        results: dict[Readout, FewshotResult] = {}
        for readout, extract in _readouts(encoders, config.pool):
            with _explained(readout.name):
                result = of.run(extract, "cv" if config.l2 == "cv" else float(config.l2), choosing=several)
            results[readout] = result
            if world.main:
                print(f"\n{readout.name}\n{result.table()}", flush=True)
    if world.main:
        for init, (result, readouts) in _chosen(results).items():
            print(f"\n{init} ({_CHOSEN})\n{result.table()}\n{_choices_text(result, readouts)}", flush=True)
    return results


_Chosen = dict[str, tuple[FewshotResult, list[list[Readout]]]]


def _chosen(results: dict[Readout, FewshotResult]) -> _Chosen:
    """By encoder, where it was read in several ways: what each draw chooses of them."""
    inits = Counter(of.init for of in results)
    return {
        init: choose_readout({of: result for of, result in results.items() if of.init == init})
        for init, ways in inits.items()
        if ways > 1
    }


def _choices_text(result: FewshotResult, readouts: list[list[Readout]]) -> str:
    """How often each layer and pooling was chosen: "10 shots: mean, layer -2 (2 draws); token (1 draw)"."""
    lines = []
    for column, number in enumerate(result.shots):
        drawn = Counter(row[column].way for row in readouts).most_common()
        told = "; ".join(f"{way} ({count(n, 'draw')})" for way, n in drawn)
        alone = result.held_out is not None and np.isnan(result.held_out[:, column]).all()
        why = ", for one image per class leaves nothing to choose by" if alone else ""
        lines.append(f"{count(number, 'shot')}: {told}{why}")
    return "\n".join(lines)


def _fewshot_rows(results: dict[Readout, FewshotResult], chosen: _Chosen) -> Iterable[Sequence[Any]]:
    yield "model", "layer", "pool", "shots", "accuracy", "std", "interval95", "seeds", "l2"
    named = [((of.name, of.layer, of.pool), result) for of, result in results.items()]
    named += [((f"{init} ({_CHOSEN})", "cv", "cv"), result) for init, (result, _) in chosen.items()]
    for of, result in named:
        for column, (shots, accuracy) in enumerate(result.estimates.items()):
            l2 = "" if result.l2 is None else " ".join(f"{value:g}" for value in result.l2[:, column])
            known = accuracy.mean, accuracy.spread, accuracy.half
            figures = ("" if value is None else f"{value:.6f}" for value in known)
            yield *of, shots, *figures, len(result.accuracy), l2


def probe(config: ProbeRecipe) -> int:
    """Prints the accuracy of the probes and writes probe.csv where `out` says so. Returns 0.

    Raises:
        UserError: bad input, before anything is written.
        RunError: images or features that cannot be used.
    """
    with processes(config, "encoder.device") as (world, device):
        of = once_a_machine(world, lambda: open_labelled(config.data, config.test, config.download))
        labels = take_fraction(of.train_labels, len(of.classes), config.labels, config.labels_seed)
        of = with_labels(of, labels)
        dist.agree(of.facts)
        _check_neighbours(config, len(of.train_indices))
        encoders = _encoders(config.init, config.pool, (config.layer,), config.encoder, world, device)
        if config.out and world.main:
            make_folder(Path(config.out).expanduser(), ("probe.csv",))
        _say(world, f"{len(of.train_indices):,} training and {len(of.test_indices):,} test images", of.notes)
        _say_seen(world, config.init, of)
        results: dict[Readout, ProbeResult] = {}
        for readout, extract in _readouts(encoders, config.pool):
            name = readout.name
            with _explained(name):
                train, kept = extract(of.train, of.train_indices)
                test, tested = extract(of.test, of.test_indices)
                images = train, of.train_labels[kept], test, of.test_labels[tested], len(of.classes)
                results[readout] = _probe(config, *images)
            if world.main:
                lost = len(of.train_indices) + len(of.test_indices) - len(kept) - len(tested)
                print(f"\n{name}\n{_probe_text(results[readout], lost)}", flush=True)
        if world.main:
            print(_chosen_probes(results), end="", flush=True)
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


def _chosen_probes(results: dict[Readout, ProbeResult]) -> str:
    """Of each encoder that was read in several ways, the one that held-out training images choose."""
    lines = []
    for init, ways in Counter(of.init for of in results).items():
        held_out = {of: result.held_out for of, result in results.items() if of.init == init}
        known = {of: accuracy for of, accuracy in held_out.items() if accuracy is not None}
        if ways > 1 and len(known) == ways:
            best = max(known, key=lambda of: known[of])  # of equals the first
            lines.append(f"\n{init}: held-out training images choose {best.way}: top-1 {results[best].top1:.1%}\n")
    return "".join(lines)


def _probe_rows(config: ProbeRecipe, results: dict[Readout, ProbeResult]) -> Iterable[Sequence[Any]]:
    yield "model", "kind", "labels", "top1", "top5", "setting", "chosen", "held_out"
    for readout, result in results.items():
        figures = ("" if value is None else f"{value:.6f}" for value in (result.top1, result.top5))
        held_out = "" if result.held_out is None else f"{result.held_out:.6f}"
        yield readout.name, config.kind, config.labels, *figures, result.setting, f"{result.chosen:g}", held_out


def _encoders(
    inits: Sequence[str],
    pools: Sequence[str],
    layers: Sequence[int | Literal["all"]],
    config: FrozenConfig,
    world: World,
    device: torch.device,
) -> list[tuple[str, Frozen]]:
    """Everything that is asked for, by its name, all of it built: what is wrong shows at once."""
    precision = choose_precision(config.precision, device, "encoder.precision")
    cache = FeatureCache() if config.cache else None
    found: list[tuple[str, Frozen]] = []
    for init in inits:
        frozen = Frozen(
            replace(once_a_machine(world, lambda init=init: open_weights(init)), max_image_mb=config.max_image_mb),
            layers=layers,
            image_hw=(config.img_size[0], config.img_size[-1]) if config.img_size else None,
            device=device,
            precision=precision,
            workers=worker_count(config.workers, world.local_size),
            cache=cache,
            seed=config.seed,
        )
        if not set(pools) & set(frozen.pools):
            raise UserError(f"--pool {' '.join(pools)}: {init} has no class token; add mean")
        found.append((init, frozen))
    return found


def _ways(frozen: Frozen, pools: Sequence[str]) -> int:
    """In how many ways an encoder is read."""
    return len(frozen.layers) * len(set(pools) & set(frozen.pools))


def _readouts(encoders: list[tuple[str, Frozen]], pools: Sequence[str]) -> Iterator[tuple[Readout, Extract]]:
    """Layer by layer, from the first on, the poolings that are asked for and that the encoder has.

    An encoder is dropped, and its features with it, before the next one runs: all layers of many images are large.
    """
    while encoders:
        init, frozen = encoders.pop(0)
        for layer in frozen.layers:
            for how in pools:
                if how in frozen.pools:
                    yield Readout(init, layer, how, frozen.depth), frozen.extract(how, layer)


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


def _say_seen(world: World, inits: Sequence[str], of: Fewshot | Labelled) -> None:
    """Names the encoders that were pretrained on some of the test images."""
    if world.main:
        for note in dict.fromkeys(
            note for init in inits for note in notes_on_pretraining(init, of.test, of.test_indices)
        ):
            print(f"note: {note}", file=sys.stderr)


def _write(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    try:
        write_csv(path, rows)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
