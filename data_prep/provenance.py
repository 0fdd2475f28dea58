"""Where a file, a run or a result comes from: commit, packages, content hashes, and JSON that is written whole or not at all."""

import hashlib
import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes", "tokenizers", "pillow",
            "numpy")
_SAMPLE = 2**20     # bytes of each large file that enter a folder's fingerprint


def git_state() -> dict[str, Any]:
    """Commit, and whether tracked files differ from it; nulls outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit, changes = (subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
                           for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def parents() -> dict[str, Any]:
    """What every result records about the code that made it."""
    return {**git_state(), "packages": {name: version(name) for name in PACKAGES}, "python": platform.python_version()}


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 over name, size and first and last MiB of each weight and configuration file of a model or adapter folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".json"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            if size > 2 * _SAMPLE:
                file.seek(-_SAMPLE, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """All or nothing: a killed process leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def place(name: str) -> str:
    """A path without the machine it is on; hub ids and relative paths as they are."""
    path = Path(name)
    if not path.is_absolute():
        return name
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def non_commercial(licence: str) -> bool:
    """Whether the name of a licence says that commercial use is not allowed."""
    return "NC" in re.split("[^A-Z]+", licence.upper()) or re.search("non-?commercial", licence, re.IGNORECASE) is not None
