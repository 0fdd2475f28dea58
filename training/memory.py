"""Memory of this process: the GPU's where there is one, else what is resident."""

import re
from pathlib import Path

import torch

GB = 2**30
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak_memory() -> None:
    """Let the peak begin anew: what loading needed is no part of training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        CLEAR.write_text("5")       # Linux: resets VmHWM to what is resident now
    except OSError:
        pass


def peak_memory_gb() -> float | None:
    """Largest allocation on the GPU, or largest resident set of the process, since `forget_peak_memory`; None where not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GB
    return _status_gb("VmHWM")


def resident_gb() -> float:
    """What the process has resident now; 0 where that is not known."""
    return _status_gb("VmRSS") or 0.0


def _status_gb(name: str) -> float | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 / GB if found else None
