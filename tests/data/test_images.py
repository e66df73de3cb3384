"""`read_image` and `read_label_map`: equal to Pillow for every mode and format, and an error for damaged files."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from allinone_ds.data.images import image_size, read_image, read_label_map, stored_bits, to_rgb
from allinone_ds.errors import BrokenSample
from tests.data.tiny_sets import pixels


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


COLOUR = Image.fromarray(pixels(0))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_every_png_mode_becomes_the_rgb_of_pillow(mode):
    picture = COLOUR.convert(mode)
    found = read_image("x", encode(picture, "PNG"))
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(picture.convert("RGB")))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "WEBP", "PPM"])
def test_other_formats_are_read(kind):
    data = encode(COLOUR, kind)
    found = read_image("x", data)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_close_to_pillow(mode):
    smooth = COLOUR.resize((4, 3)).resize((32, 24), Image.Resampling.BILINEAR).convert(mode)
    data = encode(smooth, "JPEG", quality=95)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    found = read_image("x", data).permute(1, 2, 0).numpy().astype(int)
    assert found.shape == expected.shape
    limit = 12 if mode == "CMYK" else 2  # decoders differ in rounding, and in the conversion of CMYK
    assert np.abs(found - expected).mean() < limit


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation, tmp_path):
    blocks = Image.fromarray(np.kron(pixels(1, 3, 4), np.ones((8, 8, 1), dtype=np.uint8)))  # 24 x 32
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "x"
    file.write_bytes(encode(blocks, kind, exif=exif))
    upright = np.array(ImageOps.exif_transpose(Image.open(file)).convert("RGB")).astype(int)
    found = read_image(str(file)).permute(1, 2, 0).numpy().astype(int)
    assert found.shape == upright.shape == ((32, 24, 3) if orientation > 4 else (24, 32, 3))
    assert np.abs(found - upright).mean() < 2
    assert image_size(str(file)) == upright.shape[:2]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_full_scale(kind):
    wide = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    found = read_image("x", encode(Image.fromarray(wide), kind))
    assert np.array_equal(found[0].numpy(), (wide >> 8).astype(np.uint8))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def wide(bits: int, channels: int) -> np.ndarray:
    """Random uint16 (5, 7, C) of a number of bits, all of them used; the alpha of 2 and 4 channels is opaque."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (5, 7, channels)).astype(np.uint16)
    values[0, 0, 0] = 2**bits - 1
    if channels in (2, 4):
        values[..., -1] = 65535
    return values


def colours(values: np.ndarray) -> np.ndarray:
    """The first three channels, or the grey one as three."""
    return values[..., :3] if values.shape[2] > 2 else values[..., [0, 0, 0]]


