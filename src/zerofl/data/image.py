"""An encoded image as pixels."""

import io

import numpy as np

from zerofl.data.dataset import DatasetError
from zerofl.errors import install_hint


def decode_image(data: bytes, mode: str, size: int, where: str) -> np.ndarray:
    """A PNG, JPEG or other image file -> uint8 [size, size, 3] for mode "RGB", [size, size] for "L".

    Raises:
        DatasetError: Pillow is not installed, or the image is damaged, of another size, or has more than 8 bits a
            channel; it starts with `where`.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DatasetError(f"{where} needs Pillow to be read: {install_hint('images')}") from error
    try:
        opened = Image.open(io.BytesIO(data))
        if opened.mode.startswith(("I", "F")):  # Pillow would cut off what is above 255
            raise DatasetError(f"{where} has more than 8 bits a channel; save it with 8")
        image = np.asarray(opened.convert(mode))
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        # What Pillow's readers raise for damaged files.
        raise DatasetError(f"{where} is not an image, or is truncated: {error}") from error
    if image.shape[:2] != (size, size):
        raise DatasetError(f"{where} is {image.shape[1]}x{image.shape[0]}, expected {size}x{size}")
    return image
