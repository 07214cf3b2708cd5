"""Which signals ask a run to stop, and which end it at once."""

import contextlib
import signal
import time

import pytest

from lfm_fast.distributed import PeerLost, World
from lfm_fast.train.stop import StopSignals, sigterm_put_back


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_counts_when_it_comes_a_second_later(clock, first):
    """torchrun passes on, within that second, the Ctrl-C that the terminal has already sent."""
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(World()) as stop:
        assert not stop.asked()
        signal.raise_signal(first)
        assert stop.asked()
        clock[0] += 0.9
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # pytest would take it for its own
            pytest.fail("interrupted by the first one's echo")
        clock[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_rank_that_has_lost_another_is_not_ended_before_it_says_so(clock):
    """torchrun sends SIGTERM to the ranks that are left, some within a tenth of a second."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match="Connection closed"), StopSignals(World()):
            raise RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
        signal.raise_signal(signal.SIGTERM)  # this process is still here
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ValueError, match="another"), StopSignals(World()):
        raise ValueError("another error")
    assert signal.getsignal(signal.SIGTERM) is before


def test_who_goes_on_after_a_lost_rank_can_be_ended_again(clock):
    """`train` within `main` leaves that to it, which has the sentence to say."""
    before = signal.getsignal(signal.SIGTERM)

    @sigterm_put_back()
    def train():
        with StopSignals(World()):
            raise PeerLost

    @sigterm_put_back()
    def main():
        with pytest.raises(PeerLost):
            train()
        signal.raise_signal(signal.SIGTERM)  # this process is still here

    for run in (train, main, train):
        with contextlib.suppress(PeerLost):
            run()
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_still_waits_for_the_step(clock):
    """A scheduler repeats it until the process is gone."""
    with StopSignals(World()) as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            clock[0] += 60
        assert stop.asked()
