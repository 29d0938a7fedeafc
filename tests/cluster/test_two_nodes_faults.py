"""What happens to clusters, one thing after another, happens to a run on two machines: it ends as if nothing had happened."""

import pytest

from tests.cluster.conftest import as_if_nothing_had_happened
from tests.cluster.faults import FAULTS, befall
from tests.cluster.rig import missing

_MISSING = missing()
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)),
    pytest.mark.timeout(900),
]
_MOST_STILL = 240.0  # seconds, on a machine with much else to do. What a quiet one needs is measured by `make soak`


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_goes_on_after(fault, course):
    outage = befall(course, fault)
    print(outage)
    assert outage.still < _MOST_STILL, outage


def test_after_all_of_it_the_run_is_as_if_nothing_had_happened(course, shards, tmp_path):
    """Trains the whole run again, undisturbed, in this process: about three minutes."""
    assert as_if_nothing_had_happened(course, shards, tmp_path) > 100
