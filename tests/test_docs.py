"""What the documents say is so: generated blocks, commands, paths, recipe headers. And eval.readme, which generates."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from eval import readme
from tests.test_gap import write_run

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "recipes/README.md", "ds_configs/README.md", "assets/tiny/README.md")
FOLDERS = ("assets", "benchmarks", "data_prep", "ds_configs", "eval", "recipes", "results", "tests", "training")
SUMMARY = ROOT / "results" / "demo" / "summary.json"
MAX_LINES = 400
RIGHT = {"base": {"both": 0.9, "text": 0.9, "vision": 0.6, "blind": 0.5},
         "full-text": {"both": 0.95, "text": 0.95, "vision": 0.55, "blind": 0.5},
         "vision-centric": {"both": 0.95, "text": 0.95, "vision": 0.85, "blind": 0.5},
         "mix": {"both": 0.95, "text": 0.95, "vision": 0.75, "blind": 0.5}}


# ---- eval.readme on made-up runs -------------------------------------------------------------------------------------

def trained(folder: Path, name: str, seed: int, *, recipe: str | None = None, training=None, info=None) -> Path:
    """A training run folder and the evaluation of its adapter."""
    run = folder / "runs" / f"{name}-seed{seed}"
    run.mkdir(parents=True)
    if recipe != "":
        text = recipe or f"name: {name}\nseed: {seed}\nsteps: 180\n"
        (run / "recipe.yaml").write_text(text, encoding="utf-8")
    training = {"commit": "1" * 40, "dirty": False, "finished": True, "seconds": 33.5, "device": "cpu",
                "data": {str(folder / "train.jsonl"): "cd" * 32}, "packages": {"torch": "2.13.0"}, **(training or {})}
    return write_run(folder / "answers" / run.name, RIGHT[name], n=40, seed=seed,
                     info={"adapter": str(run / "adapter"), "seed": None, "training": training, **(info or {})})


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder with a README, two recipes and the runs of both: (root, command line)."""
    root = tmp_path_factory.mktemp("repository")
    base = write_run(root / "answers" / "base", RIGHT["base"], n=40, info={"model": str(root / "tiny"), "seed": None})
    words = [f"base={base}"] + [f"{name}=" + ",".join(str(trained(root, name, seed)) for seed in range(3))
                                for name in ("full-text", "vision-centric", "mix")]
    (root / "README.md").write_text("# A\n\n<!-- generated: results/demo -->\n<!-- end -->\nprose\n", encoding="utf-8")
    (root / "recipes" / "demo").mkdir(parents=True)
    (root / "recipes" / "mixtures").mkdir()
    (root / "recipes" / "mixtures" / "m.yaml").write_text("sources: {}\n", encoding="utf-8")
    (root / "recipes" / "README.md").write_text("<!-- generated: recipes -->\nold\n<!-- end -->\n", encoding="utf-8")
    (root / "recipes" / "demo" / "full_text.yaml").write_text(
        "# Idea     Ordinary | plain,\n#          in two lines.\n# Result   results/demo/summary.json\n"
        "name: full-text\nsteps: 5\noptim:\n  lr: {vision: 1e-3, language: 1e-3}\n", encoding="utf-8")
    (root / "recipes" / "demo" / "mix.yaml").write_text(
        "# Idea     Mixed.\n# Result   results/demo/summary.json\nname: mix\nsteps: 5\n", encoding="utf-8")
    (root / "recipes" / "demo" / "centric.yaml").write_text(
        "# Idea     Pictures.\n# Result   results/demo/summary.json\nname: vision-centric\nsteps: 5\n", encoding="utf-8")
    (root / "recipes" / "demo" / "later.yaml").write_text(
        "# Idea     Later.\n# Result   results/demo/summary.json\nname: later\nsteps: 5\n", encoding="utf-8")
    (root / "recipes" / "demo" / "slow.yaml").write_text(
        "# Idea     Slow words.\n# Differs  from full_text.yaml in optim.lr.language. Nothing else.\n"
        "# Result   none yet\n"
        "base: full_text.yaml\nname: slow\nsteps: 5\noptim: {lr: {language: 1e-4}}\n", encoding="utf-8")
    return root, ["--collect", str(root / "results" / "demo"), *words]


