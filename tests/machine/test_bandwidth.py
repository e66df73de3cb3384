"""The bandwidth between ranks is measured."""

from __future__ import annotations

from pathlib import Path

from tests.launcher import run_ranks


def test_bandwidth_is_measured_between_ranks(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "import torch.distributed as dist\n"
        "from allinone_ds.machine import bandwidth\n"
        "bandwidth.SECONDS, bandwidth.SIZES = 0.05, (2**16,)\n"
        "dist.init_process_group('gloo')\n"
        "result = bandwidth.run()\n"
        "if dist.get_rank() == 0:\n"
        "    pathlib.Path(sys.argv[1]).write_text(json.dumps(result))\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    result = run_ranks(script, 2, tmp_path)
    assert result["ranks"] == 2 and abs(result["clocks_differ_s"]) < 60
    assert all(speed > 0 for speed in result["GB/s"][str(2**16)].values())
