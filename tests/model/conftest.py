"""Fixtures of the model tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Seed every test, so that a failure can be reproduced."""
    torch.manual_seed(0)
