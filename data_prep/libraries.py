"""How other libraries behave: to be settled before they are imported, so nothing heavy is imported here."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console


def quiet() -> None:
    """No warnings of libraries about each other, which a user can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in ("transformers.trainer", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)


def offline_if_local(model: str) -> None:
    """A local folder needs no hub, and PEFT asking the hub for files that the folder lacks costs half a minute of retries."""
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def console(**options) -> Console:
    """Where tables are printed. A pipe or a file gets them 150 columns wide, where rich would cut them at 80."""
    return Console(width=None if Console().is_terminal else 150, **options)


@contextmanager
def one_sentence(*errors: type[Exception]) -> Iterator[None]:
    """A command's way to fail: one sentence on stderr and a non-zero exit for `errors` and for what the system refuses; when it
    is interrupted, that the same command continues."""
    try:
        yield
    except errors as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
