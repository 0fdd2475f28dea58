"""Adapters: what they make of the authors' layouts and of users' own files, and what they refuse.

Tests on real extracts need EVENSIGHT_REALDATA, the folder that holds `nlvr/` and `puzzlevqa/`.
"""

import base64
import io
import json
import os
import shutil
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.problem import LETTERS, View, load_images, partners, read_problems, render
from data_prep.sources import common, hf, llava, messages, nlvr, puzzlevqa

needs_real_data = pytest.mark.skipif(
    not os.environ.get("EVENSIGHT_REALDATA"),
    reason="EVENSIGHT_REALDATA is not set: no extract of the real data to read",
)


def real(name):
    return Path(os.environ["EVENSIGHT_REALDATA"]) / name


def run(adapter, tmp_path, *arguments):
    """Run an adapter's command; {file name: problems} of what it wrote, every picture decoded on the way."""
    out = tmp_path / "out"
    adapter.main(["--out", str(out), *map(str, arguments)])
    return {path.name: read_problems(path) for path in sorted(out.glob("t*.jsonl")) if ".bad." not in path.name}


def everything(files):
    return [problem for part in files.values() for problem in part]


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fails(adapter, tmp_path, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(adapter, tmp_path, *arguments)
    assert isinstance(caught.value.code, str), "a sentence, not a number"
    return caught.value.code


# NLVR


@pytest.fixture(scope="module")
def nlvr_dev(tmp_path_factory):
    if not os.environ.get("EVENSIGHT_REALDATA"):
        pytest.skip("EVENSIGHT_REALDATA is not set")
    return run(nlvr, tmp_path_factory.mktemp("nlvr"), "--from", real("nlvr"))


@needs_real_data
def test_nlvr_counts(nlvr_dev):
    problems = everything(nlvr_dev)
    assert len(problems) == 989 and Counter(problem.answer for problem in problems) == {"true": 547, "false": 442}
    assert 190 <= len(nlvr_dev["test.jsonl"]) <= 205
    groups = [{problem.group for problem in part} for part in nlvr_dev.values()]
    assert sum(map(len, groups)) == 267 and not set.intersection(*groups)
    assert {(p.options, p.license, p.source, p.meta["answer_with"]) for p in problems} == {
        (("true", "false"), "CC-BY-4.0", "nlvr", "text")
    }
    prompt = render(problems[0], "both", partners(problems)[0])
    assert set(prompt.choices) == {"true", "false"} and prompt.images[0].size == (400, 100)


@needs_real_data
def test_nlvr_facts_are_what_the_picture_shows(nlvr_dev):
    """Every 10th picture: each object of the words is found in the pixels, and no coloured pixel lies outside them."""
    colors = {name: value for name, value in nlvr.COLORS.values()}
    sizes = {word: size for size, word in nlvr.SIZES.items()}
    seen = Counter()
    for problem in everything(nlvr_dev)[::10]:
        pixels = np.asarray(load_images(problem)[0]).astype(int)
        covered = np.zeros(pixels.shape[:2], bool)
        for slot, box in enumerate(problem.facts.split(" Box ")[1:]):
            for said in box.partition(": ")[2].rstrip(".").split("; "):
                size, color, shape, _, _, xs, _, ys = said.split()
                left, right = map(int, xs.rstrip(",").split("-"))
                top, bottom = map(int, ys.split("-"))
                assert right - left == bottom - top == sizes[size], said
                left, right = left + nlvr.BOX_STEP * slot, right + nlvr.BOX_STEP * slot
                centre = pixels[(top + bottom) // 2, (left + right) // 2]
                assert np.abs(centre - colors[color]).max() < 60, (problem.id, said)
                corner = np.abs(pixels[top + 1, left + 1] - colors[color]).max() < 60
                if len(problem.facts) < 400 and shape != "square":
                    assert not corner, (problem.id, said)  # a circle or triangle leaves its box's corner free
                covered[top:bottom, left:right] = True
                seen[color, shape, size] += 1
        background = (np.abs(pixels - 211).max(-1) < 12) | (np.abs(pixels - 128).max(-1) < 12)
        assert (background | covered).mean() > 0.999, problem.id
    assert len(seen) == 27, "every colour, shape and size was looked at"


@needs_real_data
def test_nlvr_again_is_the_same(tmp_path):
    arguments = ("--from", real("nlvr"), "--limit", 40)
    assert len(everything(run(nlvr, tmp_path, *arguments))) == 40
    first = snapshot(tmp_path)
    run(nlvr, tmp_path, *arguments)
    assert snapshot(tmp_path) == first
    assert not list((tmp_path / "out" / "images").glob(".*")), "nothing half-written stays"


BOXES = [
    [{"x_loc": 0, "y_loc": 80, "type": "square", "color": "Black", "size": 20}],
    [
        {"x_loc": 70, "y_loc": 0, "type": "circle", "color": "#0099ff", "size": 30},
        {"x_loc": 5, "y_loc": 5, "type": "triangle", "color": "Yellow", "size": 10},
    ],
    [],
]


def nlvr_clone(root, split="dev", directory="0", orders=range(6), **changes):
    """A clone with one sentence over two pictures, in the authors' layout, each box order drawn."""
    for n in range(2):
        row = {
            "sentence": "There is a circle . ", "label": "true", "identifier": f"7-{n}", "directory": directory,
            "evals": {"r0": "true", "r1": "false"}, "structured_rep": BOXES, **changes,
        }  # fmt: skip
        folder = root / "nlvr" / split / "images" / directory
        folder.mkdir(parents=True, exist_ok=True)
        for order in orders:
            picture = Image.new("RGBA", (400, 100), (211, 211, 211, 255))
            for slot, box in enumerate(nlvr.ORDERS[order]):
                for item in BOXES[box]:
                    corner = (150 * slot + item["x_loc"], item["y_loc"])
                    square = (*corner, corner[0] + item["size"] - 1, corner[1] + item["size"] - 1)
                    ImageDraw.Draw(picture).rectangle(square, fill=nlvr.COLORS[item["color"]][1])
            picture.save(folder / f"{split}-7-{n}-{order}.png")
        with open(root / "nlvr" / split / f"{split}.json", "a") as file:
            file.write(json.dumps({name: value for name, value in row.items() if value is not ...}) + "\n")
    return root


def test_nlvr_facts_in_words():
    assert nlvr.facts(BOXES) == (
        "Three boxes from left to right. In each, x goes from 0 (left edge) to 100 (right edge) and y from 0 (top) to "
        "100 (bottom). Objects that are 1 apart touch. Box 1: medium black square at x 0-20, y 80-100. "
        "Box 2: small yellow triangle at x 5-15, y 5-15; large blue circle at x 70-100, y 0-30. Box 3: empty."
    )


def test_nlvr_kinds_are_told_from_the_structure():
    def blocks(*places, **changes):
        return [{"x_loc": x, "y_loc": y, "type": "square", "color": "Black", "size": 20, **changes} for x, y in places]

    assert nlvr.kind([blocks((40, 80), (40, 59)), [], blocks((40, 80))]) == "tower"
    assert nlvr.kind([blocks((40, 80), (41, 59)), [], []]) == "scatter"
    assert nlvr.kind([blocks((40, 80), type="circle"), [], []]) == "scatter"
    assert nlvr.kind([blocks((40, 80)), [], []]) is None


def test_nlvr_clone_with_splits_and_orders(tmp_path):
    clone = nlvr_clone(nlvr_clone(tmp_path / "clone"), "train", directory="3")
    problems = everything(run(nlvr, tmp_path, "--from", clone, "--orders", "all"))
    assert Counter(problem.group for problem in problems) == {"dev-7": 12, "train-7": 12}
    by_id = {problem.id: problem for problem in problems}
    assert "Box 1: empty. Box 2: medium black" in by_id["nlvr-train-7-1-4"].facts  # order 4 is (2, 0, 1)
    one = by_id["nlvr-dev-7-0-0"]
    assert one.question == "Is this sentence true or false? There is a circle ."
    assert one.meta == {
        "answer_with": "text", "kind": "scatter", "split": "dev", "order": 0, "votes": 2, "votes_agree": 1,
    }  # fmt: skip
    one_split = run(nlvr, tmp_path / "b", "--from", clone, "--split", "train", "--test-share", 1)
    assert {name: len(part) for name, part in one_split.items()} == {"test.jsonl": 2}


def test_nlvr_refuses_a_picture_in_another_order(tmp_path):
    clone = nlvr_clone(tmp_path / "clone")
    shutil.copy(clone / "nlvr/dev/images/0/dev-7-1-3.png", clone / "nlvr/dev/images/0/dev-7-1-0.png")
    assert fails(nlvr, tmp_path, "--from", clone, "--test-share", 0) == (
        f"{clone}/nlvr/dev/dev.json:2: structured_rep: only 0% of its objects are found in images/0/dev-7-1-0.png"
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"label": "maybe"}, "label: must be true or false, not 'maybe'"),
        ({"sentence": ...}, "sentence: missing field"),
        ({"identifier": 7}, "identifier: must be text, not 7"),
        ({"structured_rep": BOXES[:2]}, "structured_rep: must be three boxes"),
        ({"structured_rep": [[{**BOXES[0][0], "color": "Red"}], [], []]}, "structured_rep: unknown color 'Red'"),
        ({"structured_rep": [[{**BOXES[0][0], "x_loc": 90}], [], []]}, "structured_rep: x_loc 90 with size 20 leaves"),
        ({"structured_rep": [[{"x_loc": 1}], [], []]}, "type: missing field"),
        ({"directory": "9"}, "image: 'images/9/dev-7-0-0.png' does not exist"),
    ],
)
def test_nlvr_bad_rows(tmp_path, changes, said):
    directory = changes.pop("directory", "0")
    clone = nlvr_clone(tmp_path / "clone", orders=[0], **changes)
    if directory != "0":
        file = clone / "nlvr/dev/dev.json"
        file.write_text(file.read_text().replace('"directory": "0"', f'"directory": "{directory}"'))
    assert fails(nlvr, tmp_path, "--from", clone, "--test-share", 1).startswith(f"{clone}/nlvr/dev/dev.json:1: {said}")


