import pytest
from tests.parallel.test_meshes import alone, check, source
@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble"])
def test_zb(schedule, source, tmp_path, alone):
    check("llama3_of_4", {"pipeline": 2, "tensor": 2, "pipeline_schedule": schedule}, source, tmp_path, alone)
