"""Attentive probes against efficient probing written out by hand, and what they can read that the mean cannot."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import EvalTransform, normalise
from mpp.downstream.attentive import Probes, Training, batch_for, epochs_for, sweep_attentive, train_probes
from mpp.downstream.features import FrozenEncoder
from mpp.downstream.probe import cut_tenth, sweep_linear
from mpp.downstream.tokens import TokenReader
from mpp.weights.opening import open_weights

CPU = torch.device("cpu")


class Given:
    """Tokens that are simply there, in place of an encoder's."""

    device = CPU

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.float16))
        flat = self.tokens.double().flatten(0, 1).numpy()
        self.mean, self.std = flat.mean(axis=0), flat.std(axis=0)

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, positions: Sequence[np.ndarray]) -> Iterator[Tensor]:
        return (self.tokens[some] for some in positions)


def given(tokens: np.ndarray, labels: np.ndarray) -> Any:
    return Given(tokens), labels


def spotted(
    seed: int, images: int, classes: int = 3, patches: int = 9, width: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """In each image one patch, flagged by the first number, shows its class; the others show any, so that their mean
    says next to nothing."""
    rng = np.random.default_rng(seed)
    tokens = 0.3 * rng.normal(size=(images, patches, width))
    shows = rng.integers(0, classes, (images, patches))
    np.put_along_axis(tokens, 1 + shows[..., None], 2, axis=2)
    spot, every = rng.integers(0, patches, images), np.arange(images)
    tokens[every, spot, 0] += 3
    return tokens, shows[every, spot]


class ByHand(nn.Module):
    """Efficient probing as in its paper: all tokens are projected, then averaged by each query's weights."""

    def __init__(self, first: Probes, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        queries, values = first.queries[0], first.values[0]
        self.mean, self.std = torch.from_numpy(mean).float(), torch.from_numpy(std).float()
        self.queries = nn.Parameter(queries.detach().clone())
        width = queries.shape[1]
        self.v = nn.Linear(width, width, bias=False)
        self.v.weight.data = values.detach().permute(0, 2, 1).reshape(width, width).clone()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, first.biases[0].numel())
        self.head.weight.data, self.head.bias.data = (
            part[0].detach().T.clone() if part[0].ndim > 1 else part[0].detach().clone()
            for part in (first.weights, first.biases)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = (tokens.float() - self.mean) / self.std
        v = self.v(x).unflatten(2, (len(self.queries), -1))  # images, patches, queries, d / queries
        found = []
        for number, query in enumerate(self.queries):
            attention = torch.softmax(x @ query / x.shape[2] ** 0.5, dim=1)
            found.append((attention[..., None] * v[:, :, number]).sum(dim=1))
        return self.head(self.norm(torch.cat(found, dim=1)))


@pytest.mark.parametrize("several", [False, True], ids=["one label", "several"])
def test_each_of_several_probes_is_efficient_probing_trained_alone(several: bool) -> None:
    tokens, labels = spotted(0, 70)
    truth: Any = np.eye(3, dtype=np.uint8)[labels] | (labels[:, None] == 0) if several else labels
    how = Training((), (), queries=4, epochs=5, seed=3)
    settings, rows, source = [(3e-2, 0.5), (1e-3, 0.0)], np.arange(2, 68), Given(tokens)
    probes = train_probes(source, rows, truth, 3, how, settings)  # pyright: ignore[reportArgumentType]
    for number, (lr, decay) in enumerate(settings):
        model = ByHand(Probes(1, source.mean, source.std, 4, 3, seed=3), source.mean, source.std)
        groups = [{"params": [model.queries, model.v.weight, model.head.weight], "weight_decay": decay}]
        groups += [{"params": [model.head.bias], "weight_decay": 0}]
        optimizer, steps = torch.optim.AdamW(groups, lr=lr), 0
        for epoch in range(5):
            order = np.random.default_rng([3, epoch]).permutation(rows)
            for batch in (order[:32], order[32:64]):  # what does not fill a batch is left out
                for group in optimizer.param_groups:  # warm-up of 5 % is less than half a step
                    group["lr"] = lr * (1 + np.cos(np.pi * steps / 10)) / 2
                logits, of = model(source.tokens[batch]), torch.from_numpy(truth[batch])
                loss = nn.functional.cross_entropy(logits, of) if not several else None
                if loss is None:
                    loss = nn.functional.binary_cross_entropy_with_logits(logits, of.float(), reduction="sum") / 32
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
        expected = model.eval()(source.tokens)
        torch.testing.assert_close(probes(source.tokens)[number], expected, rtol=1e-3, atol=1e-3)


def test_attention_finds_the_one_token_that_the_mean_hides() -> None:
    (tokens, labels), (test, test_labels) = spotted(1, 400), spotted(2, 200)
    how = Training((1e-2,), (1e-3,), queries=4, epochs=40)
    found = sweep_attentive(given(tokens, labels), given(test, test_labels), 3, how)
    assert found.top1 > 0.95
    assert (found.chosen, found.table, found.top5) == ((1e-2, 1e-3), (), None)
    mean = sweep_linear((tokens.mean(axis=1), labels), (test.mean(axis=1), test_labels), 3)
    assert mean.top1 < 0.6  # of the 9 patches one is of the class for sure, the others by chance


@pytest.mark.parametrize("val", [None, given(*spotted(3, 30))], ids=["a tenth", "validation images"])
def test_rates_are_chosen_on_held_out_images_and_never_on_test_images(val: Any) -> None:
    tokens, labels = spotted(4, 80)
    test, test_labels = spotted(5, 40)
    how = Training((1e-4, 3e-2), (1.0, 0.0), queries=2, epochs=6)
    found = sweep_attentive(given(tokens, labels), given(test, test_labels), 3, how, val)
    grid = [(1e-4, 1.0), (1e-4, 0.0), (3e-2, 1.0), (3e-2, 0.0)]
    assert [setting for setting, _ in found.table] == grid
    assert found.chosen == max(found.table, key=lambda row: row[1])[0]
    source: Any = Given(tokens)
    (learned, _), (rows, _) = cut_tenth((np.arange(80), labels), None)
    held_out, truth = (val[0].tokens, val[1]) if val else (source.tokens[rows], labels[rows])
    probes = train_probes(source, np.arange(80) if val else learned, labels, 3, how, grid)
    right = [(logits.argmax(dim=1).numpy() == truth).mean() for logits in probes(held_out)]
    assert [accuracy for _, accuracy in found.table] == right
    other = sweep_attentive(given(tokens, labels), given(-test, 2 - test_labels), 3, how, val)
    assert (other.chosen, other.table) == (found.chosen, found.table)
    again = train_probes(source, np.arange(80), labels, 3, how, [grid[right.index(max(right))]])
    assert found.predicted.tolist() == again(Given(test).tokens)[0].argmax(dim=1).tolist()


def test_classes_without_images_diverged_probes_and_constant_dimensions_count_for_nothing() -> None:
    tokens, labels = spotted(6, 60)
    tokens[..., 7] = 2
    source = Given(tokens)
    source.std[7] = np.inf
    how = Training((1e30, 1e-2), (0.0,), queries=3, epochs=10)  # of width 8: two queries
    found = sweep_attentive((source, 2 * labels), given(tokens, 2 * labels), 6, how)  # pyright: ignore
    assert set(found.predicted.tolist()) <= {0, 2, 4}
    assert found.chosen == (1e-2, 0.0)
    with pytest.raises(ValueError, match="two classes or more; all 60 are of class 1"):
        sweep_attentive(given(tokens, np.ones_like(labels)), given(tokens, labels), 3, how)


def test_several_labels_an_image_are_told_by_their_mean_average_precision() -> None:
    tokens, labels = spotted(7, 60)
    sets = np.eye(4, dtype=np.uint8)[labels]  # no image has the last
    how = Training((1e-2, 1e-1), (0.0,), queries=4, epochs=10)
    found = sweep_attentive(given(tokens, sets), given(tokens, sets), 4, how)
    assert (found.multi_label, found.top5, len(found.table)) == (True, None, 2)
    assert 0.8 < found.top1 <= 1
    assert found.predicted.max() < 3


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [(3, 3, 1000), (20, 8, 500), (40, 16, 500), (5_000, 256, 53), (50_000, 256, 20), (1_281_167, 256, 20)],
)
def test_batch_and_epochs_follow_from_the_number_of_images(images: int, batch: int, epochs: int) -> None:
    assert (batch_for(images), epochs_for(images)) == (batch, epochs)


@pytest.mark.parametrize(("kept", "spec"), [(True, "random:test_vit"), (False, "random:test_vit3")])
def test_tokens_are_timms_patch_tokens_alone(kept: bool, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.downstream.tokens.memory", lambda: 2**40 if kept else 1)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(5)]
    frozen = FrozenEncoder(open_weights(spec), image_hw=(32, 32), device=CPU)
    tokens, decoded = TokenReader(frozen, 4, cache=False).extract(ListSource(images, [0] * 5), np.array([0, 1, 3, 4]))
    assert (len(tokens), decoded.tolist()) == (4, [0, 1, 3, 4])
    transform = EvalTransform((32, 32), frozen.weights.framing)
    pixels = torch.stack([transform(images[index]) for index in decoded])
    with torch.no_grad():
        found = frozen.model.forward_features(normalise(pixels, frozen.weights.mean, frozen.weights.std))
    expected = found[:, frozen.model.num_prefix_tokens :]
    read = torch.cat(list(tokens.batches([np.array([2, 0]), np.array([3, 1])])))
    torch.testing.assert_close(read.float(), expected[[2, 0, 3, 1]], rtol=1e-3, atol=1e-3)
    flat = expected.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(tokens.mean, flat.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(tokens.std, flat.std(axis=0), rtol=1e-3)
