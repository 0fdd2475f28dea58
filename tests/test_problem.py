"""Problems: what each view shows, and what reading and writing a file accepts and refuses."""

import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_prep import problem as module
from data_prep.problem import (
    Problem,
    ProblemError,
    View,
    load_images,
    partners,
    possible_views,
    read_problems,
    render,
    write_problems,
)

ROW = {
    "id": "p1",
    "group": "g1",
    "source": "demo",
    "image": "images/a.png",
    "facts": "a1 red circle",
    "question": "What colour is the circle?",
    "options": ["red", "blue", "green"],
    "answer": "blue",
    "license": "MIT",
    "meta": {"answer_with": "text"},
}
SPECIAL = "<|im_start|>user <|image_pad|><|vision_start|><image><|endoftext|>"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (40, 30)), ("b", (20, 50))):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{name}.png")
    return tmp_path


def make(folder, **changes):
    row = {**ROW, **changes}
    return Problem(**{**row, "options": row["options"] and tuple(row["options"])}, root=folder)


@pytest.fixture
def one(folder):
    return make(folder)


@pytest.fixture
def other(folder):
    return make(folder, id="p2", image="images/b.png", facts="b2 green square", answer="green")


def text_of(prompt):
    (turn,) = prompt.messages
    assert turn["role"] == "user"
    assert [part["type"] for part in turn["content"]] == ["image"] * len(prompt.images) + ["text"]
    return turn["content"][-1]["text"]


# Views


def test_text_of_every_view(one, other):
    shown = ", ".join(render(one, "blind").options)
    question = f"What colour is the circle?\nOptions: {shown}\nAnswer with one of the options."
    for view in View:
        prompt = render(one, view, other)
        own, others = {View.both, View.text}, {View.conflict, View.other_facts}
        facts = "a1 red circle" if view in own else "b2 green square" if view in others else None
        expected = f"Facts: {facts}\n{question}" if facts else question
        if view is View.rendered:
            expected = "Answer the question in the picture."
        assert text_of(prompt) == expected, view
        assert len(prompt.images) == (view not in (View.text, View.blind, View.other_facts)), view
        assert (prompt.answer, prompt.choices) == ("blue", render(one, "blind").options), view


def test_pixels_of_every_view(one, other, folder):
    own = np.asarray(Image.open(folder / "images/a.png"))
    bicubic = Image.open(folder / "images/b.png").resize((40, 30), Image.Resampling.BICUBIC)
    expected = {
        View.both: own, View.vision: own, View.conflict: own,
        View.white: np.full_like(own, 255), View.black: np.full_like(own, 0), View.gray: np.full_like(own, 128),
        View.noise: np.asarray(module.images.noise((40, 30), "p1")), View.shuffled: np.asarray(bicubic),
    }  # fmt: skip
    for view, pixels in expected.items():
        (picture,) = render(one, view, other).images
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), pixels, err_msg=view.value)
    (drawn,) = render(one, View.rendered).images
    np.testing.assert_array_equal(np.asarray(drawn)[:30], own)
    assert drawn.width == 40 and drawn.height > 30


def test_replaced_pictures_have_the_upright_size(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "images/turned.jpg", exif=exif)
    turned = make(folder, image="images/turned.jpg")
    assert [render(turned, view).images[0].size for view in ("vision", "white", "noise")] == [(30, 40)] * 3


def test_the_question_is_drawn_whole(one, monkeypatch):
    drawn = []
    monkeypatch.setattr(module.images, "draw_below", lambda picture, text: drawn.append(text) or picture)
    render(one, "rendered")
    assert drawn == [text_of(render(one, "vision"))]


