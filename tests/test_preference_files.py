"""Adapters of preference data in JSON beside pictures: MMPR, ms-swift, POVID; and what the placing of pictures promises."""

import json

import pytest

from data_prep.images import ProblemError
from data_prep.sources import common, groups
from data_prep.sources.preference import mmpr, povid, swift
from data_prep.sources.preference.common import prompt_of
from tests.test_preference_sources import BLUE, GREEN, RED, fails, placed, run, sides, user
from tests.test_sources import data_uri, picture_bytes, save, snapshot, talk

PICTURES = {"a.png": RED, "b.png": GREEN, "deep/c.png": BLUE, "broken.png": b"no"}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for name, data in PICTURES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def shown(pair):
    names = {placed(data): name for name, data in PICTURES.items()}
    return [names[path] for path in pair.images]


# MMPR


def mmpr_row(question="What?", chosen="A", rejected="B", **changes):
    return {"question": question, "chosen": chosen, "rejected": rejected, **changes}


MMPR = [
    mmpr_row("<image>\nWhat?", image="a.png", id=3),
    mmpr_row("Which of <image> and <image>?", image=["b.png", "a.png"], id=3),
    mmpr_row("No picture?", image=None),
    mmpr_row("None at all?"),
    mmpr_row("Plain?", image="deep/c.png"),
    mmpr_row("Tie?", "A", "A\n", image="a.png"),
]


def test_mmpr(tmp_path, pictures, capsys):
    file = save(tmp_path, MMPR, "scienceqa_vqa.jsonl", lines=True)
    pairs = run(mmpr, tmp_path, "--data", file, "--images", pictures)
    assert [pair.prompt for pair in pairs] == [
        (user(None, "What?"),), (user("Which of ", None, " and ", None, "?"),), (user("No picture?"),), (user("None at all?"),),
        (user(None, "Plain?"),),
    ]  # fmt: skip
    assert [shown(pair) for pair in pairs] == [["a.png"], ["b.png", "a.png"], [], [], ["deep/c.png"]]
    assert [pair.group for pair in pairs] == [placed(RED), placed(RED), pairs[2].id, pairs[3].id, placed(BLUE)]
    assert pairs[0].id.startswith("mmpr-3-") and pairs[1].id.startswith("mmpr-3-") and pairs[0].id != pairs[1].id
    assert {(pair.license, pair.source, pair.meta["subset"]) for pair in pairs} == {("MIT", "mmpr", "scienceqa_vqa")}
    assert capsys.readouterr().out.splitlines()[1:] == ["mmpr: pairs left out: identical answers (1)"], "MIT needs no warning"
    before = snapshot(tmp_path / "out")
    run(mmpr, tmp_path, "--data", file, "--images", pictures)
    assert snapshot(tmp_path / "out") == before


def test_mmpr_of_its_meta_json(tmp_path, pictures):
    """Two files; their paths begin on the authors' machines."""
    folder = tmp_path / "MMPR"
    (folder / "annotations").mkdir(parents=True)
    save(folder / "annotations", [mmpr_row(image="a.png")], "one.jsonl", lines=True)
    save(folder / "annotations", [mmpr_row(image="c.png"), mmpr_row("Words?")], "two.jsonl", lines=True)
    meta = {
        "one": {"root": "MMPR/images", "annotation": "/mnt/share/MMPR/annotations/one.jsonl", "length": 1, "repeat_time": 1},
        "two": {"root": "MMPR/images/deep", "annotation": "MMPR/annotations/two.jsonl", "length": 2, "repeat_time": 2},
    }
    file = save(folder, meta, "meta.json")
    pairs = run(mmpr, tmp_path, "--data", file, "--images", pictures)
    assert [(shown(pair), pair.meta["subset"]) for pair in pairs] == [(["a.png"], "one"), (["deep/c.png"], "two"), ([], "two")]
    assert "only a data set has a revision" in fails(mmpr, tmp_path, "--data", file, "--images", pictures, "--revision", "main")
    (folder / "annotations/two.jsonl").unlink()
    said = f"{file}: two.annotation: 'two.jsonl' does not exist in {folder}/annotations"
    assert fails(mmpr, tmp_path, "--data", file, "--images", pictures) == said
    save(folder, {"one": {"root": "../..", "annotation": "one.jsonl"}}, "meta.json")
    assert fails(mmpr, tmp_path, "--data", file).startswith(f"{file}: one.root: '../..' leaves the data folder")


