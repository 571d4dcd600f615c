"""Hatchling's hook for the stubs' distribution: generates them as it is built or installed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Hatchling loads this file by its path, which does not make its neighbours importable.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import stubgen

EDITABLE_OUT = "gen"
"""Where an editable install finds its stubs; `dev-mode-dirs` in pyproject.toml names it too."""


class StubsBuildHook(BuildHookInterface[BuilderConfig]):
    """Puts the generated tree into a wheel, or beside the sources for an editable install."""

    PLUGIN_NAME = "custom"
    _scratch: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates; a source distribution needs nothing, for it is built again from source."""
        if self.target_name != "wheel":
            return
        source = Path(self.root)
        if version == "editable":
            stubgen.write_all(source, source / EDITABLE_OUT)
            return
        # Outside the source tree: that may be read-only, or be built twice at the same time.
        self._scratch = tempfile.TemporaryDirectory(prefix="payment-gateway-stubs-")
        scratch = Path(self._scratch.name)
        stubgen.write_include(source, scratch / "include")
        image = stubgen.compile_image(scratch / "include")
        tree = scratch / "python"
        stubgen.write_python(scratch / "include", image, tree)
        for path in sorted(tree.rglob("*")):
            if path.is_file():
                build_data["force_include"][str(path)] = path.relative_to(tree).as_posix()

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Removes what the build left."""
        if self._scratch is not None:
            self._scratch.cleanup()
