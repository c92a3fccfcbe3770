"""Decoding on the device: workers hand on the JPEG files, and nvJPEG decodes the whole batch where it is needed.

worker   headers, boxes' draws, everything that is no ordinary JPEG     -> UndecodedJpeg, one a file
here     decode all at once -> turn upright, crop, resize, flip on the device -> the file's row in the batch
         what nvJPEG refuses goes the way of all other images, with the same replacements
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from mpp.data.reader import Batch, TrainReader, UndecodedJpeg
from mpp.data.transform import TrainTransform, Transform
from mpp.errors import UserError

_MOST_PIXELS = 2**28  # decoded before they are cropped: at full size many large photographs would fill the memory
_STEEPEST = 32  # CUDA's kernel for resizing refuses reductions from about 47 on

DecodeJpegs = Callable[[Sequence[Tensor], int], list[Tensor]]
"""Files, uint8 (n,) each, and channels, 1 or 3, to uint8 (C, H, W) each on a device; RuntimeError if one is refused."""


def choose_decoder(decode: str, device: torch.device, transform: Transform) -> DecodeJpegs | None:
    """What decodes the JPEGs of a training by its data.decode; None: the workers. Raises UserError where it cannot."""
    if decode == "cpu":
        return None
    if not isinstance(transform, TrainTransform):
        raise UserError("data.decode cuda does not go with data.randaugment, which works on the CPU; choose one")
    return nvjpeg(device)


def nvjpeg(device: torch.device) -> DecodeJpegs:
    """torchvision's decoder of JPEG. Raises UserError without a CUDA device or nvJPEG."""
    if device.type != "cuda":
        raise UserError(f"data.decode cuda needs a CUDA device, and this run is on {device}: leave it at cpu")
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        probe = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), dtype=np.uint8))
        decode_jpeg([torch.frombuffer(bytearray(probe), dtype=torch.uint8)], device=device)
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"data.decode cuda needs a torchvision with nvJPEG ({reason}): leave it at cpu") from error
    modes = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}

    def decode(files: Sequence[Tensor], channels: int) -> list[Tensor]:
        decoded: Any = decode_jpeg(list(files), mode=modes[channels], device=device)
        return decoded

    return decode


class DeviceDecoder:
    """Decodes the files that the workers left undecoded; the workers' own `reader` takes those that it refuses."""

    def __init__(self, reader: TrainReader, decode: DecodeJpegs, device: torch.device) -> None:
        assert isinstance(reader.transform, TrainTransform)
        self.reader, self.transform, self.decode, self.device = reader, reader.transform, decode, device

    def __call__(self, batch: Batch) -> Batch:
        """The batch with all of its images, on the device. Raises TooManyBad, or torch.OutOfMemoryError.

        On CUDA to be called on a stream of its own, whose memory nobody else uses: nvJPEG writes without waiting for
        what is queued, and must not write over what the training still reads.
        """
        images = batch["images"].to(self.device, non_blocking=True)
        jpegs = batch.get("undecoded", [])
        files = batch.get("files", images.new_empty(0)).split([jpeg.size for jpeg in jpegs]) if jpegs else ()
        waiting = list(zip(jpegs, files, strict=True))
        while waiting:
            group = [waiting.pop(0)]
            while waiting and sum(jpeg.pixels for jpeg, _ in group) + waiting[0][0].pixels <= _MOST_PIXELS:
                group.append(waiting.pop(0))
            for (jpeg, file), decoded in zip(group, self._decoded([file for _, file in group]), strict=True):
                crop = self._sample(jpeg, file, batch) if decoded is None else self._crop(decoded, jpeg)
                images[jpeg.slot] = crop.to(self.device)
        return {**batch, "images": images}

    def _decoded(self, files: list[Tensor]) -> list[Tensor | None]:
        """Pixels of each file; None where the decoder refuses it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        try:
            return list(self.decode(files, self.transform.channels))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
        if len(files) == 1:
            return [None]
        middle = len(files) // 2
        return [*self._decoded(files[:middle]), *self._decoded(files[middle:])]

    def _sample(self, jpeg: UndecodedJpeg, file: Tensor, batch: Batch) -> Tensor:
        """What a worker makes of the file: its crop, or that of another image."""
        found = file.numpy().tobytes(), int(batch["label"][jpeg.slot])
        shown, image, label = self.reader.sample(jpeg.epoch, jpeg.index, found, jpeg.draws, batch["bad"])
        batch["index"][jpeg.slot], batch["label"][jpeg.slot] = shown, label
        return image

    def _crop(self, pixels: Tensor, jpeg: UndecodedJpeg) -> Tensor:
        """The crop of the file's draws, as `TrainTransform` makes it, resized in floating point."""
        upright = _turned(pixels, jpeg.orientation)
        top, left, height, width = self.transform.crop(upright.shape[1], upright.shape[2], jpeg.draws)
        region = upright[None, :, top : top + height, left : left + width].float()
        size = self.transform.image_hw
        if max(height / size[0], width / size[1]) > _STEEPEST:
            region = region.cpu()
        if region.shape[2:] != size:
            region = torch.nn.functional.interpolate(region, size=size, mode="bicubic", antialias=True)
        out = region[0].round_().clamp_(0, 255).to(torch.uint8)
        return self.transform.finished(out.to(pixels.device), jpeg.draws)


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """(C, H, W) turned upright by EXIF's orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    axes = [axis for axis, those in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in those]
    return pixels.flip(axes) if axes else pixels