@pytest.fixture(scope="module")
def collected(repository):
    root, words = repository
    readme.main(words, root)
    return root, json.loads((root / "results" / "demo" / "summary.json").read_text(encoding="utf-8"))


def test_collect_keeps_numbers_and_parents(collected):
    root, summary = collected
    assert [run["name"] for run in summary["runs"]] == ["base", "full-text", "vision-centric", "mix"]
    assert summary["control"] == "full-text"
    found = summary["tasks"]["twins"]["runs"]
    assert found["full-text"]["gap"]["gap"] == pytest.approx(0.40)
    assert len(found["full-text"]["gap"]["seeds"]["values"]) == found["full-text"]["n_seeds"] == 3
    assert found["base"]["views"]["vision"]["value"] == pytest.approx(0.60) and found["base"]["n_groups"] == 20
    changes = {(one["before"], one["after"]): one for one in summary["tasks"]["twins"]["changes"]}
    assert list(changes) == [("base", "full-text"), ("base", "vision-centric"), ("base", "mix"),
                             ("full-text", "vision-centric"), ("full-text", "mix")]
    last = changes["full-text", "vision-centric"]
    assert last["gap"]["change"] == pytest.approx(-0.30) and last["gap"]["closure"]["value"] == pytest.approx(0.75)
    assert last["gap"]["low"] < -0.30 < last["gap"]["high"] < 0 and last["verdict"]["word"] == "closed well"
    assert len(last["views"]["vision"]["mcnemar_p_seeds"]) == 3
    one = summary["runs"][1]["seeds"][2]
    assert (one["seed"], one["recipe"], one["steps"], one["training_seconds"]) == (2, "full-text", 180, 33.5)
    assert one["commit"] == "0" * 40 and one["training_commit"] == "1" * 40 and len(one["recipe_sha256"]) == 64
    assert one["data_sha256"] == {"twins": "ab" * 32} and one["training_data_sha256"] == {"train.jsonl": "cd" * 32}
    assert summary["dirty"] is False and str(root) not in json.dumps(summary)


NUMBER = r"[+-]?\d+\.\d \[[+-]?\d+\.\d, [+-]?\d+\.\d\]"


def cells(text: str, run: str) -> list[str]:
    """The row of a run, values without their intervals, after checking that an interval stands behind them."""
    row = next(line for line in text.splitlines() if line.startswith(f"| `{run}` |"))
    found = [cell.strip() for cell in row.strip("|").split("|")][1:]
    assert all(re.fullmatch(NUMBER, cell) or cell == "-" for cell in found[4:]), row
    return [cell.partition(" [")[0] for cell in found]


def test_blocks_hold_the_numbers(collected):
    root, _ = collected
    text = (root / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# A\n\n<!-- generated: results/demo -->\n\n| run | both | text | vision | blind | gap (both - "
                           "vision) | text gap (text - vision) | image gain (vision - blind) | "
                           "change of the gap against `full-text` | closed % |\n")
    assert text.endswith("\n\n<!-- end -->\nprose\n")
    assert cells(text, "base") == ["90.0", "90.0", "60.0", "50.0", "+30.0", "+30.0", "+10.0", "-", "-"]
    assert cells(text, "full-text") == ["95.0", "95.0", "55.0", "50.0", "+40.0", "+40.0", "+5.0", "-", "-"]
    assert cells(text, "vision-centric") == ["95.0", "95.0", "85.0", "50.0", "+10.0", "+10.0", "+35.0", "-30.0", "75.0"]
    assert cells(text, "mix") == ["95.0", "95.0", "75.0", "50.0", "+20.0", "+20.0", "+25.0", "-20.0", "50.0"]
    assert ("From `full-text` to `vision-centric`, the lowest gap of 2 runs that closed it well, the gap changes by -30.0 [" in text
            and "which closes 75.0 [" in text and "`vision` +30.0 [" in text and "(closed well)" in text)
    assert "3 training seeds, 180 optimizer steps each" in text and "40 items in 20 groups" in text
    assert "change of the gap per seed: -30.0, -30.0, -30.0." in text and "uncommitted" not in text
    table = (root / "recipes" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| \[demo/full_text\]\(demo/full_text.yaml\) \| Ordinary \\\| plain, in two lines. \| - \| gap \+40.0 "
                     r"\[\+[\d.]+, \+[\d.]+\] \(\[numbers", table)
    assert re.search(rf"\| Mixed. \| - \| gap {NUMBER}; against `full-text` -20.0 \[-[\d.]+, -[\d.]+\] \(\[numbers", table)
    assert "| Later. | - | none yet |" in table
    assert "| [demo/slow](demo/slow.yaml) | Slow words. | `full_text.yaml` in `optim.lr.language` | none yet |" in table
    assert "old" not in table and "m.yaml" not in table


