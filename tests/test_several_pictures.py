"""Several pictures in one problem, forms that a data set publishes for a view, fixed option order, and rationales."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_prep import problem as module
from data_prep.problem import (
    OPEN_TAIL,
    RATIONALE_TAIL,
    RENDERED_TEXT,
    TAIL,
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

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "white": (255, 255, 255)}
SIZES = {"red": (40, 30), "green": (20, 50), "blue": (60, 60), "black": (30, 30), "white": (200, 120)}
NAMES = {value: name for name, value in COLORS.items()}


@pytest.fixture
def folder(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", SIZES[name], color).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def three(folder):
    return Problem(
        "p1", "g", "demo", ("red.png", "green.png", "blue.png"), "three squares", "Which is larger?", ("first", "second"),
        "second", "MIT", {"answer_with": "text"}, folder,
    )  # fmt: skip


def shown(prompt):
    """The turn's parts in order: texts as they are, pictures as the name of their colour in brackets."""
    pictures = iter(prompt.images)
    (turn,) = prompt.messages
    parts = [part["text"] if part["type"] == "text" else [NAMES[next(pictures).getpixel((0, 0))]] for part in turn["content"]]
    assert next(pictures, None) is None
    return parts


def words(prompt):
    return "".join(part.get("text", "") for part in prompt.messages[0]["content"])


# Where pictures stand


def test_pictures_without_markers_stand_first_in_order(three):
    assert shown(render(three, "vision")) == [
        ["red"], ["green"], ["blue"], "Which is larger?\nOptions: first, second\nAnswer with one of the options.",
    ]  # fmt: skip


def test_markers_place_pictures_and_later_mentions_stay(three):
    problem = replace(three, question="Is <image 3> below <image 1>? Or <image 3>?", options=None, meta={})
    assert shown(render(problem, "vision")) == [
        ["green"], "Is ", ["blue"], " below ", ["red"], f"? Or <image 3>?\n{OPEN_TAIL}",
    ]  # fmt: skip
    problem = replace(problem, facts="<image 2> is wide")
    assert shown(render(problem, "both")) == [
        "Facts: ", ["green"], " is wide\nIs ", ["blue"], " below ", ["red"], f"? Or <image 3>?\n{OPEN_TAIL}",
    ]  # fmt: skip


@pytest.mark.parametrize("ident, order", [("a", "BCA"), ("b", "BAC"), ("c", "ACB")])
def test_markers_in_options_follow_the_order_shown(three, ident, order):
    options = {"A": "<image 1>", "B": "<image 2>", "C": "<image 3>"}
    problem = replace(three, id=ident, options=tuple(options.values()), answer="<image 3>", meta={})
    colours = {"A": "red", "B": "green", "C": "blue"}
    prompt = render(problem, "vision")
    assert shown(prompt) == [
        "Which is larger?\nA. ", [colours[order[0]]], "\nB. ", [colours[order[1]]], "\nC. ", [colours[order[2]]],
        f"\n{TAIL['letter']}",
    ]  # fmt: skip
    assert prompt.answer == "ABC"[order.index("C")]
    assert prompt.options == tuple(options[letter] for letter in order)


@pytest.mark.parametrize("view", ["text", "blind", "other_facts"])
def test_without_pictures_markers_stay_as_text(three, view):
    problem = replace(three, question="Is <image 2> red?", facts="<image 1> is red")
    other = replace(three, id="p2", facts="<image 3> is blue")
    prompt = render(problem, view, other)
    facts = {"text": "Facts: <image 1> is red\n", "blind": "", "other_facts": "Facts: <image 3> is blue\n"}[view]
    assert prompt.images == ()
    assert shown(prompt) == [f"{facts}Is <image 2> red?\nOptions: first, second\nAnswer with one of the options."]


def test_anothers_facts_may_name_more_pictures_than_there_are(three):
    one = replace(three, image="red.png", facts="a")
    other = replace(three, id="p2", facts="<image 3> is blue, <image 1> is red")
    parts = shown(render(one, "conflict", other))
    assert parts[:2] == ["Facts: <image 3> is blue, ", ["red"]] and parts[2].startswith(" is red\nWhich")


def test_a_single_picture_may_have_a_marker(three):
    one = replace(three, image="red.png", question="See <image 1>: what?", options=None, meta={})
    assert shown(render(one, "vision")) == ["See ", ["red"], f": what?\n{OPEN_TAIL}"]


# Views of several pictures


