"""Pairs on disk: what is read is what was written, and what is wrong is named by file, line and field."""

import copy
import json
from dataclasses import replace

import pytest
from PIL import Image

from data_prep.pair import Pair, from_row, read_pairs, to_row, write_pairs
from data_prep.problem import ProblemError

ROW = {
    "id": "p", "group": "g", "source": "s", "license": "CC0-1.0", "images": ["images/a.png"],
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "cross"}]}],
    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "circle"}]}],
    "rejected_prior": "square", "rejected_images": ["images/b.png"], "rejected_images_answer": "circle", "meta": {"level": 1},
}
GONE = object()


def row_with(**changes) -> dict:
    row = copy.deepcopy(ROW) | changes
    return {name: value for name, value in row.items() if value is not GONE}


def said(text) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (28, 28), colour).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write(folder, *rows) -> object:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_and_back() -> None:
    pair = from_row(ROW)
    assert (pair.chosen, pair.rejected, pair.rejected_prior) == ("cross", "circle", "square")
    assert pair.rejected_images_answer == "circle"
    assert (pair.images, pair.rejected_images) == (("images/a.png",), ("images/b.png",))
    assert to_row(pair) == ROW
    bare = row_with(rejected=GONE, rejected_images=GONE, rejected_images_answer=GONE)
    assert to_row(from_row(bare)) == bare
    assert hash(pair) == hash(from_row(ROW)) and len({pair, from_row(bare)}) == 2


def test_forms_of_messages_that_mean_the_same() -> None:
    """A text for a list of parts, and the null text that Arrow gives an image part."""
    plain = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}]}]
    assert from_row(row_with(prompt=plain, chosen=said("cross"), rejected=said("circle"))) == from_row(ROW)
    talk = [{"role": "system", "content": "Be brief."}, *ROW["prompt"]]
    assert to_row(from_row(row_with(prompt=talk)))["prompt"][0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert to_row(replace(from_row(ROW), prompt=tuple(talk)))["prompt"][0]["content"] == [{"type": "text", "text": "Be brief."}]


def test_a_space_between_two_pictures_is_text() -> None:
    content = [{"type": "image"}, {"type": "text", "text": " "}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    row = row_with(prompt=[{"role": "user", "content": content}], images=["a", "b"], rejected_images=["b", "a"])
    assert to_row(from_row(row)) == row


def test_messages_are_what_an_encoder_takes() -> None:
    assert from_row(ROW).messages("cross") == [*ROW["prompt"], {"role": "assistant", "content": "cross"}]


def test_files_with_and_without_pictures(folder) -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}]
    blind = row_with(id="q", images=[], prompt=talk, rejected_images=GONE, rejected_images_answer=GONE)
    pairs = [from_row(ROW), from_row(blind)]
    assert write_pairs(folder / "pairs.jsonl", pairs) == 2
    found = read_pairs(folder / "pairs.jsonl")
    assert found == pairs and [pair.root for pair in found] == [folder, folder]
    assert [[picture.getpixel((0, 0)) for picture in found[0].load(which)] for which in ("images", "rejected_images")] == [
        [(255, 0, 0)], [(0, 0, 255)]]
    assert found[1].load() == ()
    first = (folder / "pairs.jsonl").read_bytes()
    write_pairs(folder / "pairs.jsonl", found)
    assert (folder / "pairs.jsonl").read_bytes() == first and b"null" not in first and b"root" not in first


BAD = [
    ({"rejected": said("cross")}, "rejected: is the same as chosen"),
    ({"rejected": said(" cross\n")}, "rejected: is the same as chosen"),
    ({"rejected_prior": "cross"}, "rejected_prior: is the same as chosen"),
    ({"rejected_images": ["images/a.png"]}, "rejected_images: are the same as images"),
    ({"rejected_images_answer": "cross"}, "rejected_images_answer: is the same as chosen"),
    ({"rejected_images": GONE}, "rejected_images: missing, but rejected_images_answer is there"),
    ({name: GONE for name in ROW if name.startswith("rejected")}, "rejected: missing, and neither rejected_prior nor"),
    ({"chosen": said("")}, "chosen: is empty"),
    ({"chosen": said("  ")}, "chosen: is empty"),
    ({"rejected": said([{"type": "text", "text": ""}])}, "rejected: is empty"),
    ({"rejected_prior": " "}, "rejected_prior: is empty"),
    ({"chosen": said([])}, r"chosen: the answer must be one text, not \[\]"),
    ({"chosen": said([{"type": "image"}])}, "chosen: the answer must be one text"),
    ({"chosen": "cross"}, "chosen: must be a list of one assistant's message, not 'cross'"),
    ({"chosen": said("a") + said("b")}, "chosen: must be a list of one assistant's message"),
    ({"chosen": [{"role": "user", "content": "cross"}]}, "chosen: must be a list of one assistant's message"),
    ({"rejected_prior": 3}, "rejected_prior: must be text, not a number"),
    ({"images": []}, "images: 0 pictures, but the prompt has 1 image parts"),
    ({"images": ["images/a.png", "images/b.png"]}, "images: 2 pictures, but the prompt has 1"),
    ({"rejected_images": ["images/b.png", "images/a.png"]}, "rejected_images: 2 pictures, but the prompt has 1"),
    ({"rejected_images": []}, "rejected_images: is an empty list; a field that is not needed is left out"),
    ({"images": "images/a.png"}, "images: must be a list of paths, not 'images/a.png'"),
    ({"images": [1]}, r"images\[0\]: must be text, not a number"),
    ({"rejected_imgs": ["images/b.png"]}, "rejected_imgs: unknown field; did you mean 'rejected_images'?"),
    ({"zzz": 1}, "zzz: unknown field$"),
    ({"rejected": None}, "rejected: is null; a field that is not needed is left out"),
    ({"meta": None}, "meta: is null"),
    ({"meta": []}, "meta: must be an object, not a list"),
    ({"license": GONE}, "license: missing field"),
    ({"prompt": []}, "prompt: must be a list of chat messages"),
    ({"prompt": said("hello")}, r"prompt\[0\]: the last message must be the user's"),
    ({"prompt": [{"role": "tool", "content": "x"}]}, r"prompt\[0\]: must have a role"),
    ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, r"prompt\[0\].content\[0\]: must be an image part or"),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}, r"prompt\[0\].content\[0\].text: is empty"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_rows_are_named(folder, changes, message) -> None:
    path = write(folder, ROW, row_with(id="q", **changes))
    with pytest.raises(ProblemError, match=rf"^{path}:2: {message}"):
        read_pairs(path)


