"""Files and folders that a source names and that do not exist."""

import pytest

from allinone_ds.errors import DataError
from tests.data.tiny_sets import COCO, FOLDERS, LIST, MAPS, errors, opened


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**COCO, "annotations": "no.json"}, r"no\.json: file is missing"),
        ({**COCO, "images": "no"}, "no: 'images' must be a folder, it does not exist"),
        ({**COCO, "images": "boxes.json"}, "'images' must be a folder, it is a file"),
        ({**MAPS, "label_maps": "no"}, "'label_maps' must be a folder"),
        ({**LIST, "list": "no.txt"}, r"no\.txt: file is missing"),
        ({**LIST, "list": "boxes.json", "classes": "no.txt"}, r"no\.txt: file is missing"),
        ({**FOLDERS, "images": "no"}, "'images' must be a folder"),
    ],
)
def test_a_wrong_path_is_named_with_its_field(coco_root, config, message):
    with pytest.raises(DataError, match=message):
        opened(config, coco_root)
    assert len(errors(config, coco_root)) == 1
