"""Every element of the parameters is found in the saved shards exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from allinone_ds.zero.checkpoint.layout import Fragment, SavedShards, fragments_of_parameters, fragments_of_parts

SHAPES = [{"a": torch.Size([5, 3]), "b": torch.Size([1])}, {"c": torch.Size([7]), "d": torch.Size([2, 2])}]


def held(parts: list[list[Fragment]]) -> dict[str, list[int]]:
    """Elements of each parameter that the ranks hold together."""
    found: dict[str, list[int]] = {}
    for fragments in parts:
        for f in fragments:
            found.setdefault(f.name, []).extend(range(f.offset, f.offset + f.length))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
def test_every_element_is_held_once(world: int) -> None:
    expected = {name: list(range(shape.numel())) for named in SHAPES for name, shape in named.items()}
    assert held([fragments_of_parameters(SHAPES, rank, world) for rank in range(world)]) == expected
    for gaps in ([[0, 0], [0, 0]], [[3, 1], [0, 2]]):  # elements of padding after each parameter
        sizes = [-(-(sum(s.numel() for s in named.values()) + sum(gap)) // world)
                 for named, gap in zip(SHAPES, gaps, strict=True)]  # fmt: skip
        parts = [fragments_of_parts(SHAPES, gaps, [(rank * size, size) for size in sizes]) for rank in range(world)]
        assert held(parts) == expected


def saved_shards(folder: Path, ranks: int, **state: torch.Tensor) -> Path:
    """Files like those of stage 2, one group of one parameter of 4 elements per rank."""
    folder.mkdir()
    for rank in range(ranks):
        masters = [torch.arange(4.0) + 4 * rank]
        optimizer = {"single_partition_of_fp32_groups": masters, "base_optimizer_state": {"state": {0: state}}}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    shapes = [{"w": torch.Size([8])}]
    torch.save({"param_shapes": shapes, "module": {}}, folder / "mp_rank_00_model_states.pt")
    return folder


def test_what_is_not_in_the_files_is_named(tmp_path: Path) -> None:
    assert SavedShards(saved_shards(tmp_path / "whole", 2)).whole("w").tolist() == list(range(8))
    with pytest.raises(ValueError, match="of 8 elements of 'w' only 4"):
        SavedShards(saved_shards(tmp_path / "half", 1)).whole("w")
    with pytest.raises(KeyError, match="no trained parameter 'v'"):
        list(SavedShards(tmp_path / "whole").where("v", 0, 1))
