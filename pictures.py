"""One file of a user's own, read without trusting it: a picture's pixels, a text's characters.

Whatever is wrong with it is a DataError, one sentence that names the file and what to do.
"""
import codecs
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

# Pillow's limits are for servers that strangers send pictures to.  Beyond a thousand million
# pixels it warns, beyond twice as many it refuses; text beside the pixels may have 1 GiB.
Image.MAX_IMAGE_PIXELS = 2 ** 30
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 30

# what counts as a picture in a folder; Pillow reads and writes all of them
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif",
            ".tiff", ".webp")

# the marks at the beginning of a text that tell its encoding; UTF-32's begins with UTF-16's
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32",
         codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}


class DataError(ValueError):
    """Something is wrong with a file the user gave: one sentence that names it and what to do."""


def read_text(file, encoding="utf-8"):
    """The characters of a file in `encoding`, or in that which its first bytes tell.

    Raises DataError.
    """
    try:
        raw = Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    encoding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), encoding)
    try:
        return raw.decode(encoding)
    except LookupError:
        raise DataError(f"{file}: its encoding {encoding!r} is unknown; save it as UTF-8") from None
    except ValueError as error:
        at = getattr(error, "start", 0)
        raise DataError(f"{file}: not in {encoding.upper()}: byte {raw[at]:#04x} at position {at}; "
                        f"it is in another encoding, save it as UTF-8") from None


def picture_size(path):
    """Height and width of a picture file, upright.  Raises DataError.

    From its header alone, but for a PNG, which may tell its rotation behind its pixels.
    """
    try:
        with Image.open(path) as picture:
            # EXIF's orientations 5 to 8 exchange the sides
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            if turned and picture.format == "TIFF":      # some versions of Pillow have done it
                return load_picture(path).size[::-1]
            return picture.size if turned else picture.size[::-1]
    except FileNotFoundError:
        raise DataError(f"{path}: the picture does not exist; check the image folder") from None
    except Exception as error:                      # Pillow raises many kinds
        raise DataError(f"{path}: the picture cannot be read ({reason(error)}); "
                        f"fetch it again") from None


def load_picture(path, height=None, width=None, image_id=None, source="the JSON"):
    """A picture file as upright RGB (PIL): grey, palette, CMYK, alpha, 16 bit, EXIF, all of it.

    Raises DataError if it cannot be decoded to its end or is not of the size that `source` says.
    Decoding is Pillow's; torchvision's own image reading is deprecated.
    """
    which = path if image_id is None else f"{path} (image {image_id!r})"
    try:
        with Image.open(path) as picture:
            deep = ";16" in str(picture.tile)       # 16 bits a colour, of which Pillow keeps 8
            picture.load()                          # decodes the whole file
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode.startswith("I") or picture.mode == "F":
                picture = Image.fromarray(eight_bits(np.asarray(picture)))
                deep = False
            picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        if deep and 0 < max(high for _, high in picture.getextrema()) < 16:
            raise DataError("its 16 bits a colour hold values below 4096 alone, as of 12 bits, and "
                            "would be black; save it with 8 bits")
    except DataError as error:
        raise DataError(f"{which}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{which}: the picture does not exist; check the image folder") from None
    except Exception as error:                      # Pillow raises many kinds
        instead = "" if image_id is None else " or take it out of the JSON (--drop-bad does)"
        raise DataError(f"{which}: the picture cannot be decoded ({reason(error)}); "
                        f"fetch it again{instead}") from None
    if height is not None and picture.size != (width, height):
        raise DataError(f"{which}: the picture is {picture.width} x {picture.height} "
                        f"(width x height, after its EXIF rotation) but {source} says "
                        f"{width} x {height}; correct one of them")
    return picture


def eight_bits(grey):
    """One channel of 16 or 32 bits, or of floats, as 8 bits.  Raises DataError.

    What is white is not written in such files: it is the least of 255, 4095 (cameras put 12 bits
    into 16) and 65535 that no value exceeds, for floats also 1.
    """
    whites = (1, 255, 4095, 65535) if grey.dtype.kind == "f" else (255, 4095, 65535)
    grey = grey.astype(np.float64)
    white = next((white for white in whites if grey.max() <= white), None)
    # NaN compares false
    if white is None or not grey.min() >= 0 or 0 < grey.max() < white / 255:
        raise DataError(f"its values reach from {grey.min():g} to {grey.max():g}, of which black "
                        f"and white are not known; save it with 8 bits")
    return (grey * 255 / white).astype(np.uint8)


def reason(error):
    """What an error says; some say nothing, like Python's for want of memory."""
    return str(error) or type(error).__name__
