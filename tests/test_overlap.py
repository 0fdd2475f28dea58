"""What counts as an overlap, by hand: pictures re-encoded, resized, bordered; questions that are templates or not."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from data_prep import overlap
from data_prep.overlap import near_questions, same_items, shingles, without_overlap, words
from data_prep.problem import Problem, ProblemError, read_problems, write_problems

LONG = "How many red buses are parked left of the old fountain beside the church?"


def drawing(cells: dict[int, str], size=(120, 90)) -> Image.Image:
    """Coloured squares in some of 3x3 cells on flat ground."""
    image = Image.new("RGB", size, (124, 118, 104))
    for cell, colour in cells.items():
        left, top = cell % 3 * size[0] // 3 + 6, cell // 3 * size[1] // 3 + 5
        ImageDraw.Draw(image).rectangle((left, top, left + 24, top + 18), fill=colour)
    return image


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer).convert("RGB")


def problem(name: str, question: str = "What is it?", *, image=None, facts=None, options=None, answer="a", group=None,
            source="s") -> Problem:
    return Problem(name, group or name, source, image, facts, question, options, answer, "CC0-1.0", {})


def with_picture(folder: Path, name: str, image: Image.Image) -> Problem:
    image.save(folder / f"{name}.png")
    return replace(problem(name, image=f"{name}.png"), root=folder)


ORIGINAL = {0: "red", 4: "blue", 8: "white"}
COPIES = {
    "equal": (lambda image: image, "same picture"),
    "jpeg": (jpeg, "near picture"),
    "smaller": (lambda image: image.resize((90, 68), Image.Resampling.LANCZOS), "near picture"),
    "smaller jpeg": (lambda image: jpeg(image.resize((90, 68), Image.Resampling.LANCZOS)), "near picture"),
    "larger": (lambda image: image.resize((180, 135), Image.Resampling.BICUBIC), "near picture"),
    "white border": (lambda image: ImageOps.expand(image, 6, "white"), "near picture"),
    "border of its own ground": (lambda image: ImageOps.expand(image, 6, image.getpixel((0, 0))), "near picture"),
}
OTHERS = {
    "another colour": {0: "red", 4: "green", 8: "white"},
    "another colour, as bright": {0: "red", 4: (0, 41, 0), 8: "white"},  # 0.587 x 41 is about 0.114 x 255 - 5
    "another cell": {0: "red", 5: "blue", 8: "white"},
    "one more": {0: "red", 4: "blue", 8: "white", 6: "black"},
    "one less": {0: "red", 4: "blue"},
    "all moved by a cell": {1: "red", 5: "blue"},
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_a_picture_are_found(name, tmp_path) -> None:
    change, reason = COPIES[name]
    mine = with_picture(tmp_path, "mine", change(drawing(ORIGINAL)))
    other = with_picture(tmp_path, "other", drawing(ORIGINAL))
    decoy = with_picture(tmp_path, "decoy", drawing(OTHERS["another cell"]))
    kept, found = without_overlap([mine, decoy], [[other]])
    assert kept == [decoy]
    assert [(one.id, one.file, one.other, one.reason) for one in found] == [("mine", "against[0]", "other", reason)]


@pytest.mark.parametrize("name", OTHERS)
def test_drawings_that_differ_in_one_thing_are_others(name, tmp_path) -> None:
    """At any distance: what decides is the comparison of pixels."""
    mine, other = with_picture(tmp_path, "mine", drawing(OTHERS[name])), with_picture(tmp_path, "other", drawing(ORIGINAL))
    assert without_overlap([mine], [[other]], distance=64) == ([mine], [])


def test_a_thin_mark_a_step_of_colour_a_place_and_a_shape_each_make_another_picture(tmp_path) -> None:
    """Each is seen by one of the comparisons alone: brightness, colour, place on plain ground, width to height."""
    def disc(colour: tuple[int, int, int], *, mark: bool = False) -> Image.Image:
        image = Image.new("RGB", (240, 240), "white")
        ImageDraw.Draw(image).ellipse((60, 60, 180, 180), fill=colour)
        if mark:
            ImageDraw.Draw(image).line((120, 110, 120, 130), fill="black", width=2)
        return image

    purple, blue = (140, 125, 195), (110, 168, 222)
    pairs = [(disc(blue), disc(blue, mark=True)), (disc(blue), disc(purple)),
             (drawing({0: "red", 4: "blue"}), drawing({1: "red", 5: "blue"})),
             (drawing(ORIGINAL), drawing(ORIGINAL).resize((120, 72)))]
    for number, pair in enumerate(pairs):
        mine, other = (with_picture(tmp_path, f"{number}{side}", image) for side, image in zip("ab", pair))
        assert without_overlap([mine], [[other]], distance=64) == ([mine], []), number


def test_worlds_of_other_splits_are_others(twins) -> None:
    """24 training pictures of twins share no world with the 8 test pictures, and every one is found against itself."""
    train, test = read_problems(twins / "train.jsonl"), read_problems(twins / "test.jsonl")
    assert without_overlap(train, [twins / "test.jsonl"]) == (train, [])
    kept, found = without_overlap(test, [train, twins / "test.jsonl"])
    assert kept == [] and {(one.reason, one.file) for one in found} == {("same picture", str(twins / "test.jsonl"))}


def test_hash_counts_bits_and_the_distance_is_a_limit(tmp_path, monkeypatch) -> None:
    """Columns that grow brighter set all 64 bits; a step down in one of 8 columns clears 8 of them."""
    steps = np.repeat(np.arange(9) * 20, 10)[None, :, None].astype(np.uint8)
    rising = Image.fromarray(np.broadcast_to(steps, (80, 90, 3)).copy())
    falling = rising.copy()
    falling.paste((35, 35, 35), (30, 0, 40, 80))    # 0 20 40 35 80 ...: the third step goes down
    codes = overlap.dhash(rising), overlap.dhash(falling)
    assert codes[0] == 2**64 - 1 and int(codes[1]).bit_count() == 56
    pair = with_picture(tmp_path, "mine", falling), with_picture(tmp_path, "other", rising)
    monkeypatch.setattr(overlap, "_equal_pixels", lambda *_: True)
    assert len(without_overlap([pair[0]], [[pair[1]]], distance=8)[1]) == 1
    assert len(without_overlap([pair[0]], [[pair[1]]], distance=7)[1]) == 0


def test_content_box() -> None:
    image = Image.new("RGB", (60, 40), "white")
    image.paste("gray", (5, 5, 55, 35))
    image.paste("red", (20, 10, 40, 30))
    assert overlap.content_box(image) == (20, 10, 40, 30)      # white, then gray; the red one is plain and stays
    image.putpixel((0, 0), (0, 0, 0))
    assert overlap.content_box(image) == (0, 0, 60, 40)


def test_any_of_several_pictures_and_published_ones_count(tmp_path) -> None:
    drawing({1: "red"}).save(tmp_path / "a.png")
    drawing({7: "blue"}).save(tmp_path / "b.png")
    several = replace(problem("several", image=("a.png", "b.png")), root=tmp_path)
    meta = {"published": {"vision": {"image": "b.png", "question": None}}}
    published = replace(problem("published", image="a.png"), meta=meta, root=tmp_path)
    plain = replace(problem("plain", image="b.png"), root=tmp_path)
    assert [one.id for one in without_overlap([several, published], [[plain]])[1]] == ["several", "published"]


def test_words() -> None:
    assert words("  What IS <image 1>  2x + 3 = 5,\n“really”?") == ("what", "is", "2x", "+", "3", "=", "5", "really")
    assert words("ﬁve") == ("five",)
    assert shingles(("a", "b", "c", "d")) == {("a", "b", "c"), ("b", "c", "d")} and shingles(("a", "b")) == set()


def test_same_item_needs_facts_or_a_question_that_says_something() -> None:
    short, options = "Which shape is at I?", ("circle", "cross")
    base = problem("x", short, facts="I circle.", options=options, answer="circle")

    def pairs(mine: Problem, *others: Problem) -> list:
        return list(same_items([mine], list(others)))

    assert pairs(base, replace(base, id="y", question="which shape is at i", options=("cross", "circle"))) == [(0, 0)]
    for change in ({"facts": "I circle. B cross."}, {"answer": "cross"}, {"options": ("circle", "cross", "square")},
                   {"question": "Which shape is at B?"}):
        assert pairs(base, replace(base, id="y", **change)) == []
    bare = replace(base, facts=None)
    assert pairs(bare, replace(bare, id="y")) == []                         # 5 + 2 words
    longer = replace(bare, options=("circle", "cross", "square"))
    assert pairs(longer, replace(longer, id="y")) == [(0, 0)]               # 5 + 3 words
    assert pairs(longer, replace(longer, id="y", group="1"), replace(longer, id="z", group="2")) == []      # a template
    assert pairs(longer, replace(longer, id="y", group="1"), replace(longer, id="z", group="1")) == [(0, 0)]


def test_near_questions_by_hand() -> None:
    """14 words make 12 triples. The last word changed, 11 are shared: 11 / 13 = 0.846. Both ends changed: 10 / 14."""
    mine = [problem("m", LONG)]
    one_off = problem("o", LONG.replace("church", "bank"))
    two_off = problem("t", LONG.replace("church", "bank").replace("How", "So"))
    assert list(near_questions(mine, [one_off], 11 / 13)) == [(0, 0)]
    assert list(near_questions(mine, [one_off], 0.85)) == []
    assert list(near_questions(mine, [two_off], 0.8)) == [] and list(near_questions(mine, [two_off], 10 / 14)) == [(0, 0)]


def test_templates_are_no_evidence_and_groups_are_one_voice() -> None:
    mine, other = problem("m", LONG), problem("o", LONG, group="g")
    again = replace(other, id="o2")
    assert [one.other for one in without_overlap([mine], [[other, again]])[1]] == ["o"]             # one group
    assert without_overlap([mine], [[other, replace(again, group="h")]])[1] == []                   # two groups ask it
    unlike = replace(mine, answer="b")
    assert [one.reason for one in without_overlap([unlike], [[other]])[1]] == ["near question"]
    second = problem("m2", LONG.replace("church", "bank"))
    assert without_overlap([unlike, second], [[other]])[1] == []        # a template on this side
    seven = "How many red buses are parked there?"
    assert without_overlap([problem("m", seven)], [[problem("o", seven)]])[1] == []


def test_a_question_published_for_a_view_counts() -> None:
    """MathVerse says the whole question in `both` only."""
    published = {"published": {"both": {"question": LONG}, "vision": {"question": None}}}
    other = replace(problem("o", "How many?", image="o.png"), meta=published)
    mine, unlike = problem("m", LONG), problem("u", LONG.replace("church", "bank"), answer="b")
    assert list(same_items([mine], [other])) == list(near_questions([unlike], [other], 0.8)) == [(0, 0)]
    assert list(same_items([other], [mine])) == list(near_questions([other], [unlike], 0.8)) == [(0, 0)]


def test_facts_decide_within_a_source() -> None:
    mine, other = problem("m", LONG, facts="Two buses."), problem("o", LONG, facts="Three buses.")
    assert without_overlap([mine], [[other]])[1] == []
    elsewhere = replace(other, source="elsewhere", answer="b")
    assert [one.reason for one in without_overlap([mine], [[elsewhere]])[1]] == ["near question"]


def test_command_writes_the_rest(tmp_path, capsys) -> None:
    train = [with_picture(tmp_path, "mine", jpeg(drawing(ORIGINAL))),
             with_picture(tmp_path, "decoy", drawing(OTHERS["one less"]))]
    write_problems(tmp_path / "train.jsonl", train)
    write_problems(tmp_path / "test.jsonl", [with_picture(tmp_path, "other", drawing(ORIGINAL))])
    words = [str(tmp_path / "train.jsonl"), "--against", str(tmp_path / "test.jsonl")]
    overlap.main([*words, "--out", str(tmp_path / "kept.jsonl")])
    printed = capsys.readouterr().out
    assert "near picture: mine is other of" in printed and "1 of 2 problems occur" in printed
    assert [json.loads(line)["id"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()] == ["decoy"]
    for out, message in (("elsewhere/kept.jsonl", "must lie in"), ("train.jsonl", "a .jsonl file of its own"),
                         ("test.jsonl", "is one of --against")):
        with pytest.raises(SystemExit, match=f"error: --out .*{message}"):
            overlap.main([*words, "--out", str(tmp_path / out)])
    with pytest.raises(SystemExit, match="no problem is left, so it is not written"):
        overlap.main([words[0], "--against", words[0], "--out", str(tmp_path / "none.jsonl")])
    assert not (tmp_path / "none.jsonl").exists()


def test_errors(tmp_path) -> None:
    for values in ({"distance": 65}, {"question": 0.0}, {"question": 1.1}):
        with pytest.raises(ProblemError, match=next(iter(values))):
            without_overlap([problem("x")], [[problem("y")]], **values)
    gone = replace(problem("x", image="gone.png"), root=tmp_path)
    with pytest.raises(ProblemError, match="x: image: 'gone.png' does not exist"):
        without_overlap([gone], [[problem("y")]])
