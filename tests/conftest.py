"""Fixtures that several test files share."""

import pytest
from helpers import random_core, tiny

from hieratok_hf import HieraTokConfig, HieraTokCore


@pytest.fixture
def tiny_config() -> HieraTokConfig:
    return tiny()


@pytest.fixture
def tiny_core() -> HieraTokCore:
    return random_core()
