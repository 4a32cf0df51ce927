"""What the benchmarks share: a description of the machine, and a file for the figures."""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fastops


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(*packages: str) -> dict[str, object]:
    """The machine, how busy it is, and the versions of these packages."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in packages},
        "fastops": fastops.BACKEND,
    }


def write(path: Path, about: dict, results: object, **more: object) -> None:
    """Write the figures as JSON, with the command and the machine that they come from."""
    command = " ".join([Path(sys.executable).name, *sys.argv])
    figures = {"command": command, "machine": about, **more, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