def test_mmpr_folder_of_files(tmp_path, pictures):
    folder = tmp_path / "annotations"
    folder.mkdir()
    for name in ("b", "a"):
        save(folder, [mmpr_row(f"In {name}?", image="a.png")], f"{name}.jsonl", lines=True)
    pairs = run(mmpr, tmp_path, "--data", folder, "--images", pictures)
    assert [pair.meta["subset"] for pair in pairs] == ["a", "b"] and pairs[0].group == pairs[1].group


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"image": "gone.png"}, "image: 'gone.png' does not exist"),
        ({"image": ["a.png", "../pictures/b.png"]}, "image[1]: '../pictures/b.png' leaves the data folder with '..'"),
        ({"image": "/etc/passwd"}, "image: '/etc/passwd' lies outside the picture folder"),
        ({"image": "broken.png"}, "image: 'broken.png' is not a picture that can be read"),
        ({"image": 7}, "image: must be text, not 7"),
        ({"image": None, "question": "<image> What?"}, "question: <image> stands 1 time, the row has 0 pictures"),
        ({"question": ["x"]}, "question: must be text, not ['x']"),
        ({"rejected": {"a": 1}}, "rejected: must be text, not {'a': 1}"),
        ({"chosen": ...}, "chosen: missing field"),
    ],
)  # fmt: skip
def test_mmpr_bad_rows(tmp_path, pictures, changes, said):
    bad = {name: value for name, value in {**MMPR[4], **changes}.items() if value is not ...}
    file = save(tmp_path, [MMPR[0], bad], "rows.jsonl", lines=True)
    assert fails(mmpr, tmp_path, "--data", file, "--images", pictures).startswith(f"{file}:2: {said}")
    assert [pair.chosen for pair in run(mmpr, tmp_path, "--data", file, "--images", pictures, "--skip-bad")] == ["A"]


# ms-swift


def chat(*texts, **row):
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)], **row}


def test_swift_answers(tmp_path, pictures, capsys):
    rows = [
        chat("<image>What?", "Cat.", images=["a.png"], rejected_response="Dog."),
        chat("<image>What?", "Cat.", images=["a.png"], rejected_images=["a.png"],
             rejected_messages=chat("<image>What?", " Cow. ")["messages"]),
        chat("<image>A?", "Yes.", "And <image>?", "No.", images=["b.png", "a.png"], rejected_response="Yes."),
        chat("Words?", "Yes.", rejected_response="No.", margin=2),
        chat([{"type": "image", "image": "b.png"}, {"type": "text", "text": "Who?"}], "Here.", rejected_response=["No.", "x"]),
        chat("<image>Addressed?", "Yes.", images=[data_uri((9, 9, 9))], rejected_response="No."),
    ]
    rows[0]["messages"].insert(0, {"role": "system", "content": "Be short."})
    file = save(pictures, rows, "mine.jsonl", lines=True)
    pairs = run(swift, tmp_path, "--data", file, "--license", "CC-BY-NC-SA-4.0")
    assert [sides(pair) for pair in pairs] == [
        ("Cat.", "Dog."), ("Cat.", "Cow."), ("No.", "Yes."), ("Yes.", "No."), ("Here.", "No."), ("Here.", "x"), ("Yes.", "No."),
    ]  # fmt: skip
    assert pairs[0].prompt == ({"role": "system", "content": [{"type": "text", "text": "Be short."}]}, user(None, "What?"))
    assert pairs[2].prompt == (
        user(None, "A?"), {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}, user("And ", None, "?"),
    )  # fmt: skip
    assert [shown(pair) for pair in pairs[:6]] == [["a.png"], ["a.png"], ["b.png", "a.png"], [], ["b.png"], ["b.png"]]
    assert pairs[6].images[0].endswith(".jpg") and {pair.rejected_images for pair in pairs} == {()}
    assert {(pair.source, pair.license) for pair in pairs} == {("mine", "CC-BY-NC-SA-4.0")}
    assert "mine: CC-BY-NC-SA-4.0: non-commercial use only" in capsys.readouterr().out