def test_items_left_out_are_told_below_the_table(collected):
    summary = json.loads(json.dumps(collected[1]))
    assert "Left out" not in readme.results_block(summary, "twins")[-1]
    summary["tasks"]["twins"]["runs"]["mix"]["left_out"] = {"n": 3, "views": {"text": 3}}
    assert readme.results_block(summary, "twins")[-1].endswith(
        " Left out of all numbers: 3 items cannot be shown in every view (3 not in text).")


def test_runs_are_found_by_the_recipe_that_they_record(collected, tmp_path):
    root, summary = collected
    (tmp_path / "results" / "demo").mkdir(parents=True)
    (tmp_path / "recipes").symlink_to(root / "recipes")
    mix = summary["runs"][3]

    def table(*runs) -> str:
        found = {**summary, "runs": [*summary["runs"][:3], *runs]}
        for task in found["tasks"].values():
            task["runs"].update({run["name"]: task["runs"]["mix"] for run in runs})
        (tmp_path / "results" / "demo" / "summary.json").write_text(json.dumps(found), encoding="utf-8")
        return "\n".join(readme.recipes_block(tmp_path))

    assert "| Mixed. | - | gap +20.0 [" in table({**mix, "name": "mxi"}), "misspelt on the command line"
    assert "| Mixed. | - | gap +20.0 [" in table({**mix, "name": "mix-long"}, mix)
    with pytest.raises(readme.ReadmeError, match="the runs mix-long, mix-short are all of the recipe mix; call one of them that"):
        table({**mix, "name": "mix-long"}, {**mix, "name": "mix-short"})
    renamed = {**mix, "seeds": [{**one, "recipe": "mixed"} for one in mix["seeds"]]}
    with pytest.raises(readme.ReadmeError, match="the run mix is of the recipe mixed, but no recipe .* full-text, later"):
        table(renamed)


def test_the_best_run_of_the_headline_task_is_named_in_every_task(collected):
    summary = json.loads(json.dumps(collected[1]))
    summary["tasks"]["twins_new"] = other = json.loads(json.dumps(summary["tasks"]["twins"]))
    for one in other["changes"]:
        if (one["before"], one["after"]) == ("full-text", "vision-centric"):
            one["gap"]["change"] = 0.01        # the other task would name mix
    text = "\n".join(readme.results_block(summary, "twins_new"))
    assert "From `full-text` to `vision-centric`, the lowest gap of 2 runs that closed it well on `twins`, the gap changes by +1.0 [" in text
    for task in summary["tasks"].values():
        for one in task["changes"]:
            if (one["before"], one["after"]) == ("full-text", "vision-centric"):
                one["verdict"]["word"] = "closed by loss"   # the lower gap is not the better run
    text = "\n".join(readme.results_block(summary, "twins"))
    assert "From `full-text` to `mix` the gap changes by -20.0 [" in text
    for task in summary["tasks"].values():
        for one in task["changes"]:
            if "verdict" in one:
                one["verdict"]["word"] = "closed well"
    summary["headline"] = "twins_new"
    text = "\n".join(readme.results_block(summary, "twins_new"))
    assert "From `full-text` to `mix`, the lowest gap of 2 runs that closed it well, the gap changes by -20.0 [" in text


