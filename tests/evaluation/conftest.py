"""The evaluators that must give the same numbers."""

import pytest

from tests.support.evaluation_cases import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
