"""A file of a user's own (oracles: PIL's drawing, the EXIF standard, PNG by hand)."""
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import pictures

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
WHITE = (255, 255, 255)


# ------------------------------------------------------------------------------------------------
# pictures of every make
# ------------------------------------------------------------------------------------------------

def two_halves(mode, left, right):
    """A picture 40 wide and 20 high of two colours."""
    picture = Image.new(mode, (40, 20), left)
    picture.paste(right, (20, 0, 40, 20))
    return picture


def assert_halves(path, left, right, tolerance=0):
    picture = pictures.load_picture(path, 20, 40)
    assert picture.mode == "RGB" and picture.size == (40, 20)
    for x, colour in ((5, left), (35, right)):
        assert np.abs(np.subtract(picture.getpixel((x, 10)), colour)).max() <= tolerance


@pytest.mark.parametrize("mode, left, right, name, rgb", [
    ("RGB", RED, BLUE, "p.bmp", (RED, BLUE)),
    ("L", 50, 200, "p.png", ((50,) * 3, (200,) * 3)),
    ("L", 50, 200, "p.jpg", ((50,) * 3, (200,) * 3)),
    ("1", 0, 1, "p.png", ((0,) * 3, WHITE)),
    ("LA", (50, 0), (200, 255), "p.png", ((50,) * 3, (200,) * 3)),
    ("RGBA", (*RED, 0), (*BLUE, 128), "p.png", (RED, BLUE)),
    ("I", 50 * 257, 200 * 257, "p.tif", ((50,) * 3, (200,) * 3)),
    ("CMYK", (0, 255, 255, 0), (255, 255, 0, 0), "p.tif", (RED, BLUE)),
    ("CMYK", (0, 255, 255, 0), (255, 255, 0, 0), "p.jpg", (RED, BLUE)),
    ("YCbCr", (76, 85, 255), (29, 255, 107), "p.jpg", (RED, BLUE)),
])
def test_a_picture_of_any_mode_becomes_rgb_of_the_same_colours(
        tmp_path, mode, left, right, name, rgb):
    two_halves(mode, left, right).save(tmp_path / name)
    assert_halves(tmp_path / name, *rgb, tolerance=4 if name.endswith("jpg") else 0)


@pytest.mark.parametrize("name", ["p.png", "p.tif"])
@pytest.mark.parametrize("left, right, rgb", [
    (50 * 257, 200 * 257, (50, 200)),
    (3 * 257, 65535, (3, 255)),
    # 12 bits, as cameras write them: 819 / 4095 is a fifth of white
    (819, 4095, (51, 255)),
    (5, 200, (5, 200)),
    (0, 0, (0, 0)),
])
def test_sixteen_bits_of_grey_become_eight_whether_12_or_8_of_them_are_used(
        tmp_path, name, left, right, rgb):
    grey = np.full((20, 40), left, np.uint16)
    grey[:, 20:] = right
    Image.fromarray(grey).save(tmp_path / name)
    assert_halves(tmp_path / name, *[(v,) * 3 for v in rgb])


@pytest.mark.parametrize("left, right, rgb", [
    (0.2, 1.0, (51, 255)),
    (0.0, 0.6, (0, 153)),
    (51.0, 204.0, (51, 204)),
    (819.0, 4095.0, (51, 255)),
    (13107.0, 65535.0, (51, 255)),
])
def test_floats_are_scaled_from_the_white_that_holds_them(tmp_path, left, right, rgb):
    two_halves("F", left, right).save(tmp_path / "p.tif")
    assert_halves(tmp_path / "p.tif", *[(v,) * 3 for v in rgb])


@pytest.mark.parametrize("mode, left, right", [
    ("F", -1.0, 1.0), ("F", 0.0, 1e6), ("F", float("nan"), 1.0), ("F", 0.0, 1e-4),
    ("I", 0, 70_000), ("I", -3, 200)])
def test_values_whose_white_is_unknown_are_refused(tmp_path, mode, left, right):
    two_halves(mode, left, right).save(tmp_path / "p.tif")
    with pytest.raises(pictures.DataError, match="p.tif.*save it with 8 bits"):
        pictures.load_picture(tmp_path / "p.tif")


def png(width, height, kind, bits, rows, *further):
    """A PNG by hand, as Pillow writes none of 16 bits a colour.  kind: 2 RGB   rows: bytes"""
    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)
    size = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + b"".join(chunk(*f) for f in further)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_colours_of_12_bits_in_16_are_never_black_in_silence(tmp_path):
    """Pillow keeps the upper 8 bits of the 16."""
    for value, fine in ((4095, False), (51 * 257, True)):
        row = b"\0" + struct.pack(">3H", value, value, value) * 40
        (tmp_path / "p.png").write_bytes(png(40, 20, 2, 16, row * 20))
        if fine:
            assert_halves(tmp_path / "p.png", (51,) * 3, (51,) * 3)
        else:
            with pytest.raises(pictures.DataError, match="p.png.*12 bits.*black"):
                pictures.load_picture(tmp_path / "p.png")