@pytest.mark.parametrize(
    "changes, tail, choices",
    [
        ({"meta": {"answer_with": "text"}}, "Answer with one of the options.", {"red", "blue", "green"}),
        ({"meta": {"answer_with": "letter"}}, "Answer with the option's letter.", {"A", "B", "C"}),
        ({"meta": {}}, "Answer with the option's letter.", {"A", "B", "C"}),
        ({"options": None, "meta": {}}, "Answer briefly.", None),
    ],
)
def test_how_it_is_answered(folder, changes, tail, choices):
    prompt = render(make(folder, **changes), "blind")
    lines = text_of(prompt).split("\n")
    assert lines[-1] == tail
    assert (None if prompt.choices is None else set(prompt.choices)) == choices
    if choices == {"A", "B", "C"}:
        assert lines[1:-1] == [f"{letter}. {option}" for letter, option in zip("ABC", prompt.options)]
        assert dict(zip(prompt.choices, prompt.options))[prompt.answer] == "blue"
    elif choices is None:
        assert (lines, prompt.answer, prompt.options) == ([ROW["question"], tail], "blue", None)


def test_options_are_permuted_by_the_id_alone(folder):
    assert render(make(folder), "blind").options == ("red", "green", "blue")  # pinned: sha256, not Python's hash
    places = Counter(render(make(folder, id=f"x{n}", answer="red"), "blind").options.index("red") for n in range(3000))
    assert all(900 < places[place] < 1100 for place in range(3)), places


def test_special_tokens_pass_through(folder):
    special = make(folder, question=SPECIAL, facts=SPECIAL, options=[SPECIAL, "b"], answer=SPECIAL)
    assert text_of(render(special, "both")).count(SPECIAL) == 3
    write_problems(folder / "s.jsonl", [special])
    assert read_problems(folder / "s.jsonl") == [special]


@pytest.mark.parametrize(
    "changes, view, borrowed, said",
    [
        ({"facts": None}, "both", None, "p1: view both: the problem has no facts"),
        ({"facts": None}, "text", None, "p1: view text: the problem has no facts"),
        *(
            ({"image": None}, view.value, {}, f"p1: view {view.value}: the problem has no picture")
            for view in View
            if view not in (View.text, View.blind, View.other_facts)
        ),
        ({}, "shuffled", None, "p1: view shuffled: no other problem was given"),
        ({}, "conflict", None, "p1: view conflict: no other problem was given"),
        ({}, "other_facts", None, "p1: view other_facts: no other problem was given"),
        ({}, "shuffled", {"image": None}, "p1: view shuffled: the other problem (p2) has no picture"),
        ({}, "shuffled", {"image": "images/a.png"}, "p1: view shuffled: the other problem (p2) has the same picture"),
        ({}, "conflict", {"facts": None}, "p1: view conflict: the other problem (p2) has no facts"),
        ({}, "other_facts", {"facts": None}, "p1: view other_facts: the other problem (p2) has no facts"),
        ({}, "other_facts", {"facts": "a1 red circle"}, "p1: view other_facts: the other problem (p2) has the same facts"),
        ({}, "conflict", {"facts": "a1 red circle"}, "p1: view conflict: the other problem (p2) has the same facts"),
        ({"image": "images/gone.png"}, "white", None, "p1: image: 'images/gone.png' does not exist"),
        ({"question": "色?"}, "rendered", None, "p1: view rendered: cannot be drawn: the font has no '色'"),
        ({}, "colour", None, "p1: no such view 'colour'; views: both, vision,"),
    ],
)
def test_a_view_that_cannot_be(folder, changes, view, borrowed, said):
    other = None if borrowed is None else make(folder, **{"id": "p2", "image": "images/b.png", **borrowed})
    with pytest.raises(ProblemError) as caught:
        render(make(folder, **changes), view, other)
    assert said in str(caught.value)


def test_possible_views_are_those_that_render(folder, other):
    for problem in (make(folder), make(folder, facts=None), make(folder, image=None)):
        for borrowed in (None, other):
            for view in View:
                if view in possible_views(problem, borrowed):
                    render(problem, view, borrowed)
                else:
                    with pytest.raises(ProblemError):
                        render(problem, view, borrowed)


def test_a_picture_is_opened_once(one, monkeypatch):
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(args) or original(*args, **kwargs))
    for view in ("both", "vision", "white", "noise", "rendered"):
        opened.clear()
        render(one, view)
        assert len(opened) == 1, view
    assert [picture.size for picture in load_images(one)] == [(40, 30)]


# Partners


