"""Export what a run has trained: an adapter as plain PEFT loads it, or a model of its own.

    python -m training.export runs/demo/no-text-seed0 --out runs/no-text-adapter
    python -m training.export runs/demo/no-text-seed0 --merge --out runs/no-text \\
        --summary results/demo/summary.json --run no-text --push-to-hub NAME/no-text

Without --merge the folder holds the adapter in PEFT's layout. With --merge it holds the base with the adapter in its weights:
PEFT merges module by module in float32, each is cast once to the base's own dtype, and one copy of the model is in memory. A
run that trained all weights (lora: null) is a model already, with --merge or without.

A model folder differs from its base in its weights alone. Tensors have the names of the base's files, which is checked: those
of the hub are `model.layers.` and `visual.`, while the modules are called `model.language_model.layers.` and `model.visual.`.
Configuration, tokenizer and processor are the base's files as they are. What transformers 5 would write in their stead
(`rope_parameters`, a list of `extra_special_tokens`) older versions and engines built on them cannot read.

An adapter's keys are `base_model.model.` and the names of modules, which PEFT needs and engines that load adapters unmerged
have to know. One that was trained on from another (model.adapter) is complete in itself, because the same weights were trained
further. LoRA by token type depends on what a token is, and further modules have no place in the base (extras.json, see
modeling.adapters): neither can be merged.

Everything is written to DIR.part first, which takes DIR's place at the end.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from yaml import YAMLError

from data_prep.libraries import one_sentence, quiet
from data_prep.problem import ProblemError
from data_prep.provenance import weights_fingerprint, write_json
from training.card import Exported, card_of, from_gap, from_summary
from training.config import Model, Recipe
from training.licences import ExportError, licence_warnings, read_run, sources_of
from training.merge import INDEX, dtype_of, write_merged
from training.strict import RecipeError

TEXT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json")
CONFIG = ("config.json", "generation_config.json")
LICENCE = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", ("adapter_model.safetensors", "extras.json", "mender.safetensors")


def export(run: Path, out: Path, *, merge: bool = False, checkpoint: int | None = None, results: Path | None = None,
           summary: tuple[Path, str] | None = None, base_name: str | None = None, place: str | None = None,
           force: bool = False) -> list[str]:
    """Write `out`; returns what the data's licences forbid or leave open, in sentences.

    Args:
        run: folder of a training.
        checkpoint: number of a whole checkpoint to export instead of the end of training.
        results: a gap.json of eval.gap; summary: a summary.json of results and the run's name there. For the card.
        base_name: what card and adapter call the base where the recipe names a local folder.
        place: what the card calls the exported folder; its name by default.
        force: replace an earlier export.

    Raises:
        ExportError, RecipeError: the run is not finished, damaged, cannot be merged, or was not what was measured.
    """
    recipe, info = read_run(run)
    source, step = _trained(run, recipe, info, checkpoint)
    extras = _extras(source) if recipe.lora else {}
    merge = merge and recipe.lora is not None
    if merge and extras:
        raise ExportError(f"{source}: cannot be merged: {_unmergeable(extras)}; without --merge the adapter is copied")
    fingerprint = weights_fingerprint(source)

    def is_this(measured: Mapping[str, Any]) -> bool:
        """Whether the weights were evaluated in the run's folder, or in an earlier export to the same place."""
        where = Path(measured.get("adapter") or measured["model"]).resolve()
        known = measured.get("adapter_sha256") if recipe.lora else measured.get("model_sha256")
        return where == out.resolve() or (known == fingerprint if known else where == source.resolve() and not recipe.lora)

    tables = from_gap(results, is_this) if results else from_summary(*summary, recipe.name, is_this) if summary else []
    sources = sources_of(recipe, info.get("data", {}))
    _check_out(out, [run, source, Path(recipe.model.name)], force)
    base = base_folder(recipe.model, weights=merge)
    kind = "merged" if merge else "adapter" if recipe.lora else "model"
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        name = base_name or recipe.model.name
        config = {}
        if merge:
            write_merged(base, source, part)
        elif recipe.lora:
            config = copy_adapter(source, part, name, recipe.model.revision)
        else:
            for file in [*source.glob("model*.safetensors"), *source.glob(INDEX)]:
                shutil.copyfile(file, part / file.name)
        files = TEXT + LICENCE + (() if kind == "adapter" else CONFIG)
        copy_base_files(base, part, files, recipe.model)
        dtype = dtype_of(part)
        if kind == "model":
            _set_dtype(part / "config.json", dtype)
        card = card_of(Exported(recipe, info, name, _base_card(base), kind, step, dtype, place or out.name, sources, tables,
                                config, extras))
        card.save(part / "README.md")
        _replace(out, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return licence_warnings(sources)


# -- what is read ----------------------------------------------------------------------------------


def _trained(run: Path, recipe: Recipe, info: Mapping[str, Any], checkpoint: int | None) -> tuple[Path, int]:
    """The folder of the weights, and the optimizer steps behind them."""
    if checkpoint is None and info.get("finished"):
        source, step = run / ("adapter" if recipe.lora else "model"), recipe.steps
    else:
        from training.callbacks import COMPLETE     # here, because the libraries behind it take seconds

        marks = (run / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")
        whole = sorted(int(mark.parent.name.rpartition("-")[2]) for mark in marks)
        there = f"whole checkpoints: {', '.join(map(str, whole)) or 'none'}"
        if checkpoint is None:
            words = [word for word in info.get("command", ["train.py", "RECIPE"]) if word != "--resume"]
            raise ExportError(f"{run}: is not finished; continue it with python {shlex.join([*words, '--resume'])}, or export "
                              f"a checkpoint with --checkpoint N ({there})")
        if checkpoint not in whole:
            raise ExportError(f"{run}: has no whole checkpoint {checkpoint}; {there}")
        source, step = run / "checkpoints" / f"checkpoint-{checkpoint}", checkpoint
    wanted = [ADAPTER_CONFIG, ADAPTER[0]] if recipe.lora else ["model*.safetensors"]
    for name in wanted:
        if not any(source.glob(name)):
            raise ExportError(f"{source / name}: is missing")
    return source, step


def _extras(source: Path) -> dict[str, Any]:
    """What extras.json says is needed beyond PEFT."""
    from modeling.adapters import read_extras

    try:
        return {key: value for key, value in read_extras(source).items() if value or key == "mender"}
    except ValueError as error:
        raise ExportError(str(error)) from error


def _unmergeable(extras: Mapping[str, Any]) -> str:
    reasons = {"token_lora": "its language tower is adapted by token type, with other weights for image tokens than for text",
               "mender": "it adds modules to the model, which have no place in the base's weights"}
    return " and ".join(reasons[key] for key in extras)


def base_folder(model: Model, *, weights: bool) -> Path:
    """The base's own folder, or a copy of a hub model's: its small files, and its weights where they are needed."""
    if Path(model.name).is_dir():
        return Path(model.name)
    wanted = [*TEXT, *CONFIG, *LICENCE, "README.md", *(["*.safetensors", INDEX] if weights else [])]
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ExportError(f"model.name: {model.name}: {' '.join(str(error).split())}") from error


def _base_card(base: Path) -> ModelCardData | None:
    """The metadata of the base's own card, where it has one."""
    path = base / "README.md"
    if not path.is_file() or not (text := path.read_text(encoding="utf-8-sig")).startswith("---"):
        return None
    try:
        return ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, TypeError, YAMLError):      # whatever others wrote there; the card says that it could not be read
        return None


# -- what is written -------------------------------------------------------------------------------


def copy_adapter(source: Path, out: Path, base: str, revision: str | None) -> dict[str, Any]:
    """PEFT's files and what stands beside them (extras.json), with the base's name; returns the adapter's configuration."""
    for name in ADAPTER:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    config = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": revision}
    write_json(out / ADAPTER_CONFIG, config)
    return config


def copy_base_files(base: Path, out: Path, names: Sequence[str], model: Model) -> None:
    """The base's own files, as they are but for the bounds on pictures that the recipe gives.

    Raises:
        ExportError: the bounds would not be read as the recipe has them.
    """
    for name in names:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    bounds = {key: value for key in ("min_pixels", "max_pixels") if (value := getattr(model, key))}
    if not bounds:
        return
    from data_prep.encode import Encoder
    from training.collate import load_encoder

    path, wanted = out / "preprocessor_config.json", load_encoder(model).pixel_bounds
    if not path.is_file():
        raise ExportError(f"{base}: has no {path.name} to keep the recipe's {' and '.join(bounds)} in")
    low, high = wanted["min"], wanted["max"]
    size = {"min_pixels": low, "max_pixels": high, "size": {"shortest_edge": low, "longest_edge": high}}
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | size)
    if (found := Encoder(out).pixel_bounds) != wanted:
        raise ExportError(f"{path}: bounds on pictures are read as {found}, not as the recipe's {wanted}")


