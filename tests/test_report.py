"""eval.report and eval.plots: a page that asks the network for nothing and shows answers as text, whatever they say."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from eval import gap, plots, report
from eval.answers import AnswersError
from tests.test_gap import write_run

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> & </td>'
VOID = {"meta", "img", "br", "input", "link"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects tags with their attributes and the visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.tags, self.text, self.script = [], [], [], ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1:]}>"
        self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.script += data
        self.text.append(data)

    def of(self, tag: str, **attributes) -> list[dict]:
        return [found for name, found in self.tags
                if name == tag and all(found.get(key.replace("_", "-")) == value for key, value in attributes.items())]


def evil(rows):
    for row in rows:
        row["question"] = EVIL
        row["text"] = f"{EVIL} {row['pred']} \ud800"
    return rows


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    right = {"both": 0.9, "text": 0.9, "vision": 0.6, "blind": 0.5, "white": 0.5}
    base = write_run(folder / "base", right, n=40, edit=evil)
    for item in range(40):
        (base / "images").mkdir(exist_ok=True)
        if item % 10:
            Image.new("RGBA", (900, 300), (item, 0, 0, 128)).save(base / "images" / f"{item}.png")
        else:
            (base / "images" / f"{item}.png").write_bytes(b"\x89PNG broken" if item else b"")
    (base / "images" / "1.png").unlink()
    control, better = ([write_run(folder / f"{name}{seed}", {**right, "vision": share}, n=40, seed=seed + 1)
                        for seed in range(3)] for name, share in (("full-text", 0.65), ("better", 0.9)))
    words = [f"base={base}", "full-text=" + ",".join(map(str, control)), "better=" + ",".join(map(str, better))]
    for out in ("one.html", "two.html"):
        report.main(["--runs", *words, "--out", str(folder / out), "--sample", "40"])
    one, two = ((folder / out).read_bytes() for out in ("one.html", "two.html"))
    assert one == two
    return one.decode("utf-8")


def test_page_is_whole_and_asks_for_nothing(page):
    found = Page(page)
    for tag, attributes in found.tags:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert value.startswith(("data:image/", "#")), (tag, key, value[:60])
            assert not key.startswith("on"), (tag, key)
    assert not re.search(r"url\((?!#)|@import", page)
    assert {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in found.tags} == set()
    policy = found.of("meta", http_equiv="Content-Security-Policy")[0]["content"]
    digest = base64.b64encode(hashlib.sha256(found.script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_answers_are_text(page):
    found = Page(page)
    assert len(found.of("script")) == 1 and "alert" not in found.script
    assert any('<script>alert("x")</script>' in text for text in found.text)


def test_ids_and_references_are_unique(page):
    found = Page(page)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | {value[1:] for _, attributes in found.tags
                                                         for key, value in attributes.items() if key == "xlink:href"}
    assert used and used <= set(ids)
    assert len(found.of("svg", role="img")) == 4  # gap, changes, accuracy per view, kinds


def test_tables_hold_the_changes_against_the_first_and_the_control(page):
    text = " ".join(Page(page).text)
    for name in ("full-text - base", "better - base", "better - full-text"):
        assert name in text
    assert "base - full-text" not in text and "+30.0 [" in text  # gap of the base run: 0.9 - 0.6


def test_cards_have_their_picture_or_say_why_not(page):
    found = Page(page)
    assert len(found.of("article")) == 40
    shown = found.of("img")
    assert len(shown) == 35 and "picture not found: images/1.png" in page
    assert page.count("the picture cannot be read") == 4  # 0, 10, 20, 30: empty or broken
    data = base64.b64decode(shown[0]["src"].split(",", 1)[1])
    with Image.open(BytesIO(data)) as image:
        assert max(image.size) == report.SIDE_PIXELS and not image.info.get("exif")
    kinds = {one["data-kind"] for one in found.of("article")}
    assert kinds == {"lookup", "count"} and {one["data-differs"] for one in found.of("article")} <= {"yes", "no"}


def test_script_names_what_the_page_has(page):
    found = Page(page)
    for name in ("filter-task", "filter-kind", "filter-differs", "filter-count", "filters"):
        assert f'id="{name}"' in page
    for select in found.of("select"):
        assert all(f"data-{select['name']}" in card for card in found.of("article"))


def test_sample_keeps_room_for_both_sorts(tmp_path):
    base = write_run(tmp_path / "a", {"vision": 0.5}, n=100)
    other = write_run(tmp_path / "b", {"vision": 0.5}, n=100, seed=1)
    sides = report.parse_runs([f"a={base}", f"b={other}"])
    found = report._sample("twins", sides, ["vision"], 20)
    assert [card["differs"] for card in found["cards"]] == [True] * 10 + [False] * 10
    same = report._sample("twins", report.parse_runs([f"a={base}"]), ["vision"], 20)
    assert len(same["cards"]) == 20 and same["differing"] == 0


def test_picture_outside_its_folder_is_not_shown(tmp_path):
    run = write_run(tmp_path / "a", {"vision": 0.5}, n=4)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    sides = report.parse_runs([f"a={run}"])
    assert report.picture(sides, "twins", "../secret.png") == (None, "its path leaves the folder of pictures")
    assert report.picture(sides, "twins", None) == (None, "this problem has no picture")


@pytest.mark.parametrize("words, message", [
    (["nothing"], "NAME=DIR"), (["=x"], "NAME=DIR"), (["a=nowhere"], "cannot read"),
])
def test_refuses_wrong_runs(words, message):
    with pytest.raises(AnswersError, match=message):
        report.parse_runs(words)


def test_refuses_runs_that_cannot_be_compared(tmp_path):
    a = write_run(tmp_path / "a", {"vision": 0.5})
    b = write_run(tmp_path / "b", {"vision": 0.5}, info={"mode": "likelihood"})
    with pytest.raises(SystemExit, match="differ in mode"):
        report.main(["--runs", f"a={a}", f"b={b}", "--out", str(tmp_path / "x.html")])
    with pytest.raises(AnswersError, match="given twice"):
        report.parse_runs([f"a={a}", f"a={b}"])


def test_one_run_is_enough(tmp_path):
    run = write_run(tmp_path / "a", {"vision": 0.5})
    page = report.build(report.parse_runs([f"a={run}"]))
    assert "Changes" not in page and "gap: needs the view both" in page


def test_twelve_runs_look_different():
    assert len({plots._run_style(number) for number in range(12)}) == 12


def test_rendered_has_a_column_where_it_was_asked(tmp_path):
    words = [f"{name}={write_run(tmp_path / name, {'vision': 0.8, 'rendered': share})}"
             for name, share in (("a", 0.6), ("b", 0.7))]
    text = " ".join(Page(report.build(report.parse_runs(words))).text)
    assert "rendered gap (vision - rendered)" in text and "+20.0 [" in text and "-10.0 [" in text
    run = write_run(tmp_path / "c", {"vision": 0.5})
    assert "rendered" not in report.build(report.parse_runs([f"c={run}"])).partition("<h2>Items")[0]


def test_settings_are_those_that_runs_must_share(tmp_path):
    run = write_run(tmp_path / "a", {"vision": 0.5}, info={"rationale": True})
    text = " ".join(Page(report.build(report.parse_runs([f"a={run}"]))).text)
    assert "mode generate; rationale true; max_new_tokens 32; pixels 3136 to 50176." in text


def test_gap_figure_is_deterministic_and_takes_odd_names(tmp_path):
    run = write_run(tmp_path / "a", {"both": 0.9, "vision": 0.5}, n=20)
    rows = gap.table({"cost_$1 & $2 <b>": [run]})
    svg = plots.gap_figure(rows, title="a")
    assert svg == plots.gap_figure(rows, title="a") and svg.startswith("<?xml") and "<dc:date>" not in svg
    with pytest.raises(ValueError):
        plots.gap_figure([])


def test_undefined_intervals_are_drawn_as_points():
    nan = float("nan")
    assert plots._reach([(0.5, nan, nan), (0.5, 0.4, 0.7)]) == [[0.0, pytest.approx(10)], [0.0, pytest.approx(20)]]
    assert "<svg" in plots.bar_figure({"a": {"x": (0.5, nan, nan)}})
    assert "<svg" in plots.change_figure({"a": {"gap": (-0.1, nan, nan)}})