def test_pixels_of_replaced_pictures(three, folder):
    for view, value in (("white", 255), ("black", 0), ("gray", 128)):
        pictures = render(three, view).images
        assert [picture.size for picture in pictures] == [(40, 30), (20, 50), (60, 60)]
        assert all((np.asarray(picture) == value).all() for picture in pictures)
    noises = [picture.tobytes() for picture in render(three, "noise").images]
    assert noises[0] == module.images.noise((40, 30), "p1").tobytes(), "the first as when it stands alone"
    alike = replace(three, image=("red.png", "red.png"))
    first, second = render(alike, "noise").images
    assert first.tobytes() != second.tobytes()


def test_shuffled_borrows_in_turn_and_keeps_sizes(three, folder):
    other = replace(three, id="p2", image=("black.png", "white.png"))
    prompt = render(three, "shuffled", other)
    assert shown(prompt)[:3] == [["black"], ["white"], ["black"]]
    assert [picture.size for picture in prompt.images] == [(40, 30), (20, 50), (60, 60)]
    assert shown(render(other, "shuffled", three))[:2] == [["red"], ["green"]]
    for mixed in (("black.png", "red.png"), ("blue.png", "red.png", "green.png")):
        with pytest.raises(ProblemError, match=r"view shuffled: the other problem \(p2\) has the same picture"):
            render(three, "shuffled", replace(other, image=mixed))


def test_rendered_draws_below_the_last_picture(three):
    prompt = render(replace(three, question="Is <image 3> larger?"), "rendered")
    assert shown(prompt) == [["red"], ["green"], ["blue"], RENDERED_TEXT]
    sizes = [picture.size for picture in prompt.images]
    assert sizes[:2] == [(40, 30), (20, 50)] and sizes[2][0] == 60 and sizes[2][1] > 60


def test_partners_share_no_picture_where_that_is_possible(three):
    names = ["red.png", "green.png", "blue.png", "black.png", "white.png"]
    problems = [
        replace(three, id=f"q{n}", image=(names[n % 5], names[(n + 1) % 5]), facts=f"scene {n}") for n in range(40)
    ]
    for problem, other in zip(problems, partners(problems)):
        assert not set(problem.pictures) & set(other.pictures)
        assert {View.shuffled, View.conflict, View.other_facts} <= set(possible_views(problem, other))


def test_partners_are_of_another_group_where_that_is_possible(three):
    """A group of six versions of one drawing, in six files: none borrows from its own, though it stands next in the ring."""
    problems = [replace(three, id=f"q{n}", image=f"{n}.png", facts=None, group=f"g{n // 6}") for n in range(18)]
    assert all(other.group != problem.group for problem, other in zip(problems, partners(problems)))
    assert all(other.image != problem.image for problem, other in zip(problems[:6], partners(problems[:6]))), "one group alone"


def test_errors_name_the_picture(three, folder):
    (folder / "green.png").unlink()
    with pytest.raises(ProblemError, match=r"^p1: image\[1\]: 'green.png' does not exist"):
        load_images(three)
    with pytest.raises(ProblemError, match=r"p1: image\[1\]: 'green.png' does not exist"):
        render(three, "white")


# Files

ROW = {
    "id": "p1", "group": "g", "source": "demo", "image": ["red.png", "green.png"], "facts": None, "question": "What?",
    "options": ["a", "b"], "answer": "a", "license": "MIT", "meta": {},
}  # fmt: skip


