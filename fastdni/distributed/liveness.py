"""Who is alive: every process tells the store now and then, and says there what has gone wrong.

An error of one process is so an error of all, within a fraction of a second; a process that says
nothing for `heartbeat` seconds, behind a link that is cut, say, is one, too.
"""

import datetime
import threading
import time

import torch.distributed as dist

BEAT = 0.25  # seconds between two looks at the store
_FAILED = "failed"


class Liveness:
    """This process's pulse, and everyone's that it talks to.

    Args:
        store: that all processes reach.
        rank: this process; `peers`: those that it talks to, by name.
        heartbeat: seconds of silence after which a peer counts as lost.
    """

    def __init__(self, store: dist.Store, rank: int, peers: dict[str, int], heartbeat: float):
        self._store = dist.PrefixStore("alive", store)
        self._rank, self._peers, self._heartbeat = rank, peers, heartbeat
        self.failure: str | None = None
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="fastdni alive", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        self._store.set(f"beat/{self._rank}", repr(time.monotonic()))

    def _run(self) -> None:
        seen = {name: (b"", time.monotonic()) for name in self._peers}
        while not self._stop.wait(BEAT):
            try:
                self._beat()
                if self._store.check([_FAILED]):
                    self.failure = self.failure or self._store.get(_FAILED).decode()
                    return
                for name, peer in self._peers.items():
                    self._look_at(name, peer, seen)
            except Exception as error:
                if not self._stop.is_set() and self.failure is None:
                    self.failure = f"the store does not answer: {str(error).splitlines()[0]}"
                return

    def _look_at(self, name: str, peer: int, seen: dict) -> None:
        key, now = f"beat/{peer}", time.monotonic()
        beat = self._store.get(key) if self._store.check([key]) else b""
        before, since = seen[name]
        if beat != before:
            seen[name] = beat, now
        elif now - since > self._heartbeat:
            self.fail(
                f"{name} (rank {peer}) has not been heard of for {self._heartbeat:g} s: its process"
                " hangs, or the network between it and the store is cut"
            )

    def fail(self, message: str) -> None:
        """Says to all what has gone wrong; the first who does is heard."""
        self.failure = self.failure or message
        try:
            self._store.set_timeout(datetime.timedelta(seconds=2))
            self._store.compare_set(_FAILED, "", message)
        except Exception:  # the store is gone as well
            return

    def reason(self) -> str | None:
        """What somebody has said that has gone wrong: he did so before his connections broke."""
        try:
            if self.failure is None and self._store.check([_FAILED]):
                self.failure = self._store.get(_FAILED).decode()
        except Exception:  # the store is gone as well
            return None
        return self.failure

    def stop(self) -> None:
        """No more looks."""
        self._stop.set()
        self._thread.join(5)
