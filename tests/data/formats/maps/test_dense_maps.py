"""Depth, normals, edges and saliency from files: every way to store them gives the same target, or one clear error."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from allinone_ds.data.dense_maps import DenseMap, EdgeMap, NormalMap
from allinone_ds.data.inspection.targets import target_problems
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.strict import explain
from tests.data.tiny_sets import COUNT, HEIGHT, WIDTH, errors, opened, source, warnings, write_images

SIZE = (HEIGHT, WIDTH)


def config(kind: str = "depth", **options: object) -> dict:
    return {"format": "dense_maps", "kind": kind, "images": "images", "maps": "maps", **options}


def write(root: Path, stored: np.ndarray | list[np.ndarray], suffix: str = ".npy", count: int = COUNT) -> Path:
    """Write images and maps: the same for every image, or one per image."""
    write_images(root / "images", count)
    (root / "maps").mkdir(exist_ok=True)
    for i in range(count):
        values = stored[i] if isinstance(stored, list) else stored
        if suffix == ".npy":
            np.save(root / "maps" / f"{i}.npy", values)
        elif values.ndim == 3 and values.dtype == np.uint16:
            (root / "maps" / f"{i}{suffix}").write_bytes(encode_png_16(values))
        else:
            Image.fromarray(values).save(root / "maps" / f"{i}{suffix}")
    return root


def encode_png_16(values: np.ndarray) -> bytes:
    """A png of 16-bit colours (H, W, 3), which neither Pillow nor torchvision can write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    H, W, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def metres() -> np.ndarray:
    """Depths of 0.5 to 8 metres, float32, without a value in the first row."""
    depth = np.random.default_rng(0).uniform(0.5, 8, SIZE).astype(np.float32)
    depth[0] = 0
    return depth


def unit_vectors() -> np.ndarray:
    """Normals towards the viewer, float32 (H, W, 3)."""
    vectors = np.random.default_rng(0).normal(size=(*SIZE, 3)).astype(np.float32)
    vectors[..., 2] = np.abs(vectors[..., 2]) + 0.5
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("store", "suffix", "options", "tolerance"),
    [
        (lambda m: m, ".npy", {}, 0),
        (lambda m: m.astype(np.float64)[..., None], ".npy", {}, 0),
        (lambda m: m.astype(np.float16)[None], ".npy", {}, 4e-3),
        (lambda m: np.where(m > 0, m, np.nan), ".npy", {"invalid": []}, 0),
        (lambda m: np.where(m > 0, m, -1), ".npy", {"invalid": -1}, 0),
        (lambda m: np.rint(m * 1000).astype(np.uint16), ".png", {"scale": 0.001}, 6e-4),
        (lambda m: np.rint(m * 1000).astype(np.int32), ".tiff", {"scale": 0.001}, 6e-4),
        (lambda m: np.rint(m * 30).astype(np.uint8), ".png", {"scale": 1 / 30}, 0.02),
        (lambda m: m, ".tiff", {}, 0),
        (lambda m: np.where(m > 0, np.rint(m * 1000), 65535).astype(np.uint16), ".png",
         {"scale": 0.001, "invalid": [65535]}, 6e-4),
        (lambda m: np.where(m > 0, m, 99), ".npy", {"maximum": 10}, 0),
        (lambda m: np.where(m > 0, m, 1e-3), ".npy", {"minimum": 0.1}, 0),
    ],
)  # fmt: skip
def test_depth_in_any_file_is_the_same(tmp_path: Path, store, suffix, options, tolerance) -> None:
    dataset = opened(config(**options), write(tmp_path, store(metres()), suffix))
    depth = dataset[3]["depth"]
    assert type(depth) is DenseMap and depth.dtype == torch.float32 and depth.shape == SIZE
    expected = np.where(metres() > 0, metres(), np.nan)
    np.testing.assert_allclose(depth.numpy(), expected, rtol=1e-6, atol=tolerance)
    assert dataset.classes == [] and dataset[3]["path"].endswith("3.png")
    assert errors(config(**options), tmp_path) == []