def published(**entry):
    return {"meta": {"keep_order": True, "published": {"both": entry}}}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"image": []}, "image: is an empty list; no picture is null"),
        ({"image": ["red.png", 7]}, "image[1]: must be text, not a number"),
        ({"image": ["red.png", " "]}, "image[1]: is empty"),
        ({"image": ["red.png", "gone.png"]}, "image[1]: 'gone.png' does not exist"),
        ({"image": ["../x.png", "red.png"]}, "image[0]: '../x.png' leaves the data folder with '..'"),
        ({"image": ["red.png", "text.png"]}, "image[1]: 'text.png' is not a picture that can be read"),
        ({"question": "Is <image 3> red?"}, "question: <image 3> names no picture; the problem has 2"),
        ({"question": "Is <image 0> red?"}, "question: <image 0> names no picture; the problem has 2"),
        ({"options": ["a", "<image 9>"]}, "options[1]: <image 9> names no picture; the problem has 2"),
        ({"facts": "<image 3> is red"}, "facts: <image 3> names no picture; the problem has 2"),
        ({"image": None, "facts": "x", "question": "<image 1>?"}, "question: <image 1> names no picture; the problem has 0"),
        (published(image="red.png", question="<image 2>?"),
         "meta.published.both.question: <image 2> names no picture; meta.published.both has 1"),
        ({"question": "<image 2>?", **published(image="red.png")},
         "question: <image 2> names no picture; meta.published.both has 1"),
        ({"facts": "<image 2>", **published(image="red.png")},
         "facts: <image 2> names no picture; meta.published.both has 1"),
        (published(image="gone.png"), "meta.published.both.image: 'gone.png' does not exist"),
        (published(image=["red.png", "text.png"]), "meta.published.both.image[1]: 'text.png' is not a picture that can"),
        (published(image=None), "meta.published.both.image: must be text or a list, not null"),
        (published(question=" "), "meta.published.both.question: is empty"),
        (published(question=3), "meta.published.both.question: must be text, not a number"),
        (published(), "meta.published.both: must hold image, question or both, holds nothing"),
        (published(img="red.png"), "meta.published.both: must hold image, question or both, holds img"),
        ({"meta": {"published": {"both": "red.png"}}}, "meta.published.both: must be an object, not text"),
        ({"meta": {"published": {"text": {"question": "x"}}}},
         "meta.published.text: no such view can be published; views: both, vision, rendered"),
        ({"meta": {"published": []}}, "meta.published: must be an object, not a list"),
        ({"meta": {"published": {"vision": {"question": None}}}},
         "meta.keep_order: must be true, the pictures of meta.published.vision show letters"),
        ({"meta": {"keep_order": "yes"}}, "meta.keep_order: must be true or false, not text"),
        ({"meta": {"rationale": 7}}, "meta.rationale: must be text, not a number"),
        ({"meta": {"rationale": " "}}, "meta.rationale: is empty"),
    ],
)  # fmt: skip
def test_bad_rows(folder, changes, said):
    (folder / "text.png").write_text("hello")
    file = folder / "p.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "id": "p2", **changes}) + "\n")
    with pytest.raises(ProblemError) as caught:
        read_problems(file)
    assert str(caught.value).startswith(f"{file}:2: {said}")


def test_rows_that_are_good(folder):
    """The same picture twice; facts that a published question takes the place of; null where the options are texts."""
    rows = [
        {"image": ["red.png", "red.png"], "question": "<image 2> or <image 1>?"},
        {"facts": "<image 2> is green", **published(image="red.png", question="The first is green?")},
        {"meta": {"answer_with": "text", "published": {"vision": {"question": None}}}},
        {"question": "<image 2>?", **published(image="red.png", question=None)},
        {"facts": "<image 2> is green", "meta": {"published": {"vision": {"image": "red.png"}}}},  # vision shows no facts
        {"image": ["red.png"]},
    ]
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps({**ROW, "id": f"p{n}", **row}) + "\n" for n, row in enumerate(rows)))
    problems = read_problems(file)
    assert [problem.image for problem in problems] == [("red.png", "red.png"), *[("red.png", "green.png")] * 4, "red.png"]
    write_problems(folder / "again.jsonl", problems)
    assert read_problems(folder / "again.jsonl") == problems
    assert json.loads((folder / "again.jsonl").read_text().splitlines()[0])["image"] == ["red.png", "red.png"]
    assert hash(problems[0]) != hash(problems[1])


def test_each_picture_is_decoded_once(folder, monkeypatch):
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **more: opened.append(path.name) or original(path, **more))
    row = {**ROW, "image": ["red.png", "green.png", "red.png"], **published(image=["green.png", "blue.png"])}
    (folder / "p.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": "p2"}) + "\n")
    read_problems(folder / "p.jsonl")
    assert opened == ["red.png", "green.png", "blue.png"]


