"""Read the file that an offline W&B run leaves: LevelDB's log framing around W&B's own protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7  # bytes; a record does not cross a block, a long message is several records


def records(file: Path) -> Iterator[Record]:
    """Every message of a run-ID.wandb file, in order."""
    data = file.read_bytes()
    assert data.startswith(b":W&B")
    position, message = HEADER, b""  # the file's own header is as long as a record's
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if kind == 0:  # a padded end
            position += left
            continue
        message += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def items(found: Any) -> dict[str, Any]:
    """Key-value items of a message, nested keys joined by a dot."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found.item}


def rows(file: Path) -> list[dict[str, Any]]:
    """Everything that was logged, one row a call of `log`."""
    return [items(record.history) for record in records(file) if record.WhichOneof("record_type") == "history"]
