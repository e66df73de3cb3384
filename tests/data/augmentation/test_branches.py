"""Branches: how a config gives them, what is refused, and how one is drawn."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from allinone_ds.data.augmentation.branches import AugmentConfig, as_augment
from allinone_ds.data.augmentation.transforms import train_transform
from allinone_ds.errors import ConfigError

SIZE = (24, 32)


def branches(**given):
    """{name: (probability, transforms)} in the form of a config."""
    return {"branches": {name: {"probability": p, "transforms": list(t)} for name, (p, t) in given.items()}}


def test_a_plain_list_is_one_branch_and_survives_a_dump():
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
        (branches(a=(1, [{"Mosaic": {"center": [0.2, 3]}}])), "Mosaic cannot be constructed with .*within 0.5..1.5"),
        (branches(a=(1, [{"LargeScaleJitter": {"scale": [2, 1]}}])), r"give \(least, largest\)"),
        (branches(a=(1, [{"Rain": {"severity": [0, 2]}}])), r"severity is \[0, 2\]"),
        (
            branches(a=(1, [{"RandomApply": {"transforms": ["Mosaic"]}}])),
            "must not be nested; list it directly in a branch",
        ),
        (
            branches(a=(1, [{"RandomApply": {"transforms": {"ColorJitter": {"hue": 0.1}}}}])),
            "must be a list of entries",
        ),
        ({**branches(a=(1, [])), "conflicts": [["Mosaic", "auto-agment"]]}, "did you mean 'auto-augment'"),
    ],
)
def test_a_mistake_is_named_with_its_location(given, message):
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
def test_transforms_in_conflict_are_refused_in_one_branch_and_both_are_named(transforms, names):
    for order in (("hard", "easy"), ("easy", "hard")):
        given = {"hard": (0.5, transforms), "easy": (0.5, [])}
        with pytest.raises(ConfigError, match=rf"branches\.hard: {names} are in conflict"):
            as_augment(branches(**{name: given[name] for name in order}))


def test_a_config_may_add_conflicts():
    given = branches(a=(1.0, ["Fog", {"RandomOrder": {"transforms": ["RandomInvert", "Rain"]}}]))
    as_augment(given)
    for pair, names in ((["Rain", "Fog"], "Fog and Rain"), (["Rain", "RandomInvert"], "RandomInvert and Rain")):
        with pytest.raises(ConfigError, match=names):
            as_augment({**given, "conflicts": [pair]})
        with pytest.raises(ConfigError, match=names):  # and not only the first pair counts
            as_augment({**given, "conflicts": [["Mosaic", "Frost"], pair]})


def test_alternatives_and_different_branches_are_not_in_conflict():
    as_augment(branches(hard=(0.5, ["Mosaic", "MixUp"]), easy=(0.5, ["ColorRandAugment"])))
    choice = [{"RandomChoice": {"transforms": [["Fog", "RandomInvert"], "Rain"]}}]
    as_augment({**branches(a=(1.0, choice)), "conflicts": [["Rain", "Fog"]]})
    with pytest.raises(ConfigError, match="Fog and RandomInvert"):
        as_augment({**branches(a=(1.0, choice)), "conflicts": [["RandomInvert", "Fog"]]})


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("MixUp", "segmentation", "MixUp supports only detection, the data is segmentation"),
        ("Mosaic", "classification", "Mosaic supports only detection and segmentation"),
        ("TrivialAugmentWide", "detection", "use ColorRandAugment"),
        ("RandomIoUCrop", "segmentation", "RandomIoUCrop supports only detection"),
    ],
)
def test_a_transform_that_does_not_support_the_kind_is_refused(name, kind, message):
    with pytest.raises(ConfigError, match=message):
        train_transform([name], SIZE, kind)


def test_branches_are_drawn_by_their_probabilities():
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
    for value, probability in ((65, 0.5), (128, 0.3), (190, 0.2)):
        assert abs(counts[value] / 1000 - probability) < 0.05
    assert transform.only("grey").branches.keys() == {"grey"}
    assert int(transform.only("grey")({"image": image, "label": 0})["image"].max()) == 128


def test_a_single_branch_draws_no_random_number():
    """A plain list augments exactly as the transforms alone do."""
    sample = {"image": tv_tensors.Image(torch.arange(3 * 24 * 32).view(3, 24, 32).to(torch.uint8)), "label": 0}
    torch.manual_seed(5)
    expected = v2.RandomHorizontalFlip()(sample["image"])
    torch.manual_seed(5)
    assert torch.equal(train_transform(["RandomHorizontalFlip"], SIZE)(sample)["image"], expected)
