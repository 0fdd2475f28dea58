"""The memory that `train.py --dry-run` estimates against the peak that training measures.

    python -m benchmarks.memory RECIPE [key=value ...] --out results/memory/3b_cpu.json

Both are run by the command a person would type, one after the other. A run in `run_dir` that is finished is not run again.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.provenance import write_json
from training.config import RecipeError, load_recipe

ESTIMATED = re.compile(r"memory of one device, estimated\s*\S\s*([0-9.]+) GB")


def estimated_gb(shown: str) -> float:
    """The estimate in what a dry run printed. ValueError when there is none."""
    found = ESTIMATED.search(shown)
    if found is None:
        raise ValueError("the dry run printed no estimate")
    return float(found[1])


def compare(run_dir: Path, estimate: float) -> dict:
    """The estimate in GB beside the largest peak of a finished run, with the run's parents."""
    info = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = max(row["peak_memory_gb"] for row in rows)
    parents = {key: info[key] for key in ("commit", "dirty", "packages", "python", "device", "threads")}
    return {"estimated_gb": estimate, "measured_gb": peak, "estimate_to_measured_ratio": round(estimate / peak, 4),
            "seconds": info["seconds"], "steps": info["steps"], "loss": [row["loss"] for row in rows], **parents}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_intermixed_args(argv)
    command = [sys.executable, "train.py", args.recipe, *args.overrides]
    try:
        run_dir = Path(load_recipe(args.recipe, args.overrides).run_dir)
        shown = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True).stdout
        subprocess.run([*command, "--resume"], check=True)
        estimate = estimated_gb(shown)
    except (RecipeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    except subprocess.CalledProcessError as error:
        raise SystemExit((error.stderr or "").strip() or f"error: {' '.join(command)} failed") from error
    found = compare(run_dir, estimate)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"recipe": args.recipe, "overrides": args.overrides, **found})
    print(f"{args.out}: estimated {estimate:.1f} GB, measured {found['measured_gb']:.1f} GB")


if __name__ == "__main__":
    main()