def test_another_control_and_none(repository, tmp_path):
    root, words = repository
    sides = readme.parse_runs([words[2], words[4], words[5]])   # base, vision-centric, mix
    found = readme.collect(sides, control="mix")
    assert found["control"] == "mix"
    assert [(one["before"], one["after"]) for one in found["tasks"]["twins"]["changes"]] == [
        ("base", "vision-centric"), ("base", "mix"), ("mix", "vision-centric")]
    text = "\n".join(readme.results_block(found, "twins"))
    assert cells(text, "vision-centric")[-2] == "-10.0" and "From `mix` to `vision-centric` the gap changes by" in text
    found = readme.collect(sides)
    assert found["control"] is None and len(found["tasks"]["twins"]["changes"]) == 2
    text = "\n".join(readme.results_block(found, "twins"))
    assert "against `base`" in text and cells(text, "mix")[-2] == "-10.0" and cells(text, "base")[-2:] == ["-", "-"]
    with pytest.raises(SystemExit, match="error: no run is called control, so it cannot be the control; there are base, "):
        readme.main([*words[:1], str(tmp_path / "x"), *words[2:], "--control", "control"], root)
    assert not (tmp_path / "x").exists()


def test_a_summary_without_the_name_of_its_control(collected):
    """It is the run called control, else the first."""
    text = json.dumps({key: value for key, value in collected[1].items() if key != "control"})
    assert "against `base`" in readme.results_block(json.loads(text), "twins")[0]
    old = json.loads(text.replace('"full-text"', '"control"'))
    lines = readme.results_block(old, "twins")
    assert "against `control`" in lines[0] and cells("\n".join(lines), "mix")[-2:] == ["-20.0", "50.0"]


def test_check_names_what_is_out_of_date(collected, capsys):
    root, _ = collected
    path, document = root / "results" / "demo" / "summary.json", root / "README.md"
    fresh, drawn = path.read_text(encoding="utf-8"), (path.parent / "gap.svg").read_text(encoding="utf-8")
    summary = json.loads(fresh)
    assert drawn.startswith("<?xml") and "</svg>" in drawn
    readme.main(["--check"], root)
    text = document.read_text(encoding="utf-8")
    document.write_text(text.replace("55.0", "56.0"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"out of date: README.md: the block 'results/demo'\. Run"):
        readme.main(["--check"], root)
    assert "56.0" in document.read_text(encoding="utf-8")  # a check writes nothing
    readme.main([], root)
    assert document.read_text(encoding="utf-8") == text and "README.md" in capsys.readouterr().out
    summary["tasks"]["twins"]["runs"]["base"]["views"]["vision"]["value"] = 0.61
    path.write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(SystemExit, match="the block 'results/demo'; the figure results/demo/gap.svg"):
        readme.main(["--check"], root)
    path.write_text(fresh, encoding="utf-8")
    readme.main(["--check"], root)


@pytest.mark.parametrize("options, message", [
    ({"info": {"dirty": True}}, "full-text-seed0: made from a working tree with uncommitted changes"),
    ({"training": {"dirty": True}}, "uncommitted changes"),
    ({"info": {"commit": None}}, "no commit was recorded"),
    ({"training": {"commit": None}}, "no commit was recorded"),
    ({"training": {"finished": False}}, "was not finished"),
    ({"recipe": ""}, "no run.json and recipe.yaml beside the adapter"),
    ({"info": {"training": None}}, "no run.json and recipe.yaml beside the adapter"),
    ({"info": {"seed": 4}}, "seed 4 was recorded, but .* says 0"),
])
def test_collect_refuses(options, message, tmp_path):
    run = trained(tmp_path, "full-text", 0, **options)
    with pytest.raises(SystemExit, match=message):
        readme.main(["--collect", str(tmp_path / "results"), f"full-text={run}"], tmp_path)
    assert not (tmp_path / "results").exists()


def test_collect_refuses_one_seed_twice(tmp_path):
    again = "name: full-text\nseed: 0\nsteps: 5\n"
    runs = [trained(tmp_path, "full-text", 0), trained(tmp_path, "full-text", 1, recipe=again)]
    with pytest.raises(SystemExit, match="not one recipe with seeds that differ: full-text 0, full-text 0"):
        readme.main(["--collect", str(tmp_path), "full-text=" + ",".join(map(str, runs))], tmp_path)


def test_a_dirty_result_says_so(tmp_path):
    run = trained(tmp_path, "full-text", 0, info={"dirty": True})
    (tmp_path / "README.md").write_text("<!-- generated: results/x twins -->\n<!-- end -->\n", encoding="utf-8")
    readme.main(["--collect", str(tmp_path / "results" / "x"), f"full-text={run}", "--allow-dirty"], tmp_path)
    summary = json.loads((tmp_path / "results" / "x" / "summary.json").read_text(encoding="utf-8"))
    assert summary["dirty"] is True and summary["runs"][0]["seeds"][0]["dirty"] is True
    assert "Made from a working tree with uncommitted changes." in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text, message", [
    ("<!-- generated: recipes -->\n", "begins or ends twice"),
    ("<!-- generated: recipes -->\n<!-- generated: recipes -->\n<!-- end -->\n", "begins or ends twice"),
    ("<!-- generated: recipe -->\n<!-- end -->\n", "nothing is generated under the name 'recipe'"),
    ("<!-- generated: results/none -->\n<!-- end -->\n", "cannot read .*none/summary.json"),
    ("<!-- generated: curve results/demo -->\n<!-- end -->\n", "cannot read .*demo/curve.json"),
    ("<!-- generated: results/demo maths -->\n<!-- end -->\n", "holds no task maths; it holds twins"),
])
def test_wrong_blocks_are_errors(collected, tmp_path, text, message):
    (tmp_path / "results").symlink_to(collected[0] / "results")
    (tmp_path / "README.md").write_text("<!-- generated: results/demo -->\n<!-- end -->\n", encoding="utf-8")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        readme.main([], tmp_path)
    assert "| run |" not in (tmp_path / "README.md").read_text(encoding="utf-8")    # one wrong block leaves all as they were