@pytest.mark.parametrize("text", [
    (b"tEXt", b"Comment\0" + 2 ** 21 * b"x"),
    (b"zTXt", b"Comment\0\0" + zlib.compress(2 ** 21 * b"x")),
])
def test_a_picture_that_carries_a_long_text_is_read(tmp_path, text):
    """Pillow's own limit is 1 MiB."""
    row = b"\0" + bytes((*RED, *BLUE))
    (tmp_path / "p.png").write_bytes(png(2, 1, 2, 8, row, text))
    assert pictures.load_picture(tmp_path / "p.png", 1, 2).getpixel((1, 0)) == BLUE


@pytest.mark.filterwarnings("error")
def test_a_picture_of_200_million_pixels_is_read(tmp_path):
    """Pillow's own limits are 89 million for a warning, and twice as many."""
    Image.new("1", (20_000, 10_000)).save(tmp_path / "p.png")
    assert pictures.picture_size(tmp_path / "p.png") == (10_000, 20_000)


@pytest.mark.parametrize("name", ["p.png", "p.gif"])
@pytest.mark.parametrize("transparency", [None, 1])
def test_a_palette_is_looked_up_also_where_it_is_transparent(tmp_path, name, transparency):
    picture = two_halves("P", 1, 2)
    picture.putpalette([*GREEN, *RED, *BLUE])
    options = {} if transparency is None else {"transparency": transparency}
    picture.save(tmp_path / name, **options)
    assert_halves(tmp_path / name, RED, BLUE)


# Which visual corners (T, B: top, bottom; L, R: left, right) the stored corners TL, TR, BL, BR
# are, from the EXIF standard's "the 0th row is at the visual ..., the 0th column at the visual ..."
EXIF = {1: "TL TR BL BR", 2: "TR TL BR BL", 3: "BR BL TR TL", 4: "BL BR TL TR",
        5: "TL BL TR BR", 6: "TR BR TL BL", 7: "BR TR BL TL", 8: "BL TL BR TR"}


@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("name", ["p.jpg", "p.png", "p.tif"])
def test_a_rotated_photograph_comes_out_upright(tmp_path, orientation, name):
    colours = {"TL": RED, "TR": GREEN, "BL": BLUE, "BR": WHITE}
    # as stored; upright it is 96 wide
    width, height = (96, 64) if orientation < 5 else (64, 96)
    stored = Image.new("RGB", (width, height))
    for corner, where in zip(EXIF[orientation].split(), [(0, 0), (1, 0), (0, 1), (1, 1)]):
        place = where[0] * width // 2, where[1] * height // 2, width, height
        stored.paste(colours[corner], place)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif, **({"quality": 95} if name == "p.jpg" else {}))
    assert pictures.picture_size(tmp_path / name) == (64, 96)
    picture = pictures.load_picture(tmp_path / name, height=64, width=96)
    for corner, place in (("TL", (8, 8)), ("TR", (88, 8)), ("BL", (8, 56)), ("BR", (88, 56))):
        assert np.abs(np.subtract(picture.getpixel(place), colours[corner])).max() < 30


def test_an_orientation_that_is_none_changes_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    Image.new("RGB", (96, 64)).save(tmp_path / "p.jpg", exif=exif)
    assert pictures.picture_size(tmp_path / "p.jpg") == (64, 96)
    assert pictures.load_picture(tmp_path / "p.jpg").size == (96, 64)


@pytest.mark.parametrize("name", ["p.jpg", "p.png", "p.bmp", "p.tif", "p.gif", "p.webp"])
def test_a_picture_cut_in_the_middle_is_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(pictures.DataError, match=f"{name} .image 7.: the picture cannot be decod"):
        pictures.load_picture(path, 30, 40, image_id=7)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("text.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(pictures.DataError, match=name):
            pictures.load_picture(tmp_path / name)


def test_a_picture_of_another_size_than_the_json_says_is_refused(tmp_path):
    Image.new("RGB", (30, 40)).save(tmp_path / "b.png")
    with pytest.raises(pictures.DataError, match="b.png .image '5'.*is 30 x 40.*says 40 x 30"):
        pictures.load_picture(tmp_path / "b.png", 30, 40, image_id="5")


# ------------------------------------------------------------------------------------------------
# texts
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_is_read_in_the_encoding_that_its_mark_tells(tmp_path, encoding):
    (tmp_path / "t.txt").write_bytes("Käfer, 虫".encode(encoding))
    assert pictures.read_text(tmp_path / "t.txt") == "Käfer, 虫"


def test_another_encoding_is_told_with_the_byte_that_gives_it_away(tmp_path):
    (tmp_path / "t.txt").write_bytes("Käfer".encode("cp1252"))
    with pytest.raises(pictures.DataError, match="t.txt: not in UTF-8: byte 0xe4 at position 1;"):
        pictures.read_text(tmp_path / "t.txt")
    assert pictures.read_text(tmp_path / "t.txt", "cp1252") == "Käfer"
