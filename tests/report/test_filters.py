"""Filters against scikit-learn's components, position similarity against its closed form."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import PCA

from mpp.model.encoder import Encoder, build_encoder
from mpp.model.positions import sincos2d
from mpp.model.settings import ModelConfig
from mpp.report.filters import embedding_filters, position_similarity
from mpp.weights.numerics import create_hybrid
from mpp.weights.timm_folder import timm_state


def encoder(**changes: Any) -> Encoder:
    settings = {"img_size": (16, 40), "patch_size": (8,), "depth": 1, "embed_dim": 48, "num_heads": 3} | changes
    torch.manual_seed(0)
    return build_encoder(ModelConfig("vit_tiny_patch16_224", **settings))


def timm_vit(**settings: Any) -> Any:
    size = {"img_size": (16, 40), "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **size, **settings)


@pytest.mark.parametrize("channels", [1, 3])
def test_components_are_scikit_learns_and_their_largest_value_is_positive(channels: int) -> None:
    model = encoder(in_chans=channels)
    filters = embedding_filters(model, 28)
    weight = model.vit.patch_embed.proj.weight.detach().double().numpy()
    theirs: Any = PCA(28, svd_solver="full").fit(weight.reshape(48, -1))
    np.testing.assert_allclose(filters.share, theirs.explained_variance_ratio_, rtol=1e-6)
    components = theirs.components_.reshape(28, channels, 8, 8).transpose(0, 2, 3, 1)
    signs = np.sign((filters.kernels * components).sum(axis=(1, 2, 3), keepdims=True))
    np.testing.assert_allclose(filters.kernels, signs * components, atol=1e-6)
    flat = filters.kernels.reshape(28, -1)
    assert (flat[np.arange(28), np.abs(flat).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize(
    ("changes", "count"),
    [({"embed_dim": 12}, 11), ({"patch_size": (2,), "in_chans": 1, "img_size": (8,)}, 4)],
    ids=["narrow", "small patches"],
)
def test_there_are_as_many_components_as_dimensions(changes: dict[str, Any], count: int) -> None:
    filters = embedding_filters(encoder(**changes))
    assert len(filters.kernels) == len(filters.share) == count
    assert filters.share.sum() == pytest.approx(1)


def test_filters_that_are_all_the_same_explain_nothing() -> None:
    model = encoder()
    model.vit.patch_embed.proj.weight.data[:] = 1
    filters = embedding_filters(model)
    assert np.isfinite(filters.kernels).all()
    assert np.array_equal(filters.share, np.zeros(28))


def test_a_hybrid_shows_its_first_convolution() -> None:
    small = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    vit: Any = create_hybrid("vit_base_r50_s16_224", (1, 1), **small)
    kernels, share = embedding_filters(Encoder(vit.eval()))
    assert len(share) == 0
    assert torch.equal(torch.from_numpy(kernels).permute(0, 3, 1, 2), vit.patch_embed.backbone.stem.conv.weight[:28])


def sincos_tiles() -> np.ndarray:
    """By the offset of two patches alone: half the mean of cos(omega dx), half that of cos(omega dy)."""
    omega = 10_000.0 ** -(np.arange(12) / 11)
    rows, columns = (np.cos(np.subtract.outer(at, at)[..., None] * omega).mean(-1) for at in map(np.arange, (2, 5)))
    return (rows[:, None, :, None] + columns[None, :, None, :]) / 2


def test_sinusoids_are_alike_by_their_offset_and_without_positions_there_are_no_tiles() -> None:
    tiles: Any = position_similarity(encoder(pos_embed="sincos2d"))
    np.testing.assert_allclose(tiles, sincos_tiles(), atol=1e-6)
    assert position_similarity(encoder(pos_embed="none")) is None


@pytest.mark.parametrize(
    "settings",
    [{}, {"no_embed_class": True}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}],
    ids=str,
)
def test_a_learned_table_is_read_rows_first_and_without_the_tokens_before_it(settings: dict[str, Any]) -> None:
    vit = timm_vit(**settings)
    vit.pos_embed.data[:, -10:] = 3 * sincos2d(2, 5, 48)
    tiles: Any = position_similarity(Encoder(vit))
    np.testing.assert_allclose(tiles, sincos_tiles(), atol=1e-6)


def test_tiles_of_learned_2d_positions_are_those_of_the_table_that_is_written_out() -> None:
    model, vit = encoder(pos_embed="2d"), timm_vit(num_classes=0)
    vit.load_state_dict(timm_state(model))
    tiles: Any = position_similarity(model)
    written: Any = position_similarity(Encoder(vit))
    np.testing.assert_allclose(written, tiles, atol=1e-6)
    np.testing.assert_allclose(np.einsum("rcrc->rc", tiles), np.ones((2, 5)), rtol=1e-6)
