"""Decode JPEGs with libjpeg-turbo, taking its warnings for errors."""

import numpy as np
import simplejpeg


def decode_jpeg(data: bytes, *, eighth: bool = False) -> np.ndarray | None:
    """(height, width, 3) uint8 RGB; None for a rare chroma subsampling, which simplejpeg does not know.

    eighth: an eighth of height and width, rounded up, in grey. All coefficients are read, but few pixels are made, in half the
    time.
    Raises ValueError with libjpeg-turbo's words where it reports damage, however small.
    """
    colours, least = ("GRAY", 1) if eighth else ("RGB", 0)  # least: side in pixels; 0 does not shrink
    try:
        return simplejpeg.decode_jpeg(data, colours, min_height=least, min_width=least, strict=True)
    except ValueError as error:
        if "subsampling" in str(error):
            return None
        raise