def test_nlvr_elsewhere(tmp_path):
    assert "holds no train/train.json, dev/dev.json or test/test.json" in fails(nlvr, tmp_path, "--from", tmp_path)
    assert "holds no dev/dev.json" in fails(nlvr, tmp_path, "--from", tmp_path, "--split", "dev")


# PuzzleVQA


@needs_real_data
def test_puzzlevqa_counts_and_places(tmp_path):
    files = run(puzzlevqa, tmp_path, "--from", real("puzzlevqa"))
    problems = everything(files)
    assert len(problems) == 400 and Counter(p.meta["kind"] for p in problems)["venn"] == 50
    assert {(p.license, p.source, p.meta["answer_with"]) for p in problems} == {("MIT", "puzzlevqa", "letter")}
    assert all(isinstance(option, str) for problem in problems for option in problem.options)
    groups = [{problem.group for problem in part} for part in files.values()]
    assert len(files) == 2 and not set.intersection(*groups)
    captions = defaultdict(set)
    for name, part in files.items():
        for problem in part:
            captions[problem.facts].add(name)
    assert all(len(names) == 1 for names in captions.values()), "no puzzle stands in both files"
    for view in (View.both, View.text, View.rendered):
        assert render(problems[0], view).answer in LETTERS[:4]


def puzzle_data(root, template="color_grid", count=40, **changes):
    """PuzzleVQA's layout with the right option always last, as in the authors' grid_number."""
    (root / "data" / "images" / template).mkdir(parents=True)
    rows = []
    for n in range(count):
        image = f"images/{template}/{template}_{n:04}.png"
        Image.new("RGB", (8, 8), (n, 0, 0)).save(root / "data" / image)
        row = {
            "image": image, "question": "What is missing?", "answer": n + 3, "options": [n, n + 1, n + 2, n + 3],
            "caption": f"A grid of {n}.", "explanation": "...", "deduction": "...", **changes,
        }  # fmt: skip
        rows.append(json.dumps({name: value for name, value in row.items() if value is not ...}))
    (root / "data" / f"{template}.json").write_text("\n".join(rows))
    return root


