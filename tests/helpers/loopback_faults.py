"""What can go wrong on the way to a Hub and back.

Not carried out: a status (429 comes with `Retry-After: 1`); `refused` (no answer, and no new
connections for a moment); `timeout` (no answer until the client is long gone); `malformed` (status
200 with something else; of a download, altered bytes); `reset` of a request in the middle of its
body.
Carried out: `reset` of a download in the middle of its bytes; `truncated` (half of the announced
length, then the end); `slow` (the answer trickles); `lost_answer`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

STAGES = ("create", "preupload", "lfs_batch", "lfs_upload", "commit", "tag", "download")
# What else is asked on the way there.
OTHER_STAGES = ("whoami", "auth", "validate", "info", "tree", "refs", "branch", "verify")
STATUSES = ("401", "403", "404", "409", "412", "413", "429", "500", "502", "503")
KINDS = (*STATUSES, "refused", "reset", "timeout", "truncated", "malformed", "slow", "lost_answer")
# The request takes effect although the client does not hear so.
CARRIED_OUT = ("truncated", "slow", "lost_answer")


@dataclass
class Fault:
    stage: str
    kind: str
    times: int | None
    hits: int = 0


@dataclass
class Faults:
    """Which requests fail next."""

    active: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, stage: str, kind: str, times: int | None = 1) -> Fault:
        assert kind in KINDS, kind
        fault = Fault(stage, kind, times)
        with self.lock:
            self.active.append(fault)
        return fault

    def clear(self) -> None:
        with self.lock:
            self.active.clear()

    def take(self, stage: str) -> Fault | None:
        with self.lock:
            for fault in self.active:
                if fault.stage == stage and (fault.times is None or fault.hits < fault.times):
                    fault.hits += 1
                    return fault
        return None
