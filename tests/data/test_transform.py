import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.data.decoding import open_picture
from mpp.data.seeds import image_seeds, uniforms
from mpp.data.settings import CROP_MODES, INTERPOLATIONS, DataConfig, DecodeOptions, Framing
from mpp.data.transform import EvalTransform, Normalise, TrainTransform, normalise, resize
from mpp.errors import UserError

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)
from torchvision.transforms import v2  # isort: skip

WHOLE = DataConfig(crop_scale=(1.0, 1.0), hflip=0.0)


class Drawing:
    """A transform with other draws at each call."""

    def __init__(self, transform):
        self.transform, self.calls = transform, itertools.count()

    def __call__(self, image):
        key = image_seeds(0, np.array([next(self.calls)]))
        return self.transform(image, uniforms(key, self.transform.draws)[0].tolist())


def plain(hw, channels=3, **options):
    """Whole images, with other draws at each call."""
    return Drawing(TrainTransform(replace(WHOLE, **options), hw, channels))


def noise(height, width, channels=3):
    """Smooth noise, like a photograph's; white noise would only test rounding."""
    shape = (max(1, height // 8), max(1, width // 8), channels)
    small = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    planes = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack(planes, axis=-1)


def by_pillow(image, size):
    """Each channel by Pillow's bicubic: int (C, h, w)."""
    planes = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2])]
    return np.stack([np.asarray(p.resize(size[::-1], Image.Resampling.BICUBIC)) for p in planes]).astype(int)


def assert_equal_but_for_rounding(out, reference):
    """Both round to whole numbers between the two directions, in fixed point of their own."""
    difference = np.abs(np.asarray(out).astype(int) - reference)
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-3


def ramp(height=240, width=200):
    """Channel 0 holds the row, channel 1 the column, channel 2 nothing."""
    return np.stack([*np.indices((height, width), np.uint8), np.zeros((height, width), np.uint8)], axis=-1)


def crops(transform, image, number):
    """(rows, columns) that each of many crops spans, seen from the ramp's values."""
    out = torch.stack([transform(image)[:2].flatten(1).float() for _ in range(number)])
    return (out.amax(2) - out.amin(2) + 1).numpy()


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (500, 300), (7, 5)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_resize_equals_pillow(size, channels):
    image = noise(180, 240, channels)
    out = resize(image, size)
    assert out.dtype == torch.uint8
    assert out.shape == (channels, *size)
    assert_equal_but_for_rounding(out, by_pillow(image, size))


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("share", [1.0, 0.875, 0.9, 0.965, 1.15])
@pytest.mark.parametrize("target", [(64, 64), (32, 96), (33, 33)])
def test_evaluation_is_timms(target, share, mode):
    mean = (0.1, 0.5, 0.9)
    fill = tuple(round(255 * value) for value in mean) if mode == "border" else (0,)
    for hw in ((180, 240), (241, 180), (50, 71), (64, 64), (200, 40)):
        for interpolation in INTERPOLATIONS if (hw, share) == ((180, 240), 0.9) else ("bicubic", "bilinear"):
            image = noise(*hw)
            theirs = timm.data.create_transform(
                (3, *target), crop_pct=share, crop_mode=mode, interpolation=interpolation, mean=mean, normalize=False
            )
            reference = np.asarray(theirs(Image.fromarray(image))).astype(int)
            out = EvalTransform(target, Framing(share, interpolation, mode, fill))(image)
            assert out.shape == (3, *target)
            assert out.is_contiguous()
            # torch's weights have fewer bits than Pillow's; a place off by one pixel would make 5 levels on average.
            difference = np.abs(out.numpy().astype(int) - reference)
            assert difference.mean() < 0.2
            assert difference.max() <= 4


