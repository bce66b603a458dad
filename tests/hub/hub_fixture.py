"""A Hub on this machine, and the environment that leads the real client to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_runs import OTHER_TOKEN, READ_TOKEN, TOKEN
from loopback import LoopbackHub


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
