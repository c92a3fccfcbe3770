"""Which file names are images, in folders and in tar files alike."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm", "npy")
"""File name endings that count as images; lower case."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a system's own, never an image and never a class."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")
