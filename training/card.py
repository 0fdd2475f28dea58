"""The model card of an exported run: README.md, with the metadata that the hub reads.

It says what the weights are and how they are loaded, what was measured on them, which data they were trained on under which
licences, and where they come from.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from data_prep.provenance import place
from training.config import Recipe
from training.licences import ExportError, Source, licence_metadata, licence_warnings

DIFFERENCES = {"gap": "gap (both - vision)", "text_gap": "text gap (text - vision)",
               "image_gain": "image gain (vision - blind)"}


@dataclass(frozen=True)
class Exported:
    """What a card is about."""
    recipe: Recipe
    run: Mapping[str, Any]                                  # run.json
    base: str                                               # name of the base model
    base_card: ModelCardData | None                         # of the base model, where it has one
    kind: str                                               # adapter, merged, or model: all weights were trained
    step: int                                               # optimizer steps that were made
    dtype: str                                              # of the weights in the folder
    place: str                                              # hub id or name of the folder
    sources: list[Source]
    measured: list[str]                                     # lines of Markdown; empty: nothing
    adapter: Mapping[str, Any] = field(default_factory=dict)    # adapter_config.json
    extras: Mapping[str, Any] = field(default_factory=dict)     # extras.json


def card_of(one: Exported) -> ModelCard:
    """The card; `str()` of it is README.md."""
    recipe, adapter = one.recipe, one.kind == "adapter"
    tags = ["evensight", "qwen2_5_vl", "dpo" if recipe.preference else "sft", "lora" if recipe.lora else None,
            recipe.active_balance.method if recipe.active_balance else None]
    data = ModelCardData(
        base_model=one.base if _is_hub_id(one.base) else None, base_model_relation="adapter" if adapter else "finetune",
        library_name="peft" if adapter else "transformers", pipeline_tag="image-text-to-text",
        datasets=sorted({name for source in one.sources for name in source.datasets if _is_hub_id(name)}) or None,
        tags=[tag for tag in tags if tag], **licence_metadata(one.base_card, one.sources))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_text(one)) + "\n")


def _is_hub_id(name: str) -> bool:
    """Whether the hub would take it for a repository. A relative folder of two words has the same form."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _text(one: Exported) -> Iterator[str]:
    base, recipe = f"`{place(one.base)}`", one.recipe
    what = {"adapter": f"LoRA adapter for {base}", "merged": f"{base} with a LoRA adapter merged into it",
            "model": f"{base}, fine-tuned"}
    yield f"# {recipe.name}"
    yield from ("", f"{what[one.kind]}, trained by the recipe `{recipe.name}` of EvenSight: {one.step} of {recipe.steps} "
                    f"optimizer steps of {recipe.batch} {'pairs' if recipe.preference else 'conversations'}, "
                    f"seed {recipe.seed}.")
    for warning in licence_warnings(one.sources):
        yield from ("", f"> **{warning}**")
    yield from ("", "## Use", "", "```python", *_use(one), "```", "", *_notes(one))
    yield from ("", "## What was measured", "")
    yield from one.measured or ["Nothing was measured on this model."]
    if one.measured and one.kind == "merged" and one.dtype != "float32":
        yield from ("", f"Measured with the adapter beside the base. Merged weights are rounded to {one.dtype}, and answers "
                        "may differ where two options are nearly equal.")
    yield from ("", "## Data", "", *_data(one))
    yield from ("", "## Recipe", "", "```yaml", yaml.safe_dump(places(one.recipe.to_dict()), sort_keys=False).rstrip(), "```")
    yield from _changes(one.run.get("changed", []))
    yield from ("", "## Where it comes from", "", *_parents(one.run))


def _use(one: Exported) -> list[str]:
    bounds = "".join(f", {key}={value}" for key in ("min_pixels", "max_pixels") if (value := getattr(one.recipe.model, key)))
    if one.extras:
        return ["from data_prep.answerer import Answerer        # of EvenSight", "",
                f'answerer = Answerer("{place(one.base)}", "{one.place}"{bounds})']
    load = 'AutoModelForImageTextToText.from_pretrained("{}", dtype="auto")'
    imports = "from transformers import AutoModelForImageTextToText, AutoProcessor"
    if one.kind == "adapter":
        return ["from peft import PeftModel", imports, "", f"base = {load.format(place(one.base))}",
                f'model = PeftModel.from_pretrained(base, "{one.place}")',
                f'processor = AutoProcessor.from_pretrained("{place(one.base)}"{bounds})']
    return [imports, "", f"model = {load.format(one.place)}", f'processor = AutoProcessor.from_pretrained("{one.place}")']