def test_swift_pictures(tmp_path, pictures, capsys):
    twin = pictures / "same.png"
    twin.write_bytes(RED)
    rows = [
        chat("<image>What?", "Cat.", images=["a.png"], rejected_images=["b.png"]),
        chat("<image>What?", "Cat.", images=["a.png"], rejected_images=["deep/c.png"], rejected_response="Dog."),
        chat("<image>Why?", "Cat.", images=["a.png"], rejected_images=["same.png"]),
        chat("<image>Why?", "Cat.", images=["a.png"], rejected_images=["same.png"], rejected_response="Dog."),
        chat("Lone <image>?", "Cat.", images=["deep/c.png"], rejected_response="Cow."),
    ]
    file = save(pictures, rows, "mine.jsonl", lines=True)
    pairs = run(swift, tmp_path, "--data", file, "--license", "MIT", "--source", "cats")
    red, green, blue = map(placed, (RED, GREEN, BLUE))
    assert [(pair.rejected, pair.images, pair.rejected_images) for pair in pairs] == [
        (None, (red,), (green,)), ("Dog.", (red,), (blue,)), ("Dog.", (red,), ()), ("Cow.", (blue,), ()),
    ]  # fmt: skip
    assert {pair.group for pair in pairs} == {red}, "a picture on the rejected side ties pairs too"
    assert {pair.source for pair in pairs} == {"cats"}
    assert capsys.readouterr().out.splitlines()[1:] == ["cats: pairs left out: identical pictures (1)"]


