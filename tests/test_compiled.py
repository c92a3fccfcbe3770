"""Steps of pretraining and fine-tuning under torch.compile: one graph, and none more whatever comes between them."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import runs

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[str, dict[str, str]]] = {
    "the paper's": ("pretrain", {"optim__ema_decay": "0"}),
    "4x4 colours, details, visual words, blocks, 2-D positions, [mask] enters later, a decoder": (
        "pretrain",
        {
            "objective__target": "colour_4x4",
            "objective__detail": "0.1",
            "objective__words": "0.1",
            "objective__picking": "block",
            "objective__mask_enters": "1",
            "objective__decoder_depth": "1",
            "objective__split": "1,0,0",
            "model__pos_embed": "2d",
        },
    ),
    "pixels, from the batch, sincos2d positions, norms after the branches, explicit attention, bf16": (
        "pretrain",
        {
            "objective__target": "pixels",
            "objective__random_from": "batch",
            "model__name": "vit_base_patch16_rpn_224",
            "model__pos_embed": "sincos2d",
            "model__attention": "explicit",
            "train__precision": "bf16",
        },
    ),
    "[mask] never enters, a mean of each channel, recomputed": (
        "pretrain",
        {
            "model__depth": "1",
            "objective__mask_enters": "1",
            "objective__decoder_depth": "1",
            "objective__split": "1,0,0",
            "data__mean": "0.5,0.4,0.3",
            "model__grad_checkpointing": "true",
        },
    ),
    "registers, no class token, no positions, norms of queries and keys": (
        "pretrain",
        {"model__name": "vit_so150m2_patch16_reg1_gap_256", "model__pos_embed": "none"},
    ),
    "fine-tuning, linear, without a moving average, bf16": (
        "finetune",
        {"train__precision": "bf16", "optim__ema_decay": "0"},
    ),
    "fine-tuning, hidden layer, smoothed": (
        "finetune",
        {"model__head": "tanh", "loss__smoothing": "0.1", "optim__layer_decay": "0.8"},
    ),
    "fine-tuning, mixed, batch normalisation": (
        "finetune",
        {"init": "random:test_resnet", "model__img_size": "32", "loss__mixup": "0.8", "loss__cutmix": "1"},
    ),
}


def compiled() -> None:
    """Trains each case, compiled and not, and prints what was compiled; in a process of its own, see below."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    from mpp.config import parse
    from mpp.dist import World
    from mpp.downstream import features, tuning
    from mpp.downstream.labelled import open_labelled
    from mpp.downstream.settings import FinetuneConfig
    from mpp.objective.reconstruction import reconstruct
    from mpp.pretraining import build, step
    from mpp.pretraining.monitor import evaluating
    from mpp.training.loop import fit

    torch.set_num_threads(1)
    features.EVALUATION_BATCH = 16  # so that the last of 40 images are a batch of 8
    cpu, plain = torch.device("cpu"), torch.nn.Module.compile
    counter = CompileCounterWithBackend("eager")
    torch.nn.Module.compile = lambda self: plain(self, backend=counter, fullgraph=True)

    def look_at_pretraining(run: Any) -> None:
        with evaluating(run) as model, torch.inference_mode():
            for number in (16, 8):
                images = torch.zeros(number, 3, *model.encoder.image_hw, dtype=torch.uint8)
                model.encoder(model.normalise(images))
                reconstruct(model, images, model.normalise(images), step.draw(run, 0, number))

    def train(kind: str, changed: dict[str, str], compile: str) -> list[float]:
        changed = {"train__length": "4 steps", "train__compile": compile, **changed}
        if kind == "pretrain":
            run: Any = build.build(runs.pretrain_config(source, fewshot__data="", **changed), World(), cpu)
            train_step = step.training_step(run)
            look = lambda state: look_at_pretraining(run)  # noqa: E731
        else:
            words = runs.finetune_command(source, Path("nowhere"), init=changed.pop("init", "none"), **changed)[1:]
            config = parse(FinetuneConfig, words, "finetune", "", {})
            run = tuning.build_tuning(config, open_labelled(source), 0.05, World(), cpu)
            train_step = tuning.training_step(run)
            look = lambda state: tuning.predict(run, run.labelled.test, run.labelled.test_indices)  # noqa: E731
        losses: list[float] = []
        note = lambda state: losses.append(state.meter.read()["loss"])  # noqa: E731
        with contextlib.closing(run.batches()) as batches:
            fit(run.state, run.wrapped, batches, train_step, run.schedule, [(2, look)], each_step=[note])
        return losses

    with tempfile.TemporaryDirectory() as folder:
        source = runs.write_images(Path(folder))
        for name, (kind, changed) in CASES.items():
            torch._dynamo.reset()
            counters.clear()
            counter.clear()
            counter.backend = "aot_eager" if "recomputed" in name else "eager"  # whose backward pass is traced, too
            without = train(kind, changed, "off")
            losses = train(kind, changed, "on")
            found = {"graphs": counter.frame_count, "breaks": dict(counters["graph_break"])}
            print(json.dumps({"case": name, "losses": losses, "without": without, **found}), flush=True)


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, Any]]:
    # A process of its own: the type checks of these tests cannot be compiled.
    out, _ = runs.finish(["-m", __name__], cwd=runs.ROOT)
    return {found["case"]: found for found in map(json.loads, out.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_compiled_once_into_one_graph(case: str, trained: dict[str, dict[str, Any]]) -> None:
    """Over steps that differ in place, learning rate and draws, and evaluations with a short last batch in between."""
    found = trained[case]
    assert (found["graphs"], found["breaks"]) == (1, {})  # fullgraph: a break would have been an error
    assert len(found["losses"]) == 4
    assert found["losses"] == pytest.approx(found["without"], rel=1e-2 if "bf16" in case else 1e-4)


if __name__ == "__main__":
    compiled()
