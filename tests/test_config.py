"""Recipes: what is accepted, and that every refusal names the file and the key."""

from pathlib import Path

import pytest
import yaml

from training.config import RecipeError, load_recipe
from training.strict import find_beside, merge, parse_override, read_yaml

GOOD = """\
name: demo
model: {name: some/model, dtype: float32}
data: {mixture: mix.yaml}
optim:
  lr: {vision: 1e-4, merger: 2e-4, language: 5.0e-5}
steps: 10
batch: 8
micro_batch: 4
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe (the good one with lines replaced or added) and its mixture; returns the path."""
    (tmp_path / "mix.yaml").write_text("sources: {}\n", encoding="utf-8")

    def write(text: str = GOOD, file: str = "recipe.yaml", **replaced: str) -> Path:
        for old, new in replaced.items():
            assert old in text
            text = "\n".join(new if line.startswith(old) else line for line in text.splitlines())
        (tmp_path / file).write_text(text, encoding="utf-8")
        return tmp_path / file

    return write


def refusal(path: Path, overrides=()) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_a_good_recipe(recipe):
    loaded = load_recipe(recipe())
    assert loaded.optim.lr.vision == 1e-4 and isinstance(loaded.optim.lr.vision, float)
    assert (loaded.steps, loaded.batch, loaded.micro_batch, loaded.seed) == (10, 8, 4, 0)
    assert Path(loaded.data.mixture).is_file()
    assert loaded.run_dir == str(Path("runs") / recipe().parent.name / "demo-seed0")
    assert load_recipe(recipe(), ["seed=3"]).run_dir.endswith("demo-seed3")


def test_to_dict_is_a_recipe_again(recipe, tmp_path):
    """What is recorded in the run folder can be run."""
    loaded = load_recipe(recipe(), ["lora.vision.rank=8", "optim.clip=0.5"])
    recorded = tmp_path / "recorded.yaml"
    recorded.write_text(yaml.safe_dump(loaded.to_dict()), encoding="utf-8")
    assert load_recipe(recorded) == loaded


@pytest.mark.parametrize("number", ("1e-4", "1E-4", "1.0e-4", "0.0001", "1.e-4", "+1e-4"))
def test_numbers_as_people_write_them(recipe, number):
    lr = f"  lr: {{vision: {number}, merger: {number}, language: {number}}}"
    assert load_recipe(recipe(**{"  lr": lr})).optim.lr.vision == pytest.approx(1e-4)
    assert load_recipe(recipe(), [f"optim.lr.vision={number}"]).optim.lr.vision == pytest.approx(1e-4)