@pytest.mark.parametrize(
    ("store", "suffix", "options", "tolerance"),
    [
        (lambda n: n, ".npy", {}, 1e-6),
        (lambda n: np.moveaxis(n, -1, 0), ".npy", {}, 1e-6),
        (lambda n: n * [1, -1, -1], ".npy", {"negate": ["y", "z"]}, 1e-6),
        (lambda n: np.rint((n + 1) * 127.5).astype(np.uint8), ".png", {}, 0.02),
        (lambda n: np.rint((n + 1) * 32767.5).astype(np.uint16), ".png", {}, 1e-4),
        (lambda n: (n + 1) / 2, ".npy", {"stored_range": [0, 1]}, 1e-6),
    ],
)
def test_normals_in_any_file_are_the_same(tmp_path: Path, store, suffix, options, tolerance) -> None:
    dataset = opened(config("normals", **options), write(tmp_path, store(unit_vectors()), suffix))
    normals = dataset[0]["normals"]
    assert type(normals) is NormalMap and normals.shape == (3, *SIZE)
    np.testing.assert_allclose(normals.numpy(), np.moveaxis(unit_vectors(), -1, 0), atol=tolerance)
    torch.testing.assert_close(normals.norm(dim=0), torch.ones(SIZE))


@pytest.mark.parametrize(
    ("stored", "options"), [(np.zeros((*SIZE, 3), np.uint8), {}), (np.full((*SIZE, 3), 128, np.uint8), {}),
                            (np.full((*SIZE, 3), 7, np.uint8), {"invalid": [7]})]
)  # fmt: skip
def test_pixels_without_a_normal_are_nan(tmp_path: Path, stored: np.ndarray, options: dict) -> None:
    stored = stored.copy()
    stored[2:] = np.rint((unit_vectors()[2:] + 1) * 127.5)
    normals = opened(config("normals", **options), write(tmp_path, stored, ".png"))[0]["normals"]
    assert normals[:, :2].isnan().all() and normals[:, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("positive", "options"), [(1, {}), (255, {}), (200, {"threshold": 127}), (True, {}), (3, {"invalid": [9]})]
)
@pytest.mark.parametrize("kind", ["edges", "saliency"])
def test_binary_maps(tmp_path: Path, kind: str, positive: int, options: dict) -> None:
    yes = np.random.default_rng(0).random(SIZE) < 0.3
    stored = yes if positive is True else np.where(yes, positive, 100 if "threshold" in options else 0).astype(np.uint8)
    if "invalid" in options:
        stored[5:7] = 9
    found = opened(config(kind, **options), write(tmp_path, stored, ".png"))[0][kind]
    assert type(found) is EdgeMap or kind == "saliency"
    expected = np.where(stored == 9, 255, yes) if "invalid" in options else yes
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("kind", "stored", "options", "message"),
    [
        ("depth", np.ones((5, WIDTH)), {}, f"is {WIDTH} x 5 (width x height), its image is {WIDTH} x {HEIGHT}"),
        ("normals", unit_vectors()[:, :9], {}, f"is 9 x {HEIGHT} (width x height)"),
        ("depth", unit_vectors(), {}, "needs one channel per pixel"),
        ("normals", np.ones(SIZE), {}, "needs three channels (x, y, z) per pixel"),
        ("normals", np.ones((*SIZE, 4)), {}, f"has the shape {HEIGHT} x {WIDTH} x 4"),
        ("saliency", np.ones((*SIZE, 3)), {}, "needs one channel"),
        ("depth", -np.ones(SIZE), {}, "holds -1 in 768 pixels; a depth is above 0"),
        ("normals", 100 * unit_vectors(), {}, "length 100 (median) with -1 as -1 and 1 as 1"),
        ("normals", (unit_vectors() + 1) / 2 + 0.5, {}, "set 'stored_range'"),
        ("depth", np.full(SIZE, "a"), {}, "no numbers"),
        ("depth", np.ones(SIZE, dtype=np.complex64), {}, "holds complex64, no numbers; write one real number"),
        ("normals", (unit_vectors() + 1) / 2, {}, "set 'stored_range'"),  # each length is near 1 in the mean only
        ("saliency", np.arange(HEIGHT * WIDTH).reshape(SIZE) % 256, {}, "from 1 to 255; set 'threshold'"),
    ],
)
def test_wrong_maps_are_named(tmp_path: Path, kind: str, stored: np.ndarray, options: dict, message: str) -> None:
    root = write(tmp_path, stored)
    with pytest.raises(BrokenSample) as raised:
        opened(config(kind, **options), root, strict=False)[0]
    assert message in str(raised.value) and str(root / "maps" / "0.npy") in str(raised.value)
    assert len([p for p in errors(config(kind, **options), root) if message in p.reason]) >= COUNT
    with pytest.raises(DataError, match="1 problem") as refused:  # before training starts
        opened(config(kind, **options), root)
    assert message in str(refused.value) and "none of 7 maps that were read can be used" in str(refused.value)


