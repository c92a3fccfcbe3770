"""Words of whole images against loops in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mpp.objective.image_words import COMPONENTS, IMAGE_WORDS, ImageComponents, ImageWords
from tests.objective.test_objective import seeded
from tests.objective.test_words import smooth


def components_of(
    images: Tensor, grid: tuple[int, int], patch: tuple[int, int], flips: tuple[bool, bool] = (False, False)
) -> ImageComponents:
    components = ImageComponents(grid, patch, images.shape[1], flips)
    components.words.learn(images)
    components.learn(components.quarters(images))
    return components


@pytest.mark.parametrize(("grid", "patch"), [((3, 4), (8, 8)), ((2, 6), (16, 4)), ((6, 1), (4, 8))])
def test_quarters_are_means_of_the_words_of_their_patches(grid: tuple[int, int], patch: tuple[int, int]) -> None:
    images = smooth(40, 3, grid[0] * patch[0], grid[1] * patch[1])
    components = components_of(images, grid, patch)
    assert components.words.windows == tuple(min(side, 8) // 2 for side in patch)  # 16 pixels are shrunk to 8
    words = components.words.of(images).double().numpy().reshape(40, *grid, -1)
    rows, columns = -(-grid[0] // 2), -(-grid[1] // 2)
    for image, found in zip(words, components.quarters(images), strict=True):
        parts = [image[:rows, :columns], image[:rows, -columns:], image[-rows:, :columns], image[-rows:, -columns:]]
        values = np.stack([part.mean(axis=(0, 1)) for part in parts], axis=1).reshape(-1)  # a word's four together
        np.testing.assert_allclose(found, values, atol=1e-4)


@pytest.mark.parametrize("flips", [(False, True), (True, False), (True, True)])
def test_halves_that_flips_exchange_count_as_one(flips: tuple[bool, bool]) -> None:
    images = smooth(20, 3, 32, 32)
    plain = components_of(images, (4, 4), (8, 8))
    quarters = plain.quarters(images).unflatten(1, (-1, 2, 2))
    axes = [axis for axis, flip in zip((2, 3), flips, strict=True) if flip]
    found = components_of(images, (4, 4), (8, 8), flips).quarters(images).unflatten(1, (-1, 2, 2))
    torch.testing.assert_close(found, quarters.mean(dim=axes, keepdim=True).expand_as(quarters), rtol=1e-4, atol=1e-5)


def test_components_are_whitened() -> None:
    images = smooth(400, 3, 24, 32)
    components = components_of(images, (3, 4), (8, 8))
    quarters = components.quarters(images).double()
    largest = np.linalg.eigvalsh(np.cov(quarters.numpy(), rowvar=False, bias=True))[-COMPONENTS:]
    found = components.of(quarters.float()).double().numpy()
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-3)
    white = np.cov(found, rowvar=False, bias=True)
    np.testing.assert_allclose(white, np.diag(largest / (largest + largest.mean())), atol=2e-3)


def of_kinds(images: int, kinds: int) -> tuple[Tensor, Tensor]:
    """Components of images of some kinds, which differ little within a kind, and the kinds."""
    kind = torch.arange(images) % kinds
    middle = torch.randn(kinds, COMPONENTS, generator=seeded(0))
    return middle[kind] + 0.1 * torch.randn(images, COMPONENTS, generator=seeded(1)), kind


def test_words_are_what_a_loop_over_images_finds() -> None:
    components, _ = of_kinds(300, 40)
    learnt = ImageWords()
    learnt.learn(components)
    found = learnt.of(components)
    typical, usual, spread = (value.double().numpy() for value in learnt.buffers())
    for image, words in zip(components.double().numpy(), found, strict=True):
        distance = np.linalg.norm(image - typical, axis=1)
        by_hand = (np.maximum(0, distance.mean() - distance) - usual) / spread
        np.testing.assert_allclose(words, by_hand, rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(IMAGE_WORDS), rtol=0, atol=1e-3)
    deviation = found.std(dim=0, unbiased=False)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), rtol=0, atol=0.02)


def test_images_of_a_kind_are_alike() -> None:
    components, kind = of_kinds(640, 5)
    learnt = ImageWords()
    learnt.learn(components)
    found = torch.nn.functional.normalize(learnt.of(components), dim=1)
    likeness = (found @ found.T).fill_diagonal_(-1)
    assert torch.equal(kind[likeness.argmax(dim=1)], kind)


@pytest.mark.parametrize(("images", "typical"), [(1, 1), (80, 10), (4096, 512), (5000, 512)])
def test_each_eighth_image_makes_a_typical_one(images: int, typical: int) -> None:
    learnt = ImageWords()
    learnt.learn(torch.randn(images, COMPONENTS, generator=seeded(4)))
    assert len(learnt.words) == IMAGE_WORDS
    assert len(learnt.words.unique(dim=0)) == typical


def test_images_that_are_all_the_same_are_no_error() -> None:
    images = torch.full((20, 3, 24, 32), 9, dtype=torch.uint8)
    components, learnt = components_of(images, (3, 4), (8, 8)), ImageWords()
    learnt.learn(components.of(components.quarters(images)))
    assert learnt.of(components.of(components.quarters(images)).half()).isfinite().all()
    assert learnt.of(components.of(components.quarters(smooth(2, 3, 24, 32)))).isfinite().all()
