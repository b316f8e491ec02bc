"""Tests against independent truths: diffusers in torch, attention in float64, schedules counted by hand."""

import os

# The tests' workers, one to a core, and the processes that they start, gain nothing by more threads. The libraries read
# this when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
