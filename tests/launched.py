"""Started by a launcher in every rank: trains several recipes in turn, as train.py would, since a launch costs more than a small run.

    torchrun --nproc_per_node 2 tests/launched.py RUNS.json [--local_rank N]

RUNS.json: [{"argv": [...], "stop_at": step or null}]; a run is interrupted behind the checkpoint of the step that it stops at.
"""

import faulthandler
import gc
import json
import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TOO_LONG_S = 1800       # a rank that waits for ever says where


def main(file: str) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    import train
    from training.callbacks import MarkComplete

    torch.set_num_threads(1)
    saved, given = MarkComplete.on_save, os.environ.get("ACCELERATE_USE_DEEPSPEED")
    gc.freeze()     # trainers collect garbage, which takes long where it goes through all that was imported
    for run in json.loads(Path(file).read_text(encoding="utf-8")):
        if given is None:       # what the run before set would be taken for the launcher's word
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        faulthandler.dump_traceback_later(TOO_LONG_S, exit=True)

        def stop(self, args, state, control, run=run, **kwargs):
            saved(self, args, state, control, **kwargs)
            if state.global_step == run["stop_at"]:
                raise KeyboardInterrupt

        with mock.patch.object(MarkComplete, "on_save", stop):
            try:
                train.main(run["argv"])
            except SystemExit as end:
                if run["stop_at"] is None or end.code != 130:
                    raise SystemExit(f"{run['argv']}: {end.code}") from end


if __name__ == "__main__":
    main(sys.argv[1])
