"""Strict YAML: read, merged, overridden by key=value and built into frozen dataclasses.

A mistake is one sentence that names the place and the key, and suggests the nearest name.
"""

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_prep.images import one_line

LARGEST = 100_000       # values in a file
STRICT = ConfigDict(extra="forbid", strict=True)       # of the dataclasses: no unknown key, no value of another type


class RecipeError(ValueError):
    """A recipe or mixture that cannot be used; the message names file and key. A line for each mistake."""

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(map(one_line, message.split("\n"))))


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as everybody expects, and a repeated key is an error."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key, _ in node.value:
        name = loader.construct_object(key, deep=True)
        if not isinstance(name, (str, int, float)):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
        seen.add(name)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = _Loader) -> dict[str, Any]:
    """A YAML file that holds a mapping. RecipeError names file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    try:
        values = _load(text, loader)
    except ValueError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a mapping of keys to values is needed")
    return values


def _load(text: str, loader: type[yaml.SafeLoader]) -> Any:
    """ValueError: the text is no YAML, or a few lines of it stand for more than a file of settings can hold."""
    try:
        values = yaml.load(text, loader)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:     # a tag or a date that its value does not fit
        raise ValueError(str(error)) from error
    left, waiting = LARGEST, [values]       # references (*name) may repeat a list in itself, or ten times in ten others
    while waiting:
        left -= 1
        if left < 0:
            raise ValueError(f"holds more than {LARGEST} values")
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    return values


def build(kind: type, values: dict[str, Any], where: str | Path, layers: Iterable[tuple[str | Path, dict]] = ()) -> Any:
    """Values to a dataclass. RecipeError says which key is wrong and suggests the nearest name.

    layers: (place, values) of what `values` was merged from, the lowest first: a mistake is reported at the place it was made.
    """
    try:
        # As JSON, because strict validation of Python objects would ask for instances of the nested dataclasses.
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = _path(problem, values)
            places = [place for place, layer in layers if _holds(layer, path)]
            lines.append(_explain(kind, problem, path, places[-1] if places and path else where))
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def _path(problem: dict, values: Any) -> list[str | int]:
    """The keys that lead to a mistake, without the names of a union's branches, which stand among them."""
    path, parts = [], list(problem["loc"])
    # The last of these is a key itself: one that is not there, or one that may be a number or nothing in YAML and is text here.
    is_key = problem["type"] in ("missing", "missing_argument", "unexpected_keyword_argument", "extra_forbidden")
    for part in parts[:-1] if is_key else parts:
        if isinstance(values, dict) and part in values or isinstance(values, list) and part in range(len(values)):
            path.append(part)
            values = values[part]
    return [*path, parts[-1]] if is_key else path


def _holds(values: Any, path: Iterable[str | int]) -> bool:
    for part in path:
        if not isinstance(values, dict):
            return True                         # the mistake is above the end of the path
        part = part if part in values else str(part)    # an override names an entry of a list as text: stages.1.share
        if part not in values:
            return False
        values = values[part]
    return True


def _explain(kind: type, problem: dict, path: list[str | int], where: str | Path) -> str:
    key = one_line(".".join(map(str, path)), 100) or "recipe"
    if problem["type"] == "json_invalid":       # the values have no JSON that is valid: half of a surrogate pair, hundreds of levels
        return f"{where}: cannot be read: {problem['msg']}"
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = get_close_matches(str(path[-1]), _field_names(kind, problem["loc"][:-1]), n=1, cutoff=0.5)
        return f"{where}: {key}: no such key" + (f"; did you mean '{near[0]}'?" if near else "")
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where}: {key}: is missing"
    if problem["type"] == "union_tag_not_found":
        return f"{where}: {key}.{problem['ctx']['discriminator'].strip(chr(39))}: is missing"
    if problem["type"] == "union_tag_invalid":
        tags = problem["ctx"]["expected_tags"].replace("'", "").split(", ")
        near = get_close_matches(problem["ctx"]["tag"], tags, n=1, cutoff=0.5)
        return (f"{where}: {key}.{problem['ctx']['discriminator'].strip(chr(39))}: no such {_shown(problem['ctx']['tag'])}; there are "
                f"{', '.join(tags)}" + (f"; did you mean '{near[0]}'?" if near else ""))
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f", not {_shown(problem['input'])}"
    return f"{where}: {key}: {message[0].lower() + message[1:]}{given}"


def _shown(value: Any) -> str:
    """A value in a message."""
    return one_line(repr(value), 100)


def _field_names(kind: Any, path: Iterable[str | int]) -> list[str]:
    """Names of the fields of the dataclass that `path` leads to."""
    kinds = [kind]
    for part in path:
        holders = [one for one in kinds if part in one.__dataclass_fields__]
        if holders:
            kinds = _dataclasses(holders[-1].__dataclass_fields__[part].type)
        elif isinstance(part, str):         # the tag of a union's branch; numbers are places in a list
            kinds = [one for one in kinds if part in get_args(getattr(one.__dataclass_fields__.get("method"), "type", None))] or kinds
    return [name for one in kinds for name in one.__dataclass_fields__]


def _dataclasses(kind: Any) -> list[type]:
    """The dataclasses in a type: itself, or inside unions, lists and annotations."""
    if hasattr(kind, "__dataclass_fields__"):
        return [kind]
    return [one for argument in get_args(kind) for one in _dataclasses(argument)]


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=1e-4` to (["a", "b"], 0.0001); values are read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise RecipeError(f"override {_shown(text)}: key=value is needed, such as optim.lr.vision=1e-4")
    try:
        return key.split("."), _load(value, _Loader) if value else None
    except ValueError:
        raise RecipeError(f"override {_shown(text)}: {_shown(value)} is not a value") from None


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change`; mappings are merged, everything else replaced.

    A list against a mapping of numbers (`stages.1.share=0.5`) keeps its other entries. RecipeError: no such entry.
    """
    merged = dict(base)
    for key, value in change.items():
        if isinstance(merged.get(key), list) and isinstance(value, dict) and all(re.fullmatch(r"\d{1,9}", str(one)) for one in value):
            entries = {str(number): entry for number, entry in enumerate(merged[key])}
            if unknown := [number for number in value if str(number) not in entries]:
                raise RecipeError(f"{key}: the list that this changes has no entry {unknown[0]}")
            merged[key] = list(merge(entries, {str(number): entry for number, entry in value.items()}).values())
            continue
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def find_beside(name: str, folder: Path) -> Path | None:
    """`name` in `folder` or the nearest of its parents up to the one called `recipes`; else relative to the working folder."""
    for place in (folder, *folder.parents):
        if is_file(place / name):
            return place / name
        if place.name == "recipes":
            break
    return Path(name) if is_file(Path(name)) else None


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:         # a name too long for a file
        return False