def _notes(one: Exported) -> Iterator[str]:
    if one.kind == "merged":
        yield (f"- Merged in float32, module by module, and cast once to the base's {one.dtype}. Names, shapes and types of "
               "the tensors are those of the base's own files.")
    if one.kind != "adapter":
        bounds = one.recipe.model.min_pixels or one.recipe.model.max_pixels
        yield ("- Configuration, tokenizer and processor files are the base's own, so that whatever serves the base serves "
               "this model" + ("; only the bounds on a picture's size in `preprocessor_config.json` are those of the training."
                               if bounds else "."))
        return
    yield ("- Keys of the adapter are `base_model.model.` and the names of modules in transformers since 4.52, such as "
           "`model.language_model.layers.0.self_attn.q_proj` and `model.visual.blocks.0.attn.qkv`, not the names in the base's "
           "files. On older versions PEFT finds none of these modules.")
    yield ("- Engines that serve adapters unmerged have to know these names; some leave out what is adapted in the vision "
           "tower and the merger, or read one rank and one alpha for all modules."
           + ("" if one.extras else " The same run exported with `--merge` has nothing that could be left out."))
    if len(scales := _scales(one.adapter)) > 1:
        yield (f"- Its towers have different scales (alpha / rank: {', '.join(f'{scale:g}' for scale in scales)}), given in "
               "`rank_pattern` and `alpha_pattern`: an engine that does not read these computes something else.")
    if one.extras:
        parts = [words for key, words in (("token_lora", "LoRA by token type, with weights of its own for image tokens"),
                                          ("mender", "further modules in `mender.safetensors`")) if one.extras.get(key)]
        yield (f"- **Plain PEFT is not enough**: `extras.json` names {' and '.join(parts)}, which PEFT would leave out. "
               "It cannot be merged either.")
    if one.recipe.model.adapter:
        yield (f"- Complete in itself: training went on with the weights of `{place(one.recipe.model.adapter)}`, which are "
               "part of this adapter. It is loaded on the base alone.")