def test_one_wrong_map_does_not_stop_a_run(tmp_path: Path) -> None:
    root = write(tmp_path, [np.ones((5, WIDTH)), *[metres()] * 6])
    dataset = opened(config(), root)
    assert dataset[1]["depth"].shape == SIZE and len(errors(config(), root)) == 1
    with pytest.raises(BrokenSample, match=f"its image is {WIDTH} x {HEIGHT}"):
        dataset[0]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"no map"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    root = write(tmp_path, metres(), count=1)
    (root / "maps" / "0.npy").write_bytes(content)
    with pytest.raises(BrokenSample, match="0.npy"):
        opened(config(), root, strict=False)[0]


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    root = write(tmp_path, metres(), count=1)
    np.save(root / "maps" / "0.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BrokenSample, match="allow_pickle"):
        opened(config(), root, strict=False)[0]


def test_files_without_a_partner_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, metres())
    (root / "images" / "1.png").unlink()
    (root / "maps" / "2.npy").unlink()
    np.save(root / "maps" / "3.tiff.npy", metres())
    Image.fromarray(metres()).save(root / "maps" / "4.tiff")
    found = {Path(p.file).name: p.reason for p in errors(config(), root)}
    assert "has no image" in found["1.npy"] and "has no map" in found["2.png"] and "has no image" in found["3.tiff.npy"]
    assert any("differs only in its suffix" in reason for reason in found.values())


def test_suffixes_choose_among_several_maps_of_one_folder(tmp_path: Path) -> None:
    root = write(tmp_path, metres(), count=2)
    for i in range(2):
        (root / "maps" / f"{i}.npy").rename(root / "maps" / f"{i}_depth.npy")
        np.save(root / "maps" / f"{i}_other.npy", metres())
    dataset = opened(config(map_suffix="_depth"), root)
    assert len(dataset) == 2 and "do not end with '_depth'" in warnings(config(map_suffix="_depth"), root)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("normals", {"scale": 0.5}, "scale is an option of depth, the kind is normals"),
        ("edges", {"maximum": 10}, "maximum is an option of depth"),
        ("depth", {"threshold": 1}, "threshold is an option of edges and saliency"),
        ("depth", {"negate": ["x"]}, "negate is an option of normals"),
        ("depth", {"minimum": 3, "maximum": 2}, "the minimum must be smaller"),
        ("normals", {"stored_range": [1, 1]}, "two different numbers"),
        ("normals", {"negate": ["w"]}, "negate"),
        ("depth", {"scale": 0}, "scale"),
        ("height", {}, "kind"),
        ("depth", {"scales": 1}, "did you mean 'scale'"),
    ],
)
def test_options_that_cannot_work_are_refused_when_the_file_is_read(kind: str, options: dict, message: str) -> None:
    task = {"type": "depth", "image_size": 32, "batch_size": 1, "train": config(kind, **options)}
    with pytest.raises(ValidationError) as raised:
        RunConfig.model_validate({"name": "x", "model": {"backbone": {"name": "vit_b"}}, "tasks": {"t": task}})
    assert message in explain(raised.value, RunConfig, "x.yaml")


def test_files_that_change_the_numbers_are_a_warning(tmp_path: Path) -> None:
    root = write(tmp_path, np.full((16, 16), 50, np.uint8), ".jpg")
    for i in range(COUNT):
        Image.new("RGB", (16, 16)).save(root / "images" / f"{i}.png")
    assert "7 of 7 maps are stored in a format that changes their numbers (0.jpg)" in warnings(config(), root)


def test_class_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="depth has no classes"):
        source(config()).open(write(tmp_path, metres()), ["near", "far"])


