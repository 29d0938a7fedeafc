"""The clock of waiting, with the host's time and with a device's."""

import pytest
import torch

from pipelines.wait_timer import WaitClock


class Device:
    """A device with a queue: what it is asked for takes time, and the host does not wait for it."""

    def __init__(self):
        self.now = 0.0  # of the host, seconds
        self.free_at = 0.0  # when all that was asked for so far is done

    def work(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds

    def event(self, enable_timing: bool):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.free_at, self.device.now)

    def query(self):
        return self.device.now >= self.at

    def elapsed_time(self, end):
        return (end.at - self.at) * 1000


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    return found


def test_a_device_that_is_busy_does_not_wait_while_the_host_does(device):
    clock = WaitClock("cuda")
    device.work(5.0)  # a step of training
    with clock.waiting():
        device.now += 3.0  # the host waits for the decoder, the device still trains
    device.now += 10.0
    assert clock.seconds == 0


def test_a_device_waits_from_the_end_of_its_work(device):
    clock = WaitClock("cuda")
    device.work(1.0)
    with clock.waiting():
        device.now += 3.0
        device.work(0.5)  # the augmentation, for which training waits too
    assert clock.seconds == 0  # the device has not come to the end of it
    device.now += 10.0
    assert clock.seconds == pytest.approx(2.5)
    with clock.waiting():
        device.now += 1.0
    assert clock.seconds == pytest.approx(3.5)


def test_a_block_that_fails_does_not_count():
    clock = WaitClock("cpu")
    with pytest.raises(KeyError), clock.waiting():
        raise KeyError
    assert clock.seconds == 0
