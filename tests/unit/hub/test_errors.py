"""Which failures are worth another try, and when."""

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from simcse_trainer.hub.errors import HubFailure, Retries, explain


class Response:
    def __init__(self, status: int, **headers: str):
        self.status_code = status
        self.headers = headers


def failed(status: int, **headers: str) -> HubFailure:
    error = RuntimeError(f"{status}\n  of some request")
    error.response = Response(status, **headers)
    return explain(error)


@pytest.mark.parametrize("status", [408, 409, 412, 429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(status):
    assert not failed(status).refused


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422])
def test_what_was_refused_would_be_again(status):
    assert failed(status).refused


def test_a_failure_is_one_line_and_keeps_what_the_answer_said():
    failure = failed(429, **{"Retry-After": "17"})
    assert failure.text == "429 of some request"
    assert (failure.status, failure.retry_after) == (429, 17.0)
    assert HubFailure(**failure.as_dict()).as_dict() == failure.as_dict()


def test_the_forms_in_which_an_answer_asks_to_wait():
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)
    assert 85 < failed(503, **{"Retry-After": soon}).retry_after <= 90
    assert failed(503, **{"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}).retry_after == 0
    assert failed(429, ratelimit='"api";r=0;t=55').retry_after == 55
    assert failed(429, ratelimit='"api";r=3;t=55').retry_after is None
    assert failed(503, **{"Retry-After": "soon"}).retry_after is None


def test_the_cause_of_the_clients_own_error_counts():
    error = RuntimeError("Error while uploading")
    error.__cause__ = RuntimeError("cause")
    error.__cause__.response = Response(403)
    assert explain(error).refused


def test_delays_grow_spread_and_honour_the_hub():
    unknown = HubFailure("reset")
    runs = [Retries(1.0) for _ in range(200)]
    for attempt in range(1, 41):
        delays = [retries.after(unknown) for retries in runs]
        about = {1: 1, 2: 2, 5: 16, 40: 300}.get(attempt)
        if about:
            assert 0.75 * about <= min(delays) < max(delays) <= 1.25 * about
            assert max(delays) > 1.1 * min(delays)
    assert Retries(1.0).after(HubFailure("later", retry_after=40.0)) == 40.0


def test_what_the_hub_refuses_is_asked_three_times_and_what_was_decided_here_once():
    retries, refusal = Retries(1.0), HubFailure("no", status=403, refused=True)
    assert [retries.after(refusal) is None for _ in range(3)] == [False, False, True]
    assert Retries(1.0).after(HubFailure("malformed", refused=True)) is None
