"""The comparison with measured kernels: which blocks a causal mask leaves, and the saved rows. Nothing is compiled."""

import json

import numpy as np
import pytest

from benchmarks import measured_kernels


@pytest.mark.parametrize(("block_q", "block_kv"), [(4, 4), (4, 8), (8, 4), (2, 12), (12, 2)])
def test_blocks_that_the_mask_leaves(block_q, block_kv):
    row = measured_kernels.ROWS["1"]._replace(tokens=24, block_q=block_q, block_kv=block_kv)
    seen = np.tril(np.ones((24, 24), bool)).reshape(24 // block_q, block_q, 24 // block_kv, block_kv)
    whole, any_ = seen.all((1, 3)).sum(), seen.any((1, 3)).sum()
    assert measured_kernels.blocks(row) == (whole, any_ - whole)


def test_rows_of_the_repository_are_those_of_the_code():
    saved = json.loads(measured_kernels.report.MEASURED_KERNELS.read_text())
    assert saved.keys() == measured_kernels.ROWS.keys()
    clocks = {"v6e-1": 1.75e9, "7x-4": 2.2e9}
    for name, found in saved.items():
        row = measured_kernels.ROWS[name]
        assert {field: found[field] for field in row._fields} == row._asdict(), name
        seconds = found["cycles"] / clocks[row.topology]
        # Two products of 2 x 256 FLOP for each pair of a query and a key, half of which count.
        assert found["predicted"] == pytest.approx(32 * row.tokens**2 / 2 * 2 * 2 * 256 / seconds / 1e12)
        assert found["ratio"] == pytest.approx(row.measured / found["predicted"])