def _scales(config: Mapping[str, Any]) -> list[float]:
    """alpha / rank of each tower."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r, alpha = config.get("r", 1), config.get("lora_alpha", 1)
    return sorted({alphas.get(key, alpha) / ranks.get(key, r) for key in {*ranks, *alphas}} or {alpha / r})


def _data(one: Exported) -> Iterator[str]:
    rows = [(source.name, f"`{place(source.file)}`", name, str(count) if count else "-") for source in one.sources
            for name, count in sorted(source.licences.items()) or [(f"not known: {source.unread}", 0)]]
    yield from table(("source", "file", "licence", "rows"), rows)
    yield from ("", "Rows are those of the files; a mixture's filters may leave some of them out.")
    if one.base_card is None or not (named := one.base_card.license_name or one.base_card.license):
        yield from ("", "The base model has a licence of its own, which could not be read here and holds for this model too.")
    else:
        yield from ("", f"The base model's own licence, {named}, holds for this model too.")


def _changes(changed: list[Mapping[str, Any]]) -> Iterator[str]:
    """Of a run that was continued with another recipe or other data."""
    for one in changed:
        said = [f"`{key}` from `{cell(places(each['old']))}` to `{cell(places(each['new']))}`" for key, each in one["recipe"].items()]
        for name, each in one["data"].items():
            was, now = (f"SHA-256 `{each[when]}`" if each[when] else "none" for when in ("old", "new"))
            said.append(f"`{place(name)}` from {was} to {now}")
        yield from ("", f"Changed after step {one['step']}: {'; '.join(said)}.")
    if any(one["data"] for one in changed):
        yield from ("", "The data above are those of the last part. What was trained on before has licences too, and they hold for this "
                        "model.")


def _parents(run: Mapping[str, Any]) -> Iterator[str]:
    commit = run.get("commit")
    yield f"- commit: {f'`{commit}`' if commit else 'not known'}" + (", with uncommitted changes" if run.get("dirty") else "")
    yield f"- device: {run.get('device')}, Python {run.get('python')}"
    yield "- packages: " + ", ".join(f"{name} {version}" for name, version in sorted(run.get("packages", {}).items()))
    hashes = [(f"`{place(name)}`", f"`{digest}`") for name, digest in sorted(run.get("data", {}).items())]
    yield from ("", *table(("file", "SHA-256"), hashes))


# -- results ---------------------------------------------------------------------------------------


def from_gap(path: Path, is_this: Callable[[Mapping], bool]) -> list[str]:
    """What eval.gap wrote as lines of Markdown.

    Args:
        is_this: whether a run of that file (model, adapter, their fingerprints) is the model that the card is about.

    Raises:
        ExportError: it cannot be read, or was measured on other models.
    """
    with _reading(path, "eval.gap"):
        result = json.loads(path.read_text(encoding="utf-8"))
        before, after = result["before"]["name"], result["after"]["name"]
        runs = result["after"]["runs"]
        if not any(map(is_this, runs)):
            where = ", ".join(place(str(run.get("adapter") or run["model"])) for run in runs)
            raise ExportError(f"--results {path}: was measured on {where}, not on the weights that are exported")
        tables = [line for task, found in result["tasks"].items()
                  for line in _measured(task, (before, after), found["before"], found["after"], found["change"])]
        return [_seeds(len(runs), True), *tables]


def from_summary(path: Path, name: str, recipe: str, is_this: Callable[[Mapping], bool]) -> list[str]:
    """A run of a summary.json of results as lines of Markdown: against every run that it is compared with there.

    Args:
        name: of the run in that file.
        recipe: of the exported run; other trainings of it may stand for it, which is then said.
        is_this: see from_gap.

    Raises:
        ExportError: it cannot be read, has no such run, or that is one of another recipe.
    """
    with _reading(path, "eval.readme --collect"):
        summary = json.loads(path.read_text(encoding="utf-8"))
        runs = {run["name"]: run["seeds"] for run in summary["runs"]}
        if name not in runs:
            raise ExportError(f"--summary {path}: no run is called {name}; there are {', '.join(runs)}")
        here = any(map(is_this, runs[name]))
        if not here and {seed["recipe"] for seed in runs[name]} != {recipe}:
            raise ExportError(f"--summary {path}: {name} is neither the model that is exported nor one of its recipe, {recipe}")
        tables = []
        for task, found in summary["tasks"].items():
            for change in found["changes"]:
                if change["after"] == name:
                    sides = change["before"], name
                    tables += _measured(task, sides, *(found["runs"][side] for side in sides), change)
        if not tables:
            raise ExportError(f"--summary {path}: {name} is compared with no other run there")
        return [_seeds(len(runs[name]), here), *tables]


class _reading:
    """Turns what goes wrong with a file of another form into a sentence."""

    def __init__(self, path: Path, writer: str) -> None:
        self.path, self.writer = path, writer

    def __enter__(self) -> None:
        if not self.path.is_file():
            raise ExportError(f"{self.path}: no such file")

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError)):
            raise ExportError(f"{self.path}: is not what {self.writer} writes ({kind.__name__}: {error})") from error


def _seeds(count: int, here: bool) -> str:
    if not here:
        return (f"Measured on {count} training{'s' * (count > 1)} of this recipe, **not on these weights**. "
                "Points, with 95 % intervals paired by item and clustered by group.")
    several = f", means over {count} training seeds, of which this model is one" if count > 1 else ""
    return f"Points, with 95 % intervals paired by item and clustered by group{several}."


def _measured(task: str, names: tuple[str, str], before: Mapping, after: Mapping, change: Mapping) -> list[str]:
    rows = [(f"accuracy, {view}", within(before["views"].get(view)), within(one),
             within(change["views"].get(view), "change", True)) for view, one in after["views"].items()]
    rows += [(title, within(before.get(key), "gap", True), within(after.get(key), "gap", True),
              within(change.get(key), "change", True)) for key, title in DIFFERENCES.items() if key in after]
    notes = f"{after['n']} items in {after['n_groups']} groups, chance {points(after['chance'])}"
    if (verdict := change.get("verdict")) is not None:
        notes += f"; {verdict['word']} ({verdict['reason']})"
    first, second = names if names[0] != names[1] else (f"{names[0]} (before)", f"{names[1]} (after)")
    return ["", f"### {cell(task)}: from {cell(first)} to {cell(second)}", "", *table(("", first, second, "change"), rows),
            "", f"{cell(notes)}."]


def points(value: float | None, sign: bool = False) -> str:
    """0.123 -> "12.3", with its sign when asked; "-" when undefined."""
    return "-" if value is None or math.isnan(value) else f"{round(100 * value, 1) + 0.0:{'+' if sign else ''}.1f}"


def within(one: Mapping | None, key: str = "value", sign: bool = False) -> str:
    """A value with its interval in points: "12.3 [10.1, 14.2]"."""
    if one is None:
        return "-"
    interval = "" if one.get("low") is None else f" [{points(one['low'], sign)}, {points(one['high'], sign)}]"
    return points(one[key], sign) + interval


# -- words -----------------------------------------------------------------------------------------


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(map(cell, header)) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows]


def cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def places(value: Any) -> Any:
    """The same values with `place` for every text."""
    if isinstance(value, dict):
        return {key: places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [places(one) for one in value]
    return place(value) if isinstance(value, str) else value
