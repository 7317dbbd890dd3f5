"""What a result file says of the machine it was measured on: processor, threads, versions. Shared by all benchmarks."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def processor(device: str = "cpu") -> str:
    """Name of the processor, or of the accelerator."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of `PACKAGES`, and of the packages named; "absent" where one is not installed."""
    found = {"python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, *packages)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def describe(*packages: str, device: str = "cpu") -> str:
    """A line for a result file."""
    import torch

    named = ", ".join(f"{k} {v}" for k, v in versions(*packages).items())
    return f"{processor(device)}, {torch.get_num_threads()} threads. Versions: {named}."