def _set_dtype(path: Path, dtype: str) -> None:
    """Let a configuration name the dtype of its weights, under the names it uses for it."""
    def changed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: dtype if key in ("dtype", "torch_dtype") else changed(one) for key, one in value.items()}

    write_json(path, changed(json.loads(path.read_text(encoding="utf-8"))))


def _check_out(out: Path, used: Sequence[Path], force: bool) -> None:
    """ExportError where the folder may not be written: it is there, is no export, or holds what is being exported."""
    here = out.resolve()
    for path in used:
        if here == path.resolve() or here in path.resolve().parents:
            raise ExportError(f"--out {out}: holds {path}, which is exported or needed for it")
    if not out.exists():
        return
    if not force:
        raise ExportError(f"--out {out}: exists already; --force replaces it")
    if not out.is_dir() or any(out.iterdir()) and not any((out / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        raise ExportError(f"--out {out}: is no exported folder, and is not replaced")


def _replace(out: Path, part: Path) -> None:
    old = out.with_name(out.name + ".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def push(folder: Path, repo: str, *, public: bool) -> None:
    """Upload a folder. ExportError: the hub refuses it, or the repository is public and `public` was not asked for."""
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise ExportError(f"--push-to-hub {repo}: is public already; --public uploads to it")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Export of {folder.name}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"--push-to-hub {repo}: {' '.join(str(error).split())[:500]}") from error


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--merge", action="store_true", help="a model with the adapter in its weights")
    parser.add_argument("--checkpoint", type=int, metavar="N", help="export this checkpoint and not the end of training")
    parser.add_argument("--results", type=Path, metavar="GAP.json", help="of eval.gap, for the card")
    parser.add_argument("--summary", type=Path, metavar="SUMMARY.json", help="of committed results, for the card; needs --run")
    parser.add_argument("--run", metavar="NAME", help="of the run in --summary")
    parser.add_argument("--base-name", metavar="ID", help="hub id of the base, where the recipe names a local folder")
    parser.add_argument("--force", action="store_true", help="replace DIR where it holds an earlier export")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload DIR; private unless --public")
    parser.add_argument("--public", action="store_true")
    args = parser.parse_args(argv)
    if (args.summary is None) != (args.run is None):
        parser.error("--summary and --run go together")
    if args.summary and args.results:
        parser.error("--results and --summary: one of them")
    if args.public and not args.push_to_hub:
        parser.error("--public: goes with --push-to-hub")
    for option in ("push_to_hub", "base_name"):
        try:
            validate_repo_id(getattr(args, option) or "name")
        except HFValidationError as error:
            parser.error(f"--{option.replace('_', '-')}: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quiet()
    with one_sentence(ExportError, RecipeError, ProblemError):
        summary = (args.summary, args.run) if args.summary else None
        warnings = export(args.folder, args.out, merge=args.merge, checkpoint=args.checkpoint, results=args.results,
                          summary=summary, base_name=args.base_name, place=args.push_to_hub, force=args.force)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"{args.out} is written")
        if args.push_to_hub:
            push(args.out, args.push_to_hub, public=args.public)
            print(f"{args.push_to_hub} is uploaded")


if __name__ == "__main__":
    main()