def _many(folder, count, picture, facts):
    return [make(folder, id=f"q{n}", image=picture(n), facts=facts(n), source=f"s{n % 2}") for n in range(count)]


def test_partners_show_another_picture_of_the_same_source(folder):
    problems = _many(folder, 60, lambda n: f"{n // 4}.png", lambda n: f"scene {n // 8}")
    found = partners(problems)
    for problem, other in zip(problems, found):
        assert (other.source, other.image != problem.image, other.facts != problem.facts) == (
            problem.source,
            True,
            True,
        )
    assert len({other.id for other in found}) > 20, "not all borrow from one"


def test_partners_do_not_depend_on_the_order_of_the_file(folder):
    problems = _many(folder, 40, lambda n: f"{n // 3}.png", lambda n: f"scene {n}")
    forward = dict(zip([p.id for p in problems], partners(problems)))
    backward = dict(zip([p.id for p in problems[::-1]], partners(problems[::-1])))
    assert forward == backward


def test_partners_where_there_is_little_to_borrow(folder):
    assert partners([]) == []
    assert partners(_many(folder, 6, lambda n: "same.png", str)) == [None] * 6
    assert partners(_many(folder, 4, lambda n: None, str)) == [None] * 4
    same_facts = _many(folder, 8, lambda n: f"{n}.png", lambda n: "same")
    assert all(other.image != problem.image for problem, other in zip(same_facts, partners(same_facts)))
    mixed = _many(folder, 20, lambda n: f"{n}.png", lambda n: str(n) if n < 10 else None)
    assert all((p.facts is None) == (o.facts is None) for p, o in zip(mixed, partners(mixed)))


def test_partners_of_many_problems_with_few_pictures_are_fast(folder):
    problems = _many(folder, 20_000, lambda n: "b.png" if n < 2 else "a.png", str)
    assert all(other.image != problem.image for problem, other in zip(problems, partners(problems)))


# Files


def write_rows(folder, *rows):
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_round_trip_is_exact_and_repeats(folder, one, other):
    problems = [one, replace(other, image=None, options=None, meta={"level": 2, "x": [1.5, None, "ä"]})]
    write_problems(folder / "p.jsonl", problems)
    first = (folder / "p.jsonl").read_bytes()
    assert read_problems(folder / "p.jsonl") == problems
    assert [problem.root for problem in read_problems(folder / "p.jsonl")] == [folder] * 2
    write_problems(folder / "p.jsonl", read_problems(folder / "p.jsonl"))
    assert (folder / "p.jsonl").read_bytes() == first
    assert first.endswith(b"}\n") and b"\r" not in first and "ä".encode() in first
    assert list(json.loads(first.split(b"\n")[0])) == sorted(ROW)


def test_writing_checks_and_leaves_the_old_file(folder, one):
    write_problems(folder / "p.jsonl", [one])
    before = (folder / "p.jsonl").read_bytes()
    for bad, said in (
        (replace(one, id="p9", answer="teal"), ":2: answer: 'teal'"),
        (one, ":2: id: 'p1' stands on line 1"),
    ):
        with pytest.raises(ProblemError, match=said):
            write_problems(folder / "p.jsonl", [one, bad])
    assert (folder / "p.jsonl").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["images", "p.jsonl"]


