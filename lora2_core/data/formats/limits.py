"""How large a picture may be, and how that is said."""

from __future__ import annotations

MOST_PIXELS = 80_000_000  # of a picture that has to be decoded whole
MOST_CLEAR = 50_000_000  # px of one that may be transparent; two more copies are made of those
MOST_OF_GIF = 50_000_000  # px
MOST_OF_WEBP = 40_000_000  # px; its decoder holds four copies
MOST_OF_HEIF = 50_000_000  # px, of AVIF and HEIC; phones write 48 million
MOST_OF_JXL = 40_000_000  # px; its decoder computes in fp32
MOST_STREAMED = 250_000_000  # px of a JPEG with one scan, which can be decoded at half its sides
MOST_DECODED = 300_000_000  # bytes of the pixels of a TIFF, which may be one strip
MOST_BYTES = 300_000_000  # of a file
MOST_PARTS = 100_000  # of a PNG or of what comes before the pixels of a JPEG
MOST_NOTES = 20_000_000  # bytes beside the pixels: profiles, texts, previews
MOST_EXIF = 70_000  # bytes; Pillow may copy all of them for each of their entries
LONGEST_SIDE = 65_535  # px, as in a JPEG; Pillow cannot make a far longer one smaller
CUT_UP = "is cut into too many parts; save it anew"
NO_COLOURS = (
    "holds numbers that are no colours (signed, fractions, or more than 16 bits); save it with 8 "
    "or 16 bits"
)
TOO_MUCH_BESIDE = "holds too much beside its pixels; save it anew without it"


class PictureError(ValueError):
    """A picture cannot be used; the message stands behind its name, and says why and what to do."""


def check_pixels(width: int, height: int, most: int) -> None:
    """Raises PictureError for more than ``most`` px, and for a side that is too long."""
    if width * height > most:
        raise PictureError(
            f"has {width}×{height} px ({width * height / 1e6:.1f} MP); at most {most / 1e6:.0f} MP "
            "are read: make it smaller"
        )
    if max(width, height) > LONGEST_SIDE:
        raise PictureError(f"has {width}×{height} px; no side may be over {LONGEST_SIDE} px")
