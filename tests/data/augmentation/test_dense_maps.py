"""Depth, normals, edges and saliency move with the pixels under every transform, or the transform is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from allinone_ds.data.augmentation.catalog import NAMES, PIXELS_ONLY, build_transform
from allinone_ds.data.augmentation.transforms import eval_transform, train_transform
from allinone_ds.data.dense_maps import DenseMap, EdgeMap, NormalMap
from allinone_ds.data.loading.workers.packing import pack, unpack
from allinone_ds.errors import ConfigError

SIZE = (60, 80)
KINDS = ("depth", "normals", "edges", "saliency")
OPTIONS: dict[str, dict] = {
    "ColorJitter": {"brightness": 0.3},
    "GaussianBlur": {"kernel_size": 3},
    "RandomPosterize": {"bits": 4},
    "RandomSolarize": {"threshold": 100},
    "RandomAffine": {"degrees": 30, "translate": [0.1, 0.1], "scale": [0.8, 1.2]},
    "RandomRotation": {"degrees": 40},
    "RandomApply": {"transforms": ["RandomHorizontalFlip"]},
    "RandomChoice": {"transforms": ["RandomHorizontalFlip", "RandomVerticalFlip"]},
    "RandomOrder": {"transforms": ["RandomHorizontalFlip", "RandomVerticalFlip"]},
    "Pad": {"padding": 5},
    "RandomResize": {"min_size": 40, "max_size": 100},
    "RandomShortestSize": {"min_size": 50},
    "RandomAdjustSharpness": {"sharpness_factor": 2},
    "JPEG": {"quality": 90},
}
REFUSED = {
    **dict.fromkeys(("AutoAugment", "RandAugment", "TrivialAugmentWide", "AugMix"), KINDS),
    **dict.fromkeys(("RandomIoUCrop", "Mosaic", "MixUp"), KINDS),
    **dict.fromkeys(("RandomPerspective", "ElasticTransform"), ("normals",)),
}


def sample(kind: str) -> dict:
    """An image whose red and green say where a pixel was, and a target that follows from them."""
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    image = torch.stack([x * 3, y * 4, torch.full_like(x, 128)]).to(torch.uint8)
    return {"image": tv_tensors.Image(image), kind: target(image, kind), "path": "x", "index": 0}


def target(image: Tensor, kind: str) -> tv_tensors.Mask:
    """The target of an image's colours; every normal lies in the plane of x = 0, so that only its z is known."""
    red, green = image[0].float(), image[1].float()
    if kind == "depth":
        return DenseMap(1 + (red + 2 * green) / 100)
    if kind == "normals":
        z = 0.5 + red / 600
        return NormalMap(torch.stack([torch.zeros_like(z), (1 - z.square()).sqrt(), z]))
    inside = (((red - 120).square() + (green - 120).square()) < 70**2).to(torch.uint8)
    return EdgeMap(inside) if kind == "edges" else tv_tensors.Mask(inside)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_transform_moves_the_target_or_is_refused(name: str, kind: str) -> None:
    entry = {name: OPTIONS.get(name, {})}
    if kind in REFUSED.get(name, ()):
        with pytest.raises(ConfigError, match=f"{name} (supports only|cannot move)"):
            build_transform(entry, SIZE, "augment[0]", kind)
        return
    given = sample(kind)
    for seed in range(3):
        torch.manual_seed(seed)
        step = build_transform(entry, SIZE, "augment[0]", kind)
        torch.manual_seed(seed)
        if isinstance(step, PIXELS_ONLY):
            found = train_transform([entry], SIZE, kind)(given)
            torch.testing.assert_close(found[kind].as_subclass(Tensor), given[kind].as_subclass(Tensor))
            continue
        moved = step({key: given[key] for key in ("image", kind)})
        assert type(moved[kind]) is type(given[kind]) and moved[kind].shape[-2:] == moved["image"].shape[-2:]
        assert moved[kind].dtype == given[kind].dtype
        image, values = moved["image"].as_subclass(Tensor), moved[kind].as_subclass(Tensor)
        covered = (image[2] == 128) & ~_border(image[2] != 128)  # pixels of the image, not filled or mixed with filling
        expected = target(image, kind).as_subclass(Tensor)
        if kind in ("depth", "normals"):
            found, best = (values, expected) if kind == "depth" else (values[2], expected[2])
            known = found.isfinite()
            assert known[covered].all() or kind == "normals"  # a mirrored border has no normals
            assert found[(image == 0).all(0) & ~_border((image != 0).any(0))].isnan().all()
            gap = (found - best).abs()[known & covered]
            assert gap.max() < (0.25 if kind == "depth" else 0.03), (name, float(gap.max()))
        else:
            near = F.gaussian_blur(target(image, "saliency").float()[None], [7, 7], [3.0, 3.0])[0]
            sure = covered & ((near < 0.02) | (near > 0.98))  # not at the outline
            assert torch.equal(values[sure], expected[sure]), name
            assert sure.sum() > 200


