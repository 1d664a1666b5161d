"""The transposition of scales against its twin; rows past the counts are neither read nor written."""

import pytest
import torch

from moe_nixl_ep import scales


@pytest.mark.parametrize("groups", [1, 17, 24])
def test_rows_that_are_there_are_transposed(groups):
    counts = torch.tensor([0, 1, 33, 40], dtype=torch.int32)
    source = torch.rand(4, 24, 40).transpose(1, 2)
    for expert, count in enumerate(counts.tolist()):
        source[expert, count:] = torch.nan
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        found = scales._launch(source, counts, groups)
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = scales.row_major_torch(source, counts, groups)
    assert found.is_contiguous()
    assert found.shape == (4, 40, groups)
    assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1))
