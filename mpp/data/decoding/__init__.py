"""From encoded bytes or arrays to uint8 pixels."""

from mpp.data.decoding.bad_image import BadImage
from mpp.data.decoding.formats import decode, open_picture
from mpp.data.decoding.picture import Picture

__all__ = ["BadImage", "Picture", "decode", "open_picture"]
