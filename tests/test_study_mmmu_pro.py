"""MMMU-Pro: small parquet files in the hub's schema through the command, every view and the fakes."""

import pytest

from data_prep.problem import RENDERED_TEXT, TAIL, load_images, render
from data_prep.sources import mmmu_pro
from tests.study import (  # noqa: F401, F811
    BLUE, GREEN, GREY, RED, colours, fails, library, make, meet_the_fakes, parquet, png, render_all, shape,
)  # fmt: skip


@pytest.mark.parametrize(
    "texts, there, marked",
    [
        (["See <image 1> and <image 2>"], [1, 2], ["See <image 1> and <image 2>"]),
        (["See <image 2>", "<image 5>"], [2, 5], ["See <image 1>", "<image 2>"]),
        (["See <image3> or < image 3 >"], [3], ["See <image 1> or <image 1>"]),
        (["no marker"], [1], ["no marker"]),
    ],
)
def test_markers_count_the_pictures_that_are_there(texts, there, marked):
    assert mmmu_pro.renumbered(texts, there) == marked


def item(number, question="What is <image 1>?", options=None, answer="B", subject="History", **pictures):
    options = options or [f"choice {number}-{letter}" for letter in "ABCDEFGHIJ"]
    return {
        "id": f"test_{subject}_{number}", "question": question, "options": repr(options), "explanation": "?",
        **{f"image_{n}": pictures.get(f"image_{n}", png(RED) if n == 1 and not pictures else None) for n in range(1, 8)},
        "img_type": "['Diagrams']", "answer": answer, "topic_difficulty": "Medium", "subject": subject,
    }  # fmt: skip


def screenshot(row, **changes):
    width = 40 + int(row["id"].rsplit("_", 1)[1])  # a prompt is asked once, so no two screenshots may be alike
    shot = {name: row[name] for name in ("id", "options", "answer", "subject")} | {"image": png(GREY, width)}
    return shot | changes


def mmmu_copy(library, root, items, shots=None, options=10):
    config = f"standard ({options} options)"
    columns = [f"image_{n}" for n in range(1, 8)]
    parquet(library, root / config / "test-00000-of-00001.parquet", items, columns)
    if shots is not None:
        parquet(library, root / "vision" / "test-00000-of-00001.parquet", shots, ["image"])
    return root


SEVERAL = item(
    2, "Compare <image 2> with this.", ["<image 3>", "none", "<image 2> too", *"defghij"], "A", "Art",
    image_2=png(GREEN), image_3=png(BLUE),
)  # fmt: skip


def test_mmmu_pro_items_and_screenshots(tmp_path, library):
    items = [item(1), SEVERAL]
    root = mmmu_copy(library, tmp_path / "in", items, [screenshot(row) for row in reversed(items)])
    files = make(mmmu_pro, tmp_path, "--from", root)
    assert set(files) == {"test"}
    one, several = files["test"]
    assert (one.id, one.answer, one.license) == ("mmmu_pro-test_History_1", "choice 1-B", "Apache-2.0")
    assert len(one.options) == 10 and isinstance(one.image, str) and one.meta["kind"] == "History"
    assert one.meta["topic_difficulty"] == "Medium" and one.meta["img_type"] == "['Diagrams']"
    prompt = render(one, "vision")
    listed = "\n".join(f"{letter}. choice 1-{letter}" for letter in "ABCDEFGHIJ")
    assert shape(prompt) == ["What is ", "image", f"?\n{listed}\n{TAIL['letter']}"] and prompt.answer == "B"
    assert several.options[:3] == ("<image 2>", "none", "<image 1> too") and len(several.image) == 2
    prompt = render(several, "vision")
    assert shape(prompt)[:4] == ["Compare ", "image", " with this.\nA. ", "image"] and colours(prompt) == [GREEN, BLUE]
    for problem, answer in ((one, "B"), (several, "A")):
        prompt = render(problem, "rendered")
        assert shape(prompt) == ["image", f"{RENDERED_TEXT}\n{TAIL['letter']}"] and colours(prompt) == [GREY]
        assert prompt.answer == answer and prompt.choices == tuple("ABCDEFGHIJ")
    assert [load_images(problem)[0].getpixel((0, 0)) for problem in (one, several)] == [RED, GREEN]
    seen = render_all(files["test"])
    assert {seen[view] for view in ("vision", "blind", "white", "rendered")} == {2} and "both" not in seen


