"""Damaged and hostile files: read or refused in one sentence, never a traceback, never anything run or opened that they name.

`EVENSIGHT_LONG=1` damages 50,000 files instead of 2,000; so does `python -m tests.fuzzing --cases 50000`, which goes on after a finding.
"""

import ast
import copy
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import EpsImagePlugin, Image

from data_prep.images import one_line
from data_prep.pair import read_pairs
from data_prep.problem import ProblemError, read_problems, render
from eval import case_page, gap, report
from eval.answers import read_side
from modeling.adapters import load_adapter
from training.config import RecipeError
from training.strict import parse_override, read_yaml

from .fuzz_targets import data_folder, targets
from .fuzzing import LAUGHS, Target, search
from .running import run
from .test_gap import write_run
from .test_report import Page
from .test_resume import interrupted

ROOT = Path(__file__).parent.parent
CASES = 50_000 if os.environ.get("EVENSIGHT_LONG") else 2_000
ROOMS = ("data_prep", "training", "eval", "modeling", "benchmarks")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzzing"))}


def test_damaged_files_are_read_or_refused_in_a_sentence(sets):
    """tests.fuzzing says what is damaged and how a finding is repeated."""
    tried, found = search(list(sets.values()), CASES, seed=0)
    assert tried >= 0.99 * CASES and not found, "\n\n".join(f"{case}: {finding}" for case, finding in list(found.items())[:5])


def test_the_search_finds_what_it_looks_for(sets):
    """A reader that lets an error of Python through, says nothing of the file, says too much, or never ends."""
    good = sets["problems"]

    def found(read, errors=(ProblemError,)) -> str:
        return Target("bad", good.folder, good.files, read, errors).finding(good.files[0], b"")

    def fail(error: Exception):
        raise error

    def hang():
        while True:
            pass

    assert "KeyError" in found(lambda: fail(KeyError("x")))
    assert "does not name the file" in found(lambda: fail(ProblemError("is wrong")))
    assert "no line of at most" in found(lambda: fail(ValueError("problems.jsonl: " + "x" * 700)), (ValueError,))
    assert "no line of at most" in found(lambda: fail(ValueError("problems.jsonl:\nx")), (ValueError,))
    assert "no character" in found(lambda: fail(ValueError("problems.jsonl: \x1b[2J")), (ValueError,))
    assert "not with a sentence" in found(lambda: fail(SystemExit(1)))
    assert found(lambda: None) is found(lambda: fail(ProblemError("problems.jsonl: is wrong"))) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fuzzing.LIMIT_S", 0.2)
        assert "was not read within 0.2 s" in found(hang)


# -- what was found, each once ---------------------------------------------------------------------

