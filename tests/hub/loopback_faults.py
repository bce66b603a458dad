"""What can go wrong on the way to a Hub and back.

| kind                | what happens                                                   | carried out |
|---------------------|----------------------------------------------------------------|-------------|
| 401 ... 503         | this status; 429 with `Retry-After: 1`                         | no          |
| refused             | no answer, and no new connections for a moment                 | no          |
| reset               | half an answer, then RST; of an upload, before it has been read| downloads   |
| timeout             | no answer until the client is long gone                        | no          |
| truncated           | half of the announced length, then the end                     | yes         |
| malformed           | status 200 with something else; a download: altered bytes      | no          |
| slow                | the answer trickles                                            | yes         |
| lost_answer         | no answer                                                      | yes         |
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

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