def test_puzzlevqa_fixed_place_is_undone_by_the_prompt(tmp_path):
    problems = everything(run(puzzlevqa, tmp_path, "--from", puzzle_data(tmp_path / "in", "grid_number", 200)))
    assert {problem.options.index(problem.answer) for problem in problems} == {3}, "the file's order is kept"
    letters = Counter(render(problem, "blind").answer for problem in problems)
    assert set(letters) == set("ABCD") and max(letters.values()) < 0.35 * len(problems), letters
    assert problems[0].options == tuple(str(int(problems[0].answer) - 3 + n) for n in range(4))


@pytest.mark.parametrize("template", sorted(puzzlevqa.WITHOUT_CUE))
def test_puzzlevqa_captions_without_the_cue_are_no_facts(tmp_path, template):
    problems = everything(run(puzzlevqa, tmp_path, "--from", puzzle_data(tmp_path / "in", template, 4)))
    assert {(problem.facts, problem.meta["text_sufficient"]) for problem in problems} == {(None, False)}


def test_puzzlevqa_facts_are_the_caption(tmp_path):
    one = min(everything(run(puzzlevqa, tmp_path, "--from", puzzle_data(tmp_path / "in"))), key=lambda p: p.id)
    assert (one.id, one.facts, one.image) == (
        "puzzlevqa-color_grid_0000",
        "A grid of 0.",
        "images/color_grid/color_grid_0000.png",
    )
    assert one.meta == {"answer_with": "letter", "kind": "color_grid", "text_sufficient": True}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"answer": 99}, "answer: '99' is not among the options (0, 1, 2, 3)"),
        ({"answer": True}, "answer: must be text or a number, not True"),
        ({"options": "0"}, "options: must be a list, not '0'"),
        ({"options": [3, "3"]}, "options: '3' stands there twice"),
        ({"caption": ...}, "caption: missing field"),
        ({"image": "../a.png"}, "image: '../a.png' leaves the data folder with '..'"),
    ],
)
def test_puzzlevqa_bad_rows(tmp_path, changes, said):
    root = puzzle_data(tmp_path / "in", count=1, **changes)
    assert fails(puzzlevqa, tmp_path, "--from", root, "--test-share", 0) == f"{root}/data/color_grid.json:1: {said}"