@pytest.mark.parametrize("changes, message", [
    ({"rejected": " cross"}, "rejected: is the same"), ({"chosen": ""}, "chosen: is empty"),
    ({"images": ()}, "images: 0 pictures"), ({"images": "a.png"}, "images: 5 pictures"),
    ({"meta": {"x": float("nan")}}, "meta: cannot be written as JSON"), ({"id": "p"}, "id: 'p' stands on line 1 already"),
    ({"rejected_prior": "\ud800"}, "rejected_prior: holds half of a surrogate pair"),
])
def test_bad_pairs_are_not_written(tmp_path, changes, message) -> None:
    with pytest.raises(ProblemError, match=rf"pairs.jsonl:2: {message}"):
        write_pairs(tmp_path / "pairs.jsonl", [from_row(ROW), replace(from_row(row_with(id="q")), **changes)])
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_wrong(folder) -> None:
    with pytest.raises(ProblemError, match=r"pairs.jsonl:2: id: 'p' stands on line 1 already"):
        read_pairs(write(folder, ROW, ROW))
    with pytest.raises(ProblemError, match=r"pairs.jsonl:1: rejected_images\[0\]: 'images/gone.png' does not exist"):
        read_pairs(write(folder, row_with(rejected_images=["images/gone.png"])))
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "a.png").read_bytes()[:60])
    with pytest.raises(ProblemError, match=r"pairs.jsonl:1: images\[0\]: 'cut.png' cannot be decoded"):
        read_pairs(write(folder, row_with(images=["images/cut.png"])))
    for name, message in (("/etc/x.png", "is an absolute path"), ("../x.png", "leaves the data folder")):
        with pytest.raises(ProblemError, match=rf"images\[0\]: '{name}' {message}"):
            read_pairs(write(folder, row_with(images=[name])), verify="none")
    (folder / "pairs.jsonl").write_text('{"id": "p",')
    with pytest.raises(ProblemError, match="pairs.jsonl:1: row: is not JSON"):
        read_pairs(folder / "pairs.jsonl")
    (folder / "pairs.jsonl").write_text("")
    with pytest.raises(ProblemError, match="pairs.jsonl: no good row"):
        read_pairs(folder / "pairs.jsonl")
    with pytest.raises(ProblemError, match="cannot be read"):
        read_pairs(folder / "none.jsonl")
    with pytest.raises(ProblemError, match="verify must be one of full, header, none, not 'some'"):
        read_pairs(folder / "pairs.jsonl", verify="some")


def test_bad_rows_are_left_out_and_kept_aside(folder, capsys) -> None:
    path = write(folder, ROW, row_with(id="q", chosen=said("")), row_with(id="r"))
    assert [pair.id for pair in read_pairs(path, skip_bad=True)] == ["p", "r"]
    assert "1 of 3 rows are bad" in capsys.readouterr().err
    assert json.loads((folder / "pairs.bad.jsonl").read_text())["error"] == f"{path}:2: chosen: is empty"


def test_a_picture_that_went_missing_is_named(folder) -> None:
    (pair,) = read_pairs(write(folder, ROW))
    (folder / "images" / "b.png").unlink()
    with pytest.raises(ProblemError, match=r"^p: rejected_images\[0\]: 'images/b.png' does not exist"):
        pair.load("rejected_images")


def test_a_bare_pair() -> None:
    """Made in code: what is not given is left out of the row."""
    pair = Pair("p", "g", "s", "MIT", ({"role": "user", "content": "Which?"},), "cross", rejected_prior="circle")
    assert set(to_row(pair)) == {"id", "group", "source", "license", "images", "prompt", "chosen", "rejected_prior", "meta"}
