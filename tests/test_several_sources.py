"""Several pictures through the adapters: their order, their markers, their places, and groups that share none."""

import hashlib
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from data_prep.images import ProblemError
from data_prep.problem import Problem, read_problems, render
from data_prep.read import BadRows
from data_prep.sources import common, hf, llava, messages
from tests.test_sources import data_uri, everything, fails, openai, picture_bytes, run, save, snapshot, talk

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, color in (("a.png", RED), ("b.png", GREEN), ("c.png", BLUE)):
        (folder / name).write_bytes(picture_bytes(color))
    return folder


def stored(problem):
    return [(problem.root / name).read_bytes() for name in problem.pictures]


# Conversations


def said(problems):
    return {problem.id: (problem.question, problem.image) for problem in problems}


def test_tokens_become_markers(tmp_path, mine):
    rows = [
        {"id": "all", "image": ["a.png", "b.png"], "conversations": talk("<image>\n<image>\nSame?", "No.", "Sure?", "Yes.")},
        {"id": "in", "image": ["a.png", "b.png"], "conversations": talk("Is <image> in <image>?", "No.")},
        {"id": "late", "image": ["a.png", "b.png"], "conversations": talk("<image>\nWhat?", "A.", "And <image>?", "B.")},
        {"id": "none", "image": ["b.png", "a.png"], "conversations": talk("Same?", "No.")},
        {"id": "one", "image": ["c.png"], "conversations": talk("And <image> ?", "C.")},
        {"id": "two", "image": "c.png", "conversations": talk("What?", "C.", "Now <image>?", "D.")},
    ]
    problems = everything(run(llava, tmp_path, "--from", save(mine, rows), "--license", "MIT"))
    both = ("images/a.png", "images/b.png")
    assert said(problems) == {
        "all-0": ("<image 1>\n<image 2>\nSame?", both), "all-1": ("Sure?", both),
        "in-0": ("Is <image 1> in <image 2>?", both),
        "late-0": ("What?", "images/a.png"), "late-1": ("And <image 2>?", both),
        "none-0": ("Same?", both[::-1]),
        "one-0": ("And \n ?", "images/c.png"),
        "two-0": ("What?", "images/c.png"), "two-1": ("Now \n?", "images/c.png"),
    }  # fmt: skip
    late = next(problem for problem in problems if problem.id == "late-1")
    content = render(late, "vision").messages[0]["content"]
    assert [part.get("text") for part in content] == [None, "And ", None, "?\nAnswer briefly."]


def test_parts_become_markers(tmp_path, mine):
    def part(url):
        return {"type": "image_url", "image_url": {"url": url}}

    def text(words):
        return {"type": "text", "text": words}

    def row(*contents):
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}

    uri = data_uri(RED)
    rows = [
        row([part("a.png"), text("or"), part("b.png")], "A."),
        row([part("a.png"), text("What?")], "A.", [text("And"), part("b.png"), text("?")], "B.", "Both?", "No."),
        row([text("See <image> and <image>."), part("b.png"), part("c.png")], "Yes."),
        row([part(uri), part(uri), text("Same?")], "Yes."),
        {**row([part("a.png"), text("Named twice?")], "Yes."), "images": ["a.png"]},
    ]
    problems = everything(run(messages, tmp_path, "--from", save(mine, rows, lines=True), "--license", "MIT"))
    a, b, c = (f"images/{name}.png" for name in "abc")
    found = said(problems)
    twice = found.pop("mine-4-0")
    assert found == {
        "mine-1-0": ("<image 1>\nor\n<image 2>", (a, b)),
        "mine-2-0": ("What?", a), "mine-2-1": ("And\n<image 2>\n?", (a, b)), "mine-2-2": ("Both?", (a, b)),
        "mine-3-0": ("See <image 1> and <image 2>.", (b, c)),
        "mine-5-0": ("Named twice?", a),
    }  # fmt: skip
    assert twice[0] == "<image 1>\n<image 2>\nSame?" and twice[1][0] == twice[1][1]


def picture_in_the_answer():
    row = openai("a.png")
    row["messages"][1]["content"] = [{"type": "image_url", "image_url": {"url": "b.png"}}]
    return row


@pytest.mark.parametrize(
    "row, said",
    [
        ({"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image> or <image> or <image>"},
                                                     {"role": "assistant", "content": "x"}]},
         "image: <image> stands 3 times, the row has 2 pictures"),
        ({"images": ["a.png", "b.png"], "conversations": talk("Q", "A", "<image><image>", "B")},
         "image: must stand in the first question"),
        ({**openai("a.png"), "images": ["b.png"]}, "image: the pictures beside the conversation are not those in it"),
        (picture_in_the_answer(), "image: must stand in a question"),
        ({"images": ["a.png", "b.png"], "conversations": talk("Is it <image 3>?", "A")},
         "question: <image 3> names no picture; the problem has 2"),
        ({"images": ["a.png", "gone.png"], "conversations": talk("Q", "A")}, "image: 'gone.png' does not exist"),
    ],
)  # fmt: skip
def test_conversations_that_do_not_fit(tmp_path, mine, row, said):
    file = save(mine, [openai("c.png"), row], "chat.jsonl", lines=True)
    error = fails(messages, tmp_path, "--from", file, "--license", "MIT", "--test-share", 0)
    assert error.startswith(f"{file}:2: {said}")