def test_puzzlevqa_templates(tmp_path):
    root = puzzle_data(tmp_path / "in", count=2)
    assert "no template 'venn'; there are color_grid" in fails(
        puzzlevqa, tmp_path, "--from", root, "--template", "venn"
    )
    assert "holds no PuzzleVQA data" in fails(puzzlevqa, tmp_path, "--from", tmp_path / "nowhere")


# LLaVA and chat files


def picture_bytes(color=(255, 0, 0), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    (folder / "coco").mkdir(parents=True)
    for name, color in (("coco/a.png", (255, 0, 0)), ("coco/b.png", (0, 0, 255))):
        (folder / name).write_bytes(picture_bytes(color))
    return folder


def talk(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def save(folder, rows, name="mine.json", lines=False):
    file = folder / name
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    return file


LLAVA = [
    {"id": "1", "image": "coco/a.png", "conversations": talk("<image>\nWhat colour?", "Red.", "And its size?", "8x6")},
    {"id": 2, "image": "coco/b.png", "conversations": talk("What is it?\n<image>", " Blue. ")},
    {"id": "1", "image": "coco/b.png", "conversations": talk("Again <image> ?", "Blue.")},
]


def test_llava(tmp_path, mine):
    arguments = ("--from", save(mine, LLAVA), "--license", "CC-BY-4.0", "--test-share", 0.5)
    files = run(llava, tmp_path, *arguments)
    problems = {problem.id: problem for problem in everything(files)}
    assert {name: (p.question, p.answer, p.group) for name, p in problems.items()} == {
        "1-0": ("What colour?", "Red.", "coco/a.png"),
        "1-1": ("And its size?", "8x6", "coco/a.png"),
        "2-0": ("What is it?", "Blue.", "coco/b.png"),
        "1~2-0": ("Again \n ?", "Blue.", "coco/b.png"),
    }
    one = problems["1-1"]
    assert (one.image, one.source, one.license, one.options) == ("images/coco/a.png", "mine", "CC-BY-4.0", None)
    assert one.facts is None and one.meta == {"turns": 2, "turn": 1}
    assert load_images(one)[0].getpixel((0, 0)) == (255, 0, 0)
    assert {len(part) for part in files.values()} == {2}
    before = snapshot(tmp_path)
    run(llava, tmp_path, *arguments)
    assert snapshot(tmp_path) == before


CHAT_ERRORS = [
    ({"image": ...}, "image: the row has no picture"),
    ({"image": ["coco/a.png", "coco/b.png"]}, "image: <image> stands 1 time, the row has 2 pictures"),
    ({"image": "coco/gone.png"}, "image: 'coco/gone.png' does not exist"),
    ({"image": "../a.png"}, "image: '../a.png' leaves the data folder with '..'"),
    ({"image": "/etc/a.png"}, "image: '/etc/a.png' lies outside the picture folder"),
    ({"image": "https://x.org/a.png"}, "image: 'https://x.org/a.png' is on the web; download it and name the file"),
    ({"image": 7}, "image: must be text, not 7"),
    ({"conversations": ...}, "conversations: missing field"),
    ({"conversations": []}, "conversation: has no turns"),
    ({"conversations": talk("Q")}, "conversation: the last question has no answer"),
    ({"conversations": talk("Q", "A")[::-1]}, "conversation: turn 1 is the assistant's, expected the user's"),
    ({"conversations": [*talk("Q"), *talk("Q")]}, "conversation: turn 2 is the user's, expected the assistant's"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from: unknown role 'bot'; known: human,"),
    ({"conversations": ["x"]}, "conversations[0]: must be an object"),
    ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0].value: must be text, not 3"),
    ({"conversations": talk("<image><image> Q", "A")}, "image: <image> stands 2 times, the row has 1 picture"),
    ({"conversations": talk("<image>", "A")}, "question: is empty"),
    ({"conversations": talk("Q", "")}, "answer: is empty"),
    ({"id": 1.5}, "id: must be text or a number, not 1.5"),
]


@pytest.mark.parametrize("changes, said", CHAT_ERRORS, ids=[said[:40] for _, said in CHAT_ERRORS])
def test_llava_bad_rows(tmp_path, mine, changes, said, capsys):
    bad = {name: value for name, value in {**LLAVA[0], "id": "9", **changes}.items() if value is not ...}
    file = save(mine, [*LLAVA[:2], bad])
    error = fails(llava, tmp_path, "--from", file, "--license", "MIT", "--test-share", 0)
    assert error.startswith(f"{file}:row 2: {said}")
    problems = everything(run(llava, tmp_path, "--from", file, "--license", "MIT", "--test-share", 0, "--skip-bad"))
    assert [problem.id for problem in problems] == ["1-0", "1-1", "2-0"]
    kept = [json.loads(line) for line in (tmp_path / "out/rows.bad.jsonl").read_text().splitlines()]
    assert {row["error"] for row in kept} == {error} and json.loads(kept[0]["raw"]) == bad
    assert "rows are bad, written to" in capsys.readouterr().err


def test_a_licence_is_required(tmp_path, mine):
    file = save(mine, LLAVA)
    assert fails(llava, tmp_path, "--from", file) == f"{file}:row 0: license: the row names none; give --license"
    own = save(mine, [{**row, "license": "CC0-1.0"} for row in LLAVA])
    assert {problem.license for problem in everything(run(llava, tmp_path, "--from", own))} == {"CC0-1.0"}


def test_files_that_are_no_rows(tmp_path, mine):
    file = mine / "x.json"
    fail = partial(fails, llava, tmp_path, "--license", "MIT", "--from", file)
    assert fail() == f"{file}: cannot be read (No such file or directory)"
    file.write_text("[{}")
    assert fail().startswith(f"{file}:1: row: is not JSON")
    file.write_text("7\n")
    assert fail() == f"{file}:1: row: must be an object"
    file.write_text("[]")
    assert fail() == f"{tmp_path}/out: no good row (0 bad)"


def data_uri(color):
    return "data:image/jpeg;base64," + base64.b64encode(picture_bytes(color, "JPEG")).decode()


def openai(url, text="What colour?", answer="Red."):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def test_openai_messages(tmp_path, mine):
    absolute = str(mine / "coco/b.png")
    rows = [openai("coco/a.png"), openai(data_uri((9, 200, 9))), openai(f"file://{absolute}"), openai(absolute)]
    rows[0]["messages"].insert(0, {"role": "system", "content": "Be short."})
    rows[1]["messages"][0]["content"][0]["image_url"] = data_uri((9, 200, 9))  # without the inner object
    rows[3]["messages"][1]["content"] = [{"type": "text", "text": "Bl"}, {"type": "text", "text": "ue"}]
    file = save(mine, rows, "chat.jsonl", lines=True)
    problems = everything(run(messages, tmp_path, "--from", file, "--license", "MIT", "--test-share", 0))
    assert [problem.id for problem in problems] == [f"chat-{line}-0" for line in (1, 2, 3, 4)]
    assert problems[0].meta == {"turns": 1, "system": "Be short.", "turn": 0}
    assert [problem.answer for problem in problems] == ["Red.", "Red.", "Red.", "Bl\nue"]
    assert problems[2].image == problems[3].image == "images/coco/b.png"
    assert problems[2].group == problems[3].group != problems[1].group
    assert problems[1].image.endswith(".jpg") and problems[1].image.startswith("images/")
    assert np.abs(np.asarray(load_images(problems[1])[0]).astype(int) - (9, 200, 9)).max() < 6


def test_sharegpt(tmp_path, mine):
    rows = [
        {"conversations": talk("<image>What colour?", "Red."), "images": ["coco/a.png"]},
        {
            "messages": [{"role": "user", "content": "Size?"}, {"role": "assistant", "content": "8x6"}],
            "images": ["coco/b.png"],
        },
    ]
    problems = everything(run(messages, tmp_path, "--from", save(mine, rows), "--license", "MIT", "--test-share", 1))
    assert [(p.id, p.question, p.answer) for p in problems] == [
        ("mine-row-0-0", "What colour?", "Red."),
        ("mine-row-1-0", "Size?", "8x6"),
    ]


def two_pictures():
    row = openai("coco/a.png")
    row["messages"] += [{**turn} for turn in openai("coco/b.png")["messages"]]
    return row


def late_picture():
    row = openai("coco/a.png")
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, *row["messages"]]}


