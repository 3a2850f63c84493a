"""Libraries that change what the system tells a program, compiled for LD_PRELOAD."""

from __future__ import annotations

import subprocess
from pathlib import Path


def build_library(name: str, folder: Path) -> Path:
    """Compiles `<name>.c` of this folder; needs a C compiler, as the program itself does."""
    library = folder / f"{name}.so"
    source = Path(__file__).with_name(f"{name}.c")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, source], check=True)
    return library