@pytest.mark.parametrize(
    "row, said",
    [
        (chat("Q?", "A."), "rejected_response: missing, and neither rejected_messages nor other rejected_images are there"),
        (chat("Q?", "A.", images=["a.png"], rejected_images=["a.png"]), "rejected_response: missing"),
        (chat("Q?", rejected_response="x"), "messages: must end with the assistant's answer"),
        (chat(rejected_response="x"), "messages: must end with the assistant's answer"),
        (chat("<image>", "A.", images=["a.png"], rejected_response="x"), "messages: is empty"),
        (chat("<image>Q?", "A.", rejected_response="x"), "messages: <image> stands 1 time, the row has 0 pictures"),
        (chat("Q?", "<image>", "R?", "A.", images=["a.png"], rejected_response="x"),
         "messages: <image> stands in the assistant's text"),
        (chat("Q?", "A.", rejected_response={"a": 1}), "rejected_response: must be text, not {'a': 1}"),
        (chat("Q?", "A.", rejected_response=["x", 3]), "rejected_response[1]: must be text, not 3"),
        (chat("Q?", "A.", rejected_response="x", rejected_messages=[]), "rejected_messages: stand beside rejected_response"),
        (chat("Q?", "A.", rejected_messages=chat("R?", "B.")["messages"]), "rejected_messages: differ from messages before"),
        (chat("Q?", "A.", images=["a.png"], rejected_images=["b.png", "a.png"]),
         "rejected_images: 2 pictures, but the prompt has 1 image parts"),
        (chat("Q?", "A.", images=["a.png"], rejected_images=["gone.png"]), "rejected_images: 'gone.png' does not exist"),
        (chat("Q?", "A.", images=["http://x.org/a.png"], rejected_response="x"), "images: 'http://x.org/a.png' is on the web"),
        (chat("Q?", "A.", videos=["a.mp4"], rejected_response="x"), "videos: only pictures are read"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: unknown role 'tool'"),
        ({"rejected_response": "x"}, "messages: missing field"),
    ],
)  # fmt: skip
def test_swift_bad_rows(tmp_path, pictures, row, said):
    good = chat("Q?", "A.", images=["deep/c.png"], rejected_response="B.")
    file = save(pictures, [good, row], "mine.jsonl", lines=True)
    assert fails(swift, tmp_path, "--data", file, "--license", "MIT").startswith(f"{file}:2: {said}")


def test_a_bad_rejected_picture_leaves_no_picture_behind(tmp_path, pictures):
    row = chat("Q?", "A.", images=["a.png"], rejected_images=["broken.png"])
    file = save(pictures, [row], "mine.jsonl", lines=True)
    assert "rejected_images: 'broken.png' is not a picture" in fails(swift, tmp_path, "--data", file, "--license", "MIT")
    assert not list(tmp_path.glob("out/images/*"))


# POVID


def povid_row(better, worse, **row):
    return {"id": "7", "image": "a.png", "conversations": talk(*better), "rejected_conversations": talk(*worse), **row}


def test_povid(tmp_path, pictures, capsys):
    question = "<image>\nWhat is it?"
    rows = [
        povid_row([question, "A cat."], [question, "A cat and a dog."]),
        povid_row([question, "One.", "And?", "Two.", "Then?", "Three."],
                  ["What is it?", "Won.", "And? ", "Two.", "Then?", "Tree."]),
        povid_row([question, "A cat."], [question, " A cat."], image="b.png"),
        povid_row(["Words?", "Yes."], ["Words?", "No."], image=None),
        povid_row(["Say.", "Said.", "And <image>?", "Seen."], ["Say.", "Sad.", "And <image>?", "Sea."], image="deep/c.png"),
    ]  # fmt: skip
    file = save(tmp_path, rows, "POVID.json")
    pairs = run(povid, tmp_path, "--data", file, "--images", pictures)
    assert [sides(pair) for pair in pairs] == [
        ("A cat.", "A cat and a dog."), ("One.", "Won."), ("Three.", "Tree."), ("Yes.", "No."), ("Said.", "Sad."),
        ("Seen.", "Sea."),
    ]  # fmt: skip
    answers = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in ("One.", "Two.", "Said.")]
    asked = user(None, "What is it?")
    assert [pair.prompt for pair in pairs] == [
        (asked,), (asked,), (asked, answers[0], user("And?"), answers[1], user("Then?")), (user("Words?"),), (user("Say."),),
        (user("Say."), answers[2], user("And ", None, "?")),
    ]  # fmt: skip
    assert [shown(pair) for pair in pairs] == [["a.png"]] * 3 + [[], [], ["deep/c.png"]], "none with what is asked before it"
    assert [pair.meta for pair in pairs] == [{}, {"turn": 0}, {"turn": 2}, {}, {"turn": 0}, {"turn": 1}]
    assert len({pair.id for pair in pairs}) == 6 and all(pair.id.startswith("povid-7-") for pair in pairs), "ids repeat"
    assert {pair.license for pair in pairs} == {"CC-BY-4.0"}
    assert capsys.readouterr().out.splitlines()[1:] == ["povid: pairs left out: identical answers (1)"]


@pytest.mark.parametrize(
    "row, said",
    [
        (povid_row(["Q?", "A."], ["R?", "B."]), "rejected_conversations[0]: asks something else than conversations[0]"),
        (povid_row(["Q?", "A."], ["Q?"]), "rejected_conversations: must have the same turns as conversations"),
        (povid_row(["Q?"], ["Q?"]), "conversations: must have a question and then an answer"),
        (povid_row(["<image><image> Q?", "A."], ["Q?", "B."]), "conversations: <image> stands 2 times, the row has 1 picture"),
        (povid_row(["Q?", "A."], ["Q?", "B."], image="gone.png"), "image: 'gone.png' does not exist"),
        ({"conversations": talk("Q?", "A.")}, "rejected_conversations: missing field"),
    ],
)
def test_povid_bad_rows(tmp_path, pictures, row, said):
    file = save(tmp_path, [povid_row(["Q?", "A."], ["Q?", "B."]), row], "POVID.json")
    assert fails(povid, tmp_path, "--data", file, "--images", pictures).startswith(f"{file}:row 1: {said}")


