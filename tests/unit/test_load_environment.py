"""What a summary says of the configuration: everything that was chosen, and no secret."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.settings import PREFIX, Settings
from loadtest.environment import configuration
from loadtest.plan import Plan

OPTIONS = dict.fromkeys(
    ("transport", "workers", "generators", "remote_generators", "control_s", "target")
)


def test_every_secret_setting_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [
        PREFIX + name.upper()
        for name, each in Settings.model_fields.items()
        if each.annotation is SecretStr
    ]
    assert PREFIX + "CONNECTOR_KEYS" in secrets
    for name in (*secrets, PREFIX + "CONNECTOR_KEYZ"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv(PREFIX + "ADMISSION_TARGET_MS", "30")
    told = configuration(asdict(Plan()), OPTIONS)
    assert "hush" not in str(told)
    assert (
        told["gateway_settings"].items()
        >= {
            **dict.fromkeys((*secrets, PREFIX + "CONNECTOR_KEYZ"), "set"),
            PREFIX + "ADMISSION_TARGET_MS": "30",
        }.items()
    )


def test_summary_has_no_path_of_this_machine(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.touch()
    plan = Plan(ca_file=str(ca_file), out=str(tmp_path), merchants=f"@{tmp_path}/merchants")
    told = configuration(asdict(plan), OPTIONS)
    assert str(tmp_path) not in str(told)
    assert told["plan"]["ca_file"] == "set"
