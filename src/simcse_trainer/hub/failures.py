"""What went wrong with the Hub, and whether it is worth another try."""

from __future__ import annotations

import random
import time
from email.utils import parsedate_to_datetime
from typing import Any

from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

# Answers that say "not now". All other 4xx are about what was asked or who asked.
_PASSING = {408, 409, 412, 425, 429}
_LONGEST_DELAY_S = 300.0


class HubFailure(Exception):
    """A request to the Hub that did not succeed.

    Attributes:
        text: One line.
        status: The HTTP status, if there was an answer.
        retry_after: Seconds that the Hub asked to wait.
        refused: The same request would fail again.
    """

    def __init__(
        self,
        text: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        refused: bool = False,
    ):
        super().__init__(text)
        self.text = text
        self.status = status
        self.retry_after = retry_after
        self.refused = refused

    def as_dict(self) -> dict[str, Any]:
        """For the way between processes; the constructor's arguments."""
        return {name: getattr(self, name) for name in ("text", "status", "retry_after", "refused")}


def explain(error: BaseException) -> HubFailure:
    """Any exception of the client as a `HubFailure`."""
    if isinstance(error, HubFailure):
        return error
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status: int | None = getattr(response, "status_code", None)
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set, so the Hub is not asked"
        return HubFailure(text, status=400, refused=True)
    if isinstance(error, LocalTokenNotFoundError):
        hint = "run `hf auth login`, set HF_TOKEN or pass --hub_token"
        return HubFailure(f"there is no Hub token: {hint}", status=401, refused=True)
    if isinstance(error, HFValidationError):
        return HubFailure(line, status=400, refused=True)
    if isinstance(error, RepositoryNotFoundError):
        text = "the repository does not exist, or is private and the token gives no access to it"
        return HubFailure(text, status=status, refused=True)
    if status is None:
        return HubFailure(f"{type(error).__name__}: {line}"[:300])
    if status == 401:
        line += " (is the token right? `hf auth login`, HF_TOKEN or --hub_token gives one)"
    refused = 400 <= status < 500 and status not in _PASSING
    return HubFailure(line[:300], status=status, retry_after=_wait(response), refused=refused)


def delay(attempt: int, unit_s: float, failure: HubFailure) -> float:
    """Seconds before the next try: exponential with jitter, and no less than the Hub asked for.

    Args:
        attempt: How many have failed, from 1.
        unit_s: The delay after the first, about.
        failure: Of the last one.
    """
    backoff: float = min(unit_s * 2 ** min(attempt - 1, 16), _LONGEST_DELAY_S)
    return max(backoff * random.uniform(0.75, 1.25), failure.retry_after or 0.0)


def _wait(response: Any) -> float | None:
    """Seconds that the answer asks to wait: `Retry-After`, or a spent `ratelimit`."""
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