def png_of(values: np.ndarray, orientation: int | None = None) -> bytes:
    """A png file of uint16 (H, W, C); Pillow writes only the grey ones."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + line.astype(">u2").tobytes() for line in values))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = [(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))] if orientation else []
    parts = [(b"IHDR", header), *turned, (b"IDAT", lines), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_of(values: np.ndarray, order: str = "<", compressed: bool = False, orientation: int = 1) -> bytes:
    """A tiff file of uint16 (H, W, C); Pillow writes only the grey ones."""
    height, width, channels = values.shape
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compressed else data
    first = 8 + 2 + 12 * (11 if channels == 4 else 10) + 4  # of what follows the directory
    bits = first if channels > 2 else 16
    entries = [(256, width), (257, height), (258, bits), (259, 8 if compressed else 1), (262, 2 if channels > 2 else 1)]
    entries += [(273, first + 8), (274, orientation), (277, channels), (278, height), (279, len(data))]
    entries += [(338, 2)] if channels == 4 else []
    out = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    for tag, value in entries:
        count = channels if tag == 258 else 1
        if tag in (273, 279) or count > 2:
            out += struct.pack(f"{order}HHII", tag, 3 if tag == 258 else 4, count, value)
        else:
            out += struct.pack(f"{order}HHIHH", tag, 3, count, value, 0)
    return out + struct.pack(f"{order}I4H", 0, 16, 16, 16, 16) + data


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_16_bit_png_keeps_the_upper_8_of_the_bits_it_uses(bits, channels):
    values = wide(bits, channels)
    found = read_image("x", png_of(values)).permute(1, 2, 0).numpy()
    assert np.array_equal(found, colours(values) >> (bits - 8))
    assert stored_bits(png_of(values)) == bits


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("order", "compressed"), [("<", False), (">", False), ("<", True), (">", True)])
def test_a_16_bit_tiff_keeps_the_upper_8_of_the_bits_it_uses(bits, channels, order, compressed):
    values = wide(bits, channels)
    data = tiff_of(values, order, compressed)
    assert np.array_equal(read_image("x", data).permute(1, 2, 0).numpy(), colours(values) >> (bits - 8))
    assert stored_bits(data) == bits


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_colours_are_turned_upright(orientation):
    values = wide(12, 3)
    plain = tiff_of((values >> 4) * 257, orientation=orientation)  # of 16 bits, whose upper byte Pillow reads
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(plain))))
    for data in (tiff_of(values, orientation=orientation), png_of(values, orientation)):
        assert np.array_equal(read_image("x", data).permute(1, 2, 0).numpy(), upright)


def test_an_image_of_black_pixels_stays_black():
    for channels in (1, 2, 3, 4):
        assert read_image("x", png_of(np.zeros((2, 3, channels), dtype=np.uint16))).max() == 0


def test_floats_in_0_to_1_are_scaled():
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    found = read_image("x", encode(Image.fromarray(values), "TIFF"))
    assert np.array_equal(found[0].numpy(), np.rint(values * 255).astype(np.uint8))


def test_an_opened_image_is_read_like_its_file():
    values = wide(12, 1)[..., 0]
    assert np.array_equal(to_rgb(Image.fromarray(values))[..., 1], values >> 4)


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def test_an_image_in_a_numpy_file_is_read_like_a_picture(tmp_path):
    shades = pixels(3)
    for stored in (shades, shades / 255, np.moveaxis(shades / 255, -1, 0).astype(np.float32), shades.astype(np.int64)):
        assert np.array_equal(read_image("x", npy(stored)).permute(1, 2, 0).numpy(), shades)
    for grey in (shades[..., 0], shades[..., :1]):
        assert np.array_equal(read_image("x", npy(grey)).permute(1, 2, 0).numpy(), shades[..., [0, 0, 0]])
    (tmp_path / "a.npy").write_bytes(npy(np.moveaxis(shades, -1, 0)))
    assert image_size(str(tmp_path / "a.npy")) == (24, 32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.zeros((5, 6, 2))), "has the shape 5 x 6 x 2, an image is"),
        (npy(np.zeros(4)), "has the shape 4, an image is"),
        (npy(np.full((4, 4, 3), 255.0)), r"floating-point numbers in 255\.\.255, allowed are 0\.\.1"),
        (npy(np.zeros((4, 4, 3), dtype=complex)), "holds complex128, an image holds"),
        (npy(np.array([[{}]])), "cannot be decoded"),
        (npy(pixels(0))[:-9], "cannot be decoded"),
    ],
)
def test_a_numpy_file_that_is_no_image_is_broken(data, reason):
    with pytest.raises(BrokenSample, match=reason):
        read_image("x.npy", data)


def test_images_of_8_bit_have_no_stored_bits():
    for kind, mode in (("JPEG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("TIFF", "L")):
        assert stored_bits(encode(COLOUR.convert(mode), kind)) is None
    assert stored_bits(b"hello") is None


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_picture_of_an_animation_is_used(kind):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    found = read_image("x", encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert found.shape == (3, 3, 4) and found[0].min() == 255 and found[2].max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF"])
@pytest.mark.parametrize("part", [0.02, 0.4, 0.9])
def test_a_truncated_file_is_broken(kind, part):
    data = encode(COLOUR, kind)
    with pytest.raises(BrokenSample, match="photo.x: .*replace the file"):
        read_image("photo.x", data[: int(len(data) * part)])


def test_a_damaged_png_raises_and_does_not_crash_the_process():
    data = bytearray(encode(COLOUR, "PNG"))
    rng = np.random.default_rng(0)
    raised = 0
    for _ in range(60):
        damaged = bytearray(data)
        at = int(rng.integers(40, len(data) - 20))
        damaged[at : at + 8] = rng.bytes(8)
        try:
            read_image("x", bytes(damaged))
        except BrokenSample:
            raised += 1
    assert raised > 50


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (encode(Image.fromarray(np.full((4, 4), 1.5, dtype=np.float32)), "TIFF"), r"floating-point.*1\.5.*0\.\.1"),
        (encode(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "TIFF"), "floating-point"),
        (encode(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "TIFF"), r"70000\.\.70000.*16 bits"),
        (encode(Image.fromarray(np.full((4, 4), -1, dtype=np.int32)), "TIFF"), r"-1\.\.-1.*16 bits"),
    ],
)
def test_pixels_that_cannot_become_8_bit_are_broken(data, reason):
    with pytest.raises(BrokenSample, match=reason):
        read_image("x", data)


def test_a_missing_file_is_broken(tmp_path):
    with pytest.raises(BrokenSample, match=r"no\.jpg: file is missing"):
        read_image(str(tmp_path / "no.jpg"))
    with pytest.raises(BrokenSample, match="cannot be opened"):
        read_image(str(tmp_path / "a\0b.jpg"))


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_label_map_keeps_its_values(mode):
    stored = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)
    picture = Image.fromarray(stored)
    if mode == "P":
        picture = Image.frombytes("P", (32, 24), stored.tobytes())
        picture.putpalette(list(np.random.default_rng(1).integers(0, 256, 768)))
    assert np.array_equal(read_label_map("x", encode(picture, "PNG")), stored)


def test_a_16_bit_label_map_keeps_its_values():
    stored = np.array([[0, 300], [65535, 7]], dtype=np.uint16)
    assert np.array_equal(read_label_map("x", encode(Image.fromarray(stored), "PNG")), stored)


@pytest.mark.parametrize("mode", ["RGB", "LA", "RGBA"])
def test_a_label_map_of_several_channels_is_broken(mode):
    with pytest.raises(BrokenSample, match=f"mode {mode}; a label map has one channel"):
        read_label_map("x", encode(COLOUR.convert(mode), "PNG"))


def test_a_label_map_in_a_numpy_file_keeps_its_values():
    stored = np.array([[-1, 0], [12, 300]])
    for values in (stored, stored.astype(np.float32), stored[..., None], stored[None]):
        found = read_label_map("x.npy", npy(values))
        assert found.dtype == np.int64 and np.array_equal(found, stored)
    assert read_label_map("x.npy", npy(stored > 0)).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.5, 1, 0.25]]), "holds 0.5 in 2 pixels; class ids are whole numbers"),
        (np.array([[np.nan, 1]]), "holds nan in 1 pixels"),
        (np.zeros((4, 4, 3)), "holds float64 of shape 4 x 4 x 3; a label map has one class id per pixel"),
        (np.zeros((4, 4), dtype=complex), "holds complex128"),
    ],
)
def test_a_numpy_file_that_is_no_label_map_is_broken(values, reason):
    with pytest.raises(BrokenSample, match=reason):
        read_label_map("x.npy", npy(values))