@pytest.mark.parametrize("words", [["--collect", "x"], ["base=x"], ["--check", "--collect", "x", "base=x"], ["--control", "x"]])
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        readme.parse(words)
    assert "--collect DIR" in capsys.readouterr().err


def test_outside_the_repository(tmp_path):
    with pytest.raises(SystemExit, match="run this in the repository's root"):
        readme.main(["--check"], tmp_path)


# ---- the real documents ----------------------------------------------------------------------------------------------

def document(name: str) -> str:
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"{name} is not written yet")
    return path.read_text(encoding="utf-8")


def test_generated_blocks_are_up_to_date():
    document("README.md")
    if not SUMMARY.is_file():
        pytest.skip("results/demo/summary.json is not collected yet")
    assert readme.update(ROOT, check=True) == []


def code(text: str) -> list[str]:
    """Everything set as code: fenced and indented blocks line by line (with their continuations), and `spans`."""
    text = re.sub(r"<!-- generated: .*?<!-- end -->", "", text, flags=re.S)
    lines, prose, fenced = [], [], False
    for line in re.sub(r"[ \t]*\\\n\s*", " ", text).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
        else:
            prose.append(line)
    return lines + re.findall(r"`([^`]+)`", "\n".join(prose))


def commands(lines: list[str]) -> list[list[str]]:
    """The words of every Python, make or launcher command among them, without comments and [brackets]."""
    program, found = re.compile(r"(\S*/)?(python3?|make|deepspeed|torchrun|accelerate)"), []
    for line in lines:
        for part in re.split(r"&&|\|\||;|\s\|\s", line.replace("[", "").replace("]", "")):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue
            words = [word for word in words if word != "..." and not re.fullmatch(r"[A-Z_]+=\S*", word)]
            if len(words) > 1 and program.fullmatch(words[0]):
                found.append(words)
    return found


class Parsed(Exception):
    """The command line was understood; nothing has run."""


