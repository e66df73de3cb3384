"""Branches: how a config gives them, which are refused, and that branch and partners follow from the sample's seed."""

import colorsys

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from allinone_ds.data.augmentation.branches import AugmentConfig, as_augment
from allinone_ds.data.augmentation.colour import ColorRandAugment, HSVJitter, change_hsv
from allinone_ds.data.augmentation.transforms import stack_images, train_transform
from allinone_ds.data.augmentation.weather import Fog, Frost, Rain, Spatter, clouds
from allinone_ds.data.base import SampleDataset
from allinone_ds.data.loader import TaskData, train_loader
from allinone_ds.data.schedule import Schedule
from allinone_ds.errors import BrokenSample, ConfigError, DataError

SIZE = (24, 32)


def branches(**given):
    """{name: (probability, transforms)} as a config writes it."""
    return {"branches": {name: {"probability": p, "transforms": list(t)} for name, (p, t) in given.items()}}


# ---- reading


def test_a_plain_list_is_one_branch_and_reads_back():
    config = as_augment(["RandomHorizontalFlip", {"ColorJitter": {"hue": 0.1}}])
    assert [(b.probability, b.transforms) for b in config.branches.values()] == [
        (1.0, ["RandomHorizontalFlip", {"ColorJitter": {"hue": 0.1}}])
    ]
    assert AugmentConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (branches(a=(0.5, []), b=(0.4, [])), r"add up to 0\.9 \(a 0\.5, b 0\.4\); they must add up to 1"),
        (branches(a=(0.0, []), b=(1.0, [])), r"augment: 'branches\.a\.probability' = 0\.0"),
        ({"branches": {}}, "'branches'"),
        ({"branchs": {}}, "unknown key 'branchs'; did you mean 'branches'"),
        ({"branches": {"a": {"probabilty": 1, "transforms": []}}}, "did you mean 'probability'"),
        (branches(a=(1, ["Mosiac"])), r"branches\.a\[0\]: there is no augmentation 'Mosiac'; did you mean 'Mosaic'"),
        (
            branches(a=(0.5, []), b=(0.5, [{"MixUp": {"scal": [1, 2]}}])),
            r"branches\.b\[0\]: MixUp has no option 'scal'",
        ),
        (branches(a=(1, [{"Mosaic": {"center": [0.2, 3]}}])), "Mosaic cannot be made from .*within 0.5..1.5"),
        (branches(a=(1, [{"LargeScaleJitter": {"scale": [2, 1]}}])), "least and the largest"),
        (branches(a=(1, [{"Rain": {"severity": [0, 2]}}])), r"severity is \[0, 2\]"),
        (
            branches(a=(1, [{"RandomApply": {"transforms": ["Mosaic"]}}])),
            "stands directly in a branch; use its option p",
        ),
        (
            branches(a=(1, [{"RandomApply": {"transforms": {"ColorJitter": {"hue": 0.1}}}}])),
            "must be a list of entries",
        ),
        ({**branches(a=(1, [])), "conflicts": [["Mosaic", "auto-agment"]]}, "did you mean 'auto-augment'"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        train_transform(given, SIZE)


@pytest.mark.parametrize(
    ("transforms", "names"),
    [
        (["Mosaic", "ColorRandAugment"], "Mosaic and ColorRandAugment"),
        (["RandAugment", "RandomInvert", {"MixUp": {"p": 0.5}}], "RandAugment and MixUp"),
        (["Mosaic", {"RandomApply": {"transforms": ["AugMix"]}}], "Mosaic and AugMix"),
        (
            ["Mosaic", {"RandomChoice": {"transforms": ["RandomInvert", ["Rain", "AutoAugment"]]}}],
            "Mosaic and AutoAugment",
        ),
    ],
)
def test_a_branch_of_transforms_that_hurt_each_other_is_refused_and_both_are_named(transforms, names):
    for order in (("hard", "easy"), ("easy", "hard")):
        given = {"hard": (0.5, transforms), "easy": (0.5, [])}
        with pytest.raises(ConfigError, match=rf"branches\.hard: {names} stand in one branch"):
            as_augment(branches(**{name: given[name] for name in order}))


def test_users_add_conflicts_of_their_own():
    given = branches(a=(1.0, ["Fog", {"RandomOrder": {"transforms": ["RandomInvert", "Rain"]}}]))
    as_augment(given)
    for pair, names in ((["Rain", "Fog"], "Fog and Rain"), (["Rain", "RandomInvert"], "RandomInvert and Rain")):
        with pytest.raises(ConfigError, match=names):
            as_augment({**given, "conflicts": [pair]})
        with pytest.raises(ConfigError, match=names):  # nor is the first pair all
            as_augment({**given, "conflicts": [["Mosaic", "Frost"], pair]})


def test_alternatives_and_different_branches_never_meet():
    as_augment(branches(hard=(0.5, ["Mosaic", "MixUp"]), easy=(0.5, ["ColorRandAugment"])))
    choice = [{"RandomChoice": {"transforms": [["Fog", "RandomInvert"], "Rain"]}}]
    as_augment({**branches(a=(1.0, choice)), "conflicts": [["Rain", "Fog"]]})
    with pytest.raises(ConfigError, match="Fog and RandomInvert"):
        as_augment({**branches(a=(1.0, choice)), "conflicts": [["RandomInvert", "Fog"]]})


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("MixUp", "segmentation", "MixUp is for detection, the data here is segmentation"),
        ("Mosaic", "classification", "Mosaic is for detection and segmentation"),
        ("TrivialAugmentWide", "detection", "use ColorRandAugment"),
        ("RandomIoUCrop", "segmentation", "RandomIoUCrop is for detection"),
    ],
)
def test_transforms_that_would_spoil_the_kind_are_refused(name, kind, message):
    with pytest.raises(ConfigError, match=message):
        train_transform([name], SIZE, kind)


