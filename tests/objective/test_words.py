"""Visual words against loops over windows, and their k-means against scikit-learn's."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from mpp.data.transform import Normalise
from mpp.model.encoder import Decoder, build_encoder
from mpp.objective.image_words import COMPONENTS
from mpp.objective.masking import Corruption, draw_corruption, others, pick_patches
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.target import build_target
from mpp.objective.words import WORDS, VisualWords, k_means
from tests.objective.test_objective import CONFIG, seeded


def smooth(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Noise with edges and areas, so that windows differ in more than their pixels' noise."""
    coarse = torch.rand(batch, channels, height // 2 + 1, width // 2 + 1, generator=seeded(0))
    grown = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * grown).round().to(torch.uint8)


def by_hand(images: Tensor, patch: tuple[int, int], words: VisualWords) -> np.ndarray:
    """(batch, patches, words and channels), window by window in float64."""
    pixels = images.double().numpy() / 255
    (by_y, by_x), (step_y, step_x), (high, wide) = words.shrink, words.stride, words.side
    middle, whitening, centres, usual, spread = (value.double().numpy() for value in words.buffers())
    batch, channels, height, width = pixels.shape
    pixels = pixels.reshape(batch, channels, height // by_y, by_y, width // by_x, by_x).mean(axis=(3, 5))
    rows, columns = height // patch[0], width // patch[1]
    result = np.zeros((batch, rows * columns, len(centres) + channels))
    for b, image in enumerate(pixels):
        for of in range(rows * columns):
            y, x = of // columns * (patch[0] // by_y), of % columns * (patch[1] // by_x)
            part = image[:, y : y + patch[0] // by_y, x : x + patch[1] // by_x]
            result[b, of, len(centres) :] = part.mean(axis=(1, 2))
        for y in range(0, image.shape[1], step_y):
            for x in range(0, image.shape[2], step_x):
                top, left = y - (high - step_y) // 2, x - (wide - step_x) // 2
                at_y = np.arange(top, top + high).clip(0, image.shape[1] - 1)
                at_x = np.arange(left, left + wide).clip(0, image.shape[2] - 1)
                window = image[:, at_y][:, :, at_x].reshape(-1)
                window = (window - window.mean()) / np.sqrt(window.var() + 10 / 255**2)
                distance = np.linalg.norm((window - middle) @ whitening - centres, axis=1)
                of = y * by_y // patch[0] * columns + x * by_x // patch[1]
                near = np.maximum(0, distance.mean() - distance)
                result[b, of, : len(centres)] += near / words.windows[0] / words.windows[1]
    return (result - usual) / spread


@pytest.mark.parametrize(
    ("patch", "channels", "size", "windows"),
    [
        ((8, 8), 3, (24, 32), (2, 2)),
        ((4, 4), 3, (16, 12), (1, 1)),  # a window reaches over the edge of its patch
        ((16, 16), 1, (32, 32), (2, 2)),  # half its side
        ((14, 12), 3, (28, 24), (1, 1)),
        ((11, 9), 4, (22, 18), (1, 1)),  # larger windows, which leave nothing out
        ((1, 1), 1, (5, 4), (1, 1)),
    ],
)
def test_they_are_what_a_loop_over_windows_finds(
    patch: tuple[int, int], channels: int, size: tuple[int, int], windows: tuple[int, int]
) -> None:
    words, images = VisualWords(patch, channels), smooth(60, channels, *size)
    words.learn(images)
    assert words.windows == windows
    found = words.of(images)
    assert found.shape == (60, size[0] // patch[0] * (size[1] // patch[1]), WORDS + channels)
    np.testing.assert_allclose(found[:2], by_hand(images[:2], patch, words), rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(found.mean(dim=(0, 1)), torch.zeros(WORDS + channels), rtol=0, atol=1e-3)
    deviation = found.std(dim=(0, 1), unbiased=False)
    varies = words.spread[:WORDS] > 1e-4  # a word may be near to no window at all
    torch.testing.assert_close(deviation[:WORDS][varies], torch.ones(int(varies.sum())), rtol=0, atol=0.02)
    torch.testing.assert_close(deviation[WORDS:].square(), torch.full((channels,), 48 / channels), rtol=0.02, atol=0)


def test_windows_are_whitened() -> None:
    words, images = VisualWords((8, 8), 3), smooth(400, 3, 16, 16)
    words.learn(images)
    white = ((words._cut(images).flatten(0, 1) - words.middle) @ words.whitening).double()
    values, _ = np.linalg.eigh(np.cov(white.numpy(), rowvar=False, bias=True))
    original = (words._cut(images).flatten(0, 1) - words.middle).double().numpy()
    expected = np.linalg.eigvalsh(original.T @ original / len(original))
    np.testing.assert_allclose(np.sort(values), np.sort(expected / (expected + 0.1)), atol=1e-4)


def test_k_means_is_scikit_learn_s() -> None:
    windows = torch.randn(3000, 12, generator=seeded(1))
    start = windows[torch.randperm(3000, generator=seeded(2))[:WORDS]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the rounds being over
        reference = KMeans(WORDS, init=start.numpy(), n_init=1, max_iter=15, tol=0, algorithm="lloyd").fit(windows)
    np.testing.assert_allclose(k_means(windows, WORDS, seeded(2)), reference.cluster_centers_, atol=1e-4)


@pytest.mark.parametrize("images", [torch.full((4, 3, 16, 16), 9), torch.zeros(1, 3, 16, 16)], ids=["grey", "one"])
def test_images_without_any_structure_are_no_error(images: Tensor) -> None:
    words = VisualWords((8, 8), 3)
    words.learn(images.to(torch.uint8))
    assert words.of(images.to(torch.uint8)).isfinite().all()
    assert words.of(smooth(2, 3, 16, 16)).isfinite().all()


def test_the_same_images_give_the_same_words() -> None:
    states = []
    for _ in range(2):
        words = VisualWords((8, 8), 3)
        words.learn(smooth(20, 3, 24, 32))
        words.learn(smooth(20, 3, 24, 32))  # what was learnt before does not count
        states.append(words.state_dict())
    assert states[0].keys() == states[1].keys() == {"middle", "whitening", "words", "usual", "spread"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_of_many_large_images_the_first_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.objective.words._MOST_WINDOWS", 100)  # 48 an image
    words, first = VisualWords((8, 8), 3), VisualWords((8, 8), 3)
    words.learn(smooth(20, 3, 24, 32))
    first.learn(smooth(20, 3, 24, 32)[:3])
    assert all(torch.equal(*both) for both in zip(words.buffers(), first.buffers(), strict=True))


@pytest.mark.parametrize("with_decoder", [False, True])
@pytest.mark.parametrize("mask_block", [0, 1])
def test_the_objective_adds_the_losses_of_its_heads(with_decoder: bool, mask_block: int) -> None:
    torch.manual_seed(0)
    images = smooth(3, 3, 24, 32)
    encoder: Any = build_encoder(CONFIG if not mask_block else CONFIG.__class__(**{**vars(CONFIG), "depth": 2}))
    decoder = Decoder(encoder, 1) if with_decoder else None
    arguments = encoder, build_target("mean_colour", (8, 8), 3, 3), Normalise((0.5,), (0.5,), 3), mask_block
    model = MaskedPatchPrediction(*arguments, 0.0, decoder, words=2.0)
    assert model.words is not None
    assert model.words_head is not None
    assert model.seen_head is not None
    assert model.image_words is not None
    model.words.learn(images)
    components = torch.randn(3, COMPONENTS, generator=seeded(4)).half()
    model.image_words.learn(components.float())
    components[1] = torch.nan  # an image that could not be read
    picked = pick_patches(3, (3, 4), 0.5, seeded(2))
    drawn: Corruption = draw_corruption(picked, 12, seeded(3), (1.0, 0.0, 0.0) if mask_block else (0.4, 0.3, 0.3))
    loss, figures = model(images, drawn, components)
    tokens, patches = model._encode(model.normalise(images), drawn)
    true = model.words.of(images)
    of_image = model.image_words.of(components)
    squared: dict[str, list[Tensor]] = {"loss_words": [], "loss_words_seen": [], "loss_words_image": []}
    for b, row in enumerate(picked.tolist()):
        for k, at in enumerate(row):
            squared["loss_words"].append((model.words_head(tokens[b, k]) - true[b, at]).square().mean())
        rest = sorted({*range(12)} - {*row})
        for at in rest:
            squared["loss_words_seen"].append((model.seen_head(patches[b, at]) - true[b, at]).square().mean())
        mean = torch.stack([patches[b, at] for at in rest]).mean(dim=0)
        if b != 1:
            squared["loss_words_image"].append((model.image_head(mean) - of_image[b]).square().mean())
    means = {name: torch.stack(values).mean().item() for name, values in squared.items()}
    for name, mean in means.items():
        assert float(figures[name][0] / figures[name][1]) == pytest.approx(mean, rel=1e-5)
    colour = float(figures["loss"][0] / figures["loss"][1])
    means["loss_words_image"] *= 2 / 3  # one image of three has no words, whichever images a micro-batch holds
    assert loss.item() == pytest.approx(colour + 2 * sum(means.values()), rel=1e-5)
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_others_are_the_rest_in_order() -> None:
    assert others(torch.tensor([[3, 0], [1, 4]]), 5).tolist() == [[1, 2, 4], [0, 2, 3]]
