"""What a benchmark ran on, for the heads of tables."""

import platform
from pathlib import Path


def processor() -> str:
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return models[0] if models else platform.processor()


def slug(name: str) -> str:
    """Part of a file name: `NVIDIA H100 80GB HBM3` becomes `nvidia-h100-80gb-hbm3`."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())
