"""`read_image` and `read_label_map`: equal to Pillow for every mode and format, and an error for damaged files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from allinone_ds.data.images import image_size, read_image, read_label_map
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
        (encode(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"), "floating-point"),
        (encode(Image.fromarray(np.full((4, 4), 255, dtype=np.uint16)), "PNG"), "would be black"),
    ],
)
def test_data_that_is_not_an_8_or_16_bit_image_is_broken(data, reason):
    with pytest.raises(BrokenSample, match=reason):
        read_image("x", data)


def test_a_missing_file_is_broken(tmp_path):
    with pytest.raises(BrokenSample, match=r"no\.jpg: file is missing"):
        read_image(str(tmp_path / "no.jpg"))


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
