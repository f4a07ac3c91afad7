"""Hatchling hook: build the agent and ship it in the wheel, which is then for one architecture."""

import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AgentBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs agent/Makefile; an editable install takes the agent from ``make -C agent install`` instead."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the binary and the platform tag to `build_data`; a failed compilation fails the build."""
        if self.target_name != "wheel" or version == "editable":
            return
        agent = Path(self.root, "agent")
        subprocess.run(["make", "-C", str(agent)], check=True)
        build_data["force_include"][str(agent / "build/ringfence-agent")] = "ringfence/_agent/ringfence-agent"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