def test_mmmu_pro_without_screenshots(tmp_path, library):
    four = mmmu_copy(library, tmp_path / "four", [item(1, options=["a", "b", "c", "d"])], options=4)
    ten = mmmu_copy(library, tmp_path / "ten", [item(1)])
    for name, root, arguments, count in (("a", four, ["--options", 4], 4), ("b", ten, ["--no-rendered"], 10)):
        (problem,) = make(mmmu_pro, tmp_path, "--from", root, *arguments, out=name)["test"]
        assert "published" not in problem.meta and len(problem.options) == count
        assert colours(render(problem, "rendered")) == [RED], "drawn by us"


def test_mmmu_pro_leaves_out_the_pictures_of_the_explanation(tmp_path, library):
    """Only what the question or an option names is shown; all, in order, where nothing is named."""
    seven = {f"image_{n}": png((30 * n, 0, 0)) for n in range(1, 8)}
    items = [item(1, "What is <image 1>?", image_1=png(RED), image_2=png(GREEN)),
             item(2, "Which?", ["<image 2>", *"bcdefghij"], image_1=png(RED), image_2=png(GREEN)),
             item(3, "What do they show?", **seven)]  # fmt: skip
    problems = make(mmmu_pro, tmp_path, "--from", mmmu_copy(library, tmp_path / "in", items), "--no-rendered")["test"]
    assert [colours(render(problem, "vision")) for problem in problems] == [
        [RED], [GREEN], [(30 * n, 0, 0) for n in range(1, 8)],
    ]  # fmt: skip
    assert problems[1].options[0] == "<image 1>"


def test_mmmu_pro_with_fewer_picture_columns(tmp_path, library):
    row = {name: value for name, value in item(1).items() if not name.startswith("image_") or name < "image_3"}
    parquet(library, tmp_path / "in" / "standard (10 options)" / "test.parquet", [row], ["image_1", "image_2"])
    (problem,) = make(mmmu_pro, tmp_path, "--from", tmp_path / "in", "--no-rendered")["test"]
    assert colours(render(problem, "vision")) == [RED]


def test_mmmu_pro_screenshots_that_do_not_belong(tmp_path, library, capsys):
    items = [item(n) for n in range(3)]
    shots = [screenshot(items[0]), screenshot(items[1], answer="C")]
    problems = make(mmmu_pro, tmp_path, "--from", mmmu_copy(library, tmp_path / "in", items, shots))["test"]
    assert ["published" in problem.meta for problem in problems] == [True, False, False]
    assert "mmmu_pro: 2 of 3 problems have no screenshot with their id and answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, said",
    [
        (item(1, "See <image 2>."), "question: <image 2> is named there or in an option, but image_2 is empty"),
        (item(1, options=["<image 4>", *"bcdefghij"]), "question: <image 4> is named there or in an option"),
        (item(1, answer="K"), "answer: 'K' is no letter of the 10 options"),
        (item(1, answer="choice"), "answer: 'choice' is no letter of the 10 options"),
        (item(1) | {"options": "A, B"}, "options: 'A, B' is not a list written as text"),
        (item(1, options=list("aacdefghij")), "options: 'a' stands there twice"),
        (item(1, "What?", image_1=None), "facts: a problem needs a picture or facts, this one has neither"),
    ],
)
def test_mmmu_pro_bad_rows(tmp_path, library, row, said):
    root = mmmu_copy(library, tmp_path / "in", [item(0), row])
    message = fails(mmmu_pro, tmp_path, "--from", root, "--no-rendered")
    assert message.startswith(f"{root} standard (10 options):row 1: {said}")


def test_mmmu_pro_fakes(tmp_path, library):
    items = [item(n, answer="ABCDEFGHIJ"[n % 10]) for n in range(20)]
    root = mmmu_copy(library, tmp_path / "in", items, [screenshot(row) for row in items])
    make(mmmu_pro, tmp_path, "--from", root, out="data/mmmu_pro")
    found = meet_the_fakes("mmmu_pro", tmp_path / "data", tmp_path, "vision,rendered,blind")
    assert sum(row["correct"] for row in found["constant"]) == 3 * 2
    assert all(row["pred"] is None for row in found["gibberish"])