def test_problems_that_share_a_picture_share_a_group(tmp_path, mine):
    """a-b and c-d share nothing until b-c comes; e stands alone."""
    for name in "de":
        (mine / f"{name}.png").write_bytes(picture_bytes((ord(name), 0, 0)))
    pairs = [("a", "b"), ("c", "d"), ("e",), ("b", "c")]
    rows = [{"id": "-".join(p), "image": [f"{n}.png" for n in p], "conversations": talk("Q", "A")} for p in pairs]
    problems = everything(run(llava, tmp_path, "--from", save(mine, rows), "--license", "MIT"))
    groups = {problem.id: problem.group for problem in problems}
    assert groups == {"a-b-0": "a.png", "c-d-0": "a.png", "b-c-0": "a.png", "e-0": "e.png"}


# Hugging Face datasets


@pytest.fixture(scope="module")
def datasets():
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    return library


def parquet(datasets, tmp_path, monkeypatch, features, **columns):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    columns = {"question": ["Which?"] * 3, "answer": ["x"] * 3, "id": ["r0", "r1", "r2"], **columns}
    text = {name: datasets.Value("string") for name in ("question", "answer", "id")}
    datasets.Dataset.from_dict(columns, features=datasets.Features({**text, **features})).to_parquet(folder / "train.parquet")
    return partial(run, hf, tmp_path, "--from", folder, "--license", "MIT")


def cell(color):
    return {"bytes": picture_bytes(color), "path": None}


def test_columns_of_pictures(tmp_path, monkeypatch, datasets):
    features = {f"image_{n}": datasets.Image() for n in (1, 2, 3)}
    adapt = parquet(
        datasets, tmp_path, monkeypatch, features,
        question=["<image 1> or <image 2>?", "Which?", "None?"],
        image_1=[cell(RED), cell(GREEN), cell(BLUE)], image_2=[cell(GREEN), None, None], image_3=[None, cell(RED), None],
    )  # fmt: skip
    arguments = ("--map", "image=image_1,image_2,image_3", "--test-share", 0)
    problems = everything(adapt(*arguments))
    red, green, blue = map(picture_bytes, (RED, GREEN, BLUE))
    assert {problem.id: stored(problem) for problem in problems} == {"r0": [red, green], "r1": [green, red], "r2": [blue]}
    groups = {problem.id: problem.group for problem in problems}
    assert groups["r0"] == groups["r1"] != groups["r2"], "r0 and r1 share both pictures"
    before = snapshot(tmp_path / "out")
    adapt(*arguments)
    assert snapshot(tmp_path / "out") == before
    with pytest.raises(SystemExit, match="--map image=image_1,image_4: no column 'image_4'; did you mean 'image_"):
        adapt("--map", "image=image_1,image_4")


def test_a_column_of_lists(tmp_path, monkeypatch, datasets):
    adapt = parquet(
        datasets, tmp_path, monkeypatch, {"image": datasets.Sequence(datasets.Image())},
        image=[[cell(RED), cell(GREEN)], [cell(BLUE)], [cell(GREEN), cell(RED), cell(GREEN)]],
    )  # fmt: skip
    problems = {problem.id: problem for problem in everything(adapt())}
    red, green, blue = map(picture_bytes, (RED, GREEN, BLUE))
    assert {name: stored(problem) for name, problem in problems.items()} == {
        "r0": [red, green], "r1": [blue], "r2": [green, red, green],
    }  # fmt: skip
    assert isinstance(problems["r1"].image, str)


# Drafts


def draft(folder, pictures=(), published=None, row=1, check=None, **changes):
    values = {
        "id": f"p{row}", "group": f"g{row}", "source": "demo", "image": None, "facts": "f", "question": "Q?", "options": None,
        "answer": "x", "license": "MIT", "meta": {}, **changes,
    }  # fmt: skip
    given = common.Row("rows", row, b"{}", dict)
    return common.Draft(Problem(**values), tuple(pictures), published or {}, check, given)


def convert(out, *drafts):
    """What an adapter does with the drafts of its rows, one draft a row."""
    bad = BadRows("rows", False, out / "bad.jsonl")
    made = [one for d in drafts for one in common.drafts_of([d.row], lambda value, row, d=d: [d], bad)]
    common.convert(out, made, bad, 0, None)
    return read_problems(out / "train.jsonl")


