"""What went wrong with the Hub, whether it is worth another try, and the loop that tries."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from textwrap import shorten
from typing import Any, TypeVar

from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

from simcse_trainer.errors import InputError

# Answers that say "not now". All other 4xx are about what was asked or who asked.
_PASSING = {408, 409, 412, 425, 429}
_LONGEST_DELAY_S = 300.0
_REFUSALS = 3

# Exit status of the child that speaks to the Hub: done, refused for good, and EX_TEMPFAIL.
DONE, REFUSED, TRY_AGAIN = 0, 2, 75

T = TypeVar("T")


class HubFailure(Exception):
    """A request to the Hub that did not succeed.

    Attributes:
        text: What went wrong, in one line.
        status: The HTTP status, if there was an answer.
        retry_after: Seconds that the Hub asked to wait.
        refused: The same request would fail again.
        options: What to add to `simcse-trainer push` so that it succeeds.
    """

    def __init__(
        self,
        text: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        refused: bool = False,
        options: str = "",
    ):
        super().__init__(text)
        self.text = text
        self.status = status
        self.retry_after = retry_after
        self.refused = refused
        self.options = options

    @property
    def is_final(self) -> bool:
        """Whether it was decided here, from what the Hub holds: no other answer can come."""
        return self.refused and self.status is None

    def as_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments, to send them between processes."""
        return dict(vars(self))


def explain(error: BaseException) -> HubFailure:
    """Turn any exception of the client into a `HubFailure`."""
    if isinstance(error, HubFailure):
        return error
    if isinstance(error, InputError):
        return HubFailure(str(error), refused=True)
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status: int | None = getattr(response, "status_code", None)
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set, so the Hub is not asked"
        return HubFailure(text, status=400, refused=True)
    if isinstance(error, LocalTokenNotFoundError):
        text = "there is no Hub token: run `hf auth login`, or set HF_TOKEN"
        return HubFailure(text, status=401, refused=True)
    if isinstance(error, HFValidationError):
        return HubFailure(line, status=400, refused=True)
    if isinstance(error, RepositoryNotFoundError):
        text = "the repository does not exist, or is private and the token gives no access to it"
        return HubFailure(text, status=status, refused=True)
    if status is None:
        return HubFailure(shorten(f"{type(error).__name__}: {line}", 300, placeholder=" ..."))
    line = shorten(line, 300, placeholder=" ...")
    if status == 401:
        line += " (is the token right? `hf auth login` or HF_TOKEN gives one)"
    refused = 400 <= status < 500 and status not in _PASSING
    return HubFailure(line, status=status, retry_after=_wait(response), refused=refused)


class Retries:
    """How often one request is made again, and when.

    A refusal may be a hiccup too (a token that is being renewed): so many in a row are an answer.
    What was decided here is one at once.

    Args:
        unit_s: The delay after the first failure, about.
        refusals: How many are an answer.
    """

    def __init__(self, unit_s: float, refusals: int = _REFUSALS):
        self._unit_s, self._most_refusals = unit_s, refusals
        self._attempts = self._refusals = 0

    def after(self, failure: HubFailure) -> float | None:
        """Return the seconds before the next try; None where there is no use in one.

        They grow exponentially, with jitter, and are no fewer than the Hub asked for.
        """
        self._attempts += 1
        self._refusals += failure.refused
        if failure.is_final or self._refusals == self._most_refusals:
            return None
        backoff: float = min(self._unit_s * 2 ** min(self._attempts - 1, 16), _LONGEST_DELAY_S)
        return max(backoff * random.uniform(0.75, 1.25), failure.retry_after or 0.0)

    def run(self, call: Callable[[], T], wait: Callable[[HubFailure, float | None], bool]) -> T:
        """Call until it succeeds.

        Args:
            call: A function that makes one try.
            wait: Gets each failure and the seconds before the next try (None: there is no use in
                one); lets them pass, and returns whether to try again.

        Raises:
            HubFailure: The last failure, if none was passed over.
        """
        while True:
            try:
                return call()
            except HubFailure as failure:
                if not wait(failure, self.after(failure)):
                    raise


def _wait(response: Any) -> float | None:
    """Return the seconds that the answer asks to wait: `Retry-After`, or a spent `ratelimit`."""
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
