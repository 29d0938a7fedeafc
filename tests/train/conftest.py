"""One thread for torch: tiny models gain nothing from more, and threads that spin for each other are slow on busy cores."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