def _border(mask: Tensor) -> Tensor:
    """True within two pixels of the mask."""
    return torch.nn.functional.max_pool2d(mask.float()[None], 5, 1, 2)[0] > 0


def plane(slope: tuple[float, float], size: int = 65) -> tuple[Tensor, Tensor]:
    """Depth and normals of the plane z = 4 + a x + b y under parallel rays: x right, y down, z away from the viewer."""
    y, x = torch.meshgrid(*[torch.arange(size) - size // 2] * 2, indexing="ij")
    depth = 4 + slope[0] * x + slope[1] * y
    # the surface is depth - a x - b y = 4; of its two normals, that with z towards the viewer (against the depth)
    normal = torch.tensor([slope[0], slope[1], 1.0])
    return depth.float(), (normal / normal.norm()).view(3, 1, 1).expand(3, size, size).clone()


def normals_of(depth: Tensor) -> Tensor:
    """Normals of a depth map from its differences, NaN at its border."""
    normals = torch.full((3, *depth.shape), math.nan)
    inner = slice(1, -1)
    dx = (depth[inner, 2:] - depth[inner, :-2]) / 2
    dy = (depth[2:, inner] - depth[:-2, inner]) / 2
    vectors = torch.stack([dx, dy, torch.ones_like(dx)])
    normals[:, inner, inner] = vectors / vectors.norm(dim=0)
    return normals


MOVES = {
    "horizontal": lambda x: F.horizontal_flip(x),
    "vertical": lambda x: F.vertical_flip(x),
    "rotate 90": lambda x: F.rotate(x, 90, fill=math.nan),
    "rotate -90": lambda x: F.rotate(x, -90, fill=math.nan),
    "rotate 180, expand": lambda x: F.rotate(x, 180, expand=True, fill=math.nan),
    "affine 90": lambda x: F.affine(x, 90, [3, -2], 1.0, [0.0, 0.0], fill=math.nan),
    "crop": lambda x: F.crop(x, 5, 7, 30, 40),
}


@pytest.mark.parametrize("slope", [(0.03, 0.0), (0.0, 0.03), (0.02, -0.05)])
@pytest.mark.parametrize("move", MOVES)
def test_normals_of_a_moved_plane_are_those_of_its_moved_depth(move: str, slope: tuple[float, float]) -> None:
    depth, normals = plane(slope)
    moved = MOVES[move](NormalMap(normals)).as_subclass(Tensor)
    expected = normals_of(MOVES[move](DenseMap(depth)).as_subclass(Tensor))
    both = expected.isfinite().all(0) & moved.isfinite().all(0)
    assert both.float().mean() > 0.8
    torch.testing.assert_close(moved[:, both], expected[:, both], atol=1e-4, rtol=0)


@pytest.mark.parametrize("angle", [17.0, -40.0, 123.0])
@pytest.mark.parametrize("how", ["rotate", "affine"])
def test_normals_of_a_rotated_plane_are_those_of_the_rotated_plane(angle: float, how: str) -> None:
    slope = (0.02, -0.05)
    _, normals = plane(slope)
    radians = math.radians(angle)  # counter-clockwise as seen, where y points down
    turned = (
        slope[0] * math.cos(radians) + slope[1] * math.sin(radians),
        -slope[0] * math.sin(radians) + slope[1] * math.cos(radians),
    )
    given = NormalMap(normals)
    if how == "rotate":
        moved = F.rotate(given, angle, fill=math.nan)
    else:
        moved = F.affine(given, -angle, [0, 0], 1.0, [0.0, 0.0], fill=math.nan)
    found = moved.as_subclass(Tensor)
    known = found.isfinite().all(0)
    assert 0.5 < known.float().mean() < 1  # the corners are uncovered
    torch.testing.assert_close(found[:, known], plane(turned)[1][:, known], atol=1e-5, rtol=0)


def test_mirrored_padding_has_no_normals_and_shears_are_refused() -> None:
    _, normals = plane((0.1, 0.0), 9)
    for mode in ("reflect", "symmetric", "edge", "constant"):
        padded = F.pad(NormalMap(normals), [2, 2, 2, 2], padding_mode=mode)
        assert padded[:, :2].isnan().all() and torch.equal(padded[:, 2:-2, 2:-2], normals)
        assert F.pad(DenseMap(normals[0]), [2, 2, 2, 2], padding_mode=mode).shape == (13, 13)
    with pytest.raises(ConfigError, match="with 'shear'"):
        train_transform([{"RandomAffine": {"degrees": 0, "shear": 10}}], SIZE, "normals")
    train_transform([{"RandomAffine": {"degrees": 0, "shear": 10}}], SIZE, "depth")
    for move in (
        lambda x: F.affine(x, 0, [0, 0], 1.0, [5.0, 0.0]),
        lambda x: F.elastic(x, torch.zeros(1, 9, 9, 2)),
        lambda x: F.perspective(x, None, None, coefficients=[1.0, 0, 0, 0, 1.0, 0, 0, 0]),
    ):
        with pytest.raises(TypeError, match="normals cannot"):
            move(NormalMap(normals))


def test_nested_refusals_name_their_place() -> None:
    with pytest.raises(ConfigError, match=r"augment\[0\].transforms\[0\]: ElasticTransform cannot move normals"):
        train_transform([{"RandomApply": {"transforms": ["ElasticTransform"]}}], SIZE, "normals")


def test_a_scaled_image_keeps_its_depths() -> None:
    depth = DenseMap(torch.linspace(1, 9, 64).expand(64, 64))
    image = tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8))
    found = train_transform([{"LargeScaleJitter": {"scale": [2, 2]}}], (64, 64), "depth")(
        {"image": image, "depth": depth}
    )
    assert set(found["depth"].unique().tolist()) <= set(depth.unique().tolist())
    small = train_transform([{"LargeScaleJitter": {"scale": [0.5, 0.5]}}], (64, 64), "depth")(
        {"image": image, "depth": depth}
    )
    assert small["depth"].isnan().float().mean() == pytest.approx(0.75)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_thin_edges_survive_a_smaller_size(factor: int) -> None:
    side = 24 * factor
    edges = torch.zeros(side, side, dtype=torch.uint8)
    edges[5 * factor + factor // 2 :, 7 * factor + 1] = 1
    edges[0, :] = 255
    image = tv_tensors.Image(torch.zeros(3, side, side, dtype=torch.uint8))
    found = eval_transform((24, 24))({"image": image, "edges": EdgeMap(edges)})["edges"]
    assert (found[5:, 7] == 1).all() and found[:, :7].eq(0).all() and found[:, 8:].eq(0).all()
    nearest = F.resize_mask(edges, [24, 24])
    assert (nearest == 1).sum() < 19  # what would be left otherwise
    ignored = EdgeMap(torch.full((side, side), 255, dtype=torch.uint8))
    assert (F.resize(ignored, [24, 24]) == 255).all()


def test_depth_is_taken_at_the_centre_of_the_new_pixels() -> None:
    depth = DenseMap(torch.arange(9.0).expand(9, 9))
    assert F.resize(depth, [3, 3])[0].tolist() == [1, 4, 7]
    assert F.resized_crop(depth, 0, 3, 6, 6, [2, 2])[0].tolist() == [4, 7]


@pytest.mark.parametrize("wrong", [tv_tensors.Mask(torch.zeros(3, *SIZE)), torch.zeros(3, *SIZE)])
def test_normals_of_another_class_are_refused(wrong: Tensor) -> None:
    with pytest.raises(TypeError, match="give a NormalMap"):
        eval_transform(SIZE)({**sample("depth"), "normals": wrong})


def test_maps_of_all_kinds_move_together_and_travel_between_processes() -> None:
    given = {**sample("depth"), **{kind: sample(kind)[kind] for kind in KINDS}}
    torch.manual_seed(0)
    step = train_transform(["RandomHorizontalFlip", {"RandomResizedCrop": {"scale": [0.5, 0.9]}}], SIZE, "normals")
    found = unpack(pack(step(given)))
    for kind in KINDS:
        assert type(found[kind]) is type(given[kind])
    z = found["normals"][2]
    torch.testing.assert_close(
        target(found["image"].as_subclass(Tensor), "normals")[2], z.as_subclass(Tensor), atol=0.03, rtol=0
    )


def test_plain_masks_still_get_their_value() -> None:
    jitter = build_transform({"LargeScaleJitter": {"scale": [0.5, 0.5]}}, SIZE, "augment[0]", "segmentation")
    mask = tv_tensors.Mask(torch.zeros(SIZE, dtype=torch.uint8))
    found = jitter({"image": sample("depth")["image"], "mask": mask})
    assert set(found["mask"].unique().tolist()) == {0, 255} and isinstance(jitter, v2.Transform)