def understands(words: list[str], monkeypatch) -> None:
    """Parse a command with the parser of the program that it names. Raises AssertionError when it does not fit."""
    line = " ".join(words)
    if Path(words[0]).name == "make":
        rules = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(words[1:]) <= set(rules), f"no such rule: {line}"
        return
    if words[1] == "-m":
        name, rest = words[2], words[3:]
        if name.partition(".")[0] not in FOLDERS:
            assert importlib.util.find_spec(name.partition(".")[0]), f"no such module: {line}"
            return
        name += ".__main__" if (ROOT / name.replace(".", "/")).is_dir() else ""
    else:
        script = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
        if script is None:
            return
        assert (ROOT / words[script]).is_file(), f"no such file: {line}"
        name, rest = words[script].removesuffix(".py").replace("/", "."), words[script + 1:]
    main = importlib.import_module(name).main
    for method in ("parse_args", "parse_intermixed_args"):
        def parse(self, *given, real=getattr(argparse.ArgumentParser, method), **named):
            real(self, *given, **named)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    monkeypatch.setattr(argparse.ArgumentParser, "error", lambda self, message: pytest.fail(f"{line}: {message}"))
    try:
        main(rest)
    except Parsed:
        pass
    except SystemExit as stop:
        assert not stop.code and {"-h", "--help"} & set(rest), f"{line}: {stop.code}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_fit_their_programs(name, monkeypatch, capsys):
    for words in commands(code(document(name))):
        with monkeypatch.context() as patch:
            understands(words, patch)


@pytest.mark.parametrize("line, fits", [
    ("python -m eval.gap BEFORE AFTER --out x", True), ("python -m eval.gap BEFORE AFTER --wrong x", False),
    ("python -m eval.gapp a b", False), ("python eval/none.py", False), ("make nothing", False), ("make demo", True),
    ("OMP_NUM_THREADS=1 python -m eval.run --help   # options", True),
    ("deepspeed --num_gpus 2 train.py x.yaml --deepspeed y", True),
    ("python -m eval.run --mode guess --model x --out y", False), ("python -m data_prep.twins --out x", True),
])
def test_a_wrong_command_is_found(line, fits, monkeypatch, capsys):
    (words,) = commands(code(f"    {line}\n"))
    with monkeypatch.context() as patch:
        if fits:
            understands(words, patch)
        else:
            with pytest.raises((AssertionError, ImportError, pytest.fail.Exception)):
                understands(words, patch)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name):
    text = document(name)
    missing = []
    for piece in code(text):
        for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*", piece):
            path = path.rstrip(".")
            if path.startswith("results/") and not SUMMARY.is_file():
                continue
            if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()):
                missing.append(path)
    for link in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in link and not (link.startswith("results/") and not SUMMARY.is_file()):
            missing += [] if ((ROOT / name).parent / link).exists() else [link]
    assert missing == []


RECIPES = readme.recipe_files(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_recipe_headers_say_what_differs(path, monkeypatch):
    head, (base, keys) = readme.header(path), readme.differences(path)
    assert {"Idea", "Run", "Result"} <= set(head)
    for words in commands([head["Run"]]):
        understands(words, monkeypatch)
    assert path.relative_to(ROOT).as_posix() in head["Run"]
    if base is None:
        assert "Differs" not in head
        return
    said = re.fullmatch(r"from (\S+) in (.+)\. Nothing else\.", head["Differs"])
    assert said and said[1] == base, head["Differs"]
    named = re.split(r",\s+(?:and\s+)?|\s+and\s+", said[2])
    assert len(named) == len(set(named))
    for name in named:
        assert any(key == name or key.startswith(name + ".") for key in keys), f"{name} does not differ"
    for key in keys:
        assert any(key == name or key.startswith(name + ".") for name in named), f"{key} differs and is not named"


def committed() -> list[Path]:
    """The files of the repository, new ones included; tests skip outside a git checkout."""
    try:
        command = ["git", "ls-files", "-co", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.decode().splitlines() if (path := ROOT / name).is_file()]


def test_no_file_names_a_machine():
    places = [rf"(?<![\w.])/{name}/" for name in ("work", "tmp", "root", "home", "Users")]
    hosts = ["pypi" + r"\.org", "python" + "hosted", "--(?:extra-)?" + "index-url", "find" + "-links"]
    found = []
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in re.finditer("|".join(places + hosts), text)]
    assert found == []


def test_files_are_short():
    long = {}
    for path in committed():
        if path.suffix in (".py", ".js", ".html") and "tests" not in path.parts:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > MAX_LINES:
                long[path.relative_to(ROOT).as_posix()] = lines
    assert long == {}