def as_bytes(color):
    return partial(picture_bytes, color)


def as_file(path: Path):
    return lambda: path


def test_files_lie_under_their_names_and_bytes_under_their_hash(tmp_path, mine):
    out = tmp_path / "out"
    one = draft(mine, [as_file(mine / "a.png"), as_bytes(GREEN), as_file(mine / "a.png")], image=("x/1.png", "any", "x/2.png"))
    (problem,) = convert(out, one)
    first, second, third = problem.pictures
    assert first == third == "images/x/1.png", "one file lies in one place"
    assert second == f"images/{hashlib.sha256(picture_bytes(GREEN)).hexdigest()[:24]}.png"
    assert stored(problem) == [picture_bytes(RED), picture_bytes(GREEN), picture_bytes(RED)]


def test_published_pictures_are_placed_and_named(tmp_path, mine):
    out = tmp_path / "out"
    forms = {
        "both": (as_file(mine / "b.png"), as_bytes(RED)), "rendered": (as_bytes(BLUE),), "vision": (as_file(mine / "c.png"),),
    }  # fmt: skip
    meta = {"published": {"both": {"image": ["m/b.png", "any"], "question": "Told."}, "rendered": {"question": None}}}
    one = draft(mine, [as_bytes(RED)], forms, image="any", meta=meta, facts=None)
    (problem,) = convert(out, one)
    found = problem.meta["published"]
    red, blue = (f"images/{hashlib.sha256(picture_bytes(color)).hexdigest()[:24]}.png" for color in (RED, BLUE))
    assert found == {
        "both": {"image": ["images/m/b.png", red], "question": "Told."}, "rendered": {"image": blue, "question": None},
        "vision": {"image": blue},  # a file without a name lies under the hash of its bytes
    }  # fmt: skip
    assert problem.image == red and meta["published"]["rendered"] == {"question": None}, "the draft's own meta is left alone"
    assert render(problem, "both").images[0].getpixel((0, 0)) == GREEN
    assert sorted(path.name for path in out.rglob("*.png")) == sorted(["b.png", Path(red).name, Path(blue).name])


def test_each_picture_of_drafts_is_decoded_once(tmp_path, mine, monkeypatch):
    decoded, load = [], common.load
    monkeypatch.setattr(common, "load", lambda source, limit: decoded.append(source) or load(source, limit))
    pictures = [as_file(mine / "a.png"), as_bytes(BLUE)]
    drafts = [draft(mine, pictures, {"both": (as_bytes(BLUE),)}, row, image=("a.png", "b")) for row in (1, 2)]
    convert(tmp_path / "out", *drafts)
    assert [source if isinstance(source, Path) else "bytes" for source in decoded] == [mine / "a.png", "bytes"]


def test_checks_get_all_pictures_and_place_none_when_they_fail(tmp_path, mine):
    def check(first: Image.Image, second: Image.Image) -> None:
        assert (first.getpixel((0, 0)), second.getpixel((0, 0))) == (RED, GREEN)
        raise ProblemError("facts: do not fit")

    one = draft(mine, [as_bytes(RED), as_bytes(GREEN)], image=("a", "b"), check=check)
    with pytest.raises(ProblemError, match="^rows:1: facts: do not fit"):
        convert(tmp_path / "out", one)
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"pictures": [as_bytes(RED), lambda: b"no"], "image": ("a", "b")}, "image[1]: a picture of 2 bytes is not"),
        ({"pictures": [as_bytes(RED)], "image": "a", "published": {"vision": (lambda: b"no",)}},
         "meta.published.vision.image: a picture of 2 bytes is not"),
        ({"pictures": [as_bytes(RED)], "image": "a", "published": {"text": (as_bytes(RED),)}},
         "meta.published.text: no such view can be published"),
        ({"pictures": [as_bytes(RED)], "image": "a", "published": {"both": (as_bytes(RED),)},
          "meta": {"published": {"both": {"question": "<image 2>?"}}}},
         "meta.published.both.question: <image 2> names no picture; meta.published.both has 1"),
    ],
)  # fmt: skip
def test_drafts_that_do_not_fit(tmp_path, mine, changes, said):
    with pytest.raises(ProblemError) as caught:
        convert(tmp_path / "out", draft(mine, **changes))
    assert str(caught.value).startswith(f"rows:1: {said}")
    assert not list(tmp_path.glob("out/*.jsonl"))


def test_two_pictures_may_not_take_one_place(tmp_path, mine):
    drafts = [draft(mine, [as_file(mine / f"{name}.png")], row=row, image="same.png") for row, name in ((1, "a"), (2, "b"))]
    with pytest.raises(ProblemError) as caught:
        convert(tmp_path / "out", *drafts)
    assert "image: images/same.png is another picture's place already" in str(caught.value)