# ---- drawing


def test_every_branch_gets_its_share():
    given = branches(
        white=(0.5, [{"RandomSolarize": {"threshold": 0, "p": 1.0}}]),
        grey=(0.3, [{"RandomPosterize": {"bits": 1, "p": 1.0}}]),
        same=(0.2, []),
    )
    transform = train_transform(given, SIZE)
    image = tv_tensors.Image(torch.full((3, *SIZE), 190, dtype=torch.uint8))
    seen = []
    for seed in range(1000):
        torch.manual_seed(seed)
        seen.append(int(transform({"image": image, "label": 0})["image"][0, 0, 0]))
    counts = {value: seen.count(value) for value in set(seen)}
    assert set(counts) == {65, 128, 190}
    for value, share in ((65, 0.5), (128, 0.3), (190, 0.2)):
        assert abs(counts[value] / 1000 - share) < 0.05
    assert transform.only("grey").branches.keys() == {"grey"}
    assert int(transform.only("grey")({"image": image, "label": 0})["image"].max()) == 128


def test_one_branch_costs_no_draw():
    """So a run with a plain list keeps its augmentation when branches come to the package."""
    sample = {"image": tv_tensors.Image(torch.arange(3 * 24 * 32).view(3, 24, 32).to(torch.uint8)), "label": 0}
    torch.manual_seed(5)
    wanted = v2.RandomHorizontalFlip()(sample["image"])
    torch.manual_seed(5)
    assert torch.equal(train_transform(["RandomHorizontalFlip"], SIZE)(sample)["image"], wanted)


# ---- loading


