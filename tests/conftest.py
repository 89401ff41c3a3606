"""Settings for the whole suite."""

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("cases", "engines_guide", "guides")

settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

# Tensors here are small; on a busy machine threads that wait for one another made the suite nine times slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "reference"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that serves CPU tensors."""
    return request.param
