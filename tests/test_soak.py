"""The short form of `python -m tests.soak`: ten faults, each kind at least once, on 1, 2 and 4 processes."""

from pathlib import Path

import pytest

from tests.soak.record import KINDS
from tests.soak.soak import Soak, table


@pytest.mark.slow
def test_runs_under_faults_equal_undisturbed_runs(tmp_path: Path) -> None:
    soak = Soak(tmp_path, [1, 2, 4])
    soak.inject(10, KINDS)
    injected = [kind for result in soak.results for kind in result.faults]
    assert len(injected) == 10 and set(injected) == set(KINDS), injected
    assert all(result.good for result in soak.results), table(soak.results)
