"""Processes that train or evaluate until something happens to them: killed at a file, cut off in the middle of one, or out of room.

They come from a server process that has the libraries loaded and has computed nothing, so each begins in a moment.
"""

import fnmatch
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDED = ["train", "trl", "training.build", "training.callbacks", "training.collate", "training.model", "training.plan", "training.run",
          "eval.run", "tests.fakes", "transformers.integrations"]
WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


@dataclass(frozen=True)
class Fate:
    """What happens at the `nth` time that a file or folder of the run is about to be opened for writing, made, moved or removed.

    `kill`: kill -9. `cut`: from then on, a write beyond `size` bytes of any file ends the process there. `full`: from then on no file has
    room for more than `size` bytes; with a size of 0, this one has none, or, if it is a folder, the file `inside` has none.
    name: only files and folders whose name fits this pattern count.
    """
    end: str
    nth: int = 1
    name: str = ""
    size: int = 0
    inside: str = ""


def live(work: Callable[[], Any], log: Path, folder: Path, fate: Fate | None) -> None:
    """In the new process: `work`, with everything it says in `log`."""
    import torch

    torch.set_num_threads(1)            # as in the tests' own process, or sums would be rounded otherwise
    with log.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    if fate is not None:
        # Here and not when it comes, which may be in another thread than the main one. Python ignores the signal by itself.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fate.end == "cut" else signal.SIG_IGN)
        sys.addaudithook(watch(folder, fate))
    work()


def watch(folder: Path, fate: Fate) -> Callable[[str, tuple], None]:
    seen, inside = 0, str(folder)

    def hook(event: str, details: tuple) -> None:
        nonlocal seen
        if event not in WRITES or seen >= fate.nth:
            return
        path = os.fsdecode(details[0]) if isinstance(details[0], (str, bytes, os.PathLike)) else ""
        if event == "open" and not (set(details[1] or "") & set("wax+") or (details[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return
        if inside not in path or fate.name and not fnmatch.fnmatch(os.path.basename(path), fate.name):
            return
        seen += 1
        if seen == fate.nth:
            meet(fate, Path(path))

    return hook


def meet(fate: Fate, path: Path) -> None:
    if fate.end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fate.end == "cut" or fate.size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fate.size, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    elif fate.inside:
        path.mkdir(parents=True)
        (path / fate.inside).symlink_to("/dev/full")
    else:
        if path.exists():
            path.rename(path.with_name(path.name + ".kept"))
        path.symlink_to("/dev/full")


def make_room(folder: Path) -> None:
    """What `full` did is undone: the disk has room again."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and os.readlink(path) == "/dev/full":
            path.unlink()
            kept = path.with_name(path.name + ".kept")
            if kept.exists():
                kept.rename(path)


def begin(work: Callable[[], Any], log: Path, folder: Path, fate: Fate | None = None) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    process = context.Process(target=live, args=(work, log, folder, fate))
    process.start()
    return process


def end(process: multiprocessing.Process, limit_s: float = 180) -> int:
    """Its exit code; below 0: the signal that ended it."""
    process.join(limit_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"hangs: it was not done within {limit_s:g} s")
    return process.exitcode


class Training:
    """train.py with these words, to be pickled."""

    def __init__(self, *words: str | Path) -> None:
        self.words = [str(word) for word in words]

    def __call__(self) -> None:
        import train

        train.main(self.words)


class Evaluation:
    """eval.run with these words and a fake model that never looks."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def __call__(self) -> None:
        from data_prep.libraries import one_sentence
        from data_prep.problem import ProblemError
        from eval import run
        from eval.tasks import TaskError
        from tests.fakes import Fake, blind

        with one_sentence(ProblemError, TaskError):
            run.run(run.parse(self.words), lambda: Fake(blind))