WRONG = {
    "misspelt": ({"steps": "stepz: 10"}, ["stepz: no such key", "did you mean 'steps'"]),
    "misspelt below": (
        {"  lr": "  lr: {vison: 1e-4, merger: 1e-4, language: 1e-4}"},
        ["optim.lr.vison: no such key", "did you mean 'vision'"],
    ),
    "misspelt three deep": (
        {"steps": "steps: 10\nlora: {vision: {rnk: 4}}"},
        ["lora.vision.rnk: no such key", "did you mean 'rank'"],
    ),
    "unlike any": ({"steps": "steps: 10\nzzzqqq: 1"}, ["zzzqqq: no such key"]),
    "text for a number": ({"steps": "steps: ten"}, ["steps: ", "integer", "'ten'"]),
    "quoted number": ({"steps": "steps: '10'"}, ["steps: ", "integer"]),
    "fraction for a count": ({"steps": "steps: 10.5"}, ["steps: ", "10.5"]),
    "boolean for a count": ({"steps": "steps: true"}, ["steps: ", "integer"]),
    "zero steps": ({"steps": "steps: 0"}, ["steps: ", "greater than or equal to 1"]),
    "negative rate": ({"  lr": "  lr: {vision: -1e-4, merger: 1e-4, language: 1e-4}"}, ["optim.lr.vision: "]),
    "infinite rate": ({"  lr": "  lr: {vision: .inf, merger: 1e-4, language: 1e-4}"}, ["optim.lr.vision: "]),
    "no number": ({"  lr": "  lr: {vision: .nan, merger: 1e-4, language: 1e-4}"}, ["optim.lr.vision: "]),
    "mapping for text": ({"name": "name: {a: 1}"}, ["name: "]),
    "number for a mapping": ({"data": "data: 3"}, ["data: "]),
    "list for a mapping": ({"data": "data: [mix.yaml]"}, ["data: "]),
    "not a choice": ({"model": "model: {name: m, dtype: float16}"}, ["model.dtype: ", "float32", "'float16'"]),
    "missing": ({"steps": ""}, ["steps: is missing"]),
    "missing below": ({"  lr": "  lr: {vision: 1e-4, merger: 1e-4}"}, ["optim.lr.language: is missing"]),
    "batch": ({"micro_batch": "micro_batch: 3"}, ["batch=8 is not a multiple of micro_batch=3"]),
    "nothing trained": ({"  lr": "  lr: {vision: 0, merger: 0, language: 0}"}, ["nothing would be trained"]),
    "nothing trained by rank": ({"steps": "steps: 10\nlora: {language: {rank: 0}}"}, ["nothing would be trained"]),
    "no warm-up in this schedule": (
        {"optim": "optim:\n  schedule: constant\n  warmup_steps: 5"},
        ["optim.warmup_steps", "constant_with_warmup"],
    ),
    "pixels": (
        {"model": "model: {name: m, min_pixels: 10, max_pixels: 5}"},
        ["model.min_pixels is larger than model.max_pixels"],
    ),
    "missing mixture": ({"data": "data: {mixture: nowhere.yaml}"}, ["data.mixture: no such file: nowhere.yaml"]),
    "repeated key": ({"steps": "steps: 10\nsteps: 20"}, ["the key 'steps' is given twice", "line 7"]),
    "repeated key below": (
        {"data": "data: {mixture: mix.yaml, mixture: b.yaml}"},
        ["the key 'mixture' is given twice"],
    ),
    "broken YAML": ({"data": "data: {mixture: [}"}, ["not valid YAML", "line 3"]),
    "key that is no text": ({"steps": "steps: 10\n? [a, b]\n: 1"}, ["not valid YAML"]),
    "tag": ({"steps": "steps: !!python/object/apply:os.getcwd []"}, ["not valid YAML"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_refused_with_file_and_key(recipe, name):
    replaced, said = WRONG[name]
    path = recipe(**replaced)
    message = refusal(path)
    assert str(path) in message
    assert all(words in message for words in said), message


def test_all_wrong_keys_are_named_at_once(recipe):
    message = refusal(recipe(steps="stepz: 10", name="nam: demo"))
    assert "stepz" in message and "nam:" in message and "name: is missing" in message


@pytest.mark.parametrize(
    "content, said",
    (
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "a mapping"),
        (b"- a\n- b\n", "a mapping"),
        (b"just text", "a mapping"),
    ),
)
def test_a_file_that_is_no_recipe(tmp_path, content, said):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message and said in message


def test_base_and_difference(recipe):
    recipe(file="base.yaml")
    child = recipe("base: base.yaml\nname: child\noptim: {lr: {vision: 0.5}}\n", file="child.yaml")
    loaded = load_recipe(child)
    assert loaded.name == "child" and loaded.steps == 10
    assert (loaded.optim.lr.vision, loaded.optim.lr.merger) == (0.5, 2e-4)


def test_a_mistake_is_reported_where_it_stands(recipe):
    base = recipe(file="base.yaml", steps="stepz: 10")
    child = recipe("base: base.yaml\nname: child\noptim: {lr: {vison: 1e-4}}\n", file="child.yaml")
    lines = refusal(child, ["optim.klip=1"]).splitlines()
    assert any(line.startswith(f"{base}: stepz: no such key") for line in lines)
    assert any(line.startswith(f"{child}: optim.lr.vison: no such key") for line in lines)
    assert any(line.startswith("override optim.klip=1: optim.klip: no such key; did you mean 'clip'") for line in lines)


def test_two_levels_of_base(recipe):
    recipe(file="base.yaml")
    middle = recipe("base: base.yaml\n", file="middle.yaml")
    child = recipe("base: middle.yaml\n", file="child.yaml")
    message = refusal(child)
    assert str(child) in message and str(middle) in message and "base: " in message and "stands alone" in message
    load_recipe(middle)


@pytest.mark.parametrize("base", ("nowhere.yaml", "3", "[base.yaml]", ""))
def test_a_base_that_is_no_file(recipe, base):
    child = recipe(f"base: {base}\nname: child\n", file="child.yaml")
    message = refusal(child)
    assert str(child) in message and "base" in message


def test_overrides(recipe):
    loaded = load_recipe(
        recipe(), ["steps=3", "optim.lr.vision=0", "lora=null", "name=x=y", "data.skip_bad=true", "steps=4"]
    )
    assert (loaded.steps, loaded.optim.lr.vision, loaded.lora, loaded.name, loaded.data.skip_bad) == (
        4,
        0,
        None,
        "x=y",
        True,
    )


@pytest.mark.parametrize(
    "text, said",
    (
        ("steps", "key=value is needed"),
        ("=3", "key=value is needed"),
        ("a b=3", "key=value is needed"),
        ("steps.=3", "key=value is needed"),
        ("--steps=3", "key=value is needed"),
        ("steps=[", "not a value"),
        ("steps=", "steps: "),
        ("steps=x", "steps: "),
        ("stepz=3", "did you mean 'steps'"),
        ("optim.lr.vison=3", "did you mean 'vision'"),
        ("steps.a=3", "steps: "),
        ("base=other.yaml", "base"),
    ),
)
def test_bad_overrides(recipe, text, said):
    message = refusal(recipe(), [text])
    assert text in message and said in message


def test_parse_override_and_merge():
    assert parse_override("a.b=1e-4") == (["a", "b"], 1e-4)
    assert parse_override("a={b: [1, 2]}") == (["a"], {"b": [1, 2]})
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "d": {"e": 1}}) == {
        "a": {"b": 5, "c": 2},
        "d": {"e": 1},
    }


def test_mixture_is_found_beside_the_recipe_or_above_it(tmp_path, monkeypatch):
    deep = tmp_path / "recipes" / "qwen" / "sft"
    deep.mkdir(parents=True)
    above, outside = tmp_path / "recipes" / "mix.yaml", tmp_path / "out.yaml"
    above.touch()
    outside.touch()
    assert find_beside("mix.yaml", deep) == above
    assert find_beside("out.yaml", deep) is None  # nothing above the folder of recipes
    monkeypatch.chdir(tmp_path)
    assert find_beside("out.yaml", deep) == Path("out.yaml")


def test_read_yaml_repeats_are_found_in_lists_too(tmp_path):
    (tmp_path / "a.yaml").write_text("a:\n- {b: 1, b: 2}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="'b' is given twice"):
        read_yaml(tmp_path / "a.yaml")
