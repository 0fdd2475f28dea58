"""MathVerse: small parquet files in the hub's schema through the command, every view and the fakes."""

import json
from collections import Counter

import pytest

from data_prep.images import ProblemError
from data_prep.problem import RENDERED_TEXT, TAIL, render
from data_prep.sources import mathverse
from tests.study import (  # noqa: F401, F811
    BLUE, GREEN, RED, all_text, colours, fails, library, make, meet_the_fakes, parquet, png, render_all, shape,
)  # fmt: skip


@pytest.mark.parametrize(
    "question, stem, choices",
    [
        ("Find x.\nChoices:\nA:40\u00b0\nB:60\u00b0\nC:2 \\sqrt { 11 }", "Find x.", ("40\u00b0", "60\u00b0", "2 \\sqrt { 11 }")),
        ("What ratio?\nChoices:\nA.1:2\nB.1:4\nC.3:5", "What ratio?", ("1:2", "1:4", "3:5")),
        ("Is it ()\nChoices:\n(A) up\n(B) down", "Is it ()", ("up", "down")),
        ("Which?\nOptions:\nA) f(x)=(x+5)\nB) $B: y$", "Which?", ("f(x)=(x+5)", "$B: y$")),
        ("Which? Choices: A:1 B:2 C:3", "Which?", ("1", "2", "3")),
        ("Which is A?\nA:one\nB:two", "Which is A?", ("one", "two")),
        ("Find.\nChoices:\nA:ratio B: C\nB:2\nC:3 D: 4", "Find.", ("ratio B: C", "2", "3 D: 4")),
        ("Point A: see.\nChoices:\nA:1\n  2\nB:3", "Point A: see.", ("1\n  2", "3")),
    ],
)
def test_choices_are_taken_out_of_the_question(question, stem, choices):
    assert mathverse.split_choices(question) == (stem, choices)


@pytest.mark.parametrize("question", ["Find x.", "Find x.\nChoices:\n40\n60", "Find x.\nChoices:\nA:40", "Find AB: CD."])
def test_no_choices_to_find(question):
    with pytest.raises(ProblemError, match="question: no choices"):
        mathverse.split_choices(question)


CHOICES = "\nChoices:\nA:10\u00b0\nB:20\u00b0\nC:30\u00b0\nD:40\u00b0"
WORDS = {
    "Text Dominant": "Triangle ABC has AB = 3 and zeta. Find gamma.",
    "Text Lite": "AB = 3. Find gamma.",
    "Vision Intensive": "Find gamma by lines.",
    "Vision Dominant": "Find gamma.",
    "Vision Only": "",
}
PICTURES = dict(zip(WORDS, (RED, RED, RED, GREEN, BLUE), strict=True))


def verse(index, answer="C", kind="multi-choice", leave=(), width=40, **changes):
    """The five rows of a problem as AI4Math/MathVerse has them; `changes` maps a version to changed fields."""
    rows = []
    for version, words in WORDS.items():
        if version in leave:
            continue
        question = words + (CHOICES if words and kind == "multi-choice" else "")
        rows.append({
            "sample_index": str(5 * index + len(rows)), "problem_index": str(index), "problem_version": version,
            "question": question, "image": png(PICTURES[version], width), "answer": answer, "question_type": kind,
            "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
            "query_wo": f"Please. {question}", "query_cot": f"Please think. {question}",
            "question_for_eval": f"THEJUDGES {WORDS['Text Dominant']}{CHOICES}",
        } | changes.get(version.replace(" ", "_"), {}))  # fmt: skip
    return rows


README = """---
configs:
- config_name: testmini
  data_files:
  - split: testmini
    path: testmini.parquet
---
"""


def mathverse_copy(library, root, *problems):
    parquet(library, root / "testmini.parquet", [row for rows in problems for row in rows], ["image"])
    (root / "README.md").write_text(README)
    return root


