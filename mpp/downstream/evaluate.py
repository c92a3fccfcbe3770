"""The few-shot and probe tools: how well frozen features of several encoders serve, side by side.

open_weights -> FrozenEncoder -> features (cached)         each encoder, layer and pooling asked for, all from one pass
Fewshot.run | sweep_linear | sweep_knn | sweep_attentive    accuracy on the test images
choose_readout | held-out images                           which layer and pooling, of several; never by test images
a table, a CSV, a picture
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mpp import dist
from mpp.data.sources.base import count
from mpp.data.sources.patterns import shown
from mpp.dist import World
from mpp.downstream.attentive import Training, sweep_attentive
from mpp.downstream.features import FrozenEncoder, read_splits
from mpp.downstream.fewshot import Extract, Fewshot, FewshotResult, Readout, choose_readout
from mpp.downstream.labelled import Labelled, open_labelled, take_fraction
from mpp.downstream.leakage import notes_on_test
from mpp.downstream.plots import plot_layers, plot_shots
from mpp.downstream.probe import L2_SWEEP, ProbeResult, Value, sweep_knn, sweep_linear
from mpp.downstream.settings import FewshotRecipe, ProbeRecipe
from mpp.downstream.start import open_frozen
from mpp.downstream.tokens import TokenReader
from mpp.errors import RunError, UserError
from mpp.system.files import make_folder, write_csv
from mpp.system.outcome import Outcome
from mpp.training.run_folder import on_main, once_a_machine, processes

_CHOSEN = "chosen by cross-validation on the shots"
_Chosen = dict[str, tuple[FewshotResult, list[list[Readout]]]]


def fewshot(config: FewshotRecipe) -> int:
    """Prints the few-shot tables and writes fewshot.csv, fewshot.png and layers.png into `out`. Returns 0.

    fewshot.png shows of each encoder the last layer that was read and what cross-validation chose, layers.png all.

    Raises:
        UserError: bad input, before anything is written.
        RunError: images or features that cannot be used.
    """
    results = fewshot_results(config)
    chosen = _choose(results)
    rows = [*_fewshot_rows(results, chosen)]
    if config.out and dist.world_from_environment().main:
        folder = Path(config.out).expanduser()
        _write(folder / "fewshot.csv", rows)
        name = "mean average precision (%)" if next(iter(results.values())).multi_label else "accuracy (%)"
        last = {readout.init: readout.layer for readout in results}  # ascending within each encoder
        shown = {of.name: result.estimates for of, result in results.items() if of.layer == last[of.init]}
        shown |= {f"{init} (chosen)": result.estimates for init, (result, _) in chosen.items()}
        plot_shots(folder / "fewshot.png", shown, name)
        files = _fewshot_files(config)
        if "layers.png" in files:
            plot_layers(folder / "layers.png", {of: result.estimates for of, result in results.items()}, name)
        print(f"\nwritten: {', '.join(str(folder / name) for name in files)}")
    figures = {
        f"{of.name}, {count(n, 'shot')}": each.mean
        for of, result in results.items()
        for n, each in result.estimates.items()
    }
    return Outcome(0, figures, fewshot=rows)


def _fewshot_files(config: FewshotRecipe) -> tuple[str, ...]:
    several = len(config.layers) > 1 or config.layers == ("all",)
    return ("fewshot.csv", "fewshot.png", *(("layers.png",) if several else ()))


def fewshot_results(config: FewshotRecipe) -> dict[Readout, FewshotResult]:
    """Prints the few-shot tables and returns them by encoder, layer and pooling; writes nothing but the folder `out`.

    Raises:
        UserError, RunError: as `fewshot`.
    """
    with processes(config, "encoder.device") as (world, device):
        labelled = _open(config, world)
        l2 = "cv" if config.l2 == "cv" else float(config.l2)
        task = Fewshot(labelled, config.shots, config.seeds, l2, config.max_test or None)
        encoders = _encoders(config, config.layers, world, device)
        seen = on_main(world, lambda: notes_on_test(labelled, config.init, task.train_indices, task.test_indices))
        if config.out and world.main:
            make_folder(Path(config.out).expanduser(), _fewshot_files(config))
        _print_notes(labelled, seen, task.train_indices, task.test_indices, world)
        if task.beside_shots and world.main:
            beside = f"{count(task.beside_shots, 'test image')} left out, of groups that shots were drawn from"
            print(f"note: {beside}", file=sys.stderr)
        ways = (len(frozen.layers) * len(set(config.pool) & set(frozen.pools)) for _, frozen in encoders)
        several = max(ways) > 1
        results: dict[Readout, FewshotResult] = {}
        for readout, extract in _readouts(encoders, config.pool):
            with _named_errors(readout.name):
                results[readout] = task.run(extract, choosing=several)
            if world.main:
                print(f"\n{readout.name}\n{results[readout].table()}", flush=True)
    if world.main:
        for init, (result, readouts) in _choose(results).items():
            print(f"\n{init} ({_CHOSEN})\n{result.table()}\n{_choices_text(result, readouts)}", flush=True)
    return results


def _choose(results: dict[Readout, FewshotResult]) -> _Chosen:
    """By encoder, where it was read in several ways: the result and readout that each draw chooses."""
    return {
        init: choose_readout({of: result for of, result in results.items() if of.init == init})
        for init, ways in Counter(readout.init for readout in results).items()
        if ways > 1
    }


def _choices_text(result: FewshotResult, readouts: list[list[Readout]]) -> str:
    """Says how often each layer and pooling was chosen: "10 shots: mean, layer -2 (2 draws); token (1 draw)"."""
    lines = []
    for column, number in enumerate(result.shots):
        ways = Counter(row[column].way for row in readouts).most_common()
        choices = "; ".join(f"{way} ({count(n, 'draw')})" for way, n in ways)
        alone = result.held_out is not None and np.isnan(result.held_out[:, column]).all()
        why = ", for one image per class leaves nothing to choose by" if alone else ""
        lines.append(f"{count(number, 'shot')}: {choices}{why}")
    return "\n".join(lines)


def _fewshot_rows(results: dict[Readout, FewshotResult], chosen: _Chosen) -> Iterable[Sequence[Any]]:
    several = any(result.multi_label for result in results.values())
    yield "model", "layer", "pool", "shots", "mean_ap" if several else "accuracy", "std", "interval95", "seeds", "l2"
    named = [((of.name, of.layer, of.pool), result) for of, result in results.items()]
    named += [((f"{init} ({_CHOSEN})", "cv", "cv"), result) for init, (result, _) in chosen.items()]
    for name, result in named:
        for column, (shots, accuracy) in enumerate(result.estimates.items()):
            l2 = "" if result.l2 is None else " ".join(f"{value:g}" for value in result.l2[:, column])
            figures = (_figure(value) for value in (accuracy.mean, accuracy.spread, accuracy.half))
            yield *name, shots, *figures, len(result.accuracy), l2


def probe(config: ProbeRecipe) -> int:
    """Prints the accuracy of the probes and writes probe.csv into `out`. Returns 0.

    Raises:
        UserError: bad input, before anything is written.
        RunError: images or features that cannot be used.
    """
    with processes(config, "encoder.device") as (world, device):
        labelled = take_fraction(_open(config, world), config.labels, config.labels_seed)
        images = len(labelled.train_indices)
        if config.kind == "knn" and labelled.sets is not None:
            raise UserError(f"--kind knn votes for one label an image, {shown(config.data)} has several: take linear")
        if config.kind == "knn" and min(config.k) > images:  # those that are too large are passed over
            ks = ", ".join(map(str, config.k))
            raise UserError(f"--k {ks}: there are only {images:,} training images to be neighbours; take at most that")
        if config.kind == "attentive" and config.pool != ProbeRecipe().pool:
            raise UserError(
                f"--pool {' '.join(config.pool)}: an attentive probe pools patch tokens itself; leave it out"
            )
        pairs = [*product(config.lr, config.weight_decay)]
        choices = {"knn": config.k, "linear": config.l2 or L2_SWEEP, "attentive": pairs}
        if len({*choices[config.kind]}) == 1:  # nothing to choose
            labelled = replace(labelled, val=None, val_labels=None)
        chosen_on = "validation" if labelled.val else "held-out training"
        encoders = _encoders(config, (config.layer,), world, device)
        path = Path(config.out).expanduser() / "probe.csv"
        seen = on_main(world, lambda: notes_on_test(labelled, config.init))
        if config.out and world.main:
            make_folder(path.parent, ("probe.csv",))
        _print_notes(labelled, seen, labelled.train_indices, labelled.test_indices, world)
        results: dict[Readout, ProbeResult] = {}
        attentive, given = config.kind == "attentive", (encoders, labelled, config.encoder.cache, world)
        for readout, extract in _token_readouts(*given) if attentive else _readouts(encoders, config.pool):
            with _named_errors(readout.name):
                train, test, val, groups = read_splits(extract, labelled)
                sides = train, test, len(labelled.classes)
                if config.kind == "knn":
                    result = sweep_knn(*sides, config.k, config.temperature, val, groups)
                elif config.kind == "linear":
                    result = sweep_linear(*sides, config.l2 or L2_SWEEP, val, groups)
                else:
                    how = Training(config.lr, config.weight_decay, config.queries, config.epochs, config.seed)
                    result = sweep_attentive(*sides, how, val, groups)
            results[readout] = result
            if world.main:
                lost = images + len(labelled.test_indices) - len(train[0]) - len(test[0])
                print(f"\n{readout.name}\n{_probe_text(result, lost, chosen_on)}", flush=True)
        if world.main:
            print(_chosen_probes(results), end="", flush=True)
        if world.main and config.out:
            _write(path, _probe_rows(config, results))
            print(f"\nwritten: {path}")
    figures = {of.name: result.top1 for of, result in results.items()}
    return Outcome(0, figures, probe=_probe_rows(config, results))


def _probe_text(result: ProbeResult, lost: int, chosen_on: str) -> str:
    """Accuracy on the test images, and the values tried."""
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.1%}"
    name = "mAP" if result.multi_label else "top-1"
    lines = [f"{name} {result.top1:.1%}{top5} of {len(result.predicted):,} test images"]
    if result.table:
        lines.append(f"{result.setting:>12}  {chosen_on} images")
        for value, accuracy in result.table:
            mark = "   chosen" if value == result.chosen else ""
            lines.append(f"{_numbers(value):>12}  {accuracy:8.1%}{mark}")
    else:
        lines.append(f"{result.setting} {_numbers(result.chosen)}")
    if lost:
        lines.append(f"images that could not be decoded and are left out: {lost:,}")
    return "\n".join(lines)


def _chosen_probes(results: dict[Readout, ProbeResult]) -> str:
    """Of each encoder that was read in several ways, the one that held-out images choose."""
    lines = []
    for init, ways in Counter(readout.init for readout in results).items():
        held_out = {of: result.held_out for of, result in results.items() if of.init == init}
        known = {of: accuracy for of, accuracy in held_out.items() if accuracy is not None}
        if ways > 1 and len(known) == ways:
            name = "mAP" if results[next(iter(known))].multi_label else "top-1"
            best = max(known, key=lambda of: known[of])  # of equals the first
            lines.append(f"\n{init}: held-out images choose {best.way}: {name} {results[best].top1:.1%}\n")
    return "".join(lines)


def _probe_rows(config: ProbeRecipe, results: dict[Readout, ProbeResult]) -> Iterable[Sequence[Any]]:
    several = any(result.multi_label for result in results.values())
    yield "model", "kind", "labels", "mean_ap" if several else "top1", "top5", "setting", "chosen", "held_out"
    for readout, result in results.items():
        figures = _figure(result.top1), _figure(result.top5), result.setting, _numbers(result.chosen)
        yield readout.name, config.kind, config.labels, *figures, _figure(result.held_out)


def _open(config: FewshotRecipe | ProbeRecipe, world: World) -> Labelled:
    sources = config.data, config.test, config.download
    labelled = once_a_machine(world, lambda: open_labelled(*sources, group=config.group))
    dist.agree(labelled.facts)
    return labelled


def _encoders(
    config: FewshotRecipe | ProbeRecipe, layers: Sequence[int | Literal["all"]], world: World, device: torch.device
) -> list[tuple[str, FrozenEncoder]]:
    """Builds all encoders, by name, before the first one runs: what is wrong shows at once."""
    of = config.encoder
    encoders: list[tuple[str, FrozenEncoder]] = []
    for init in config.init:
        frozen = open_frozen(init, of, layers, world, device, cache=of.cache, quarters="quarters" in config.pool)
        if not set(config.pool) & set(frozen.pools):
            raise UserError(f"--pool {' '.join(config.pool)}: {init} takes {' or '.join(frozen.pools)}")
        if isinstance(config, ProbeRecipe) and config.kind == "attentive" and not frozen.is_vit:
            raise UserError(f"--kind attentive reads the patch tokens of a ViT, which {init} is not: take linear")
        encoders.append((init, frozen))
    return encoders


def _readouts(encoders: list[tuple[str, FrozenEncoder]], pools: Sequence[str]) -> Iterator[tuple[Readout, Extract]]:
    """Layer by layer, from the first on, the poolings that are asked for and that the encoder has.

    An encoder is dropped, and its features with it, before the next one runs: all layers of many images are large.
    """
    while encoders:
        init, frozen = encoders.pop(0)
        for layer in frozen.layers:
            for pool in pools:
                if pool in frozen.pools:
                    yield Readout(init, layer, pool, frozen.depth), frozen.extract(pool, layer)


def _token_readouts(
    encoders: list[tuple[str, FrozenEncoder]], labelled: Labelled, cache: bool, world: World
) -> Iterator[tuple[Readout, Callable[..., Any]]]:
    """Likewise the patch tokens of the one layer that is read; says whether they are kept."""
    labels = labelled.train_labels, labelled.test_labels, labelled.val_labels
    images = sum(int((of >= 0).sum()) for of in labels if of is not None)
    while encoders:
        init, frozen = encoders.pop(0)
        reader = TokenReader(frozen, images, cache)
        if world.main:
            print(f"{init}: {reader.note}", file=sys.stderr)
        yield Readout(init, frozen.layers[0], "attentive", frozen.depth), reader.extract


@contextlib.contextmanager
def _named_errors(name: str) -> Generator[None]:
    """Turns what is wrong with features into one line that names their encoder."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise RunError(f"{name}: {error}") from error


def _print_notes(labelled: Labelled, seen: list[str], train: np.ndarray, test: np.ndarray, world: World) -> None:
    """Prints numbers of images, notes on them, and notes on test images that are not new."""
    if world.main:
        print(f"{len(train):,} training and {len(test):,} test images", file=sys.stderr)
        for note in dict.fromkeys([*labelled.notes, *seen]):
            print(f"note: {note}", file=sys.stderr)


def _numbers(value: Value) -> str:
    return " ".join(f"{number:g}" for number in (value if isinstance(value, tuple) else (value,)))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _write(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    try:
        write_csv(path, rows)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