@pytest.mark.parametrize(
    "row, said",
    [
        (openai("data:image/png,abc"), "image: a data: address that cannot be read (only base64 is read)"),
        (openai("data:image/png;base64,@@"), "image: a data: address that cannot be read ("),
        (openai("data:image/png;base64,aGVsbG8="), "image: a picture of 5 bytes is not a picture that can be read"),
        (openai("http://x.org/a.png"), "image: 'http://x.org/a.png' is on the web"),
        (openai("file:///etc/passwd"), "image: 'file:///etc/passwd' lies outside the picture folder"),
        (late_picture(), "image: must stand in the first question"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: unknown role 'tool'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content[0]: unknown part 'audio'",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: must be text, not None"),
        ({"text": "x"}, "messages: missing field (neither messages nor conversations)"),
    ],
)
def test_messages_bad_rows(tmp_path, mine, row, said):
    file = save(mine, [openai("coco/b.png"), row], "chat.jsonl", lines=True)
    error = fails(messages, tmp_path, "--from", file, "--license", "MIT", "--test-share", 0)
    assert error.startswith(f"{file}:2: {said}")
    assert not list((tmp_path / "out").glob("*.jsonl"))


# Hugging Face datasets


@pytest.fixture(scope="module")
def datasets_library(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield datasets


COLUMNS = {
    "uid": ["u0", "u1", "u2"],
    "query": ["Which?", "Which one?", "What colour?"],
    "choices": ["['red', 'blue']", '["red", "blue"]', "['red', 'blue']"],
    "label": [0, 1, 1],
    "caption": ["a red thing", None, "a blue thing"],
}
MAP = ["--map", "question=query", "image=img", "options=choices", "answer=label", "facts=caption", "id=uid"]


def parquet(datasets, tmp_path, image=True, **changes):
    columns = {**COLUMNS, **changes}
    features = None
    if image:
        pictures = [picture_bytes((n * 100, 0, 0)) for n in (0, 1, 0)]
        columns["img"] = [{"bytes": data, "path": None} for data in pictures]
        features = datasets.Features(
            {name: datasets.Dataset.from_dict({name: column}).features[name] for name, column in columns.items()}
            | {"img": datasets.Image()}
        )
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def test_parquet_folder(tmp_path, datasets_library):
    folder = parquet(datasets_library, tmp_path)
    arguments = ("--from", folder, "--license", "MIT", *MAP, "--answer-as", "index")
    problems = {problem.id: problem for problem in everything(run(hf, tmp_path, *arguments))}
    assert {name: (p.question, p.options, p.answer, p.facts) for name, p in problems.items()} == {
        "u0": ("Which?", ("red", "blue"), "red", "a red thing"),
        "u1": ("Which one?", ("red", "blue"), "blue", None),
        "u2": ("What colour?", ("red", "blue"), "blue", "a blue thing"),
    }
    assert problems["u0"].group == problems["u2"].group != problems["u1"].group, "one picture, one group"
    assert problems["u0"].image == problems["u2"].image
    assert problems["u1"].meta == {"answer_with": "letter", "split": "train"} and problems["u1"].source == "set"
    assert (problems["u1"].root / problems["u1"].image).read_bytes() == picture_bytes((100, 0, 0)), "bytes as stored"
    before = snapshot(tmp_path / "out")
    run(hf, tmp_path, *arguments)
    assert snapshot(tmp_path / "out") == before


def test_a_folder_of_the_same_name_or_changed_since_is_read_again(tmp_path, datasets_library):
    """With a README, `datasets` alone would serve the first one's rows from its cache each time."""
    readme = "---\nconfigs:\n- config_name: default\n  data_files: train-00000-of-00001.parquet\n---\n"
    for place, color in (("a", "red"), ("b", "blue"), ("a", "green")):
        folder = tmp_path / place / "set"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(readme)
        rows = {"question": ["Which?"], "answer": [color], "facts": ["one"]}
        datasets_library.Dataset.from_dict(rows).to_parquet(folder / "train-00000-of-00001.parquet")
        (problem,) = everything(run(hf, tmp_path, "--from", folder, "--license", "MIT", "--test-share", 1))
        assert problem.answer == color


def test_saved_to_disk_with_class_labels_and_paths(tmp_path, datasets_library, mine):
    features = datasets_library.Features(
        {
            "question": datasets_library.Value("string"),
            "answer": datasets_library.ClassLabel(names=["cat", "dog"]),
            "image": datasets_library.Value("string"),
        }
    )
    rows = {"question": ["What?"] * 2, "answer": [1, 0], "image": ["coco/a.png", "coco/b.png"]}
    saved = datasets_library.DatasetDict({"dev": datasets_library.Dataset.from_dict(rows, features=features)})
    saved.save_to_disk(tmp_path / "disk")
    arguments = ("--from", tmp_path / "disk", "--images", mine, "--license", "MIT", "--answer-with", "text")
    problems = everything(run(hf, tmp_path, *arguments, "--test-share", 0, "--source", "pets"))
    assert [(p.id, p.answer, p.options, p.meta["answer_with"]) for p in problems] == [
        ("pets-dev-0", "dog", ("cat", "dog"), "text"),
        ("pets-dev-1", "cat", ("cat", "dog"), "text"),
    ]
    assert "no split 'train'; there are dev" in fails(hf, tmp_path, *arguments, "--split", "train")


@pytest.mark.parametrize(
    "extra, said",
    [
        (
            ["--map", "question=qury"],
            "--map question=qury: no column 'qury'; did you mean 'query'? columns: uid, query,",
        ),
        (["--map", "qestion=query"], "--map qestion=query: did you mean 'question'? write field=column; fields: id,"),
        (["--map", "answer=label"], "--map: no column for 'question'; columns: uid, query,"),
    ],
)
def test_column_maps_are_checked(tmp_path, datasets_library, extra, said):
    folder = parquet(datasets_library, tmp_path, image=False)
    assert fails(hf, tmp_path, "--from", folder, "--license", "MIT", *extra).startswith(said)


def test_hub_errors_are_one_sentence(tmp_path, datasets_library, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(datasets_library, "load_dataset", refuse)
    assert fails(hf, tmp_path, "--from", "who/what", "--license", "MIT") == "who/what: cannot be loaded (no network)"


def test_rows_of_a_dataset_are_named(tmp_path, datasets_library):
    folder = parquet(datasets_library, tmp_path, label=[0, 1, 7])
    error = fails(hf, tmp_path, "--from", folder, "--license", "MIT", *MAP)
    assert error == f"{folder}:row 2: answer: '7' is not among the options (red, blue)"
    assert f"{folder}: license: the dataset names none" in fails(hf, tmp_path, "--from", folder, *MAP)
    assert len(everything(run(hf, tmp_path, "--from", folder, "--license", "MIT", *MAP, "--skip-bad"))) == 2


@pytest.mark.parametrize(
    "value, options, how, expected",
    [
        ("red", ("red", "blue"), "auto", "red"),
        ("b", ("red", "blue"), "auto", "blue"),
        ("B", ("red", "blue"), "letter", "blue"),
        (1, ("red", "blue"), "auto", "blue"),
        ("0", ("red", "blue"), "index", "red"),
        ("1", ("2", "3"), "auto", "3"),
        ("1", ("1", "3"), "text", "1"),
        ("1", ("1", "3"), "index", "3"),
        (7.5, None, "auto", "7.5"),
        ("1", ("1", "3"), "auto", "answer: '1' can be read in two ways (1, 3); say which with --answer-as"),
        ("A", ("B", "A"), "auto", "answer: 'A' can be read in two ways (B, A); say which with --answer-as"),
        ("teal", ("red", "blue"), "auto", "answer: 'teal' is not among the options (red, blue)"),
        ("red", ("red", "blue"), "index", "answer: 'red' is no index of the options (red, blue)"),
        ("C", ("red", "blue"), "letter", "answer: 'C' is no letter of the options (red, blue)"),
        (1, None, "index", "answer: --answer-as index needs options"),
        (["a"], None, "auto", "answer: must be text or a number, not ['a']"),
        (None, None, "auto", "answer: must be text or a number, not None"),
    ],
)
def test_how_answers_are_read(value, options, how, expected):
    if expected.startswith("answer:"):
        with pytest.raises(hf.ProblemError) as caught:
            hf.answer_text(value, options, how)
        assert str(caught.value) == expected
    else:
        assert hf.answer_text(value, options, how) == expected


@pytest.mark.parametrize(
    "value, expected",
    [
        (["a", 2], ("a", "2")),
        ("['it''s', \"b\"]", ("its", "b")),
        ('["a", "b"]', ("a", "b")),
        ("[]", None),
        (None, None),
        ("red, blue", "options: 'red, blue' is not a list written as text"),
        ("__import__('os')", "options: \"__import__('os')\" is not a list written as text"),
        ("7", "options: must be a list, not 7"),
        ([{"a": 1}], "options: must hold texts or numbers"),
    ],
)
def test_how_options_are_read(value, expected):
    if isinstance(expected, str):
        with pytest.raises(hf.ProblemError) as caught:
            hf.option_list(value)
        assert str(caught.value).startswith(expected)
    else:
        assert hf.option_list(value) == expected


# What all adapters share


@pytest.mark.parametrize(
    "share, expected", [(0, ["train"]), (1, ["test"]), (0.01, ["test", "train"]), (0.99, ["test", "train"])]
)
def test_splits(tmp_path, mine, share, expected):
    run(llava, tmp_path, "--from", save(mine, LLAVA), "--license", "MIT", "--test-share", 0.5)
    files = run(llava, tmp_path, "--from", save(mine, LLAVA), "--license", "MIT", "--test-share", share)
    assert [name.removesuffix(".jsonl") for name in files] == expected and len(everything(files)) == 4


def test_one_group_cannot_be_split(tmp_path, mine):
    file = save(mine, LLAVA[:1])
    said = "one group alone cannot be split; set --test-share to 0 or 1"
    assert said in fails(llava, tmp_path, "--from", file, "--license", "MIT")


def test_duplicate_ids_name_both_rows(tmp_path):
    root = puzzle_data(tmp_path / "in", count=2)
    file = root / "data/color_grid.json"
    file.write_text(file.read_text().splitlines()[0] + "\n" + file.read_text().splitlines()[0])
    assert fails(puzzlevqa, tmp_path, "--from", root, "--test-share", 0) == (
        f"{file}:2: id: 'puzzlevqa-color_grid_0000' stands at {file}:1 already"
    )


def test_pictures_are_copied_where_links_cannot_be_made(tmp_path, mine, monkeypatch):
    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(common.os, "link", refuse)
    problems = everything(run(llava, tmp_path, "--from", save(mine, LLAVA), "--license", "MIT"))
    assert all(not (p.root / p.image).samefile(mine / p.group) for p in problems)


def test_a_broken_picture_names_its_row(tmp_path, mine):
    (mine / "coco/b.png").write_bytes(picture_bytes()[:-28])
    file = save(mine, LLAVA)
    error = fails(llava, tmp_path, "--from", file, "--license", "MIT")
    assert error.startswith(f"{file}:row 1: image: 'b.png' cannot be decoded")
    assert not list(tmp_path.glob("out/*.jsonl"))
    limit = fails(llava, tmp_path, "--from", file, "--license", "MIT", "--max-pixels", 40)
    assert "8x6 pixels, over the limit of 40 pixels" in limit


@pytest.mark.parametrize("option, value", [("--test-share", "1.5"), ("--limit", "0"), ("--max-pixels", "-3")])
def test_options_out_of_range(tmp_path, option, value, capsys):
    with pytest.raises(SystemExit):
        llava.main(["--out", str(tmp_path), "--from", "x.json", option, value])
    assert f"argument {option}: must" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", [nlvr, puzzlevqa, llava, messages, hf])
def test_help_shows_the_command(adapter, capsys):
    with pytest.raises(SystemExit):
        adapter.main(["--help"])
    said = capsys.readouterr().out
    assert f"usage: python -m {adapter.__name__}" in said and f"    python -m {adapter.__name__} --from" in said