BAD_ROWS = [
    ({"anwser": "blue"}, "anwser: unknown field; did you mean 'answer'?"),
    ({"zzz": 1}, "zzz: unknown field"),
    *(({name: ...}, f"{name}: missing field") for name in ROW),
    *(({name: 7}, f"{name}: must be text") for name in ("id", "group", "source", "question", "answer", "license")),
    *(({name: None}, f"{name}: must be text, not null") for name in ("id", "answer", "license")),
    ({"id": True}, "id: must be text, not a boolean"),
    ({"facts": 7}, "facts: must be text or null, not a number"),
    ({"image": 7}, "image: must be text, a list or null, not a number"),
    *(
        ({name: " "}, f"{name}: is empty")
        for name in ("id", "question", "answer", "group", "license", "facts", "image")
    ),
    ({"answer": "teal"}, "answer: 'teal' is not among the options (red, blue, green)"),
    ({"options": ["red", "blue", "blue"]}, "options: 'blue' stands there twice"),
    ({"options": ["blue"]}, "options: needs at least 2, has 1"),
    ({"options": []}, "options: needs at least 2, has 0"),
    ({"options": "red, blue"}, "options: must be a list or null, not text"),
    ({"options": ["blue", 3]}, "options[1]: must be text, not a number"),
    ({"options": ["blue", ""]}, "options[1]: is empty"),
    ({"options": ["blue", "red "]}, "options[1]: 'red ' has spaces at its edge"),
    ({"options": [*map(str, range(26)), "blue"], "meta": {}}, "options: 27 options, but 26 letters"),
    ({"meta": None}, "meta: must be an object, not null"),
    ({"meta": {"answer_with": "number"}}, "meta: answer_with must be 'letter' or 'text', not 'number'"),
    ({"question": "\ud800"}, "question: holds half of a surrogate pair"),
    ({"meta": {"x": "\ud800"}}, "meta: cannot be written as JSON"),
    ({"image": None, "facts": None}, "facts: a problem needs a picture or facts, this one has neither"),
    ({"image": "images/gone.png"}, "image: 'images/gone.png' does not exist"),
    ({"image": "/etc/passwd"}, "image: '/etc/passwd' is an absolute path"),
    ({"image": "../a.png"}, "image: '../a.png' leaves the data folder with '..'"),
    ({"image": "images/link.png"}, "image: 'images/link.png' leaves the data folder through a link"),
    ({"image": "images/empty.png"}, "image: 'images/empty.png' is empty (0 bytes)"),
    ({"image": "images/text.png"}, "image: 'text.png' is not a picture that can be read"),
    ({"image": "images/cut.png"}, "image: 'cut.png' cannot be decoded"),
    (b'{"id": "p1"', "row: is not JSON ("),
    (b"[1]", "row: must be an object, not a list"),
    (b"", "row: is blank; only the end of the file may be"),
    (b"\xef\xbb\xbf{}", "row: is not JSON (Unexpected UTF-8 BOM"),
    (b'{"id": "\xff"}', "row: is not UTF-8 (byte 9 is 0xff)"),
    (b'{"meta": NaN}', "row: NaN is not a number that JSON knows"),
    (b'{"meta": 1e999}', "row: 1e999 is too large for a number"),
    (b'{"meta": ' + b"1" * 5000 + b"}", "row: is not JSON that can be read"),
    (b'{"id": "a", "id": "b"}', "id: is given twice"),
    (b"[" * 100_000, "row: is nested too deeply"),
    ({"id": "p0"}, "id: 'p0' stands on line 1 already"),
]


@pytest.fixture
def broken_pictures(folder):
    whole = (folder / "images/a.png").read_bytes()
    (folder / "images/cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images/text.png").write_text("hello")
    (folder / "images/empty.png").touch()
    outside = folder.parent / f"{folder.name}-outside.png"
    outside.write_bytes(whole)
    (folder / "images/link.png").symlink_to(outside)
    return folder


@pytest.mark.parametrize("bad, said", BAD_ROWS, ids=[f"{n}-{said[:30]}" for n, (_, said) in enumerate(BAD_ROWS)])
def test_bad_rows_name_file_line_and_field(broken_pictures, bad, said, capsys):
    folder = broken_pictures
    if isinstance(bad, dict):
        row = {name: value for name, value in {**ROW, **bad}.items() if value is not ...}
        bad = json.dumps(row).encode()
    path = write_rows(folder, {**ROW, "id": "p0"}, bad, {**ROW, "id": "p2"})
    with pytest.raises(ProblemError) as caught:
        read_problems(path)
    assert str(caught.value).startswith(f"{path}:2: {said}")
    assert not path.with_name("rows.bad.jsonl").exists()

    assert [problem.id for problem in read_problems(path, skip_bad=True)] == ["p0", "p2"]
    (kept,) = map(json.loads, path.with_name("rows.bad.jsonl").read_text().splitlines())
    assert (kept["line"], kept["error"]) == (2, str(caught.value))
    assert kept["raw"] == bad.decode("utf-8", errors="backslashreplace")
    assert f"{path}: 1 of 3 rows are bad, written to {folder}/rows.bad.jsonl" in capsys.readouterr().err