def test_borders_of_any_number_of_channels():
    for channels, fill in ((1, (7,)), (2, (7, 9)), (5, (7,))):
        out = EvalTransform((32, 32), Framing(1.0, "lanczos", "border", fill))(noise(20, 40, channels))
        assert out.shape == (channels, 32, 32)
        assert out[:, 0, 0].tolist() == [fill[0], fill[-1], *fill * channels][:channels]
    for wrong in ({"crop_pct": 0}, {"interpolation": "random"}, {"crop_mode": "middle"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Framing(**wrong)


@pytest.mark.parametrize("hw", [(1, 1), (1, 5000), (5000, 1), (3, 2000), (2, 2)])
@pytest.mark.parametrize("channels", [1, 2, 3, 8])
@pytest.mark.parametrize("config", [DataConfig(), WHOLE], ids=["random", "plain"])
def test_any_shape(hw, channels, config):
    image = np.full((*hw, channels), 9, dtype=np.uint8)
    for transform in (Drawing(TrainTransform(config, (48, 32), channels)), Drawing(EvalTransform((48, 32)))):
        out = transform(image)
        assert out.shape == (channels, 48, 32)
        assert out.dtype == torch.uint8
        assert out.unique().tolist() == [9]


def test_crops_stay_within_scale_and_ratio_and_reach_every_border():
    low, high, narrow, wide = 0.2, 0.6, 0.75, 4 / 3
    config = DataConfig(crop_scale=(low, high), crop_ratio=(narrow, wide), hflip=0)
    rows, columns = crops(Drawing(TrainTransform(config, (240, 240), 3)), ramp(), 300).T
    share, ratio = rows * columns / (240 * 200), columns / rows
    assert low - 0.03 < share.min() < low + 0.05
    assert high - 0.05 < share.max() < high + 0.03
    assert narrow * 0.95 < ratio.min() < narrow * 1.1
    assert wide * 0.9 < ratio.max() < wide * 1.05
    transform = Drawing(TrainTransform(DataConfig(crop_scale=(0.5, 0.9), hflip=0), (64, 64), 3))
    out = torch.stack([transform(ramp(200, 200))[:2].flatten(1) for _ in range(200)])
    assert out.amin(2).amin(0).tolist() <= [3, 3]
    assert out.amax(2).amax(0).tolist() >= [196, 196]

    config = DataConfig(crop_scale=(0.1, 0.3), crop_ratio=(1.0, 1.0), hflip=0)  # the ratio is relative to the target's
    rows, columns = crops(Drawing(TrainTransform(config, (120, 240), 3)), ramp(), 40).T
    np.testing.assert_allclose(columns / rows, 2, rtol=0.06)
    image = noise(100, 160)  # the whole scale: the largest central crop
    assert_equal_but_for_rounding(plain((50, 50))(image), by_pillow(image[:, 30:130], (50, 50)))


def test_crops_are_distributed_as_torchvisions():
    ours = crops(Drawing(TrainTransform(DataConfig(hflip=0), (96, 96), 3)), ramp(), 500)
    reference = v2.RandomResizedCrop(96, scale=(0.2, 1.0))
    theirs = [reference.make_params([torch.zeros(3, 240, 200)]) for _ in range(500)]
    for axis, key in enumerate(("height", "width")):
        sizes = [crop[key] for crop in theirs]
        assert ours[:, axis].mean() == pytest.approx(np.mean(sizes), rel=0.05)
        assert ours[:, axis].std() == pytest.approx(np.std(sizes), rel=0.15)


@pytest.mark.parametrize("hw", [(2000, 1500), (1999, 1501), (600, 1237)])
def test_crops_of_large_jpegs_fit_the_blocks_that_are_scaled(hw, encode):
    picture = open_picture(encode(noise(*hw), "JPEG"), DecodeOptions(3))
    exact, aligned = TrainTransform(DataConfig(), (64, 64), 3), TrainTransform(DataConfig(), (64, 64), 3)
    off = []
    for draws in uniforms(image_seeds(0, np.arange(300)), exact.draws).tolist():
        wanted, box = exact.crop(*hw, draws), aligned.box(picture, draws)
        step = picture.step(wanted[2], wanted[3], (64, 64))
        assert step in (2, 4, 8)
        assert all(edge % step == 0 for edge in box)
        assert min(box) >= 0
        assert box[0] + box[2] <= hw[0]
        assert box[1] + box[3] <= hw[1]
        assert all(abs(ours - edge) < step for ours, edge in zip(box[2:], wanted[2:], strict=True))
        off.append([ours - edge for ours, edge in zip(box[:2], wanted[:2], strict=True)])
    assert np.abs(off).max() <= 8
    assert np.abs(np.mean(off, axis=0)).max() < 1


def test_flips_and_grayscale():
    image = noise(16, 16)
    upright = torch.from_numpy(image).permute(2, 0, 1)
    for out in (resize(image, (16, 16)), EvalTransform((16, 16))(image), plain((16, 16))(image)):
        assert torch.equal(out, upright)  # what fits stays as it is
    assert torch.equal(plain((16, 16), hflip=1.0)(image), upright.flip(2))
    assert torch.equal(plain((16, 16), vflip=1.0)(image), upright.flip(1))
    grey = plain((16, 16), grayscale=1.0)(image)
    luma = np.asarray(Image.fromarray(image).convert("L")).astype(int)
    assert torch.equal(grey, grey[:1].expand(3, -1, -1))
    assert np.abs(grey[0].numpy() - luma).max() <= 1
    for option in ("hflip", "vflip", "grayscale"):
        sometimes = plain((16, 16), **{option: 0.25})
        assert 0.18 < np.mean([not torch.equal(sometimes(image), upright) for _ in range(400)]) < 0.32


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_brightness_scales_and_contrast_stretches_around_the_mean(channels):
    brighter = plain((4, 4), channels, jitter=(0.4, 0, 0, 0))
    values = np.array([brighter(np.full((4, 4, channels), 100, dtype=np.uint8)).float().mean() for _ in range(300)])
    assert 59 <= values.min() < 65
    assert 135 < values.max() <= 140
    assert values.mean() == pytest.approx(100, abs=4)
    image = np.full((4, 4, channels), 80, dtype=np.uint8)
    image[:2] = 120
    stretch, spans = plain((4, 4), channels, jitter=(0, 0.5, 0, 0)), []
    for _ in range(200):
        out = stretch(image).float()
        assert float(out.mean()) == pytest.approx(100, abs=1)
        spans.append(float(out.max() - out.min()))
    assert 19 <= min(spans) < 24
    assert 56 < max(spans) <= 61


def test_saturation_and_hue_keep_what_they_should():
    image = noise(16, 16)
    for jitter in ((0, 0, 0.5, 0), (0, 0, 0, 0.3)):
        transform = plain((16, 16), jitter=jitter)
        grey = transform(image[..., :1].repeat(3, 2)).numpy().astype(int)
        assert np.abs(grey - image[..., 0]).max() <= 1
        assert not torch.equal(transform(image), transform(image))
    for name, options in {
        "saturation": {"jitter": (0, 0, 0.1, 0)},
        "hue": {"jitter": (0, 0, 0, 0.1)},
        "grayscale": {"grayscale": 0.1},
    }.items():
        with pytest.raises(UserError, match=f"{name} needs 3 channels, the images have 1"):
            TrainTransform(DataConfig(**options), (8, 8), 1)


def test_the_draws_alone_decide():
    transform = TrainTransform(DataConfig(jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2, vflip=0.5), (32, 32), 3)
    image, runs, before = noise(60, 50), [], torch.get_rng_state()
    for _ in range(2):
        drawing = Drawing(transform)
        runs.append(torch.stack([drawing(image) for _ in range(5)]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*runs)
    assert not torch.equal(runs[0][0], runs[0][1])


def test_normalise():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    reference = v2.functional.normalize(images.float() / 255, list(mean), list(std))
    out = normalise(images, mean, std)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference)
    torch.testing.assert_close(normalise(images, (0.5,), (0.5,)), images.float() / 127.5 - 1, atol=1e-6, rtol=0)
    # The same bits as a part of a model, which adds nothing to what is saved of it.
    part = Normalise(mean, std, 3)
    assert torch.equal(part(images), out)
    assert torch.equal(out, (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    assert (part.state_dict(), list(part.parameters()), part.to("meta").mean.is_meta) == ({}, [], True)
    with pytest.raises(ValueError, match=r"data.std has 2 numbers; images of 3 channels take 1 or 3"):
        normalise(images, mean, (1.0, 2.0))
