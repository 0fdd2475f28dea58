"""What the tests of PGPS9K, MathVerse and MMMU-Pro share: commands run, prompts taken apart, hub files written."""

import io
import json
from collections import Counter

import pytest
from PIL import Image

from data_prep.problem import partners, possible_views, read_problems, render
from eval import run as eval_run
from tests.fakes import FAKES, Fake


def make(adapter, tmp_path, *arguments, out="out"):
    """Run an adapter's command; {file name: problems} of what it wrote."""
    adapter.main(["--out", str(tmp_path / out), *map(str, arguments)])
    return {name: read_problems(path) for name in ("train", "test") if (path := tmp_path / out / f"{name}.jsonl").exists()}


def fails(adapter, tmp_path, *arguments):
    with pytest.raises(SystemExit) as caught:
        make(adapter, tmp_path, *arguments)
    assert isinstance(caught.value.code, str), "a sentence, not a number"
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.jsonl")), "nothing half-written"
    return caught.value.code


def all_text(prompt):
    return " ".join(part["text"] for part in prompt.messages[0]["content"] if part["type"] == "text")


def shape(prompt):
    """The turn's parts in order: "image", or the text."""
    return [part.get("text", "image") for part in prompt.messages[0]["content"]]


def colours(prompt):
    return [picture.getpixel((0, 0)) for picture in prompt.images]


def render_all(problems):
    """Every view that each problem can have, rendered."""
    seen = Counter()
    for problem, other in zip(problems, partners(problems), strict=True):
        for view in possible_views(problem, other):
            prompt = render(problem, view, other)
            assert (prompt.choices is None) == (problem.options is None)
            assert sum(part["type"] == "image" for part in prompt.messages[0]["content"]) == len(prompt.images)
            seen[view.value] += 1
    return seen


def meet_the_fakes(task, data, tmp_path, views):
    """{fake: rows} of every fake on the task, generated; what must hold for any task is checked."""
    found = {}
    for name, say in FAKES.items():
        words = ["--model", "fake", "--tasks", task, "--views", views, "--mode", "generate", "--data", str(data)]
        eval_run.run(eval_run.parse([*words, "--out", str(tmp_path / name)]), lambda say=say: Fake(say))
        found[name] = [json.loads(line) for line in (tmp_path / name / "answers.jsonl").read_text().splitlines()]
    assert found["oracle"] and all(row["correct"] for row in found["oracle"])
    assert not any(row["correct"] for row in found["gibberish"])
    assert all(row["pred"] is not None for name in ("constant", "blind") for row in found[name])
    return found


def png(colour, width=40):
    buffer = io.BytesIO()
    Image.new("RGB", (width, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library `datasets` with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield datasets


def parquet(datasets, file, rows, pictures):
    """Rows as the hub stores them: texts and {"bytes", "path"} structs."""
    features = {name: datasets.Dataset.from_list([{name: row[name]} for row in rows]).features[name] for name in rows[0]}
    features |= {name: datasets.Image() for name in pictures}
    rows = [
        {name: {"bytes": value, "path": None} if isinstance(value, bytes) else value for name, value in row.items()}
        for row in rows
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(file)