def test_reading_mended_rows_removes_the_bad_file(folder):
    path = write_rows(folder, ROW, b"{}")
    read_problems(path, skip_bad=True)
    assert path.with_name("rows.bad.jsonl").exists()
    write_rows(folder, ROW)
    read_problems(path, skip_bad=True)
    assert not path.with_name("rows.bad.jsonl").exists()


def test_a_folder_that_cannot_be_written(folder, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data_prep.read.replacing", refuse)
    path = write_rows(folder, ROW, b"{}")
    assert len(read_problems(path, skip_bad=True)) == 1
    said = capsys.readouterr().err
    assert f"1 of 2 rows are bad, not written, {folder} is not writable (Permission denied)" in said


def test_files_without_a_good_row(folder):
    with pytest.raises(
        ProblemError, match=r"rows\.jsonl: no good row \(2 bad\); the first: .*rows\.jsonl:1: id: missing"
    ):
        read_problems(write_rows(folder, b"{}", b"{}"), skip_bad=True)
    with pytest.raises(ProblemError, match=r"rows\.jsonl: no good row \(0 bad\)"):
        read_problems(write_rows(folder))
    with pytest.raises(ProblemError, match=r"gone\.jsonl: cannot be read \(No such file"):
        read_problems(folder / "gone.jsonl")


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n", b"\r\n", b"\n  \n\n"])
def test_ends_of_files(folder, end):
    path = folder / "e.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + end)
    assert len(read_problems(path)) == 1


def test_a_line_separator_inside_text_is_text(folder):
    path = write_rows(folder, {**ROW, "question": "one\u2028two\u0085three"})
    assert read_problems(path)[0].question == "one\u2028two\u0085three"


def test_verify(broken_pictures):
    cut = write_rows(broken_pictures, {**ROW, "image": "images/cut.png"})
    assert read_problems(cut, verify="header") and read_problems(cut, verify="none")
    text = write_rows(broken_pictures, {**ROW, "image": "images/text.png"})
    assert read_problems(text, verify="none")
    with pytest.raises(ProblemError, match="not a picture"):
        read_problems(text, verify="header")
    with pytest.raises(ProblemError, match="does not exist"):
        read_problems(write_rows(broken_pictures, {**ROW, "image": "images/gone.png"}), verify="none")
    with pytest.raises(ProblemError, match="verify must be one of full, header, none"):
        read_problems(text, verify="all")


def test_the_pixel_limit_of_reading_holds_when_loading(folder):
    path = write_rows(folder, ROW)
    with pytest.raises(ProblemError, match=r"rows\.jsonl:1: image: 'a\.png' has 40x30 pixels, over the limit of 1199"):
        read_problems(path, max_pixels=1199)
    (problem,) = read_problems(path, max_pixels=1200)
    assert load_images(problem)[0].size == (40, 30)
    with pytest.raises(ProblemError, match=r"p1: image: .*over the limit of 1000"):
        load_images(replace(problem, max_pixels=1000))


def test_a_shared_picture_is_decoded_once(folder, monkeypatch):
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(args) or original(*args, **kwargs))
    assert len(read_problems(write_rows(folder, *({**ROW, "id": f"p{n}"} for n in range(5))))) == 5
    assert len(opened) == 1


# Command


def test_check_command(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = write_rows(folder, ROW, {**ROW, "id": "p2", "image": "images/b.png", "facts": None, "answer": "red"})
    module.main(["check", str(path)])
    said = capsys.readouterr().out
    for text in ("both (1), vision, text (1), blind", "33.3%", "'blue' 50.0%", "rendered"):
        assert text in said
    with pytest.raises(SystemExit) as caught:
        module.main(["check", str(write_rows(folder, ROW, ROW))])
    assert str(caught.value) == f"{path}:2: id: 'p1' stands on line 1 already"
    module.main(["check", "--skip-bad", str(path)])
    assert "problems" in capsys.readouterr().out
