"""Words of whole images against loops in float64, and their loss by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mpp.objective.image_words import IMAGE_WORDS, ImageWords
from tests.objective.test_objective import seeded

VALUES = 70  # of a patch


def words_of_kinds(images: int, kinds: int, patches: int = 12) -> tuple[Tensor, Tensor]:
    """Words of images of some kinds, whose patches differ little within a kind, and the kinds."""
    kind = torch.arange(images) % kinds
    middle = torch.randn(kinds, patches, VALUES, generator=seeded(0))
    return middle[kind] + 0.1 * torch.randn(images, patches, VALUES, generator=seeded(1)), kind


def by_hand(words: Tensor, grid: tuple[int, int], learnt: ImageWords) -> np.ndarray:
    """(images, image words), image by image in float64."""
    middle, whitening, typical, usual, spread = (value.double().numpy() for value in learnt.buffers())
    rows, columns, found = -(-grid[0] // 2), -(-grid[1] // 2), []
    for image in words.double().numpy().reshape(len(words), *grid, VALUES):
        parts = [image[:rows, :columns], image[:rows, -columns:], image[-rows:, :columns], image[-rows:, -columns:]]
        values = np.stack([part.mean(axis=(0, 1)) for part in parts], axis=1).reshape(-1)  # a word's four together
        distance = np.linalg.norm((values - middle) @ whitening - typical, axis=1)
        found.append((np.maximum(0, distance.mean() - distance) - usual) / spread)
    return np.stack(found)


@pytest.mark.parametrize("grid", [(3, 4), (2, 6), (12, 1)])
def test_they_are_what_a_loop_over_images_finds(grid: tuple[int, int]) -> None:
    words, _ = words_of_kinds(300, 40)
    learnt = ImageWords(grid, VALUES)
    learnt.learn(words.split(64), 300)
    found = learnt.of(words)
    np.testing.assert_allclose(found, by_hand(words, grid, learnt), rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(IMAGE_WORDS), rtol=0, atol=1e-3)
    deviation = found.std(dim=0, unbiased=False)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), rtol=0, atol=0.02)


def test_images_of_a_kind_are_alike() -> None:
    words, kind = words_of_kinds(640, 5)
    learnt = ImageWords((3, 4), VALUES)
    learnt.learn([words], 640)
    found = torch.nn.functional.normalize(learnt.of(words), dim=1)
    likeness = (found @ found.T).fill_diagonal_(-1)
    assert torch.equal(kind[likeness.argmax(dim=1)], kind)


def test_components_are_whitened() -> None:
    words = torch.randn(400, 12, VALUES, generator=seeded(3)) * torch.linspace(0.1, 3, VALUES)
    learnt = ImageWords((3, 4), VALUES)
    learnt.learn(words.split(100), 400)
    images = learnt._quarters(words) - learnt.middle
    torch.testing.assert_close(images.mean(dim=0), torch.zeros(4 * VALUES), rtol=0, atol=1e-4)
    size = learnt.whitening.shape[1]
    largest = np.linalg.eigvalsh(np.cov(images.double().numpy(), rowvar=False, bias=True))[-size:]
    white = np.cov((images @ learnt.whitening).double().numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose(white, np.diag(largest / (largest + 0.1 * largest.mean())), atol=1e-3)


@pytest.mark.parametrize(("different", "typical"), [(1, 1), (80, 10), (4096, 512)])
def test_each_eighth_image_makes_a_typical_one(different: int, typical: int) -> None:
    words = torch.randn(max(different, 100), 12, VALUES, generator=seeded(4))  # of few images, several crops
    learnt = ImageWords((3, 4), VALUES)
    learnt.learn(words.split(1000), different)
    assert len(learnt.words) == IMAGE_WORDS
    assert len(learnt.words.unique(dim=0)) == typical


def test_images_that_are_all_the_same_are_no_error() -> None:
    learnt = ImageWords((3, 4), VALUES)
    learnt.learn([torch.zeros(20, 12, VALUES)], 20)
    assert learnt.of(torch.zeros(2, 12, VALUES)).isfinite().all()
    assert learnt.of(torch.randn(2, 12, VALUES, generator=seeded(0))).isfinite().all()
