"""The parts of a fine-tuning run: where it starts, its step, and what is exported."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from mpp.config import parse
from mpp.data.pixel_cache import PixelSource
from mpp.data.transform import normalise
from mpp.dist import World
from mpp.downstream.labelled import open_labelled, take_fraction
from mpp.downstream.settings import FinetuneConfig, LossConfig
from mpp.downstream.start import start_weights
from mpp.downstream.tuning import FinetuningRun, build_tuning, predict, result_weights, settle_config, training_step
from mpp.errors import UserError
from mpp.weights.opening import open_weights
from mpp.weights.timm_folder import write_timm_folder
from tests import runs

CPU = torch.device("cpu")


def config(source: str, init: str = "none", **changed: str) -> FinetuneConfig:
    settings = {"train__precision": "fp32", **changed}
    words = runs.finetune_command(source, Path("nowhere"), init=init, **settings)[1:]
    return parse(FinetuneConfig, words, "finetune", "", {})


def tuning(source: str, init: str = "none", **changed: str) -> FinetuningRun:
    told = config(source, init, **changed)
    return build_tuning(told, open_labelled(source), told.optim.lr[0], World(), CPU)


def first_batch(parts: FinetuningRun) -> Any:
    batches = parts.batches()
    batch = next(batches)
    batches.close()
    return batch


def filled(parts: FinetuningRun) -> None:
    """A head that says something."""
    torch.manual_seed(1)
    torch.nn.init.normal_(parts.model.get_parameter("head.weight"))


@pytest.mark.parametrize(("labels", "decoded"), [("100%", 40), ("20%", 8)])
def test_only_images_that_are_trained_on_are_decoded_and_only_where_they_are_read_twice(
    tmp_path: Path, labels: str, decoded: int
) -> None:
    for number in range(40):
        for split, colour in (("train", number), ("test", 100 + number)):
            folder = tmp_path / split / str(number % 4)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 9, 3), colour, dtype=np.uint8)).save(folder / f"{number}.png")
    labelled = open_labelled(f"folder:{tmp_path}")
    taken = take_fraction(labelled, labels, 0)

    def said(steps: int, seen: int = 0) -> list[str]:
        size = {"train__batch_size": "4", "train__micro_batch": "4", "train__length": f"{steps} steps"}
        parts = build_tuning(config("", data__labels=labels, **size), taken, 0.1, World(), CPU)
        lines: list[str] = []
        parts.state.images_seen = seen
        parts.read_decoded(lines.append)
        source = parts.train_source
        is_decoded = isinstance(source, PixelSource) or isinstance(getattr(source, "source", None), PixelSource)
        assert is_decoded == ("are decoded once" in lines[-1])
        read = [source.read(index)[1] for index in range(len(source))]
        assert read == labelled.train_labels[taken.train_indices].tolist()
        assert len(read) == decoded
        return lines

    passes = decoded // 4
    few = f"images of {decoded} are to be read, fewer than two passes"
    assert few in said(2 * passes - 1)[-1]
    assert few in said(20 * passes, 18 * passes * 4 + 4)[-1]
    assert said(2 * passes + 1)[0].startswith(f"decoding {decoded} images, once")


@pytest.mark.parametrize("head", ["linear", "tanh", "random:test_resnet", "random:test_convnext"])
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(0.1, 0.8, 1.0)])
def test_a_new_head_says_nothing(head: str, loss: LossConfig, source: str) -> None:
    parts = tuning(source, head, model__img_size="32") if ":" in head else tuning(source, model__head=head)
    parts.config = replace(parts.config, loss=loss)
    value, figures = training_step(parts)(parts.wrapped, first_batch(parts))
    assert value.item() == pytest.approx(math.log(4), rel=1e-6)
    assert (figures["loss"] / 8)[0] == pytest.approx(math.log(4), rel=1e-6)
    if head == "tanh":
        assert parts.model.get_parameter("head.pre_logits.weight").shape == (48, 48)
        assert parts.model.get_parameter("head.pre_logits.weight").std() > 0


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("init", ["random:test_vit", "random:test_resnet", "random:test_convnext"])
def test_a_head_may_begin_as_the_linear_probe(init: str, several: bool, source: str) -> None:
    told = config(source, init, model__img_size="32", model__head="probe")
    labelled = open_labelled(source)
    labels = np.where(labelled.train_labels == 2, -1, labelled.train_labels)  # a class that keeps no image
    labelled = replace(labelled, train_labels=labels)
    if several:
        sets = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=np.uint8)
        labelled = replace(labelled, sets=sets)
    parts = build_tuning(told, labelled, 0.1, World(), CPU)
    assert parts.model.training
    logits, decoded = predict(parts, labelled.train, labelled.train_indices)
    found: list[torch.Tensor] = []
    model: Any = parts.exported
    head = model.get_submodule({"random:test_vit": "head", "random:test_resnet": "fc"}.get(init, "head.fc"))
    head.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    predict(parts, labelled.train, labelled.train_indices)
    features = torch.cat(found).double().numpy()
    scaled = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-5)
    given = labels[decoded]
    reference = LogisticRegression(C=1 / 50, tol=1e-8, max_iter=10_000)
    if several:
        expected = [reference.fit(scaled, sets[given, k]).decision_function(scaled) for k in (0, 1, 3)]
        np.testing.assert_allclose(logits[:, [0, 1, 3]], np.stack(expected, axis=1), atol=1e-3)
    else:
        expected = reference.fit(scaled, given).predict_log_proba(scaled)
        known = torch.from_numpy(logits[:, [0, 1, 3]]).log_softmax(dim=1)
        np.testing.assert_allclose(known, expected, atol=1e-3)
    assert np.isfinite(logits[:, 2]).all()


def test_a_run_that_goes_on_fits_no_head_again(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.downstream.tuning.earlier", lambda config: config)
    parts = tuning(source, "random:test_vit", model__img_size="32", model__head="probe")
    assert not parts.model.get_parameter("head.weight").any()  # a checkpoint has it


@pytest.mark.parametrize(("name", "head"), [("test_vit", "probe"), ("deit_tiny_distilled_patch16_224", "linear")])
def test_auto_fits_a_head_of_one_layer(name: str, head: str, source: str) -> None:
    told = config(source, f"random:{name}", model__img_size="32", model__head="auto")
    weights = replace(open_weights(f"random:{name}"), state={})
    settled, _ = settle_config(told, open_labelled(source), weights, World(), CPU)
    assert settled.model.head == head


def test_a_head_of_several_layers_is_no_probe(source: str) -> None:
    with pytest.raises(UserError, match="the head of deit_tiny_distilled_patch16_224 is not one linear layer"):
        tuning(source, "random:deit_tiny_distilled_patch16_224", model__head="probe", model__img_size="32")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torch_s(smoothing: float, source: str) -> None:
    parts = tuning(source, model__drop_path="0", loss__smoothing=str(smoothing))
    filled(parts)
    batch = first_batch(parts)
    value, figures = training_step(parts)(parts.wrapped, batch)
    logits = parts.model(normalise(batch["images"], (0.5,), (0.5,)))
    torch.testing.assert_close(value, F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing))
    right = (logits.argmax(dim=1) == batch["labels"]).double().sum()
    assert figures["accuracy"].tolist() == [float(right), 8.0]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_by_hand(kind: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuning(source, model__drop_path="0", loss__smoothing="0.1", **{f"loss__{kind}": "0.8"})
    filled(parts)
    batch, seen = first_batch(parts), []
    whole = F.cross_entropy

    def watched(logits: torch.Tensor, target: torch.Tensor, **told: float) -> torch.Tensor:
        seen.append((logits, target, told))
        return whole(logits, target, **told)

    monkeypatch.setattr("mpp.downstream.tuning.F.cross_entropy", watched)
    value, figures = training_step(parts)(parts.wrapped, batch)
    ((logits, target, told),) = seen
    assert told == {"label_smoothing": 0.0}  # it is in the targets
    assert "accuracy" not in figures
    torch.testing.assert_close(target.sum(dim=1), torch.ones(8))
    soft = F.one_hot(batch["labels"], 4) * 0.9 + 0.1 / 4
    # One share for the batch; the partner of each image is its mirror in the batch.
    differ = batch["labels"] != batch["labels"].flip(0)
    share = ((target - soft.flip(0)) / (soft - soft.flip(0)))[differ].nan_to_num(0).max()
    torch.testing.assert_close(target, share * soft + (1 - share) * soft.flip(0))
    torch.testing.assert_close(value, -(target * logits.log_softmax(dim=1)).sum(dim=1).mean())


def test_mixing_and_dropping_go_by_place_alone(source: str) -> None:
    parts = tuning(source, loss__mixup="0.8", loss__cutmix="1", model__drop_path="0.5")
    filled(parts)
    step, batch = training_step(parts), first_batch(parts)

    def loss(**place: int) -> float:
        np.random.seed(sum(place.values()) % 7)
        torch.manual_seed(5)
        torch.rand(3)
        return step(parts.wrapped, {**batch, "images": batch["images"].clone(), **place})[0].item()

    assert loss() == loss()
    assert len({loss(position=position, slot=slot) for position in (0, 16, 32) for slot in (0, 8)}) == 6


def test_images_are_normalised_by_the_weights_or_the_config(source: str, tmp_path: Path) -> None:
    own, seen = open_weights("random:test_resnet"), []
    mine = {"data__mean": "0.1,0.2,0.3", "data__std": "0.4"}
    for changed, mean, std in (({}, own.mean, own.std), (mine, (0.1, 0.2, 0.3), (0.4,))):
        parts = tuning(source, "random:test_resnet", model__img_size="32", **changed)
        parts.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        batch = first_batch(parts)
        training_step(parts)(parts.wrapped, batch)
        scaled = batch["images"].float() / 255
        expected = (scaled - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        torch.testing.assert_close(seen[-1], expected)
        predict(parts, parts.labelled.test, parts.labelled.test_indices[:1])
        assert -3 < float(seen[-1].min()) < float(seen[-1].max()) < 3
    write_timm_folder(result_weights(parts), tmp_path / "model")
    assert open_weights(str(tmp_path / "model")).mean == (0.1, 0.2, 0.3)


def test_a_new_model_is_what_was_asked_for(source: str) -> None:
    weights = start_weights(config(source))
    assert (weights.name, weights.state, weights.image_hw) == ("vit_tiny_patch16_224", None, (32, 32))
    assert (weights.mean, weights.std, weights.pool, weights.origin) == ((0.5,), (0.5,), "avg", "none")
    drawn = (("1", "auto"), ("1", "auto"), ("2", "auto"), ("1", "token"))
    models: list[Any] = [tuning(source, train__seed=seed, model__pool=pool).model for seed, pool in drawn]
    model, again, other, token = models
    assert (len(model.blocks), model.embed_dim, model.patch_embed.patch_size) == (2, 48, (8, 8))
    assert (model.global_pool, token.global_pool) == ("avg", "token")
    runs.assert_same(model.state_dict(), again.state_dict())
    assert not torch.equal(model.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_a_model_that_cannot_checkpoint_its_gradients(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuning(source, "random:test_vit", model__img_size="160", model__grad_checkpointing="true")
    assert vars(parts.model)["grad_checkpointing"] is True

    def refuse(self: object, enable: bool = True) -> None:
        raise AssertionError("not supported")

    monkeypatch.setattr(type(parts.model), "set_grad_checkpointing", refuse)
    with pytest.raises(UserError, match=r"model\.grad_checkpointing: timm's VisionTransformer cannot"):
        tuning(source, "random:test_vit", model__img_size="160", model__grad_checkpointing="true")


@pytest.mark.parametrize(
    ("size", "micro", "said"),
    [
        ("15", "1024", "15 go in a pass; change train.batch_size"),
        ("30", "29", "15 go in a pass; set train.micro_batch to 10"),
        ("16", "1", "1 go in a pass; set train.micro_batch to 2"),
        ("10", "9", "5 go in a pass; set train.micro_batch to 2"),
    ],
)
def test_odd_passes_cannot_be_mixed(size: str, micro: str, said: str, source: str) -> None:
    told = {"loss__mixup": "0.8", "train__batch_size": size}
    with pytest.raises(UserError, match=f"mix pairs of images, but {said}$"):
        tuning(source, train__micro_batch=micro, **told)
    if "micro_batch" in said:
        assert tuning(source, train__micro_batch=said.split()[-1], **told).micro_batch == int(said.split()[-1])
