"""What every test runs under."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; more threads than cores only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