DEEP = b"[" * 30_000 + b"]" * 30_000
FOUND = {
    # a recipe
    "a tag that its value does not fit": ("recipe", "base.yaml", (b"steps: 8", b"steps: !!timestamp x"), "base.yaml: not valid YAML"),
    "a number that is none": ("recipe", "base.yaml", (b"steps: 8", b"steps: !!int x"), "not valid YAML: invalid literal"),
    "a day that is none": ("recipe", "base.yaml", (b"name: base", b"name: 2001-13-45"), "not valid YAML: month must be in 1..12"),
    "hundreds of levels": ("recipe", "base.yaml", (b"name: base", b"name: " + DEEP), "not valid YAML: is nested too deeply"),
    "ten lines that stand for a billion values": ("recipe", "base.yaml", (b"name: base", LAUGHS.encode()), "holds more than 100000 values"),
    "a list that holds itself": ("recipe", "base.yaml", (b"name: base", b"name: &a [*a]"), "not valid YAML: found unconstructable"),
    "lists that hold each other": ("recipe", "base.yaml", (b"name: base", b"name: &a [1, &b [*b], *a]"), "not valid YAML"),
    "half of a surrogate pair": ("recipe", "base.yaml", (b"name: nowhere/tiny", rb'name: "\ud800"'), "cannot be read: Invalid JSON"),
    "a key that is a number": ("recipe", "base.yaml", (b"\nsteps: 8", b"\nsteps: 8\n7: 8"), "7: no such key"),
    "a long value": ("recipe", "base.yaml", (b"steps: 8", b"steps: " + b"x" * 5000), "not 'xxxxx"),
    "a long key": ("recipe", "base.yaml", (b"steps: 8", b"? " + b"x" * 5000 + b"\n: 8"), "no such key"),
    "a mapping where its base has a list": ("recipe", "base.yaml", (b"{lr: {vision: 1e-3, merger: 1e-3, language: 1e-3}, betas: [0.9, 0.99]}", b"[1]"), None),
    "an entry of its base's list": ("recipe", "recipe.yaml", (b"schedule: cosine", b"schedule: cosine, betas: {0: 0.8}"), None),
    "an entry that its base's list lacks": ("recipe", "recipe.yaml", (b"schedule: cosine", b"schedule: cosine, betas: {7: 0.8}"),
                                            "betas: the list that this changes has no entry 7"),
    "a name in its base's list": ("recipe", "recipe.yaml", (b"schedule: cosine", b"schedule: cosine, betas: {x: 0.8}"), "optim.betas: input should be a valid array"),
    "a number of 5,000 digits": ("recipe", "base.yaml", (b"steps: 8", b"steps: " + b"1" * 5000), "not valid YAML: Exceeds the limit"),
    "a name too long for a file": ("recipe", "base.yaml", (b"mixture.yaml", b"x" * 5000), "data.mixture: no such file"),
    # overrides
    "an entry of a list": ("overrides", "overrides.json", (b'"stages.1.share": 0.5', b'"stages.1.share": false'), "override stages.1.share=false: "),
    "an override of hundreds of levels": ("overrides", "overrides.json", (b"0.0001", DEEP), "key=value is needed"),
    # a run folder
    "a recipe cut off": ("resume", "run/recipe.yaml", lambda whole: whole[:whole.index(b"optim:")], "of another recipe"),
    "a recipe that is empty": ("resume", "run/recipe.yaml", lambda whole: b"", "a mapping of keys to values is needed"),
    "a recipe that is no YAML": ("resume", "run/recipe.yaml", lambda whole: whole + b"%", "not valid YAML"),
    "a recipe's key of two lines": ("resume", "run/recipe.yaml", (b"\nsteps:", b'\n"a\\nb":'), "differs in a b "),
    "a recipe of a billion values": ("resume", "run/recipe.yaml", lambda whole: LAUGHS.encode(), "holds more than 100000 values"),
    "run.json cut off": ("resume", "run/run.json", lambda whole: whole[:40], "run.json: cannot be read"),
    "run.json that is a list": ("resume", "run/run.json", lambda whole: b"[]", "run.json: is damaged"),
    "run.json of hundreds of levels": ("resume", "run/run.json", lambda whole: DEEP, "run.json: cannot be read"),
    "a finished run without its seconds": ("resume", "run/run.json", (b'"finished": false', b'"finished": true'), "has its seconds"),
    "a key that is a day, in a recipe that changes": ("start changed", "run/recipe.yaml", (b"\nsteps: 8", b"\nsteps: 8\n2001-01-01: 8"),
                                                      "a key must be a name"),
    "half of a pair in run.json": ("start", "run/run.json", (b'"finished": false', rb'"finished": false, "x": "\ud800"'), "run.json: cannot be read"),
    "data that is no object": ("start", "run/run.json", lambda whole: b'{"data": 3}', "run.json: is damaged"),
    "hashes that are lists": ("start", "run/run.json", lambda whole: b'{"data": {"a": [1]}}', "the data changed"),
    "a plan that is a list": ("resume", "run/checkpoints/checkpoint-4/plan.json", lambda whole: b"[]", "plan.json: cannot be read"),
    "a plan of hundreds of levels": ("resume", "run/checkpoints/checkpoint-4/plan.json", lambda whole: DEEP, "plan.json: cannot be read"),
    "a state that is cut off": ("resume", "run/checkpoints/checkpoint-4/balance.json", lambda whole: whole[:5], "balance.json: cannot be read"),
    "a log that is no text": ("resume", "run/metrics.jsonl", lambda whole: b"\xff\xfe" + whole, None),
    "a log with other rows": ("resume", "run/metrics.jsonl", lambda whole: b'[]\n3\n{"step": "x"}\n{}\n{"step": 1, "seconds": "y"}\n' + whole, None),
    # answers
    "a task that is a list": ("answers", "one/answers.jsonl", (rb'"task": "problems"', b'"task": []'), "answers.jsonl:1: 'task' is []"),
    "an id with half a pair": ("answers", "one/answers.jsonl", (rb'"id": "p0"', rb'"id": "\ud800"'), "'id' is"),
    "an answer of hundreds of levels": ("answers", "one/answers.jsonl", (b"null", DEEP), "answers.jsonl:1: not a JSON object"),
    "tokens of 5,000 digits": ("answers", "one/answers.jsonl", (b"null", b"1" * 5000), "answers.jsonl:1: not a JSON object"),
    "a text that is a number": ("report", "one/answers.jsonl", (rb'"text": null', b'"text": 3'), "answers.jsonl:1: 'text' is 3"),
    "pictures that are numbers": ("report", "one/answers.jsonl", (rb'"image": ["images/0.png", "images/1.png"]', b'"image": [1]'), "'image' is"),
    "a picture with a zero byte": ("report", "one/answers.jsonl", (rb'images/0.png', rb'images/\u0000'), None),
    "a picture in a circle": ("report", "one/answers.jsonl", (rb'images/0.png', b'images/loop.png'), None),
    "tasks that are a list": ("answers", "one/run.json", lambda whole: re.sub(rb'(?s)"tasks": \{.*?\n \},', b'"tasks": [],', whole), "'tasks' is"),
    "settings of hundreds of levels": ("answers", "one/run.json", lambda whole: DEEP, "cannot read"),
    "a count that is text": ("answers", "one/run.json", (b'"n": 6', b'"n": "6"'), "'n' is"),
    "run.json of answers cut off": ("eval again", "three/run.json", lambda whole: whole[:60], "run.json: cannot be read"),
    "run.json of answers that is a list": ("eval again", "three/run.json", lambda whole: b"[]", "is no JSON object"),
    "seconds that are text": ("eval again", "three/run.json", lambda whole: re.sub(rb'"seconds": [0-9.]+', b'"seconds": "x"', whole), "is damaged"),
    # problems and pairs: what they hold is part of the message
    "an id of two lines, twice": ("problems", "problems.jsonl", lambda whole: whole.split(b"\n")[0].replace(b'"p0"', rb'"a\nb\u001b[2J"') * 1 + b"\n"
                                  + whole.split(b"\n")[0].replace(b'"p0"', rb'"a\nb\u001b[2J"') + b"\n", "stands on line 1 already"),
    "a field's name of 3,000 characters": ("problems", "problems.jsonl", (b'"facts"', b'"' + b"x" * 3000 + b'"'), "unknown field"),
    "an answer of 5,000 characters": ("problems", "problems.jsonl", lambda whole: re.sub(rb'"answer": "[^"]*"', b'"answer": "' + b"y" * 5000 + b'"', whole),
                                      "is not among the options"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(sets, name):
    where, file, change, expected = FOUND[name]
    target = sets[where]
    whole = target.whole[file]
    data = change(whole) if callable(change) else whole.replace(change[0], change[1], 1)
    assert data != whole, "the damage does none"
    message: list[str] = []
    read = target.read

    def told() -> None:
        try:
            read()
        except (*target.errors, SystemExit) as error:
            message.append(str(error))
            raise

    finding = Target(target.name, target.folder, target.files, told, target.errors, lines=target.lines, names=target.names).finding(file, data)
    assert finding is None, finding
    if expected is None:
        assert not message, message
    else:
        assert message and expected in message[0], message


def test_a_line_of_a_message():
    assert one_line("a\nb\t\x1b[31m\u2028c\ud800 \u202e") == "a b \ufffd[31m c\ufffd \ufffd" and one_line("as  it is é") == "as  it is é"
    assert len(one_line("x" * 9999)) <= 500 and one_line("a" * 300 + "b" * 300).startswith("aaa") and one_line("a" * 300 + "b" * 300).endswith("bbb")


# -- what a file names -----------------------------------------------------------------------------


@pytest.mark.parametrize("image", ("/etc/hostname", "../outside.png", "images/../../outside.png", "images/out.png", "images/loop.png",
                                   "images/folder/outside.png", r"..\outside.png", r"C:\outside.png", "images/0.png\0", "images/pipe"))
def test_pictures_stay_in_the_data_folder(tmp_path, image):
    """By name, by a link of their own and by a link of their folder; also where the link is made after the file was checked."""
    data = data_folder(tmp_path / "data")
    (data / "images" / "folder").symlink_to(tmp_path)
    os.mkfifo(data / "images" / "pipe")
    for name, read in (("problems.jsonl", read_problems), ("pairs.jsonl", read_pairs)):
        text = (data / name).read_text(encoding="utf-8")
        (data / name).write_text(text.replace('"images/5.png"', json.dumps(image)), encoding="utf-8")
        for verify in ("full", "header", "none"):
            with pytest.raises(ProblemError, match=rf"{name}:[56]: "):
                read(data / name, verify=verify)
    run_dir = write_run(tmp_path / "run", {"vision": 0.5}, n=4)
    (run_dir / "images").symlink_to(data / "images")
    assert report.picture(report.parse_runs([f"a={run_dir}"]), "twins", image)[0] is None


def test_a_link_made_after_the_check_is_not_followed(tmp_path):
    data = data_folder(tmp_path / "data")
    problem = read_problems(data / "problems.jsonl")[5]
    pair = read_pairs(data / "pairs.jsonl")[5]
    (data / "images" / "5.png").unlink()
    (data / "images" / "5.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(ProblemError, match="p5: .*leaves the data folder through a link"):
        render(problem, "vision")
    with pytest.raises(ProblemError, match="q5: .*leaves the data folder through a link"):
        pair.load()


def test_a_page_opens_no_format_that_runs_a_program(tmp_path, monkeypatch):
    """Pillow reads EPS by starting Ghostscript."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args) or Image.new("RGB", (28, 28)).im)
    run_dir = write_run(tmp_path / "run", {"vision": 0.5}, n=4)
    (run_dir / "images").mkdir()
    Image.new("RGB", (28, 28)).save(run_dir / "images" / "0.eps")
    (run_dir / "images" / "0.eps").rename(run_dir / "images" / "0.png")
    found, why = report.picture(report.parse_runs([f"a={run_dir}"]), "twins", "images/0.png")
    assert started == [] and found is None and "cannot be read" in why


# -- nothing in a file is run ----------------------------------------------------------------------


@pytest.mark.parametrize("tag", ("!!python/object/apply:os.mkdir [{place}]", "!!python/object/new:os.mkdir [{place}]", "!!python/name:os.mkdir",
                                 "!!python/module:os", "!!python/tuple [1]", "!!python/object:os.PathLike {{}}"))
def test_yaml_makes_no_objects(tmp_path, tag):
    text = tag.format(place=tmp_path / "made")
    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    for loader in ((), (yaml.SafeLoader,)):
        with pytest.raises(RecipeError, match="a.yaml: not valid YAML: could not determine a constructor"):
            read_yaml(tmp_path / "a.yaml", *loader)
    with pytest.raises(RecipeError, match="is not a value"):
        parse_override(f"a={text}")
    assert not (tmp_path / "made").exists()


class Made:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_the_pickle_would_run(tmp_path):
    pickle.loads(pickle.dumps(Made(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_an_adapter_that_is_a_pickle_is_not_loaded(tiny, tmp_path):
    from transformers import AutoModelForImageTextToText

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(tiny)}))
    torch.save({"x": Made(tmp_path / "made")}, folder / "adapter_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_adapter(AutoModelForImageTextToText.from_pretrained(tiny), str(folder))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ("optimizer.pt", "scheduler.pt", "rng_state.pth"))
def test_a_checkpoint_that_is_a_pickle_is_not_loaded(recipe_file, tmp_path, monkeypatch, name):
    path = recipe_file(steps=3, save={"every": 1}, views={"text": 1.0})
    interrupted(path, monkeypatch, 3)
    checkpoint = tmp_path / "runs" / "recipe" / "checkpoints" / "checkpoint-2"
    assert (checkpoint / name).is_file()
    torch.save({"x": Made(tmp_path / "made")}, checkpoint / name)
    with pytest.raises((SystemExit, pickle.UnpicklingError), match="(?i)weights.only"):
        run(path, "--resume")
    assert not (tmp_path / "made").exists()


def name_of(node: ast.AST) -> str:
    """`a.b.c` as it is written; of anything else than names, the last of them."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangerous(node: ast.AST) -> str | None:
    """What is not allowed about a piece of code; None: nothing."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
        return next((f"imports {name}" for name in names if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal")), None)
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not (isinstance(node.value, ast.Constant) and node.value.value is False):
        return "trust_remote_code"
    if not isinstance(node, ast.Call):
        return None
    said = name_of(node.func)
    given = {one.arg: one.value.value if isinstance(one.value, ast.Constant) else ... for one in node.keywords}
    if said in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "builtins.eval", "builtins.exec"):
        return said
    if said.endswith("torch.load") and given.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    if said in ("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.full_load_all") or said == "yaml.load" and len(node.args) < 2 and "Loader" not in given:
        return said
    if given.get("shell"):
        return "a shell"
    if said.endswith(("np.load", "numpy.load")) and "allow_pickle" in given:
        return "allow_pickle"
    return None


def test_the_code_loads_no_code():
    files = [ROOT / "train.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
    assert len(files) > 80
    found, loads = {}, set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (what := dangerous(node)) is not None:
                found[f"{path.relative_to(ROOT)}:{node.lineno}"] = what
            if isinstance(node, ast.Call) and name_of(node.func) == "yaml.load":
                loads.add(path.name)
    assert found == {} and loads == {"strict.py"}, "whose loaders a test above has met"


@pytest.mark.parametrize("line", ("import pickle", "from pickle import loads", "torch.load(a)", "torch.load(a, weights_only=False)", "yaml.load(a)", "eval(a)",
                                  "exec(a)", "yaml.unsafe_load(a)", "f(trust_remote_code=True)", "f(trust_remote_code=x)", "os.system(a)",
                                  "subprocess.run(a, shell=True)", "np.load(a, allow_pickle=True)"))
def test_the_code_that_would_be_found(line):
    assert any(dangerous(node) for node in ast.walk(ast.parse(line)))


# -- pages -----------------------------------------------------------------------------------------

HOSTILE = ("</td></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`--><!--&lt;]]></svg></style><svg/onload=alert(3)>"
           "<a href='javascript:alert(4)'>{{ 7 * 7 }}{% raw %}$\\frac{")


def outline(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Tags with the names of their attributes, outside of figures, whose letters are drawn."""
    found, inside = [], 0
    for tag, attributes in Page(page).tags:
        if tag == "svg":
            found.append((tag, ()))
        inside = tag == "svg" or inside and tag in ("g", "path", "defs", "use", "rect", "style", "text", "clippath", "tspan", "title", "desc", "metadata")
        if not inside:
            found.append((tag, tuple(sorted(attributes))))
    return found


def spoiled(rows: list[dict], word: str) -> list[dict]:
    for row in rows:
        same = row["pred"] == row["gold"]
        options = [f"{word}{number}" for number in range(2)]
        gold = options[0]
        row |= {"id": f"{word}{row['id']}", "group": f"{word}{row['group']}", "source": word, "question": word, "choices": options, "options": options,
                "gold": gold, "pred": gold if same else options[1], "text": f"{word} said", "finish": word, "image": f"{word}.png",
                "key": word + row["key"], "meta": {"kind": word, word: word}}
    return rows


def page_of(folder: Path, word: str) -> str:
    sides = []
    for number, name in enumerate((f"{word}a", f"{word}b")):
        info = {"label": word, "model": word, "adapter": word, "parser": word, "mode": word, "commit": word, "device": word,
                "pixels": {"min": word, "max": word}, "packages": {word: word}}
        run_dir = write_run(folder / f"run{number}", {"both": 0.9, "text": 0.8, "vision": 0.5, "blind": 0.25}, n=8, task=f"{word}task", seed=number,
                            info=info, edit=lambda rows: spoiled(rows, word))
        sides.append(read_side(name, [run_dir]))
    return report.build(sides)


def test_a_report_shows_what_models_and_data_say_as_text(tmp_path):
    """The same tags with the same attributes, whatever it is called and whatever is said."""
    tame, page = page_of(tmp_path / "tame", "word"), page_of(tmp_path / "hostile", HOSTILE)
    assert outline(page) == outline(tame)
    found = Page(page)
    assert len(found.of("script")) == 1 and "alert" not in found.script and "alert" in page
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert not any("javascript" in (attributes.get(name) or "").lower() for name in ("src", "href", "xlink:href", "action")), (tag, attributes)
    text = " ".join(found.text)
    assert HOSTILE in text and "49" not in re.findall(r"\b49\b", text), "shown as it is, and no template"


def test_a_page_of_a_case_study_shows_names_as_text():
    result = gap.numbers(json.loads((ROOT / "results" / "demo" / "case_study.json").read_text(encoding="utf-8")))
    (task, found), = result["tasks"].items()
    first = next(iter(found["models"]))

    def renamed(word: str) -> dict:
        one = copy.deepcopy(found)
        one["models"] = {(word if name == first else name): model for name, model in one["models"].items()}
        for model in one["models"].values():
            model["warnings"], model["left_out"] = [word], None
            model["kinds"] = {f"{word}{kind}": part for kind, part in model["kinds"].items()}
            model["missing"] = [{**missing, "reason": word} for missing in model["missing"]]
        models = [{**model, "name": word if model["name"] == first else model["name"]} for model in result["models"]]
        return {**copy.deepcopy(result), "tasks": {f"{word}task": one}, "models": models, "only_in_some": [word],
                "settings": {**result["settings"], "parser": word}, "commit": word}

    tame, page = case_page.build(renamed("word")), case_page.build(renamed(HOSTILE))
    assert outline(page) == outline(tame)
    assert not Page(page).of("script") and HOSTILE in " ".join(Page(page).text)
