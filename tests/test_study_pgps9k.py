"""PGPS9K: a small folder in the owners' layout through the command, every view and the fakes."""

import hashlib
import json
from collections import Counter

import pytest
from PIL import Image

from data_prep.images import ProblemError
from data_prep.problem import render
from data_prep.sources import pgps9k
from tests.study import all_text, fails, make, meet_the_fakes, png, render_all


@pytest.mark.parametrize(
    "clause, said, upstream",
    [
        ("line m lieson A B C", "A, B, C lie on line m", ...),
        ("line m lieson A", "A lie on line m", ...),
        ("line A B", None, ...),
        ("line R A P", "A is on line RP", ...),
        ("line D E I K", "E, I are on line DK", "D, E are on line IK"),
        ("line A B C D E", "B, C, D are on line AE", "A, B, C are on line DE"),
        ("\\odot O lieson A B C", "In \\odot O, point A, B, C lie on \\odot O", ...),
        ("\\odot O", None, ...),
        ("circle O", None, ...),
        ("", None, ...),
    ],
)
def test_clauses_in_words(clause, said, upstream):
    assert pgps9k.in_words(clause) == said
    assert pgps9k.in_words(clause, upstream_slip=True) == (said if upstream is ... else upstream)


def test_facts_are_structure_then_measures():
    structure, semantics = ["line A B", "line A D C", "\\odot O lieson A B"], ["AB = 12", " m \\angle 1 = 40 "]
    assert pgps9k.facts(structure, semantics) == (
        "D is on line AC, In \\odot O, point A, B lie on \\odot O, AB = 12, m \\angle 1 = 40"
    )
    assert pgps9k.facts(["line A B"], []) is None
    published = ["line A D C", "\\odot O lieson A B C", "line D E I K"], ["AB = 12", "CB \\perp CA on C"]
    said = "D is on line AC, In \\odot O, point A, B, C lie on \\odot O, {}, AB = 12, CB \\perp CA on C"
    assert pgps9k.facts(*published) == said.format("E, I are on line DK")
    assert pgps9k.facts(*published, upstream_slip=True) == said.format("D, E are on line IK")


@pytest.mark.parametrize(
    "value, text",
    [("48.000", "48"), ("8.50", "8.5"), ("100", "100"), (100.0, "100"), (0.25, "0.25"), ("-0.0", "0"), (1 / 3, "0.3333333333")],
)
def test_numbers_without_idle_zeros(value, text):
    assert pgps9k.number_text(value) == text


def test_the_nearest_choice():
    assert pgps9k.nearest([8.0, 8.5, 9.0, 12.0], "8.485") == "8.5"
    with pytest.raises(ProblemError, match="choices: 8.0 and 9.0 are equally near to the answer 8.5"):
        pgps9k.nearest([8.0, 9.0], "8.5")


def geometry(number, diagram, **changes):
    row = {
        "diagram": diagram, "text": f"Find the length of A{number}. ", "parsing_stru_seqs": ["line A B", "line A D C K"],
        "parsing_sem_seqs": ["AB = 12", "CB \\perp CA on C"], "expression": "Get N0", "answer": f"{number}.000",
        "choices": [float(number), number + 10.5, number + 20.25, number + 30.0], "type": "Line Segment ",
        "book": "Some Book", "page": 7, **changes,
    }  # fmt: skip
    return {name: value for name, value in row.items() if value is not ...}


def owners_folder(root, train, test, nested=True):
    folder = root / "PGPS9K" if nested else root
    folder.mkdir(parents=True)
    (root / "Diagram_Visual").mkdir()
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.json").write_text(json.dumps({f"prob_{n}": row for n, row in rows.items()}, indent=1))
        for row in rows.values():
            if isinstance(row, dict) and row["diagram"].endswith(".png"):
                Image.new("RGB", (40, 30), (int(hashlib.sha256(row["diagram"].encode()).hexdigest()[:2], 16), 0, 0)).save(
                    root / "Diagram_Visual" / row["diagram"]
                )
    return root


@pytest.fixture
def geometry_folder(tmp_path):
    train = {n: geometry(n, f"d_{n // 2}.png") for n in range(2, 8)}  # two problems a diagram
    return owners_folder(tmp_path / "in", train, {n: geometry(n, f"t_{n}.png") for n in range(30, 43)})


