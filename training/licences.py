"""The licences of the data that a run was trained on, and what they mean for the model's own.

Rows are counted in the data files themselves, and only in those that are still what the run was trained on. Where training went
on from an adapter of an earlier run, that run's data count too.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from data_prep.problem import ProblemError
from data_prep.provenance import file_sha256, non_commercial, place, weights_fingerprint
from data_prep.read import json_lines, parse_json
from training.config import Recipe
from training.strict import build, find_beside, read_yaml

UNNAMED = "unknown"         # of data whose authors name no licence, and the hub's word for a licence that is not known


class ExportError(ValueError):
    """A run that cannot be exported as asked; the message is one sentence."""


@dataclass(frozen=True)
class Source:
    """A data file that a run was trained on."""
    name: str                                               # in the mixture
    file: str
    licences: Counter[str] = field(default_factory=Counter)     # rows under each
    datasets: frozenset[str] = frozenset()                  # what the rows name as their source
    unread: str = ""                                        # why the licences are not known, where they are not


def read_run(run: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and run.json of a run folder. ExportError, RecipeError: it is none, or they cannot be read."""
    for name in ("recipe.yaml", "run.json"):
        if not (run / name).is_file():
            raise ExportError(f"{run}: holds no {name}; a run folder of train.py is needed")
    try:
        info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{run / 'run.json'}: cannot be read: {error}") from error
    return build(Recipe, read_yaml(run / "recipe.yaml"), run / "recipe.yaml"), info


def sources_of(recipe: Recipe, recorded: Mapping[str, str]) -> list[Source]:
    """The files that all stages were trained on, with the licences of their rows, and those of the adapter it began with.

    recorded: SHA-256 of each file when the run began, under the names that run.json has. A file that is gone or has changed
    since says nothing about what was trained on, and is not read.
    """
    found: dict[tuple[str, str], Source] = {}
    for number in range(max(1, len(recipe.stages))):
        mixture = Path(recipe.stage_mixture(number))
        if why := _unlike(mixture, recorded.get(str(mixture))):
            found["", str(mixture)] = Source("all", str(mixture), unread=why)
            continue
        for name, source in read_yaml(mixture)["sources"].items():
            file = source.get("problems") or source["pairs"]
            path = find_beside(file, mixture.resolve().parent)
            why = _unlike(path, recorded.get(file))
            found[name, file] = Source(name, file, unread=why) if why else Source(name, file, *_licences(path))
    return [*found.values(), *(_of_adapter(recipe.model.adapter, recorded) if recipe.model.adapter else [])]


def _of_adapter(name: str, recorded: Mapping[str, str]) -> list[Source]:
    """The files that an adapter was trained on, found by the run folder around it."""
    folder = Path(name)
    if not folder.is_dir():
        why = "the adapter is not here"
    elif weights_fingerprint(folder) != recorded.get(name):
        why = "the adapter has changed since the training"
    else:
        run = next((one for one in (folder.parent, folder.parent.parent) if (one / "run.json").is_file()), None)
        if run is not None:
            before, info = read_run(run)
            return [replace(source, name=f"{source.name} (before, in {before.name})")
                    for source in sources_of(before, info.get("data", {}))]
        why = "the adapter's run folder is not here"
    return [Source("all (before)", name, unread=why)]


def _unlike(path: Path | None, recorded: str | None) -> str:
    """Why a file is not the one that was trained on; empty when it is."""
    if path is None or not path.is_file():
        return "the file is not here"
    return "" if file_sha256(path) == recorded else "the file has changed since the training"


def _licences(path: Path) -> tuple[Counter[str], frozenset[str]]:
    """Rows under each licence, and the data sets they name. Training has checked the rows; bad ones it left out, too."""
    licences, datasets = Counter(), set()
    for _, line in json_lines(path):
        try:
            row = parse_json(line)
            licences[str(row["license"])] += 1
            datasets.add(str(row["source"]))
        except (ProblemError, KeyError, TypeError):
            continue
    return licences, frozenset(datasets)


def licence_warnings(sources: Iterable[Source]) -> list[str]:
    """Sentences on what the data's licences forbid or leave open."""
    sources = list(sources)
    found = [f"For non-commercial use only: {count} rows of {source.name} are under {name}." for source in sources
             for name, count in sorted(source.licences.items()) if non_commercial(name)]
    found += [f"The authors of {source.name} name no licence for {source.licences[UNNAMED]} rows; ask them what is allowed."
              for source in sources if source.licences[UNNAMED]]
    return found + [f"The licences of {place(source.file)} are not known: {source.unread}."
                    for source in sources if source.unread]


def licence_metadata(base: ModelCardData | None, sources: Iterable[Source]) -> dict[str, str]:
    """The card's license, license_name and license_link: the data's where these are non-commercial, else the base's; `unknown`
    where the data's are not known; nothing where only the base's is not."""
    sources = list(sources)
    own = {key: value for key in ("license", "license_name", "license_link") if (value := getattr(base, key, None))}
    if "license_name" in own:
        own.setdefault("license", "other")
    strict = {_slug(name) for source in sources for name in source.licences if non_commercial(name)}
    if not strict:
        return {"license": UNNAMED} if any(source.unread or source.licences[UNNAMED] for source in sources) else own
    name = own.get("license_name") or str(own.get("license", ""))
    if own.get("license") == "other" or non_commercial(name):
        strict.add(_slug(name))
    names = sorted(strict)
    if len(names) == 1 and re.fullmatch(r"cc-by-nc(-nd|-sa)?-\d\.\d", names[0]):
        return {"license": names[0]}
    return {"license": "other", "license_name": "-and-".join(names)}


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")
