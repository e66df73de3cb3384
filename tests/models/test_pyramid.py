"""The feature pyramid and its norms."""

import pytest
import torch

from allinone_ds.errors import ConfigError
from allinone_ds.models.pyramid import SimpleFeaturePyramid, group_norm


def test_pyramid_levels_have_their_scales():
    levels = SimpleFeaturePyramid(32, 16)(torch.randn(1, 32, 6, 5))
    assert [tuple(level.shape[1:]) for level in levels] == [(16, 24, 20), (16, 12, 10), (16, 6, 5), (16, 3, 3)]
    with pytest.raises(ConfigError, match="scales: 3"):
        SimpleFeaturePyramid(32, 16, [3])


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (128, 16), (48, 6), (16, 2), (12, 1), (5, 1)])
def test_groups_hold_eight_channels_or_more(channels, groups):
    assert group_norm(channels).num_groups == groups
