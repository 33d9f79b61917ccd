"""The version of this code, for records of what it made."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import imagen_jax


@functools.cache
def code_version() -> str:
    """Returns the package's version; in a git checkout also the commit, and whether it is changed.

    For example "0.1.0+g15f0e04" or "0.1.0+g15f0e04.dirty".
    """
    root = Path(imagen_jax.__file__).parent.parent
    if not (root / ".git").exists():
        return imagen_jax.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=.dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return imagen_jax.__version__
    return f"{imagen_jax.__version__}+g{done.stdout.strip()}"
