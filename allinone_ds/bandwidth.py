"""Entry point of `torchrun -m allinone_ds.bandwidth`; see `allinone_ds.machine.bandwidth`."""

from __future__ import annotations

import sys

from allinone_ds.machine.bandwidth import main

if __name__ == "__main__":
    sys.exit(main())