def test_check_counts_pictures(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = [ROW, {**ROW, "id": "p2", "image": "red.png", **published(image="blue.png", question="x")}]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module.main(["check", str(folder / "p.jsonl")])
    table = dict(re.findall(r"│ ([a-z ]+?) +│ (.+?) +│", capsys.readouterr().out))
    assert (table["pictures"], table["pictures a problem"]) == ("3", "1 to 2, mean 1.5")


# Published forms, fixed order, rationale


def test_a_published_form_takes_the_place_of_both(three):
    bare = replace(three, image="red.png", facts=None)
    assert View.both not in possible_views(bare) and View.text not in possible_views(bare)
    entry = {"image": ["green.png", "blue.png"], "question": "A square: <image 2>. Which?"}
    told = replace(bare, meta={**three.meta, "published": {"both": entry}})
    assert shown(render(told, "both")) == [
        ["green"], "A square: ", ["blue"], ". Which?\nOptions: first, second\nAnswer with one of the options.",
    ]  # fmt: skip
    assert shown(render(told, "vision"))[0] == ["red"] and View.text not in possible_views(told)
    with_facts = replace(told, facts="a fact")
    assert shown(render(with_facts, "both")) == shown(render(told, "both")), "the published question holds them already"
    pictured = replace(with_facts, meta={**three.meta, "published": {"both": {"image": "green.png"}}})
    assert shown(render(pictured, "both"))[0] == ["green"]
    assert words(render(pictured, "both")).startswith("Facts: a fact\nWhich is larger?")


@pytest.mark.parametrize("view", ["both", "vision", "rendered"])
@pytest.mark.parametrize("options, tail", [(("alpha", "beta"), TAIL["letter"]), (None, OPEN_TAIL)])
def test_no_word_leaks_where_the_picture_shows_the_question(three, view, options, tail):
    meta = {"keep_order": True, "published": {view: {"image": ["white.png", "black.png"], "question": None}}}
    problem = replace(three, question="Where stands zebra?", options=options, answer="beta", facts="zebra fact", meta=meta)
    prompt = render(problem, view)
    assert shown(prompt) == [["white"], ["black"], f"{RENDERED_TEXT}\n{tail}"]
    assert not {"Where", "stands", "zebra", "alpha", "beta", "fact"} & set(re.findall(r"\w+", words(prompt)))
    assert [picture.size for picture in prompt.images] == [SIZES["white"], SIZES["black"]], "nothing drawn below"
    assert prompt.answer == ("B" if options else "beta")
    plain = replace(problem, meta={})
    for other in {"both", "vision", "rendered", "blind"} - {view}:
        fixed = replace(plain, meta={"keep_order": True})
        assert render(problem, other).messages == render(fixed, other).messages, "the other views are as before"


def test_a_published_picture_or_question_is_rendered_too(three, monkeypatch):
    drawn = []
    monkeypatch.setattr(module.images, "draw_below", lambda picture, text: drawn.append((picture.size, text)) or picture)
    for entry in ({"image": "white.png"}, {"question": "How tall?"}):
        prompt = render(replace(three, meta={**three.meta, "published": {"rendered": entry}}), "rendered")
        assert words(prompt) == RENDERED_TEXT
    tail = "\nOptions: first, second\nAnswer with one of the options."
    assert drawn == [(SIZES["white"], f"Which is larger?{tail}"), (SIZES["blue"], f"How tall?{tail}")]


def test_options_keep_their_order_where_the_picture_shows_their_letters(three):
    options = ("delta", "gamma", "beta", "alpha")
    problems = [replace(three, id=f"k{n}", options=options, answer="gamma", meta={}) for n in range(20)]
    assert len({render(problem, "blind").options for problem in problems}) > 5
    for problem in problems:
        prompt = render(replace(problem, meta={"keep_order": True}), "blind")
        assert prompt.options == options and prompt.answer == "B"


def test_a_rationale_is_asked_for_and_taught(three):
    problem = replace(three, meta={**three.meta, "rationale": "The second is 50 high."})
    other = replace(three, id="p2", facts="b", image="black.png")
    for view in View:
        plain, long = render(problem, view, other), render(problem, view, other, rationale=True)
        assert (plain.target, plain.answer) == ("second", "second")
        assert (long.target, long.answer) == ("The second is 50 high. Answer: second", "second")
        assert (long.choices, long.options) == (plain.choices, plain.options)
        if view is View.rendered:
            assert words(long) == words(plain) and long.images[2].height > plain.images[2].height, "asked in the picture"
        else:
            assert words(long) == f"{words(plain)} {RATIONALE_TAIL}"
    with pytest.raises(ProblemError, match=r"p1: view blind: the problem has no rationale \(meta.rationale\)"):
        render(three, "blind", rationale=True)
    drawn = {**problem.meta, "published": {"vision": {"question": None}}}
    asked = render(replace(problem, meta=drawn), "vision", rationale=True)
    assert words(asked) == f"{RENDERED_TEXT}\n{TAIL['text']} {RATIONALE_TAIL}"
