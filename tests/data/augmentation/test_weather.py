"""Weather transforms: the severity, and the random fields behind them."""

import pytest
import torch

from allinone_ds.data.augmentation.weather import Fog, Frost, Rain, Spatter, clouds


@pytest.mark.parametrize("weather", [Fog, Frost, Rain, Spatter])
def test_a_higher_severity_changes_more(weather):
    image = torch.randint(0, 256, (3, 80, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    change = []
    for severity in (0.0, 0.5, 1.0):
        total = 0.0
        for seed in range(6):
            torch.manual_seed(seed)
            total += float((weather((severity, severity)).paint(image).float() - image.float()).abs().mean())
        change.append(total / 6)
    assert change[0] < change[1] < change[2] and 8 < change[2] < 110


def test_clouds_have_the_size_and_lie_within_0_and_1():
    for size in ((7, 300), (40, 40), (1, 1)):
        field = clouds(size, coarsest=3)
        assert field.shape == size and field.min() >= 0 and field.max() <= 1.0001