class Shades(SampleDataset):
    """Sample i is a picture of one shade of grey, 10 i + 5, with one box of label i; those in `broken` are torn."""

    kind = "detection"
    name = "shades"

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self.count, self.broken = count, broken
        self.classes = [str(i) for i in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenSample(f"{index}.png", "is torn")
        return {
            "image": tv_tensors.Image(torch.full((3, 20, 30), 10 * index + 5, dtype=torch.uint8)),
            "boxes": tv_tensors.BoundingBoxes([[0.0, 0.0, 30.0, 20.0]], format="XYXY", canvas_size=(20, 30)),
            "labels": torch.tensor([index]),
            "iscrowd": torch.tensor([False]),
            "path": f"{index}.png",
            "index": index,
        }


HARD = branches(hard=(0.6, ["Mosaic", "MixUp", "RandomHorizontalFlip"]), easy=(0.4, ["LargeScaleJitter"]))


def collate(samples):
    return {
        "pixel_values": stack_images(samples),
        "labels": [sample["labels"].tolist() for sample in samples],
        "boxes": [sample["boxes"].tolist() for sample in samples],
    }


def loader(dataset, start=0, stop=6, workers=0, max_broken=5, batch_size=3, ranks=1, rank=0):
    data = {"det": TaskData(dataset, train_transform(HARD, SIZE, "detection"), collate, batch_size, 2)}
    schedule = Schedule(4, {"det": len(dataset)}, {"det": (batch_size, 2)}, ranks)
    return train_loader(data, schedule, rank, start, stop, workers, max_broken)


def same(left, right) -> bool:
    assert len(left) == len(right) > 0
    for one, two in zip(left, right, strict=True):
        assert one.broken == two.broken
        for a, b in zip(one.batches["det"], two.batches["det"], strict=True):
            if not torch.equal(a["pixel_values"], b["pixel_values"]) or a["labels"] != b["labels"]:
                return False
            assert a["boxes"] == b["boxes"]
    return True


def test_partners_do_not_depend_on_workers_nor_on_where_a_run_is_resumed():
    dataset = Shades(12, broken=(3,))
    whole = list(loader(dataset))
    assert any(len(labels) > 1 for step in whole for batch in step.batches["det"] for labels in batch["labels"])
    torch.manual_seed(77)
    assert same(list(loader(dataset, start=4)), whole[4:])
    assert same(list(loader(dataset, workers=2)), whole)


def test_a_sample_does_not_depend_on_who_shares_its_batch():
    dataset = Shades(12)
    pairs = [b for s in loader(dataset, stop=2, batch_size=6) for b in s.batches["det"]]
    halves = [[b for s in loader(dataset, stop=2, ranks=2, rank=r) for b in s.batches["det"]] for r in range(2)]
    for pair, first, second in zip(pairs, *halves, strict=True):
        assert torch.equal(pair["pixel_values"], torch.cat([first["pixel_values"], second["pixel_values"]]))
        assert pair["labels"] == first["labels"] + second["labels"]


def test_torn_partners_are_counted_and_another_is_drawn():
    whole, torn = list(loader(Shades(12))), list(loader(Shades(12, broken=(1, 2, 8)), max_broken=9))
    told = [line for step in torn for line in step.broken]
    drawn = sum(len(step.batches["det"]) * 3 for step in torn)
    assert set(told) == {"1.png: is torn", "2.png: is torn", "8.png: is torn"}
    assert len(told) > drawn * 3 / 12 * 1.5  # more than the samples' own: partners are counted too
    labels = {k for step in torn for batch in step.batches["det"] for boxes in batch["labels"] for k in boxes}
    assert labels == set(range(12)) - {1, 2, 8}
    assert all(step.broken == [] for step in whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_partners_that_cannot_be_read_end_the_run_with_a_reason(workers):
    with pytest.raises(DataError, match=r"shades: 3 samples in a row cannot be read .*is torn.*max_broken_images"):
        list(loader(OnlyOne(), workers=workers, max_broken=2))


class OnlyOne(Shades):
    """The first read succeeds, no other does: a partner is never found."""

    def __init__(self):
        super().__init__(6)
        self.turn = 0

    def __getitem__(self, index):
        self.turn += 1
        if self.turn > 1:
            raise BrokenSample(f"{index}.png", "is torn")
        return super().__getitem__(index)


def test_a_transform_that_joins_samples_says_when_it_has_none():
    with pytest.raises(ValueError, match="Mosaic takes further samples"):
        train_transform(["Mosaic"], SIZE)(Shades(2)[0])
    with pytest.raises(ValueError, match="Mosaic joins boxes or masks"):
        train_transform(["Mosaic"], SIZE)({"image": Shades(2)[0]["image"], "label": 1}, lambda: Shades(2)[1])


# ---- colours and weather


def test_hsv_is_that_of_the_standard_library():
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 9, 8), dtype=torch.uint8, generator=g)
    image[:, 0] = torch.arange(8, dtype=torch.uint8) * 36  # greys, black among them
    for shift, saturation, value in ((0.0, 1.0, 1.0), (0.7, 1.3, 0.8), (-1.9, 0.4, 1.2), (3.0, 1.0, 1.0)):
        found = change_hsv(image, shift, saturation, value)
        for y in range(9):
            for x in range(8):
                h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist())
                wanted = colorsys.hsv_to_rgb((h + shift / 6) % 1, min(s * saturation, 1), min(v * value, 1))
                assert torch.allclose(
                    found[:, y, x].float(), torch.tensor(wanted, dtype=torch.float32) * 255, atol=1.01
                ), (y, x)
    assert torch.equal(change_hsv(image, 0.0, 1.0, 1.0), image)


@pytest.mark.parametrize("transform", [HSVJitter(), ColorRandAugment(2), Fog(), Frost(), Rain(), Spatter()], ids=repr)
@pytest.mark.parametrize("size", [(20, 31), (96, 64)])
def test_pixel_transforms_change_pixels_and_nothing_else(transform, size):
    g = torch.Generator().manual_seed(1)
    image = tv_tensors.Image(torch.randint(40, 200, (3, *size), dtype=torch.uint8, generator=g))
    mask = tv_tensors.Mask(torch.randint(0, 4, size, dtype=torch.uint8, generator=g))
    boxes = tv_tensors.BoundingBoxes([[1.0, 2.0, 9.0, 8.0]], format="XYXY", canvas_size=size)
    before = image.clone()
    changed = 0
    for seed in range(8):
        torch.manual_seed(seed)
        out = transform({"image": image, "mask": mask, "boxes": boxes})
        assert type(out["image"]) is tv_tensors.Image and out["image"].dtype == torch.uint8
        assert out["image"].shape == image.shape
        assert torch.equal(out["mask"], mask) and torch.equal(out["boxes"], boxes)
        changed += not torch.equal(out["image"], before)
        torch.manual_seed(seed)
        assert torch.equal(transform(image), out["image"])
    assert changed >= 5 and torch.equal(image, before)


@pytest.mark.parametrize("weather", [Fog, Frost, Rain, Spatter])
def test_weather_is_worse_the_severer(weather):
    image = torch.randint(0, 256, (3, 80, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    change = []
    for severity in (0.0, 0.5, 1.0):
        total = 0.0
        for seed in range(6):
            torch.manual_seed(seed)
            total += float((weather((severity, severity)).paint(image).float() - image.float()).abs().mean())
        change.append(total / 6)
    assert change[0] < change[1] < change[2] and 8 < change[2] < 110


def test_clouds_fill_the_range():
    for size in ((7, 300), (40, 40), (1, 1)):
        field = clouds(size, coarsest=3)
        assert field.shape == size and field.min() >= 0 and field.max() <= 1.0001
