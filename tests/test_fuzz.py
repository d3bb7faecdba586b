"""A few random inputs of each property that `make fuzz` tries for minutes."""

import pytest
from fuzz_properties import PROPERTIES
from hypothesis import HealthCheck, given, settings


@pytest.mark.parametrize("name", PROPERTIES)
def test_any_input_is_read_or_refused_in_one_line(name):
    check, inputs = PROPERTIES[name]
    few = {"template": 4, "run": 15, "gateway": 40}.get(name, 60)
    slow = [HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large]
    settings(max_examples=few, deadline=None, database=None, suppress_health_check=slow)(given(inputs)(check))()