def test_pgps9k_keeps_the_split_and_the_diagrams_together(tmp_path, geometry_folder, capsys):
    files = make(pgps9k, tmp_path, "--from", geometry_folder)
    assert [problem.id for problem in files["train"]] == [f"pgps9k-train-prob_{n}" for n in range(2, 8)]
    assert [problem.id for problem in files["test"]] == [f"pgps9k-test-prob_{n}" for n in range(30, 43)]
    assert Counter(problem.group for problem in files["train"]) == {f"pgps9k-d_{n}.png": 2 for n in (1, 2, 3)}
    one = files["test"][0]
    assert one.facts == "D, C are on line AK, AB = 12, CB \\perp CA on C"
    assert (one.question, one.answer, one.options) == ("Find the length of A30.", "30", None)
    assert one.image == "images/t_30.png" and one.license == "research use, on request from the owners"
    assert one.meta == {"answer_with": "letter", "kind": "Line Segment", "split": "test", "book": "Some Book", "page": 7}
    assert "diagrams stand in" not in capsys.readouterr().err
    seen = render_all(files["test"])
    assert {seen[view] for view in ("both", "vision", "text", "blind", "rendered", "shuffled")} == {13}
    assert "AK" not in all_text(render(one, "vision")) and "on line AK" in all_text(render(one, "text"))


def test_pgps9k_switches(tmp_path, geometry_folder):
    slip = make(pgps9k, tmp_path, "--from", geometry_folder, "--upstream-slip", out="slip")["test"][0]
    assert slip.facts.startswith("A, D are on line CK, AB")
    chosen = make(pgps9k, tmp_path, "--from", geometry_folder, "--choices", out="chosen")["test"][0]
    assert (chosen.options, chosen.answer) == (("30", "40.5", "50.25", "60"), "30")
    flat = owners_folder(tmp_path / "flat", {}, {1: geometry(1, "a.png")}, nested=False)
    assert set(make(pgps9k, tmp_path, "--from", flat, out="flat_out")) == {"test"}


def test_pgps9k_says_when_the_owners_share_a_diagram(tmp_path, capsys):
    both = owners_folder(tmp_path / "in", {1: geometry(1, "a.png"), 2: geometry(2, "b.png")}, {3: geometry(3, "a.png")})
    files = make(pgps9k, tmp_path, "--from", both)
    assert {name: len(part) for name, part in files.items()} == {"train": 2, "test": 1}
    assert "1 diagrams stand in train.json and in test.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, options, said",
    [
        ({"diagram": "gone.gif"}, (), "diagram: 'gone.gif' does not exist"),
        ({"diagram": "../a.png"}, (), "diagram: '../a.png' leaves"),
        ({"text": ...}, (), "text: missing field"),
        ({"book": ["a"], "text": 7}, (), "text: must be text, not 7"),
        ({"answer": "many"}, (), "answer: 'many' is not a number"),
        ({"answer": "nan"}, (), "answer: 'nan' is not a number"),
        ({"parsing_sem_seqs": "AB = 1"}, (), "parsing_sem_seqs: must be a list, not 'AB = 1'"),
        ({"parsing_stru_seqs": [1]}, (), "parsing_stru_seqs: must be a list of texts"),
        ({"choices": ["1", 2.0]}, ("--choices",), "choices: must be numbers, not ['1', 2.0]"),
        ({"choices": [5.0, 5.0, 6.0]}, ("--choices",), "choices: 5.0 and 5.0 are equally near"),
        ({"choices": [4.0, 6.5, 6.5]}, ("--choices",), "options: '6.5' stands there twice"),
    ],
)
def test_pgps9k_bad_rows(tmp_path, changes, options, said):
    root = tmp_path / "in"
    owners_folder(root, {}, {5: geometry(5, "a.png", **{k: v for k, v in changes.items() if k != "diagram"})})
    if "diagram" in changes:
        file = root / "PGPS9K" / "test.json"
        file.write_text(file.read_text().replace("a.png", changes["diagram"]))
    assert fails(pgps9k, tmp_path, "--from", root, *options).startswith(f"{root}/PGPS9K/test.json:prob_5: {said}")


def test_pgps9k_elsewhere(tmp_path):
    assert fails(pgps9k, tmp_path, "--from", tmp_path) == f"{tmp_path}: holds no PGPS9K data (train.json and test.json)"
    (tmp_path / "test.json").write_text("{}")
    assert "no folder Diagram_Visual/ beside its json files" in fails(pgps9k, tmp_path, "--from", tmp_path)


def test_pgps9k_fakes(tmp_path, geometry_folder):
    make(pgps9k, tmp_path, "--from", geometry_folder, out="data/pgps9k")
    found = meet_the_fakes("pgps9k", tmp_path / "data", tmp_path, "both,vision,text,blind")
    assert len(found["oracle"]) == 4 * 13
    assert {row["id"] for row in found["constant"] if row["correct"]} == {"pgps9k-test-prob_42"}, "42 is right once"
    assert all(row["pred"] is None for row in found["gibberish"])
    make(pgps9k, tmp_path, "--from", geometry_folder, "--choices", out="data/pgps9k")
    found = meet_the_fakes("pgps9k", tmp_path / "data", tmp_path / "chosen", "both,vision")
    assert 0 < sum(row["correct"] for row in found["constant"]) < 26
