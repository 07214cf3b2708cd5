"""SIGTERM and SIGINT ask a run to stop; all ranks stop after the same step."""

import contextlib
import signal
import time

from lfm_fast.distributed import PeerLost, is_of_lost_peer

_putting_back = False


@contextlib.contextmanager
def sigterm_put_back():
    """Put back SIGTERM's handler, which a run that has lost a rank leaves replaced, when the outermost of these ends:

    `main` has yet to say what has ended `train`, and who calls `train` from Python wants to be ended by it later.
    """
    global _putting_back
    if _putting_back:
        yield
        return
    before, _putting_back = signal.getsignal(signal.SIGTERM), True
    try:
        yield
    finally:
        _putting_back = False
        if signal.getsignal(signal.SIGTERM) is not before:  # threads, which may not set one, do not come here
            signal.signal(signal.SIGTERM, before)


class StopSignals:
    """Context in which a first SIGTERM or SIGINT sets a flag and a second Ctrl-C interrupts at once.

    torchrun passes a Ctrl-C on to ranks that the terminal has already interrupted, so a second one counts only when
    it comes a second or more after the first.
    """

    def __init__(self, world):
        self.world, self._first, self._vote = world, None, None

    def __enter__(self):
        self._before = {sign: signal.signal(sign, self._handle) for sign in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, RuntimeError) and is_of_lost_peer(error):
            # torchrun ends the ranks that are left by SIGTERM, and they have something to say first (sigterm_put_back)
            self._before.pop(signal.SIGTERM)
        for sign, handler in self._before.items():
            signal.signal(sign, handler)
        # what ended the run is what is said of it, not that this vote, too, has lost a rank
        with contextlib.suppress(*([PeerLost] if error else [])):
            if self._vote is not None:
                self._vote.result()

    def _handle(self, sign, _):
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif sign == signal.SIGINT and now - self._first >= 1:
            raise KeyboardInterrupt

    def asked(self):
        """Whether any rank was asked to stop. Called once per step; with several ranks the answer is a step old,

        so that nobody waits for it, and the same on every rank.
        """
        if self.world.size == 1:
            return self._first is not None
        answer = self._vote is not None and self._vote.result()
        self._vote = self.world.vote(self._first is not None)
        return answer
