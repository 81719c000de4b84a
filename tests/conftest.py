"""What every test runs under."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# The workers of xdist share the cores: more threads than cores only wait for each other. And with
# one thread everywhere, what is computed here is to the byte what child processes compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