@pytest.mark.parametrize(
    ("kind", "stored", "options", "level", "message"),
    [
        ("depth", metres(), {}, None, ""),
        ("depth", np.zeros(SIZE), {}, "error", "none of 7 maps has a value"),
        ("depth", metres(), {"maximum": 0.1}, "error", "none of 7 maps has a value"),
        ("depth", np.full(SIZE, 2.5), {}, "error", "all 7 maps hold the same depth (2.5)"),
        ("depth", [np.full(SIZE, 2.5), *[metres()] * 6], {}, "warning", "1 of 7 maps hold the same depth"),
        ("depth", [np.zeros(SIZE), *[metres()] * 6], {}, "warning", "1 of 7 maps that were read have no value"),
        ("depth", np.where(metres() > 7.5, 65.535, metres()), {}, "warning", "the depth 65.54 stands in"),
        ("depth", metres() * 1000, {}, "warning", "set scale: 0.001"),
        ("depth", metres() / 1000, {}, "warning", "the median depth is 0.00"),
        ("depth", np.where(np.arange(WIDTH * HEIGHT).reshape(SIZE) % 128, 0, metres() + 1), {}, "warning",
         "0.78% of the pixels have a depth"),
        ("normals", unit_vectors(), {}, None, ""),
        ("normals", unit_vectors(), {"negate": ["z"]}, "warning", "100% of the normals point away from the viewer"),
        ("normals", np.broadcast_to([0.0, 0.0, 1.0], (*SIZE, 3)), {}, "error", "the same normals (0, 0, 1)"),
        ("edges", (metres() > 7).astype(np.uint8), {}, None, ""),
        ("edges", (metres() > 7).astype(np.uint8), {"threshold": 127}, "error", "no pixel is an edge in 7 maps"),
        ("saliency", (metres() >= 0).astype(np.uint8), {}, "error", "every pixel is salient"),
        ("saliency", (metres() > 1).astype(np.uint8), {}, "warning", "of the pixels are salient"),
        ("saliency", np.full(SIZE, 9), {"invalid": 9}, "error", "all pixels are ignored"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_counted(tmp_path: Path, kind, stored, options, level, message) -> None:
    dataset = opened(config(kind, **options), write(tmp_path, stored))
    found = target_problems(dataset, SIZE)
    assert [p.level for p in found] == ([] if level is None else [level]), found
    assert all(message in p.reason and "{seen}" not in p.reason for p in found), found
    if level == "error":
        assert "nothing can be learned" in found[0].reason
        assert target_problems(dataset, SIZE, train=False)[0].level == "warning"


@pytest.mark.parametrize("cell", ["image", "rows"])
def test_a_column_of_maps(tmp_path: Path, cell: str) -> None:
    datasets = pytest.importorskip("datasets")
    root = write(tmp_path, np.rint(metres() * 1000).astype(np.uint16), ".png", count=2)
    stored = [str(root / "maps" / f"{i}.png") if cell == "image" else (metres() * 1000).tolist() for i in range(2)]
    table = datasets.Dataset.from_dict({"photo": [str(root / "images" / f"{i}.png") for i in range(2)], "z": stored})
    table = table.cast_column("photo", datasets.Image())
    table = table.cast_column("z", datasets.Image()) if cell == "image" else table
    table.save_to_disk(root / "saved")
    options = {"format": "datasets", "kind": "depth", "path": "saved", "columns": {"image": "photo", "map": "z"}}
    dataset = opened({**options, "scale": 0.001}, root)
    expected = np.where(metres() > 0, metres(), np.nan)
    np.testing.assert_allclose(dataset[1]["depth"].numpy(), expected, atol=6e-4)
    assert type(dataset[1]["depth"]) is DenseMap and dataset.classes == []
    assert target_problems(dataset, SIZE) == [] and errors({**options, "scale": 0.001}, root) == []
    with pytest.raises(ValidationError, match="threshold is an option of edges"):
        source({**options, "threshold": 1})
    for wrong in ({"first_id": 1}, {"classes": ["a"]}):
        with pytest.raises(ValidationError, match="depth has none; remove them"):
            source({**options, **wrong})
    with pytest.raises(DataError, match="columns.map = 'map', which is not a column"):
        opened({**options, "columns": {"image": "photo"}}, root)


def test_depths_of_8_bits_and_names_of_another_case_are_said(tmp_path: Path) -> None:
    root = write(tmp_path, np.arange(HEIGHT * WIDTH).reshape(SIZE) % 200 + 1)
    for file in (root / "maps").iterdir():
        values = np.load(file).astype(np.uint8)
        file.unlink()
        Image.fromarray(values).save(file.with_suffix(".png"))
    found = opened(config("depth"), root, strict=False).structural
    assert ["the maps have 8 bits, so at most 255 different depths" in p.reason for p in found] == [True]
    (root / "maps" / "0.png").rename(root / "maps" / "A.png")
    image = next((root / "images").glob("0.*"))
    image.rename(image.with_stem("a"))
    with pytest.raises(DataError, match=r"has no map .*a\.\* \(A.png is there, whose case differs\); add the map"):
        opened(config("depth"), root)
