"""Which of DALI's decoders takes an image, by its format and coding in the manifest."""

# Source: NVIDIA's documentation of nvJPEG's hardware backend.
_HARDWARE = tuple(f"baseline {chroma}" for chroma in ("4:4:4", "4:2:2", "4:2:0"))


def decoder_path(image_format: str, coding: str | None) -> str:
    """The decoder in DALI's mixed mode: hardware JPEG (if the GPU has one), CUDA JPEG, nvJPEG2000 or CPU."""
    if image_format == "jpeg2000":
        return "nvJPEG2000"
    if image_format != "jpeg" or not coding:
        return "CPU"
    if coding in _HARDWARE:
        return "hardware JPEG"
    return "CUDA JPEG" if coding.startswith(("baseline", "progressive", "extended")) else "CPU"
