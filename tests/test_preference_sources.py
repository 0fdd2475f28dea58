"""Adapters of preference data that lies in tables: RLAIF-V in its layouts, RLHF-V, NaPO's biased answers, VLFeedback."""

import hashlib
import json
from collections import Counter

import pytest

from data_prep.images import ProblemError
from data_prep.pair import read_pairs
from data_prep.sources.preference import napo_bias, rlaif_v, rlhf_v, rows, vlfeedback
from tests.test_sources import picture_bytes, save, snapshot

RED, GREEN, BLUE = (picture_bytes(color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))


def placed(data):
    return f"images/{hashlib.sha256(data).hexdigest()[:24]}.png"


def run(adapter, tmp_path, *arguments, out="out"):
    """Run an adapter's command; the pairs that it wrote, every picture decoded on the way."""
    adapter.main(["--out", str(tmp_path / out), *map(str, arguments)])
    assert not (tmp_path / out / "test.jsonl").exists()
    return read_pairs(tmp_path / out / "train.jsonl")


def fails(adapter, tmp_path, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(adapter, tmp_path, *arguments)
    assert isinstance(caught.value.code, str), "a sentence, not a number"
    return caught.value.code


def user(*parts):
    """A user's message: a text is a text part, None an image part."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def sides(pair):
    return pair.chosen, pair.rejected


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield library


@pytest.fixture
def table(datasets, tmp_path):
    """Writes rows as a parquet file of a folder, `image` and `images` as the hub stores pictures, and returns the folder."""

    def write(records, file="set/data/train-00000-of-00001.parquet", features=None):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: [record[name] for record in records] for name in records[0]}
        pictured = {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
        words = {name: column for name, column in columns.items() if name not in pictured}
        known = datasets.Dataset.from_dict(words).features | {name: pictured[name] for name in columns if name in pictured}
        stored = datasets.Features({name: (features or {}).get(name, known[name]) for name in columns})
        datasets.Dataset.from_dict(columns, features=stored).to_parquet(path)
        return tmp_path / "set"

    return write


def cell(data):
    return None if data is None else {"bytes": data, "path": None}


# RLAIF-V


def rlaif(image, question, chosen, rejected, idx=0, **changes):
    row = {
        "ds_name": "RLAIF-V", "image": cell(image), "question": question, "chosen": chosen, "rejected": rejected,
        "origin_dataset": "coco", "origin_split": '{"model": "llava", "type": "detail"}', "idx": idx, "image_path": "c/1.jpg",
    }  # fmt: skip
    return {**row, **changes}


FLAT = [
    rlaif(RED, "What colour?", "Red.", "Blue."),
    rlaif(GREEN, "<image>\nWhat is it?", " Green.\n", "Red."),
    rlaif(RED, "How many?", "One.", "Two.", idx=7),
    rlaif(BLUE, "Same?", "Yes.", " Yes. "),
    rlaif(BLUE, "Empty?", "  ", "No."),
    rlaif(BLUE, "Empty too?", "No.", None),
    rlaif(RED, "What colour?", "Red.", "Blue."),
]


def test_flat_rows(table, tmp_path, capsys):
    pairs = run(rlaif_v, tmp_path, "--data", table(FLAT))
    assert [sides(pair) for pair in pairs] == [("Red.", "Blue."), ("Green.", "Red."), ("One.", "Two.")]
    assert [pair.prompt for pair in pairs] == [(user(None, text),) for text in ("What colour?", "What is it?", "How many?")]
    assert [pair.images for pair in pairs] == [(placed(data),) for data in (RED, GREEN, RED)]
    assert (tmp_path / "out" / placed(RED)).read_bytes() == RED and len(list((tmp_path / "out/images").iterdir())) == 2
    assert [pair.group for pair in pairs] == [placed(RED), placed(GREEN), placed(RED)]
    assert [pair.id.rsplit("-", 1)[0] for pair in pairs] == ["rlaif_v-0", "rlaif_v-0", "rlaif_v-7"]
    assert len({pair.id for pair in pairs}) == 3, "idx repeats, ids do not"
    assert {(pair.source, pair.license) for pair in pairs} == {("rlaif_v", "CC-BY-NC-4.0")}
    assert pairs[2].meta == {
        "ds_name": "RLAIF-V", "origin_dataset": "coco", "origin_split": {"model": "llava", "type": "detail"}, "idx": 7,
        "image_path": "c/1.jpg",
    }  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/out: 3 pairs in train.jsonl",
        "rlaif_v: pairs left out: empty answers (2), identical answers (1), repeated (1)",
        "rlaif_v: CC-BY-NC-4.0: non-commercial use only",
    ]


def test_again_is_the_same_and_ids_do_not_hang_on_the_order(table, tmp_path):
    pairs = run(rlaif_v, tmp_path, "--data", table(FLAT))
    before = snapshot(tmp_path / "out")
    run(rlaif_v, tmp_path, "--data", tmp_path / "set")
    assert snapshot(tmp_path / "out") == before
    table(FLAT[::-1])
    turned = run(rlaif_v, tmp_path, "--data", tmp_path / "set", out="turned")
    assert {pair.id: sides(pair) for pair in turned} == {pair.id: sides(pair) for pair in pairs}
    assert [pair.id for pair in turned] != [pair.id for pair in pairs]


def test_limit(table, tmp_path):
    folder = table([rlaif(RED if n % 2 else BLUE, f"Q{n}?", f"A{n}", "x", idx=n) for n in range(12)])
    every = run(rlaif_v, tmp_path, "--data", folder)
    four, five = ([p.id for p in run(rlaif_v, tmp_path, "--data", folder, "--limit", n, out=f"{n}")] for n in (4, 5))
    assert len(every) == 12 and len(four) == 4 and set(four) < set(five) < {pair.id for pair in every}
    order = [pair.id for pair in every]
    assert four == sorted(four, key=order.index) != order[:4], "spread over the set, in its order"


def message(role, *parts):
    return {"role": role, "content": [{"type": "text" if part else "image", "text": part} for part in parts]}


def formatted(images, *prompt, chosen="Yes.", rejected="No."):
    answers = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
    return {"images": [cell(data) for data in images], "prompt": list(prompt), **answers}


def test_formatted_rows(table, tmp_path, capsys):
    records = [
        formatted([RED], message("user", None, "What colour?"), chosen="Red.", rejected="Blue."),
        formatted([GREEN, BLUE], message("system", "Be short."), message("user", "Is", None, "like", None, "?")),
        formatted([BLUE], message("user", "No image part?")),
        formatted([], message("user", "No picture?")),
        formatted([BLUE], message("user", None, "And?"), message("assistant", "Well."), message("user", "Sure?")),
        formatted([RED], message("user", None, "Same?"), rejected="Yes."),
    ]
    pairs = run(rlaif_v, tmp_path, "--data", table(records))
    assert [pair.prompt for pair in pairs] == [
        (user(None, "What colour?"),),
        ({"role": "system", "content": [{"type": "text", "text": "Be short."}]}, user("Is", None, "like", None, "?")),
        (user(None, "No image part?"),),
        (user("No picture?"),),
        (user(None, "And?"), {"role": "assistant", "content": [{"type": "text", "text": "Well."}]}, user("Sure?")),
    ]
    red, green, blue = map(placed, (RED, GREEN, BLUE))
    assert [pair.images for pair in pairs] == [(red,), (green, blue), (blue,), (), (blue,)]
    assert [pair.group for pair in pairs] == [red, green, green, pairs[3].id, green], "blue ties the second to the third"
    assert sides(pairs[0]) == ("Red.", "Blue.") and pairs[0].meta == {} and pairs[0].id.startswith("rlaif_v-")
    assert "identical answers (1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "records, said",
    [
        ([rlaif(RED, "Q?", "a", "b"), rlaif(None, "Q?", "a", "b")], "row 1: image: must be a picture with its bytes, not None"),
        ([rlaif(RED, "Q?", "a", "b"), rlaif(b"no", "Q?", "a", "b")], "row 1: image: a picture of 2 bytes is not a picture"),
        ([rlaif(RED, "Q?", "a", "b"), rlaif(RED, "<image> <image>", "a", "b")],
         "row 1: question: <image> stands 2 times, the row has 1 picture"),
        ([rlaif(RED, "Q?", "a", "b"), rlaif(RED, " ", "a", "b")], "row 1: question: is empty"),
        ([rlaif(RED, "Q?", "a", "b"), rlaif(RED, None, "a", "b")], "row 1: question: must be text, not None"),
        ([{**rlaif(RED, "Q?", 1, 2)}], "row 0: chosen: must be text, not 1"),
        ([formatted([RED], message("user", None, "Q?")), formatted([RED], message("user", None, None, "Q?"))],
         "row 1: images: 1 pictures, but the prompt has 2 image parts"),
        ([formatted([None], message("user", None, "Q?"))], "row 0: images[0]: must be a picture with its bytes, not None"),
        ([formatted([RED], message("user", None, "Q?"), message("assistant", "A."))],
         "row 0: prompt[1]: the last message must be the user's"),
        ([formatted([RED], message("tool", None, "Q?"))], "row 0: prompt[0]: must be a message of the system, the user or"),
        ([{**formatted([RED], message("user", None, "Q?")), "chosen": [message("user", "A.")]}],
         "row 0: chosen[0]: must be the assistant's words"),
        ([{**formatted([RED], message("user", None, "Q?")), "rejected": [message("assistant", "A.")] * 2}],
         "row 0: rejected: must be one message, not 2"),
    ],
)  # fmt: skip
def test_bad_rows(table, tmp_path, records, said):
    folder = table(records)
    error = fails(rlaif_v, tmp_path, "--data", folder)
    assert error.startswith(f"{folder}:{said}")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_bad_rows_may_be_skipped(table, tmp_path, capsys):
    folder = table([FLAT[0], rlaif(None, "Gone?", "a", "b"), FLAT[1]])
    pairs = run(rlaif_v, tmp_path, "--data", folder, "--skip-bad")
    assert [pair.chosen for pair in pairs] == ["Red.", "Green."]
    (kept,) = [json.loads(line) for line in (tmp_path / "out/rows.bad.jsonl").read_text().splitlines()]
    assert kept["error"].startswith(f"{folder}:row 1: image: must be a picture")
    assert json.loads(kept["raw"])["question"] == "Gone?"
    assert f"{folder}: 1 of 3 rows are bad" in capsys.readouterr().err


def test_nothing_is_left(table, tmp_path):
    error = fails(rlaif_v, tmp_path, "--data", table(FLAT[3:5]))
    assert error.endswith("no good row (0 bad); rlaif_v: pairs left out: empty answers (1), identical answers (1)")


def test_columns_and_places(table, tmp_path):
    folder = table([{name: value for name, value in FLAT[0].items() if name != "rejected"}])
    assert fails(rlaif_v, tmp_path, "--data", folder).startswith(f"{folder}: no column 'rejected'; columns: ds_name, image,")
    assert "only a hub id has revisions" in fails(rlaif_v, tmp_path, "--data", folder, "--revision", "main")
    error = fails(rlaif_v, tmp_path, "--data", folder, "--split", "test")
    assert error.startswith(f"{folder}: no parquet files of the split 'test'")
    assert "is a file; name the folder" in fails(rlaif_v, tmp_path, "--data", folder / "data/train-00000-of-00001.parquet")


@pytest.mark.parametrize(
    "names, split, found",
    [
        (["RLAIF-V-Dataset_001.parquet", "RLAIF-V-Dataset_000.parquet"], "train", 2),  # openbmb/RLAIF-V-Dataset
        (["data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-0-of-1.parquet"], "train", 2),
        (["data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-0-of-1.parquet"], "test", 1),
        (["default/train/0000.parquet"], "train", 1),  # refs/convert/parquet
        (["test-00000-of-00001.parquet"], "train", 0),
        (["RLHF-V-Dataset.parquet"], "test", 0),
    ],
)  # fmt: skip
def test_where_parquet_files_lie(tmp_path, names, split, found):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    if found:
        files = [file.relative_to(tmp_path).as_posix() for file in rows.parquet_files(tmp_path, split)]
        assert files == sorted(name for name in names if found == len(names) or split in name)[:found] and len(files) == found
    else:
        with pytest.raises(ProblemError, match=f"no parquet files of the split '{split}'"):
            rows.parquet_files(tmp_path, split)


def test_pictures_as_another_library_writes_them(datasets, table, tmp_path):
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    folder = table(FLAT[:2], "set/RLAIF-V-Dataset_000.parquet", features={"image": struct})
    assert [pair.images for pair in run(rlaif_v, tmp_path, "--data", folder)] == [(placed(RED),), (placed(GREEN),)]


# RLHF-V and NaPO


def test_rlhf_v(table, tmp_path, capsys):
    def row(image, text, idx=0):
        return {name: value for name, value in rlaif(image, "", "", "", idx, text=text).items()
                if name not in ("question", "chosen", "rejected")}  # fmt: skip

    text = json.dumps({"question": "What is it?", "chosen": "A cät.", "rejected": "A dog."})
    (pair,) = run(rlhf_v, tmp_path, "--data", table([row(GREEN, text, 3)], "set/RLHF-V-Dataset.parquet"))
    assert (pair.prompt, sides(pair), pair.images) == ((user(None, "What is it?"),), ("A cät.", "A dog."), (placed(GREEN),))
    assert pair.id.startswith("rlhf_v-3-") and pair.meta["origin_split"]["type"] == "detail" and "text" not in pair.meta
    assert "rlhf_v: CC-BY-NC-4.0: non-commercial use only" in capsys.readouterr().out
    for text, said in (
        ("{'question': 1}", "text: must be a JSON object with question, chosen and rejected"),
        ('{"question": "Q", "chosen": "A"}', "text.rejected: missing field"),
        ('{"question": "Q", "chosen": "A", "rejected": 3}', "text.rejected: must be text, not 3"),
    ):
        folder = table([row(GREEN, text)], "set/RLHF-V-Dataset.parquet")
        assert fails(rlhf_v, tmp_path, "--data", folder).startswith(f"{folder}:row 0: {said}")


def test_napo_bias(table, tmp_path, capsys):
    def row(chosen, rejected, question_only, image_only="A red thing."):
        return rlaif(RED, "What colour?", chosen, rejected, question_only=question_only, image_only=image_only)

    records = [
        row("Red.", "Blue.", " White. "), row("Red.", "Green.", "Red."), row("Red.", "Red.", "Black."),
        row("Red.", "Red.", None), row("Red.", "Gold.", "Pink.", None),
    ]  # fmt: skip
    pairs = run(napo_bias, tmp_path, "--data", table(records, "set/RLAIF-V-Dataset-000-11.parquet"))
    assert [(pair.rejected, pair.rejected_prior) for pair in pairs] == [
        ("Blue.", "White."), ("Green.", None), (None, "Black."), ("Gold.", "Pink."),
    ]  # fmt: skip
    assert [pair.meta.get("image_only") for pair in pairs] == ["A red thing."] * 3 + [None]
    assert {(pair.source, pair.license, pair.group) for pair in pairs} == {("napo_bias", "CC-BY-NC-4.0", placed(RED))}
    assert capsys.readouterr().out.splitlines()[1:] == [
        "napo_bias: pairs left out: identical answers (1)",
        "napo_bias: dropped: rejected that is empty or the same as chosen (1), "
        "rejected_prior that is empty or the same as chosen (1)",
        "napo_bias: CC-BY-NC-4.0: non-commercial use only",
    ]
    folder = table(FLAT[:1], "set/RLAIF-V-Dataset-000-11.parquet")
    assert "no column 'question_only'" in fails(napo_bias, tmp_path, "--data", folder)


# VLFeedback


def completion(response, *ratings, model="m"):
    aspects = {name: {"Rating": rating, "Rationale": "because"} for name, rating in zip(vlfeedback.ASPECTS, ratings)}
    return {"annotations": aspects, "model": model, "response": response}


ANSWERS = [  # scores 4, 5, none, 4, 2, and one without a text
    completion("four", "3", "5", "4", model="a"), completion("five", "5", "5", "5", model="b"),
    completion("none", "5", "N/A", "5"), completion("also four", "4", "4", "4"),
    completion("two", "1", "3", "2", model="c"), completion(" ", "1", "1", "1"),
]  # fmt: skip


def feedback(ident, completions, img_path="/authors/merged_images/a.png"):
    models = [one["model"] for one in completions]
    return {"id": ident, "prompt": "What is it?", "models": models, "completions": completions, "img_path": img_path}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "merged_images"
    folder.mkdir()
    for name, data in (("a.png", RED), ("b.png", BLUE), ("q1.jpg", picture_bytes((9, 9, 9), "JPEG"))):
        (folder / name).write_bytes(data)
    return folder


def lists_of(completions):
    """As older versions of the hub's library store a list of objects."""
    return {name: [one[name] for one in completions] for name in ("annotations", "model", "response")}


@pytest.mark.parametrize("form", [list, lists_of], ids=["list of objects", "object of lists"])
def test_vlfeedback(table, tmp_path, pictures, capsys, form):
    tie = [completion("x", "3", "3", "3"), completion("y", "2", "3", "4")]
    records = [
        feedback("q1", ANSWERS), feedback("q2", tie), feedback("q3", ANSWERS[2:4], "b.png"),
        feedback("q1", ANSWERS[:2], "b.png"),
    ]  # fmt: skip
    folder = table([{**record, "completions": form(record["completions"])} for record in records])
    pairs = run(vlfeedback, tmp_path, "--data", folder, "--images", pictures)
    assert [sides(pair) for pair in pairs] == [("five", "two"), ("five", "four")]
    assert [pair.images for pair in pairs] == [(placed(RED),), (placed(BLUE),)]
    assert pairs[0].prompt == (user(None, "What is it?"),) and pairs[0].meta == {
        "chosen_score": 5.0, "rejected_score": 2.0, "chosen_model": "b", "rejected_model": "c",
    }  # fmt: skip
    assert pairs[0].id.startswith("vlfeedback-q1-") and pairs[1].id.startswith("vlfeedback-q1-"), "ids repeat"
    assert capsys.readouterr().out.splitlines()[1:] == [
        "vlfeedback: pairs left out: prompts with fewer than two rated answers (1), ties (1)",
        "vlfeedback: dropped: answers without three ratings (2), empty answers (1)",
        "vlfeedback: the authors name no licence; ask them what the data may be used for",
    ]
    every = run(vlfeedback, tmp_path, "--data", folder, "--images", pictures, "--all-pairs", "--license", "CC-BY-4.0")
    assert [sides(pair) for pair in every] == [
        ("five", "four"), ("four", "two"), ("five", "also four"), ("five", "two"), ("also four", "two"), ("five", "four"),
    ]  # fmt: skip
    assert Counter(pair.license for pair in every) == {"CC-BY-4.0": 6}
    told = capsys.readouterr().out
    assert "ties (2)" in told and "licence" not in told


def test_vlfeedback_jsonl(tmp_path, pictures):
    """The repository's file has no img_path, and its ratings may be numbers."""
    record = {name: value for name, value in feedback("q1", ANSWERS[:2]).items() if name != "img_path"}
    record["completions"][0] = completion("half", 4, 4, 4.5)
    file = pictures / "vlfeedback_80k.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (pair,) = run(vlfeedback, tmp_path, "--data", file)
    assert sides(pair) == ("five", "half") and pair.images[0].endswith(".jpg") and pair.meta["rejected_score"] == 4.1667
    assert "only a data set has a split" in fails(vlfeedback, tmp_path, "--data", file, "--split", "train")


def annotated(annotations):
    return [completion("x", "1", "1", "1"), {"annotations": annotations, "model": "m", "response": "y"}]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"img_path": "/authors/gone.png"}, "img_path: 'gone.png' does not exist"),
        ({"img_path": "../secret.png"}, "img_path: 'secret.png' does not exist"),
        ({"prompt": None}, "prompt: must be text, not None"),
        ({"completions": "x"}, "completions: must be a list or an object, not 'x'"),
        ({"completions": annotated(None)}, "completions[1].annotations: must be an object, not None"),
        ({"completions": [{"annotations": {}}]}, "completions[0].response: missing field"),
        ({"completions": {"annotations": [{}, {}], "response": ["x"]}},
         "completions: must hold as many of each, holds 2 annotations, 1 response"),
        ({"completions": {"response": ["x"]}}, "completions.annotations: missing field"),
    ],
)  # fmt: skip
def test_vlfeedback_bad_rows(tmp_path, pictures, changes, said):
    file = pictures / "rows.jsonl"
    save(pictures, [feedback("q1", ANSWERS), {**feedback("q2", ANSWERS), **changes}], file.name, lines=True)
    assert fails(vlfeedback, tmp_path, "--data", file).startswith(f"{file}:2: {said}")
    pairs = run(vlfeedback, tmp_path, "--data", file, "--skip-bad", "--all-pairs")
    assert len(pairs) == 5, "the first row's"
    assert len((tmp_path / "out/rows.bad.jsonl").read_text().splitlines()) == 1, "a row is bad once, however many pairs it has"


def test_annotations_without_a_rating_are_not_ranked():
    for annotations in ({}, {"Helpfulness": {"Rating": "5"}}, completion("", "5", None, "5")["annotations"],
                        completion("", "nan", "5", "5")["annotations"]):  # fmt: skip
        assert vlfeedback._score(annotations, "here") is None
    assert vlfeedback._score(completion("", "2", "3", "4")["annotations"], "here") == 3
