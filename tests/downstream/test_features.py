"""Pooling, features of frozen encoders against timm by hand, and what they are cached by."""

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpp.data.reader import Batch
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import EvalTransform, normalise
from mpp.downstream.features import FrozenEncoder, extract_features, pool
from mpp.model.attention import use_kernel
from mpp.weights.base import build
from mpp.weights.opening import open_weights

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((64, 64), (40, 70), (90, 30))]
SOURCE = ListSource(IMAGES, [0, 1, 0])
ALL = np.arange(3)
HW = (64, 64)


def frozen(spec: str, args: dict[str, int] = {}, **told: Any) -> FrozenEncoder:  # noqa: B006
    weights = open_weights(spec)
    return FrozenEncoder(
        replace(weights, args=weights.args | args), image_hw=told.pop("image_hw", HW), device=CPU, **told
    )


def features(of: FrozenEncoder, how: str, layer: int = -1) -> torch.Tensor:
    found, kept = of.extract(how, layer)(SOURCE, ALL)
    assert kept.tolist() == [0, 1, 2]
    return torch.from_numpy(found)


def in_timm(of: FrozenEncoder) -> tuple[Any, torch.Tensor]:
    """timm's own model with the same weights, and the images as it wants them."""
    weights = of.weights
    size = {"img_size": of.image_hw} if of.is_vit else {}
    model = timm.create_model(weights.name, num_classes=0, **size, **weights.args).eval()
    told = model.load_state_dict(of.model.state_dict(), strict=False)
    assert not [name for name in told.missing_keys if not name.startswith(("fc_norm", "norm"))]
    images = torch.stack([EvalTransform(of.image_hw, weights.framing)(image) for image in IMAGES])
    return model, normalise(images, weights.mean, weights.std)


