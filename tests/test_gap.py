"""eval.gap: known gaps in, known gaps out; a change that is none; refusals that name what differs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from eval import gap, show, stats
from eval.answers import AnswersError, check_pair, read_run, read_side

VIEWS = ("both", "text", "vision", "blind")


def write_run(folder: Path, right: dict[str, float], *, n=200, task="twins", group_size=2, seed=0, info=None,
              edit=None) -> Path:
    """An output folder as eval.run writes it. right: view -> share of items answered rightly (exactly, by index)."""
    folder.mkdir(parents=True)
    rows = []
    for view, share in right.items():
        order = list(range(n))
        random.Random(f"{seed}{view}").shuffle(order)
        good = set(order[:round(share * n)])
        for item in range(n):
            gold = ("red", "blue")[item % 2]
            pred = gold if item in good else ("blue", "red")[item % 2]
            rows.append({
                "task": task, "view": view, "id": f"i{item:04d}", "group": f"g{item // group_size}", "source": "scenes",
                "question": f"What colour is shape {item}?", "choices": ["red", "blue"], "options": ["red", "blue"],
                "gold": gold, "pred": pred, "correct": pred == gold, "scores": None, "text": pred, "finish": "stop",
                "answer_tokens": 1, "image": f"images/{item}.png", "key": f"{view}{item}",
                "meta": {"kind": ("lookup", "count")[item // 2 % 2]},
            })
    if edit:
        rows = edit(rows)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = {"model": "assets/tiny", "adapter": None, "adapter_sha256": None, "mode": "generate", "parser": 1,
           "max_new_tokens": 32, "pixels": {"min": 3136, "max": 50176}, "label": folder.name, "seed": seed,
           "dirty": False,
           "tasks": {task: {"data": "data/test.jsonl", "root": str(folder), "sha256": "ab" * 32, "n": n}},
           "views": list(right), "recipe": None, "commit": "0" * 40, "packages": {"torch": "2.13.0"}, "device": "cpu",
           "seconds": 1.0, **(info or {})}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


@pytest.fixture
def pair(tmp_path):
    return (write_run(tmp_path / "base", {"both": 0.95, "text": 0.95, "vision": 0.6, "blind": 0.5}),
            write_run(tmp_path / "tuned", {"both": 0.95, "text": 0.94, "vision": 0.9, "blind": 0.5}))


def compared(before, after, **options):
    return gap.compare(read_side(None, before), read_side(None, after), **options)["tasks"]["twins"]


def test_known_gap_comes_out(pair):
    found = compared(*map(str, pair))
    assert found["before"]["views"]["both"]["value"] == pytest.approx(0.95)
    assert found["before"]["gap"]["gap"] == pytest.approx(0.35)
    assert found["after"]["gap"]["gap"] == pytest.approx(0.05)
    assert found["before"]["text_gap"]["gap"] == pytest.approx(0.35)
    assert found["before"]["image_gain"]["gap"] == pytest.approx(0.10)
    assert found["before"]["chance"] == 0.5 and found["before"]["n_groups"] == 100
    change = found["change"]
    assert change["gap"]["change"] == pytest.approx(-0.30)
    assert change["gap"]["d_both"] == pytest.approx(0) and change["gap"]["d_vision"] == pytest.approx(0.30)
    assert change["gap"]["closure"]["value"] == pytest.approx(0.30 / 0.35)
    assert change["gap"]["low"] < -0.30 < change["gap"]["high"] < 0
    assert change["views"]["vision"]["change"] == pytest.approx(0.30)
    assert change["views"]["vision"]["mcnemar_p"] < 1e-6
    # phi_image = [(v - n) + (b - t)] / 2, phi_text = [(t - n) + (b - v)] / 2
    assert found["before"]["shapley"]["image"] == pytest.approx((0.10 + 0.0) / 2)
    assert found["before"]["shapley"]["text"] == pytest.approx((0.45 + 0.35) / 2)
    assert change["verdict"]["word"] == "closed well"


def test_no_change_gives_an_interval_around_zero(tmp_path):
    right = {"both": 0.9, "text": 0.9, "vision": 0.6, "blind": 0.5}
    found = compared(str(write_run(tmp_path / "a", right, seed=1)), str(write_run(tmp_path / "b", right, seed=2)))
    change = found["change"]
    assert change["gap"]["change"] == pytest.approx(0) and change["gap"]["low"] < 0 < change["gap"]["high"]
    assert change["verdict"]["word"] == "not closed"


def test_the_same_answers_twice_change_nothing(tmp_path):
    right = {"both": 0.9, "vision": 0.6}
    found = compared(str(write_run(tmp_path / "a", right)), str(write_run(tmp_path / "b", right)))["change"]["gap"]
    assert found["change"] == found["se"] == found["low"] == found["high"] == 0 and "no width" in found["note"]


@pytest.mark.parametrize("after, word", [
    ({"both": 0.70, "text": 0.95, "vision": 0.65}, "closed by loss"),   # both fell
    ({"both": 0.95, "text": 0.80, "vision": 0.90}, "closed by loss"),   # text fell
    ({"both": 0.95, "text": 0.93, "vision": 0.90}, "closed well"),      # a fall of the margin itself is allowed
    ({"both": 0.95, "text": 0.95, "vision": 0.50}, "not closed"),
])
def test_verdict_looks_at_both_sides(tmp_path, after, word):
    before = write_run(tmp_path / "a", {"both": 0.95, "text": 0.95, "vision": 0.6})
    found = compared(str(before), str(write_run(tmp_path / "b", after)))
    assert found["change"]["verdict"]["word"] == word


def test_a_gap_that_fell_without_vision_is_a_loss_also_inside_the_margin():
    changes = {"gap": {"change": -0.015, "high": -0.01, "d_vision": 0.0},
               "views": {"both": {"change": -0.015}, "text": {"change": 0.0}}}
    start = stats.paired_gap([1, 1, 0], [0, 1, 0])
    assert gap.verdict(changes, start) == {
        "word": "closed by loss", "reason": "gap -1.5, vision +0.0: the gap fell without a gain in vision"}
    changes["gap"]["d_vision"] = 0.01
    assert gap.verdict(changes, start)["word"] == "closed well"


def test_margin_decides_what_fall_is_allowed(tmp_path):
    before = write_run(tmp_path / "a", {"both": 0.95, "text": 0.95, "vision": 0.6})
    after = write_run(tmp_path / "b", {"both": 0.90, "text": 0.95, "vision": 0.9})
    words = [compared(str(before), str(after), margin=margin)["change"]["verdict"]["word"] for margin in (0.02, 0.06)]
    assert words == ["closed by loss", "closed well"]


def test_verdict_without_a_gap_or_without_its_views(tmp_path):
    level = write_run(tmp_path / "a", {"both": 0.6, "vision": 0.6})
    assert compared(str(level), str(write_run(tmp_path / "b", {"both": 0.6, "vision": 0.9}))
                    )["change"]["verdict"]["word"] == "no gap"
    only = compared(str(write_run(tmp_path / "c", {"vision": 0.6})), str(write_run(tmp_path / "d", {"vision": 0.9})))
    assert only["change"]["verdict"]["word"] == "not known"
    assert any(one.startswith("gap: needs the view both") for one in only["before"]["missing"])
    assert any(one.startswith("shapley: needs the views blind, text, both") for one in only["before"]["missing"])


def test_the_question_as_text_against_the_question_drawn_in(tmp_path):
    before = write_run(tmp_path / "a", {"vision": 0.8, "blind": 0.5, "rendered": 0.6})
    after = write_run(tmp_path / "b", {"vision": 0.8, "blind": 0.5, "rendered": 0.7})
    result = gap.compare(read_side(None, str(before)), read_side(None, str(after)))
    found = result["tasks"]["twins"]
    change = found["change"]["rendered_gap"]
    assert found["before"]["rendered_gap"]["gap"] == pytest.approx(0.2) and change["change"] == pytest.approx(-0.1)
    assert change["d_rendered"] == pytest.approx(0.1) and change["d_vision"] == 0
    assert change["closure"]["value"] == pytest.approx(0.5)
    assert "| rendered gap (vision - rendered) | +20.0 [" in show.markdown(result)
    assert gap.table({"a": [before]})[0]["rendered_gap"][0] == pytest.approx(0.2)


def test_the_drawn_question_is_not_missing_where_it_was_not_asked(pair):
    found = gap.measure(read_side(None, str(pair[0])), "twins")
    assert "rendered_gap" not in found and not any("rendered" in one for one in found["missing"])
    assert "rendered_gap" not in gap.table({"a": [pair[0]]})[0]
    assert gap.table({"a": [pair[0]]})[0]["image_gain"] is not None


def test_flips_against_the_blank_picture(tmp_path):
    # 10 items: vision right on all; white right on 6 -> 4 flips, all right to wrong
    run = write_run(tmp_path / "a", {"vision": 1.0, "white": 0.6}, n=10)
    flips = gap.measure(read_side(None, str(run)), "twins")["flips"]["white"]
    assert (flips["rate"], flips["right_to_wrong"], flips["wrong_to_right"]) == (0.4, 0.4, 0.0)


def test_seeds_are_averaged_per_item_and_shown_one_by_one(tmp_path):
    base = write_run(tmp_path / "base", {"both": 0.9, "vision": 0.6})
    tuned = [write_run(tmp_path / f"s{seed}", {"both": 0.9, "vision": share}, seed=seed)
             for seed, share in enumerate((0.7, 0.8, 0.9))]
    found = compared(str(base), ",".join(map(str, tuned)))
    assert found["after"]["n_seeds"] == 3 and found["after"]["gap"]["gap"] == pytest.approx(0.1)
    seeds = found["change"]["gap"]["seeds"]
    assert seeds["values"] == pytest.approx([-0.1, -0.2, -0.3]) and seeds["mean"] == pytest.approx(-0.2)
    # sd 0.1, t(0.975, 2) = 4.302653, half width = 4.302653 * 0.1 / sqrt(3) = 0.248413
    assert seeds["high"] == pytest.approx(-0.2 + 0.248413, abs=1e-6)
    assert len(found["change"]["views"]["vision"]["mcnemar_p_seeds"]) == 3


def test_warnings(tmp_path):
    def mute(rows):
        for row in rows:
            if row["view"] == "vision" and row["id"] < "i0020":
                row.update(pred=None, correct=False, finish="length")
        return rows

    run = write_run(tmp_path / "a", {"both": 1.0, "vision": 0.5, "blind": 0.8}, edit=mute,
                    info={"dirty": True})
    found = " ".join(gap.measure(read_side(None, str(run)), "twins")["warnings"])
    for words in ("unparsed answers: 10.0 % in vision", "vision is within 3 SE of chance", "both is within 3 SE of 100",
                  "blind is above chance", "10.0 % of the answers in vision were cut off", "uncommitted changes"):
        assert words in found, words


def test_few_unparsed_answers_are_no_warning(tmp_path):
    def mute(rows):
        rows[0].update(pred=None, correct=False)
        return rows

    run = write_run(tmp_path / "a", {"both": 0.8, "vision": 0.7}, edit=mute)
    found = gap.measure(read_side(None, str(run)), "twins")
    assert found["views"]["both"]["unparsed"] == pytest.approx(1 / 200) and found["warnings"] == []


SHA = {"twins": {"data": "data/test.jsonl", "root": ".", "sha256": "cd" * 32, "n": 200}}


@pytest.mark.parametrize("info, words", [
    ({"parser": 2}, "differ in parser: 1 against 2"),
    ({"mode": "likelihood"}, "differ in mode"),
    ({"max_new_tokens": 64}, "differ in max_new_tokens: 32 against 64"),
    ({"pixels": {"min": 3136, "max": 1}}, "differ in pixels"),
    ({"tasks": SHA}, "differ in the data of task 'twins': sha256"),
])
def test_refuses_runs_that_were_not_measured_alike(tmp_path, info, words):
    right = {"both": 0.9, "vision": 0.6}
    before, after = write_run(tmp_path / "a", right), write_run(tmp_path / "b", right, info=info)
    with pytest.raises(SystemExit) as stop:
        gap.main([str(before), str(after)])
    assert words in str(stop.value) and "\n" not in str(stop.value)
    assert not (after / "gap.json").exists()


@pytest.mark.parametrize("edit, words", [
    (lambda rows: rows[:-1] + [{**rows[-1], "id": "new"}], "do not pair up"),
    (lambda rows: rows[:-1], "do not pair up"),
    (lambda rows: rows + rows[-1:], "for the second time"),
    (lambda rows: [{**rows[0], "correct": not rows[0]["correct"]}] + rows[1:], "'correct' is"),
    (lambda rows: [{**rows[0], "pred": None, "correct": True}] + rows[1:], "unparsed answer"),
    (lambda rows: [{key: rows[0][key] for key in rows[0] if key != "gold"}] + rows[1:], "no field 'gold'"),
    (lambda rows: [], "holds no answers"),
])
def test_refuses_answers_that_do_not_fit(tmp_path, edit, words):
    with pytest.raises(AnswersError, match=words):
        read_run(write_run(tmp_path / "a", {"both": 0.9, "vision": 0.6}, edit=edit))


def test_refuses_other_items_other_gold_other_tasks_and_unequal_seeds(tmp_path):
    right = {"both": 0.9, "vision": 0.6}
    base = read_side(None, str(write_run(tmp_path / "a", right)))
    fewer = read_side(None, str(write_run(tmp_path / "b", right, n=100)))
    with pytest.raises(AnswersError, match="200 in .* 100 in"):
        check_pair(base, fewer)

    def swap(rows):
        return [{**row, "gold": "blue", "correct": row["pred"] == "blue"} if row["id"] == "i0000" else row
                for row in rows]

    with pytest.raises(AnswersError, match="differs in gold"):
        check_pair(base, read_side(None, str(write_run(tmp_path / "c", right, edit=swap))))
    with pytest.raises(AnswersError, match="no task in common"):
        check_pair(base, read_side(None, str(write_run(tmp_path / "d", right, task="nlvr"))))
    two, three = ([str(write_run(tmp_path / f"{count}{seed}", right)) for seed in range(count)] for count in (2, 3))
    with pytest.raises(AnswersError, match="2 seeds .* 3"):
        check_pair(read_side("x", two), read_side("y", three))
    with pytest.raises(AnswersError, match="given twice"):
        read_side("x", [two[0], two[0]])


def test_items_that_a_view_cannot_show_are_left_out_of_every_view(tmp_path):
    def no_facts(rows):
        return [row for row in rows if row["view"] == "vision" or row["id"] >= "i0040"]

    right = {"both": 1.0, "vision": 0.5}
    run = write_run(tmp_path / "a", right, edit=no_facts, info={"finished": True})
    found = gap.measure(read_side(None, str(run)), "twins")
    assert found["n"] == 160 and found["views"]["vision"]["n"] == found["views"]["both"]["n"] == 160
    assert "40 items cannot be shown in every view (40 not in both) and are left out of all numbers" in found["warnings"]
    assert found["left_out"] == {"n": 40, "views": {"both": 40}}
    none = write_run(tmp_path / "none", {"both": 1.0}, edit=lambda rows: rows[:150], info={"finished": True})
    assert read_run(none).left_out == {"twins": {"n": 50, "views": {"both": 50}}}, "those that no view can show as well"
    fewer = write_run(tmp_path / "fewer", {"vision": 0.5}, info={"finished": True})
    with pytest.raises(AnswersError, match="in one of them only; items that a view cannot show .* in the same views"):
        check_pair(read_side("x", str(run)), read_side("y", str(fewer)))
    with pytest.raises(AnswersError, match="do not pair up: view 'both' holds 160 of 200"):
        read_run(write_run(tmp_path / "b", right, edit=no_facts))
    with pytest.raises(AnswersError, match="cut short"):
        read_run(write_run(tmp_path / "c", right, info={"finished": False}))


def test_seeds_are_named_by_what_their_labels_share(tmp_path):
    runs = [str(write_run(tmp_path / f"control-seed{seed}", {"vision": 0.5}, seed=seed)) for seed in range(2)]
    assert read_side(None, runs).name == "control" and read_side(None, runs[:1]).name == "control-seed0"


def test_torn_file_and_missing_folder(tmp_path):
    folder = write_run(tmp_path / "a", {"both": 0.9, "vision": 0.6})
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"task": "twi')
    with pytest.raises(AnswersError, match="answers.jsonl:401: .*cut off"):
        read_run(folder)
    with pytest.raises(AnswersError, match="cannot read"):
        read_run(tmp_path / "nowhere")


def test_command_writes_the_same_files_twice(pair, tmp_path, capsys):
    for out in ("one", "two"):
        gap.main([*map(str, pair), "--out", str(tmp_path / out)])
    printed = capsys.readouterr().out
    assert "verdict: closed well" in printed and "gap (both - vision)" in printed
    for name in ("gap.json", "gap.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    result = json.loads((tmp_path / "one" / "gap.json").read_text(), parse_constant=pytest.fail)
    assert result["tasks"]["twins"]["change"]["gap"]["change"] == pytest.approx(-0.30)
    assert "| gap (both - vision) | +35.0 [" in (tmp_path / "one" / "gap.md").read_text()


def test_table_has_a_row_per_run_and_task(pair):
    rows = gap.table({"base": [pair[0]], "tuned": str(pair[1])})
    assert [(row["run"], row["task"], row["n"]) for row in rows] == [("base", "twins", 200), ("tuned", "twins", 200)]
    assert rows[0]["gap"][0] == pytest.approx(0.35) and rows[0]["gap"][1] < 0.35 < rows[0]["gap"][2]
    assert rows[1]["views"]["vision"][0] == pytest.approx(0.9) and rows[0]["unparsed"] == 0


def test_markdown_cells_cannot_break_the_table():
    assert show.table_lines(("a|b",), [("<x>\ny",)])[0] == "| a\\|b |"
    assert show.table_lines(("a",), [("<x>\ny",)])[2] == "| &lt;x> y |"