# Tables of rows that name pictures by path; placing


def test_a_table_needs_the_picture_folder(tmp_path, pictures):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    columns = {"image": ["a.png"], "question": ["Q?"], "chosen": ["A"], "rejected": ["B"]}
    folder = tmp_path / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.Dataset.from_dict(columns).to_parquet(folder / "data/train-0.parquet")
        (pair,) = run(mmpr, tmp_path, "--data", folder, "--images", pictures)
        assert shown(pair) == ["a.png"]
        assert fails(mmpr, tmp_path, "--data", folder) == f"{folder}:row 0: image: 'a.png' does not exist"
        columns["image"] = [{"bytes": RED, "path": None}]
        features = datasets.Dataset.from_dict(columns).features | {"image": datasets.Image()}
        stored = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        stored.to_parquet(folder / "data/train-0.parquet")
        error = fails(mmpr, tmp_path, "--data", folder, "--images", pictures)
        assert error == f"{folder}: the column 'image' holds pictures; here rows name them by path"


def test_put_places_all_or_none_and_decodes_once(tmp_path, pictures, monkeypatch):
    decoded, load = [], common.load
    monkeypatch.setattr(common, "load", lambda source, limit: decoded.append(source) or load(source, limit))
    placer = common.Placer(tmp_path / "out", 10_000)
    with pytest.raises(ProblemError, match=r"^other\[1\]: a picture of 2 bytes is not"):
        placer.put({"own": [lambda: RED], "other": [lambda: GREEN, lambda: b"no"]})
    assert not (tmp_path / "out").exists() and len(decoded) == 3
    decoded.clear()
    paths = placer.put({"own": [lambda: pictures / "a.png", lambda: GREEN], "other": [lambda: RED]})
    assert paths == {"own": (placed(RED), placed(GREEN)), "other": (placed(RED),)}, "a file is known by its bytes"
    assert (tmp_path / "out" / placed(RED)).samefile(pictures / "a.png") and len(decoded) == 2
    assert placer.put({"own": [lambda: GREEN]}) == {"own": (placed(GREEN),)} and len(decoded) == 2
    with pytest.raises(ProblemError, match=r"^own: .* over the limit"):
        common.Placer(tmp_path / "out", 20).put({"own": [lambda: picture_bytes()]})


def test_tied():
    sets = [("a", "b"), ("c", "d"), ("e",), ("b", "c"), ("f", "e")]
    assert groups.tied(sets) == ["a", "a", "e", "a", "e"] and groups.tied(sets[:2]) == ["a", "c"] and groups.tied([]) == []


def test_rows_of_a_json_list_and_of_lines_are_the_same(tmp_path, pictures):
    lists, lines = (save(tmp_path, MMPR, f"{name}.jsonl", lines=name == "lines") for name in ("list", "lines"))
    one, other = (run(mmpr, tmp_path, "--data", file, "--images", pictures, out=file.stem) for file in (lists, lines))
    assert [pair.id for pair in one] == [pair.id for pair in other] and json.loads(lists.read_text()) == MMPR


# Prompts


@pytest.mark.parametrize(
    "turns, count, parts",
    [
        ([("user", "Same?")], 2, [None, None, "Same?"]),
        ([("user", "<image>\n<image>\nSame?")], 2, [None, None, "Same?"]),
        ([("user", "<image> Same?\n")], 1, [None, "Same?"]),
        ([("user", "Is <image> in <image>?")], 2, ["Is ", None, " in ", None, "?"]),
        ([("user", "Look.\n<image>")], 1, ["Look.", None]),
        ([("user", "First:\n\n<image>\nSecond:\n<image>\nSame?")], 2, ["First:", None, "Second:", None, "Same?"]),
    ],
)  # fmt: skip
def test_places_of_pictures(turns, count, parts):
    assert prompt_of(turns, count, "question") == (user(*parts),)