@pytest.mark.parametrize("spec", ["random:vit_tiny_patch16_224", "random:vit_tiny_r_s16_p8_224"])
def test_of_a_vit(spec: str) -> None:
    small = {"depth": 5, "embed_dim": 48, "num_heads": 3}
    last = frozen(spec, small)
    model, pixels = in_timm(last)
    assert last.pools == ("mean", "token", "mean+token")
    with torch.no_grad():
        tokens = model.forward_features(pixels)
        torch.testing.assert_close(features(last, "token"), tokens[:, 0], rtol=0, atol=2e-5)
        torch.testing.assert_close(features(last, "mean"), tokens[:, 1:].mean(dim=1), rtol=0, atol=2e-5)
        # By hand, block by block.
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
        after = list(itertools.accumulate(model.blocks, lambda x, block: block(x), initial=x))[1:]
    of = frozen(spec, small, layers=(-2, 2, 0, -len(after)))
    assert of.layers == (-len(after), 2 - len(after), -2)  # each once
    for layer in of.layers:
        expected = after[layer][:, 1:].mean(dim=1), after[layer][:, 0]
        for how, each in zip(("mean", "token"), expected, strict=True):
            torch.testing.assert_close(features(of, how, layer), each, rtol=0, atol=2e-5)
        torch.testing.assert_close(features(of, "mean+token", layer), torch.cat(expected, dim=1), rtol=0, atol=2e-5)
    assert torch.equal(features(frozen(spec, small, layers=(len(after) - 1,)), "mean"), features(last, "mean"))
    of = frozen(spec, small, layers=(0, -1), quarters=True)
    assert of.pools == ("mean", "token", "mean+token", "quarters")
    for layer, all_tokens in ((-1, tokens), (-5, after[0])):
        grid = all_tokens[:, 1:].unflatten(1, model.patch_embed.grid_size)
        expected = [side.mean(dim=(1, 2)) for half in grid.chunk(2, dim=1) for side in half.chunk(2, dim=2)]
        torch.testing.assert_close(features(of, "quarters", layer), torch.cat(expected, dim=1), rtol=0, atol=2e-5)
        assert torch.equal(features(of, "mean", layer), features(frozen(spec, small, layers=(layer,)), "mean", layer))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_small_patch16_dinov3", {}),  # a class token and four registers
        ("eva02_tiny_patch14_224", {"img_size": 56}),  # its last norm comes after the pooling
        ("vit_small_patch16_dinov3", {"class_token": False, "num_reg_tokens": 0}),
    ],
)
def test_of_an_eva(name: str, args: dict[str, Any]) -> None:
    hw, small = (args.get("img_size", 64),) * 2, {"embed_dim": 48, "depth": 2, "num_heads": 3, **args}
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=0, **small).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    small.pop("img_size", None)
    weights = replace(open_weights(f"random:{name}"), args=small, state=model.state_dict(), image_hw=hw)
    of = FrozenEncoder(weights, layers=("all",), device=CPU)
    pixels = torch.stack([EvalTransform(hw, weights.framing)(image) for image in IMAGES])
    outputs: list[torch.Tensor] = []
    model.blocks[0].register_forward_hook(lambda *given: outputs.append(given[-1]))
    with torch.no_grad():
        last, prefix = model.forward_features(normalise(pixels, weights.mean, weights.std)), model.num_prefix_tokens
        for layer, tokens, norm in ((-2, outputs[0], torch.nn.Identity()), (-1, last, model.fc_norm)):
            expected = {"mean": tokens[:, prefix:].mean(dim=1), "token": tokens[:, 0]}
            for how in of.pools[:2]:
                torch.testing.assert_close(features(of, how, layer), norm(expected[how]), rtol=0, atol=2e-5)
    assert of.pools == (("mean", "token", "mean+token") if prefix else ("mean",))
    assert of.read(pixels, "none").shape == (3, (hw[0] // 14) * (hw[1] // 14) if prefix == 1 else 16, 48)


SPECS: list[Any] = ["random:test_vit", "random:resnet10t", "random:test_convnext", "random:test_efficientnet"]
SPECS += [pytest.param("random:hiera_tiny_224", marks=pytest.mark.slow)]  # timm stops early unless it is told not to


@pytest.mark.parametrize("spec", SPECS)
def test_one_pass_gives_the_features_of_one_pass_a_layer(spec: str) -> None:
    size = {"random:test_vit": {"image_hw": (32, 32)}, "random:hiera_tiny_224": {"image_hw": (224, 224)}}.get(spec, {})
    together = frozen(spec, layers=("all",), **size)
    assert together.layers == tuple(range(-together.depth, 0))
    model, pixels = in_timm(together)
    with torch.no_grad():
        outputs = model.forward_intermediates(pixels, intermediates_only=True)  # of ViTs the patches, as maps
        pooled = [of.mean(dim=(2, 3)) for of in outputs]
        if not together.is_vit:
            assert together.pools == ("mean",)
            pooled[-1] = model(pixels)
    assert together.depth == len(outputs)
    for layer in together.layers:
        alone = frozen(spec, layers=(layer,), **size)
        for how in together.pools:
            assert torch.equal(features(together, how, layer), features(alone, how, layer))
        if layer != -1 or not together.is_vit:
            torch.testing.assert_close(features(together, "mean", layer), pooled[layer], rtol=0, atol=2e-5)


def test_a_norm_after_the_pooling_is_part_of_the_last_layer() -> None:
    weights = open_weights("random:vit_base_patch32_clip_224")
    small = {**weights.args, "embed_dim": 48, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    state = timm.create_model(weights.name, num_classes=0, img_size=64, global_pool="avg", **small).state_dict()
    assert "fc_norm.weight" in state
    for name in ("fc_norm.weight", "fc_norm.bias"):
        state[name] = torch.rand(48, generator=torch.Generator().manual_seed(1))
    of = FrozenEncoder(replace(weights, args=small, state=state, pool="avg", image_hw=HW), device=CPU)
    images = torch.stack([EvalTransform(HW, weights.framing)(image) for image in IMAGES])
    with torch.no_grad():
        expected = build(of.weights, classes=()).eval()(normalise(images, weights.mean, weights.std))
    torch.testing.assert_close(features(of, "mean"), expected, rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", ["random:test_vit", "random:test_convnext"])
def test_all_layers_on_a_gpu(spec: str) -> None:
    weights = open_weights(spec)
    there, here = (FrozenEncoder(weights, layers=("all",), device=torch.device(name)) for name in ("cuda", "cpu"))
    there.model.load_state_dict(here.model.state_dict())
    for layer, how in itertools.product(here.layers, here.pools):
        torch.testing.assert_close(features(there, how, layer), features(here, how, layer), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_features_are_kept_by_all_that_they_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPP_CACHE", str(tmp_path))
    calls: list[int] = []
    whole = FrozenEncoder.encode

    def counted(self: FrozenEncoder, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(FrozenEncoder, "encode", counted)

    def read(source: ListSource = SOURCE, indices: np.ndarray = ALL, **told: Any) -> tuple[np.ndarray, int]:
        before = len(calls)
        of = frozen("random:test_vit", cache=True, **{"image_hw": (32, 32), **told})
        found = [of.extract(how, layer)(source, indices)[0] for layer in of.layers for how in of.pools]
        return np.concatenate(found, axis=1), len(calls) - before

    first, passes = read()
    assert passes == 1  # of the images; all poolings at once
    again, passes = read()
    assert (passes, again.tobytes()) == (0, first.tobytes())
    assert read(ListSource([image.copy() for image in IMAGES], [0, 1, 0]))[1] == 0  # the same images
    changed = [image.copy() for image in IMAGES]
    changed[1][0, 0, 0] ^= 1
    told: dict[str, Any]
    others = {"source": ListSource(changed, [0, 1, 0])}, {"indices": np.array([0, 2])}, {"precision": "bf16"}
    assert not np.allclose(read(seed=2)[0], first)  # fresh weights are drawn from it
    for told in ({"seed": 1}, {"image_hw": (48, 32)}, {"layers": (0, 1)}, *others):
        assert read(**told)[1] == 1, told
        assert read(**told)[1] == 0, told
    assert read(layers=(1,))[1] == 0  # it was kept with the other
    assert read(layers=("all",))[1] == 1  # one pass for all those that were not
    for name, value in (("TRANSFORM_VERSION", 0), ("PIL.__version__", "0")):
        with monkeypatch.context() as changes:
            changes.setattr(f"mpp.downstream.features.{name}", value)
            assert read()[1] == 1, name
    of = frozen("random:test_vit", cache=True, image_hw=(32, 32))
    monkeypatch.setattr("mpp.downstream.features.settle_kernel", lambda *told: use_kernel(told[-1], "sdpa"))
    before = len(calls)
    of.extract("mean")(SOURCE, ALL)
    assert len(calls) == before + 1


def test_without_a_cache_one_encoder_still_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    of = frozen("random:test_vit", image_hw=(32, 32))
    first = features(of, "mean")
    monkeypatch.setattr(of, "encode", None)
    assert torch.equal(features(of, "mean"), first)


def batch(images: Tensor, start: int, bad: tuple[int, ...] = ()) -> Batch:
    """As the loader gives it: the images whose number is in `bad` are not in it, but named."""
    good = [i for i in range(len(images)) if start + i not in bad]
    index = start + torch.tensor(good, dtype=torch.int64)
    return {"images": images[good], "index": index, "label": index % 3, "bad": [(i, "truncated") for i in bad]}


def encode(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :4].to(torch.bfloat16)


def test_pool_by_hand() -> None:
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 6.0]]])
    assert pool(tokens, 1, "mean").tolist() == [[2.0, 4.0]]
    assert pool(tokens, 1, "token").tolist() == [[9.0, 9.0]]
    with pytest.raises(ValueError, match="take pool=mean"):
        pool(tokens, 0, "token")


def test_features_are_those_of_the_encoder_in_order_without_images_that_did_not_decode() -> None:
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    shared = torch.empty(3, dtype=torch.int64)  # a loader may use a buffer again

    def batches() -> Iterator[Batch]:
        for start, bad in ((0, (1,)), (3, (3, 4, 5)), (6, ())):
            made = batch(images[start : start + 3], start, bad)
            shared[: len(made["index"])] = made["index"]
            yield {**made, "index": shared[: len(made["index"])]}

    features, index = extract_features(encode, batches(), "cpu")
    assert (features.dtype, index.dtype) == (np.float32, np.int64)
    assert index.tolist() == [0, 2, 6, 7, 8]
    np.testing.assert_array_equal(features, encode(images[index]).float().numpy())
    features, index = extract_features(encode, [], "cpu")  # as of a rank that has no image to read
    assert (features.shape, features.dtype, index.shape, index.dtype) == ((0, 0), np.float32, (0,), np.int64)


def test_one_token_of_an_image_does_not_keep_all_of_them_nor_gradients() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def encode(images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert sum(tokens() is not None for tokens in kept) <= 1  # of the batch before
        tokens = images.float().reshape(len(images), 4, -1)
        kept.append(weakref.ref(tokens.untyped_storage()))
        return pool(tokens, 1, "token")

    batches = [batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), start) for start in range(0, 8, 2)]
    assert extract_features(encode, batches, "cpu")[0].shape == (8, 12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_gives_what_the_cpu_gives() -> None:
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    batches = [batch(part, start) for start, part in zip(range(0, 64, 16), images.split(16), strict=True)]
    on_device, index = extract_features(encode, batches, "cuda")
    np.testing.assert_array_equal(on_device, extract_features(encode, batches, "cpu")[0])
    assert index.tolist() == list(range(64))