def test_mathverse_pairs(tmp_path, library):
    root = mathverse_copy(library, tmp_path / "in", verse(1), verse(2, "12", "free-form"))
    files = make(mathverse, tmp_path, "--from", root)
    assert set(files) == {"test"}
    problems = {problem.id: problem for problem in files["test"]}
    versions = [f"{text}-{vision}" for vision in ("vision_intensive", "vision_dominant", "vision_only")
                for text in ("text_dominant", "text_lite")]  # fmt: skip
    assert list(problems) == [f"mathverse-{index}-{pair}" for index in (1, 2) for pair in versions]
    assert Counter(problem.group for problem in files["test"]) == {"mathverse-1": 6, "mathverse-2": 6}
    one = problems["mathverse-1-text_lite-vision_dominant"]
    assert (one.options, one.answer) == (("10\u00b0", "20\u00b0", "30\u00b0", "40\u00b0"), "30\u00b0")
    assert one.meta["kind"] == "Vision Dominant" and one.meta["text_version"] == "Text Lite"
    assert one.meta["subject"] == "Plane Geometry" and (one.license, one.facts) == ("MIT", None)
    vision, both = render(one, "vision"), render(one, "both")
    listed = "\n".join(f"{letter}. {degrees}\u00b0" for letter, degrees in zip("ABCD", (10, 20, 30, 40)))
    assert shape(vision) == ["image", f"Find gamma.\n{listed}\n{TAIL['letter']}"] and colours(vision) == [GREEN]
    assert shape(both) == ["image", f"AB = 3. Find gamma.\n{listed}\n{TAIL['letter']}"] and colours(both) == [RED]
    assert (vision.answer, both.answer) == ("C", "C")
    open_one = problems["mathverse-2-text_dominant-vision_intensive"]
    assert (open_one.options, open_one.answer) == (None, "12")
    assert all_text(render(open_one, "vision")) == "Find gamma by lines.\nAnswer briefly."


def test_mathverse_vision_only_says_no_word_of_the_question(tmp_path, library):
    root = mathverse_copy(library, tmp_path / "in", verse(1), verse(2, "12", "free-form"))
    drawn = [p for p in make(mathverse, tmp_path, "--from", root)["test"] if p.meta["kind"] == "Vision Only"]
    assert len(drawn) == 4
    for problem in drawn:
        for view in ("vision", "rendered"):
            prompt = render(problem, view)
            tail = TAIL["letter"] if problem.options else "Answer briefly."
            assert shape(prompt) == ["image", f"{RENDERED_TEXT}\n{tail}"] and colours(prompt) == [BLUE]
        assert all_text(render(problem, "blind")).startswith("Find gamma by lines.")
        assert colours(render(problem, "both")) == [RED]


def test_mathverse_never_says_what_is_for_the_judge(tmp_path, library):
    root = mathverse_copy(library, tmp_path / "in", *(verse(n) for n in range(3)), verse(9, "12", "free-form"))
    problems = make(mathverse, tmp_path, "--from", root)["test"]
    assert "THEJUDGES" not in (tmp_path / "out" / "test.jsonl").read_text()
    for problem in problems:
        assert "zeta" not in all_text(render(problem, "vision")), "only Text Dominant says it"
    seen = render_all(problems)
    assert {seen[view] for view in ("both", "vision", "blind", "rendered", "noise")} == {24} and "text" not in seen


def test_mathverse_pictures_are_stored_once_and_again_gives_the_same(tmp_path, library):
    root = mathverse_copy(library, tmp_path / "in", verse(1))
    make(mathverse, tmp_path, "--from", root)
    pictures = sorted((tmp_path / "out" / "images").iterdir())
    assert sorted(picture.read_bytes() for picture in pictures) == sorted({png(RED), png(GREEN), png(BLUE)})
    first = (tmp_path / "out" / "test.jsonl").read_bytes()
    make(mathverse, tmp_path, "--from", root)
    assert (tmp_path / "out" / "test.jsonl").read_bytes() == first


def test_mathverse_missing_versions(tmp_path, library, capsys):
    root = mathverse_copy(
        library, tmp_path / "in",
        verse(1), verse(2, leave=["Text Lite"]), verse(3, leave=["Vision Intensive"]),
        verse(4, leave=["Text Lite", "Text Dominant"]),
    )  # fmt: skip
    problems = make(mathverse, tmp_path, "--from", root)["test"]
    # without Vision Intensive nobody says the question of Vision Only in words
    assert Counter(problem.group for problem in problems) == {"mathverse-1": 6, "mathverse-2": 3, "mathverse-3": 2}
    assert "mathverse: 3 of 4 problems lack a version; pairs are made of the rest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"Vision_Dominant": {"question": "Find gamma."}}, "question: no choices (A: ..., B: ...) are found in it (Vision D"),
        ({"Text_Lite": {"question": "Find." + CHOICES.replace("40", "50")}}, "question: Text Lite has other choices than Vision"),
        ({"Vision_Only": {"answer": "A"}}, "answer: Vision Only has 'A', Text Dominant has 'C'"),
        ({"Vision_Only": {"problem_version": "Vision Dominant"}}, "problem_version: 'Vision Dominant' stands in rows 3 and 4"),
    ],
)
def test_mathverse_bad_rows(tmp_path, library, changes, said):
    root = mathverse_copy(library, tmp_path / "in", verse(1, **changes), verse(2))
    message = fails(mathverse, tmp_path, "--from", root)
    assert message.startswith(f"{root}:rows 0-4 (problem_index 1): {said}")
    adapter = ["--from", root, "--skip-bad"]
    assert {problem.group for problem in make(mathverse, tmp_path, *adapter)["test"]} == {"mathverse-2"}
    assert message in json.loads((tmp_path / "out" / "rows.bad.jsonl").read_text())["error"]


