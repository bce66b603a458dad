"""A Hub on this machine, and the environment that leads the real client to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_runs import OTHER_TOKEN, READ_TOKEN, TOKEN
from loopback import LoopbackHub
from loopback_faults import KINDS, OTHER_STAGES, STAGES

# The property in which a test of the fault matrix says how its cell ended.
OUTCOME = "hub_fault"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = LoopbackHub()
    hub.add_user("me", TOKEN, orgs=("our-lab",))
    hub.add_user("me", READ_TOKEN, write=False)
    hub.add_user("other", OTHER_TOKEN)
    hub.start()
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_ETAG_TIMEOUT": "2",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The matrix of stages and faults, of all test processes together."""
    ended: dict[tuple[str, str], dict[str, str]] = {}
    for report in [r for reports in terminalreporter.stats.values() for r in reports]:
        for stage, kind, times, outcome in (
            value for name, value in getattr(report, "user_properties", ()) if name == OUTCOME
        ):
            ended.setdefault((stage, kind), {})[times] = outcome
    if not ended:
        return
    terminalreporter.section("how it ends where the Hub fails once / always")
    for stages in (STAGES, OTHER_STAGES):
        lines = [["", *stages]]
        for kind in KINDS:
            cells = [ended.get((stage, kind), {}) for stage in stages]
            if any(cells):
                shown = (f"{c.get('once', '-')} / {c.get('always', '-')}" for c in cells)
                lines.append([kind, *shown])
        for line in lines if len(lines) > 1 else ():
            terminalreporter.write_line(" ".join(f"{cell:<18}" for cell in line).rstrip())
