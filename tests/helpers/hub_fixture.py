"""A Hub on this machine, and the environment that leads the real client to it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils._http import default_client_factory

from helpers.hub_runs import OTHER_TOKEN, READ_TOKEN, TOKEN
from helpers.loopback import LoopbackHub
from helpers.loopback_faults import KINDS, OTHER_STAGES, STAGES
from simcse_trainer.hub import client, push
from simcse_trainer.hub.client import HubClient, read_answer
from simcse_trainer.hub.errors import HubFailure
from simcse_trainer.hub.push import set_timeout
from simcse_trainer.hub.repository import HubRepository
from simcse_trainer.training import callbacks, resume

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


class ClientHere(HubClient):
    """Does in this process, by the same functions, what a child process would do."""

    def __init__(self, settings):
        super().__init__(settings)
        self._turn = threading.Lock()

    def run(self, *command: str, content: str = "", progress=None) -> dict:
        with self._turn:
            if self._ended:
                raise HubFailure("stopped")
            settings = self.settings
            set_timeout(settings.timeout_s)
            repository = HubRepository(settings.name, settings.token, settings.private)
            report = progress or (lambda done, total: None)
            return read_answer(*push.carry_out(repository, command, content, report))

    def wait(self) -> None:
        """Until nothing is under way, so that it does not reach the next test's Hub."""
        with self._turn:
            pass


@pytest.fixture
def client_here(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch):
    """Let every command to the Hub be carried out in this process.

    The child processes are tested in test_command_line.py, test_nothing_lost.py, test_processes.py
    and at the end of test_faults.py.
    """
    made: list[ClientHere] = []

    def make(settings) -> ClientHere:
        made.append(ClientHere(settings))
        return made[-1]

    def sleep(seconds: float) -> None:
        """The client's own waiting between its tries, which a child's end would cut short."""
        time.sleep(min(seconds, 1.1))

    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=sleep))
    for module in (client, callbacks, resume):
        monkeypatch.setattr(module, "HubClient", make)
    # What the client library has read from the environment when it was imported.
    read = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DOWNLOAD_TIMEOUT": 2,
        "HF_HUB_ETAG_TIMEOUT": 2,
    }
    for name, value in read.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)

    def settle() -> None:
        for one in made:
            one.end()
            one.wait()

    yield settle
    hub.stop()
    settle()
    huggingface_hub.close_session()
    huggingface_hub.set_client_factory(default_client_factory)


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