def test_mathverse_answer_beyond_the_choices(tmp_path, library):
    root = mathverse_copy(library, tmp_path / "in", verse(1, "E"))
    assert "answer: 'E' is no letter of the 4 choices" in fails(mathverse, tmp_path, "--from", root)


def test_mathverse_elsewhere(tmp_path):
    (tmp_path / "empty").mkdir()
    assert fails(mathverse, tmp_path, "--from", tmp_path / "empty") == (
        f"{tmp_path}/empty: no parquet files of 'testmini' (testmini/testmini-*.parquet or testmini.parquet)"
    )
    (tmp_path / "empty" / "testmini.parquet").write_text("no parquet")
    assert fails(mathverse, tmp_path, "--from", tmp_path / "empty").startswith(f"{tmp_path}/empty/testmini.parquet: cannot be")


def test_a_changed_copy_is_read_again(tmp_path, library):
    """`datasets` would serve the first one from its cache: same folder name, same README."""
    for folder, index in (("a", 1), ("b", 2), ("a", 3)):
        root = mathverse_copy(library, tmp_path / folder / "in", verse(index))
        assert {problem.group for problem in make(mathverse, tmp_path, "--from", root)["test"]} == {f"mathverse-{index}"}


@pytest.mark.parametrize("stored", [bytes, lambda data: {"bytes": data, "path": "a.png"}], ids=["bytes", "struct"])
def test_parquet_of_another_library(tmp_path, library, stored):
    """It does not say that a column holds pictures; and a configuration lies in data/ where `push_to_hub` puts it."""
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [row | {"image": stored(row["image"])} for row in verse(1)]
    (tmp_path / "in" / "data").mkdir(parents=True)
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in" / "data" / "testmini-00000-of-00001.parquet")
    problems = make(mathverse, tmp_path, "--from", tmp_path / "in")["test"]
    assert [colours(render(problem, "vision")) for problem in problems] == [[RED]] * 2 + [[GREEN]] * 2 + [[BLUE]] * 2


def test_columns_that_are_missing(tmp_path, library):
    rows = [{name: value for name, value in row.items() if name != "answer"} for row in verse(1)]
    assert fails(mathverse, tmp_path, "--from", mathverse_copy(library, tmp_path / "in", rows)).startswith(
        f"{tmp_path}/in: no column 'answer'; columns: sample_index, problem_index"
    )


def test_mathverse_fakes(tmp_path, library):
    golds = ["Surface Area $=9236.28 \\mathrm{~m}^{2}$", "$h=58$", "1:64", "\\[g(x)=(x + 4)^2 - 5\\].", "$2 \\pi r(r + h)$"]
    problems = [verse(n, "ABCD"[n % 4], width=40 + n) for n in range(8)]
    problems += [verse(20 + n, gold, "free-form", width=60 + n) for n, gold in enumerate(golds)]
    for number, rows in enumerate(problems):  # a prompt is asked once, so no two problems may look and read alike
        for row in rows:
            row["question"] = row["question"].replace("gamma", f"gamma{number}")
    root = mathverse_copy(library, tmp_path / "in", *problems)
    make(mathverse, tmp_path, "--from", root, out="data/mathverse")
    found = meet_the_fakes("mathverse", tmp_path / "data", tmp_path, "both,vision,blind")
    assert len(found["oracle"]) == 3 * 6 * 13
    closed = [row for row in found["constant"] if row["choices"]]
    assert sum(row["correct"] for row in closed) / len(closed) == 1 / 4
    assert not any(row["correct"] for row in found["constant"] if not row["choices"])
