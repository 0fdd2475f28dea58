"""eval.case_study: models whose reliance is known are measured as what they are, and what cannot be given is named."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.problem import View, read_problems, write_problems
from eval import case_page, case_study, gap, stats
from eval.answers import AnswersError, read_side
from eval.report import parse_runs
from tests.fakes import Fake, blind, oracle
from tests.test_gap import write_run
from tests.test_report import Page

REPLACED = ("blind", "white", "black", "gray", "noise", "shuffled")


def _chosen(prompt, *parts: bytes) -> str:
    return prompt.choices[hashlib.sha256(b"\0".join(parts)).digest()[0] % len(prompt.choices)]


def _words(prompt) -> tuple[bytes, bytes]:
    """Facts (empty when there are none) and the question."""
    text = prompt.messages[0]["content"][-1]["text"]
    facts, _, question = text.partition("\n") if text.startswith("Facts: ") else ("", "", text)
    return facts.encode(), question.encode()


def follows_text(prompt) -> str:
    """Answers from the facts where there are some, else from the picture's pixels."""
    facts, question = _words(prompt)
    return _chosen(prompt, question, facts or b"".join(image.tobytes() for image in prompt.images))


def follows_image(prompt) -> str:
    """Answers from the picture's pixels where there is one, else from the facts."""
    facts, question = _words(prompt)
    return _chosen(prompt, question, b"".join(image.tobytes() for image in prompt.images) or facts)


SAYS = {"text": follows_text, "image": follows_image, "blind": blind}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch) -> None:
    """The intervals' own test is in test_stats and test_reliance; here they only have to be there."""
    monkeypatch.setattr(stats, "RESAMPLES", 100)


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Drawing is most of the time; test_page_is_whole looks at the figures."""
    monkeypatch.setattr("eval.plots._svg", lambda *_: "<svg></svg>")


@pytest.fixture
def models(monkeypatch) -> list[Fake]:
    """eval.run meets fakes instead of models: the bare one is the oracle, an adapter is what its folder's name says."""
    made: list[Fake] = []

    def load(model, adapter):
        made.append(Fake(SAYS[Path(adapter).name] if adapter else oracle))
        return made[-1]

    monkeypatch.setattr("data_prep.answerer.Answerer.of", lambda args: load(args.model, args.adapter))
    return made


def adapters(folder: Path, *names: str) -> list[str]:
    words = []
    for name in names:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text("{}")
        words += ["--adapter", f"{name}={folder / name}"]
    return words


def read(out: Path) -> dict:
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads((out / "case_study.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_known_models(models, no_figures, twins, tmp_path) -> None:
    words = ["--model", "fake", *adapters(tmp_path, *SAYS), "--tasks", str(twins / "test.jsonl"), "--out", str(tmp_path / "out")]
    case_study.main(words)
    result = read(tmp_path / "out")
    assert [one["name"] for one in result["models"]] == ["base", *SAYS]
    found = result["tasks"]["test"]["models"]
    measured = {name: {key: {variant: one["value"] for variant, one in variants.items()}
                       for key, variants in model["measures"].items()} for name, model in found.items()}
    assert set(measured["base"]["accuracy"]) == {view.value for view in View}
    assert not found["base"]["missing"]

    base = measured["base"]  # always right, whatever it is shown
    assert set(base["accuracy"].values()) == set(base["consistency"].values()) == {1.0}
    assert set(base["kappa"].values()) == {1.0}
    assert set(base["utility_image"].values()) == {0.0} and base["imbalance"]["text"] is None
    assert "one sign" in found["base"]["measures"]["imbalance"]["text"]["note"]
    assert base["consistency_wrong"]["blind"] is None and base["consistency_right"]["blind"] == 1
    assert base["perceptual"] == pytest.approx({"accuracy": 0, "majority": 0})

    never = measured["blind"]
    for view in REPLACED:
        assert never["consistency"][view] == never["kappa"][view] == 1
        assert never["flips"][view] == never["kl"][view] == never["js"][view] == never["gold_change"][view] == 0
    assert never["text_preference"]["conflict"] is None
    assert "never answered differently" in found["blind"]["measures"]["follows_text"]["conflict"]["note"]

    text, image = measured["text"], measured["image"]
    assert text["text_preference"]["conflict"] == text["follows_text"]["conflict"] == 1
    assert text["follows_neither"]["conflict"] == 0
    assert image["text_preference"]["conflict"] == 0 and image["follows_image"]["conflict"] == 1
    assert text["consistency"]["text"] == text["kappa"]["text"] == 1 and text["utility_image"]["text"] == 0
    assert image["consistency"]["vision"] == 1 and image["utility_text"]["vision"] == 0 and image["consistency"]["conflict"] == 1
    assert image["consistency"]["noise"] < 0.8 and abs(image["kappa"]["noise"]) < 0.4
    assert image["kl"]["noise"] > 0 and text["kl"]["text"] == 0

    changes = result["tasks"]["test"]["changes"]
    assert set(changes) == set(SAYS)
    assert changes["blind"]["consistency"]["noise"]["value"] == 0
    assert changes["image"]["consistency"]["noise"]["value"] == pytest.approx(image["consistency"]["noise"] - 1)
    assert changes["image"]["accuracy"]["vision"]["value"] == pytest.approx(image["accuracy"]["vision"] - 1)
    assert set(found["base"]["kinds"]) == {str(one.meta["kind"]) for one in read_problems(twins / "test.jsonl")}
    assert sum(one["n"] for one in found["base"]["kinds"].values()) == found["base"]["n"]


def test_the_same_command_asks_nothing_again(models, twins, tmp_path, capsys) -> None:
    words = ["--model", "fake", *adapters(tmp_path, "image"), "--tasks", str(twins / "test.jsonl"), "--views", "vision,blind",
             "--limit", "18", "--seed", "7", "--out", str(tmp_path / "out")]
    case_study.main(words)
    result = read(tmp_path / "out")
    assert 10 < result["tasks"]["test"]["models"]["base"]["n"] <= 18
    assert [one["runs"][0]["seed"] for one in result["models"]] == [7, 7]
    assert "image - base" in capsys.readouterr().out
    asked, files = sum(one.asked for one in models), {path: path.read_bytes() for path in (tmp_path / "out").glob("case_study.*")}
    assert asked and len(files) == 3
    case_study.main(words)
    assert sum(one.asked for one in models) == asked
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").glob("case_study.*")}
    # the answers alone give the same measures
    folders = [f"{name}={tmp_path / 'out' / 'answers' / name}" for name in ("base", "image")]
    case_study.main(["--runs", *folders, "--out", str(tmp_path / "again")])
    assert read(tmp_path / "again")["tasks"] == result["tasks"]


def test_without_facts_what_is_missing_is_named(models, no_figures, twins, tmp_path, capsys) -> None:
    problems = [replace(problem, facts=None) for problem in read_problems(twins / "test.jsonl")]
    write_problems(twins / "no_facts.jsonl", problems)
    case_study.main(["--model", "fake", *adapters(tmp_path, "image"), "--tasks", str(twins / "no_facts.jsonl"), "--batch-size",
                     "5", "--out", str(tmp_path / "out")])
    found = read(tmp_path / "out")["tasks"]["no_facts"]["models"]["image"]
    assert set(found["measures"]["accuracy"]) == {"vision", "rendered", *REPLACED}
    assert set(found["measures"]["imbalance_drawn"]) == set(REPLACED) and "imbalance" not in found["measures"]
    why = {(one["measure"], one["variant"]): one["reason"] for one in found["missing"]}
    assert why["imbalance", "text"] == why["text_preference", "conflict"] == "no problem of the task has facts in words"
    given = {(name, variant) for name, variants in found["measures"].items() for variant in variants}
    assert not given & set(why)
    every = {name for name, _ in given | set(why)}
    assert every == set(case_study.case_page.TEXTS), "every measure is either given or named as missing"
    page = " ".join(Page((tmp_path / "out" / "case_study.html").read_text()).text)
    assert "What is missing" in page
    assert "has facts in words: accuracy (both, text, conflict, other_facts); consistency C (" in page
    assert "interaction (accuracy, log-probability)" in page and "text preference" not in page.partition("What is missing")[0]
    assert "not given because no problem of the task has facts in words" in capsys.readouterr().out


def test_generated_answers_have_no_soft_measures(models, no_figures, twins, tmp_path) -> None:
    case_study.main(["--model", "fake", "--tasks", str(twins / "test.jsonl"), "--views", "vision,blind", "--mode", "generate",
                     "--out", str(tmp_path / "out")])
    found = read(tmp_path / "out")["tasks"]["test"]["models"]["base"]
    why = {(one["measure"], one["variant"]): one["reason"] for one in found["missing"]}
    assert why["kl", "blind"] == "the answers were generated, so there are no likelihoods of options"
    assert why["consistency", "noise"] == "noise was not asked"
    assert found["measures"]["consistency"]["blind"]["value"] == 1 and "kl" not in found["measures"]


def with_scores(rows, wrong=-1.0):
    return [{**row, "scores": [0.0 if one == row["pred"] else wrong for one in row["choices"]]} for row in rows]


def test_seeds_are_averaged_and_paired(tmp_path) -> None:
    right = {"both": 0.9, "text": 0.9, "vision": 0.6, "blind": 0.5, "shuffled": 0.5}
    base = write_run(tmp_path / "base", right, edit=with_scores)
    seeds = [write_run(tmp_path / f"s{seed}", {**right, "vision": 0.8 + 0.05 * seed}, seed=seed + 1, edit=with_scores)
             for seed in range(2)]
    sides = parse_runs([f"base={base}", "tuned=" + ",".join(map(str, seeds))])
    found = case_study.compare(sides)["tasks"]["twins"]
    tuned, moved = found["models"]["tuned"], found["changes"]["tuned"]
    assert tuned["n_seeds"] == 2 and tuned["measures"]["accuracy"]["vision"]["value"] == pytest.approx(0.825)
    # the numbers that eval.gap gives as well are the same
    known = gap.change(*sides, "twins")
    for name, variant, other in (("utility_image", "blind", "image_gain"), ("utility_text", "vision", "gap")):
        for part, key in (("value", "change"), ("low", "low"), ("high", "high")):
            assert moved[name][variant][part] == pytest.approx(known[other][key])
    for view in ("blind", "shuffled"):
        assert moved["flips"][view]["value"] == pytest.approx(known["flips"][view]["change"])
    assert moved["shapley_share"]["accuracy"]["value"] == pytest.approx(known["shapley"]["change"])
    # both 0.9, vision 0.6, text 0.9: the words are worth 0.3 beside the picture, the picture nothing beside the words
    base_measures = found["models"]["base"]["measures"]
    assert base_measures["imbalance"]["text"]["value"] == pytest.approx(1)
    assert base_measures["utilisation_image"]["text"]["value"] == pytest.approx(0)
    assert base_measures["utilisation_text"]["vision"]["value"] == pytest.approx(0.3 / 0.9)
    # two options, -1 between them: log p of the right one is log sigmoid(1) or log sigmoid(-1), 1 apart
    assert tuned["measures"]["gold_change"]["blind"]["value"] == pytest.approx(0.825 - 0.5)
    assert tuned["measures"]["shapley_image"]["log_probability"]["value"] == pytest.approx((0.325 + 0.0) / 2)
    # per kind the items are split, not resampled from the whole
    kinds = tuned["kinds"]
    assert {kind: one["n"] for kind, one in kinds.items()} == {"count": 100, "lookup": 100}
    rows = [json.loads(line) for seed in seeds for line in (seed / "answers.jsonl").read_text().splitlines()]
    for kind, one in kinds.items():
        shown = [row["correct"] for row in rows if row["view"] == "vision" and row["meta"]["kind"] == kind]
        assert one["measures"]["accuracy"]["vision"]["value"] == pytest.approx(sum(shown) / 200)
    assert kinds["count"]["measures"]["accuracy"]["vision"] != kinds["lookup"]["measures"]["accuracy"]["vision"]


def test_open_questions_are_left_out_of_what_needs_options(tmp_path) -> None:
    def edit(rows):
        return [row if int(row["id"][1:]) % 2 else {**row, "choices": None, "options": None, "scores": None}
                for row in with_scores(rows)]

    right = {"both": 0.9, "text": 0.9, "vision": 0.6, "blind": 0.5}
    run = write_run(tmp_path / "a", right, edit=edit)
    found = case_study.measure(read_side("a", str(run)), "twins")["measures"]
    assert found["consistency"]["blind"]["n"] == 200
    assert found["kappa"]["blind"]["n"] == found["kl"]["blind"]["n"] == found["shapley_image"]["log_probability"]["n"] == 100
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    closed = {view: sum(row["correct"] for row in rows if row["view"] == view and row["choices"]) / 100 for view in right}
    assert found["gold_change"]["blind"]["value"] == pytest.approx(closed["vision"] - closed["blind"])
    image = ((closed["vision"] - closed["blind"]) + (closed["both"] - closed["text"])) / 2
    assert found["shapley_image"]["log_probability"]["value"] == pytest.approx(image)


def test_items_that_a_view_cannot_show_are_counted(tmp_path, no_figures, capsys) -> None:
    def some(rows):
        return [row for row in rows if not (row["view"] == "shuffled" and row["id"] < "i0003")
                and not (row["view"] == "conflict" and row["id"] == "i0007")]

    views = {"both": 0.9, "vision": 0.6, "shuffled": 0.5, "conflict": 0.5, "other_facts": 0.5}
    run = write_run(tmp_path / "a", views, n=40, edit=some, info={"finished": True})
    case_study.main(["--runs", f"a={run}", "--out", str(tmp_path / "out")])
    model = read(tmp_path / "out")["tasks"]["twins"]["models"]["a"]
    assert model["n"] == 36 and model["left_out"] == {"n": 4, "views": {"shuffled": 3, "conflict": 1}}
    said = "4 items cannot be shown in every view (3 not in shuffled, 1 not in conflict) and are left out of all numbers"
    assert said in capsys.readouterr().out
    page = " ".join(" ".join(Page((tmp_path / "out" / "case_study.html").read_text()).text).split())
    assert f"{said}, so that every measure is of the same items." in page


def test_a_task_of_one_model_only_is_named(tmp_path, no_figures, capsys) -> None:
    first = write_run(tmp_path / "a", {"both": 1.0, "vision": 0.5}, n=10)
    second = write_run(tmp_path / "b", {"both": 1.0, "vision": 0.5}, n=10, edit=lambda rows: [
        *rows, *({**row, "task": "more"} for row in rows)], info={"tasks": {
            task: {"data": "d", "root": ".", "sha256": "ab" * 32, "n": 10} for task in ("twins", "more")}})
    case_study.main(["--runs", f"x={first}", f"y={second}", "--out", str(tmp_path / "out")])
    result = read(tmp_path / "out")
    assert list(result["tasks"]) == ["twins"] and result["only_in_some"] == ["more"]
    assert "tasks that not every model was asked: more" in capsys.readouterr().out
    assert "comparison is missing: more." in (tmp_path / "out" / "case_study.html").read_text()


def test_options_in_another_order_are_refused(tmp_path) -> None:
    def turn(rows):
        return [{**row, "choices": row["choices"][::-1]} if row["view"] == "vision" and row["id"] == "i0003" else row
                for row in rows]

    side = read_side("a", str(write_run(tmp_path / "a", {"both": 1.0, "vision": 0.5}, n=10, edit=turn)))
    with pytest.raises(AnswersError, match="item 'i0003' of task 'twins' has other choices in view 'vision' than in 'both'"):
        case_study.measure(side, "twins")


def test_scores_that_do_not_fit_are_refused(tmp_path) -> None:
    def cut(rows):
        return [{**row, "scores": [0.0]} for row in rows]

    side = read_side("a", str(write_run(tmp_path / "a", {"both": 1.0}, n=10, edit=cut)))
    with pytest.raises(AnswersError, match="item 'i0000' of task 'twins', view 'both': 1 scores for 2 options"):
        case_study.measure(side, "twins")


def test_page_is_whole_asks_for_nothing_and_escapes(tmp_path) -> None:
    evil = '<script>alert("x")</script>'

    def edit(rows):
        return [{**row, "meta": {"kind": evil if row["id"] < "i0020" else "plain"}} for row in with_scores(rows)]

    views = {view.value: 0.5 for view in View}
    runs = [f"{name}={write_run(tmp_path / name, {**views, 'vision': share}, n=40, edit=edit)}"
            for name, share in (("a", 0.7), ("b", 0.8), ("c", 0.9), ("d", 1.0))]
    case_study.main(["--runs", *runs, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "case_study.html").read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert key not in ("src", "href", "action", "data", "srcset") and not key.startswith("on"), (tag, key)
            assert key != "xlink:href" or value.startswith("#")
    assert not page.of("script") and any(evil in part for part in page.text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and not re.search(r"url\((?!#)|@import", text)
    assert len(page.of("svg", role="img")) == 6  # accuracy, agreement, probabilities, utility, conflict, kinds
    assert "default-src 'none'" in page.of("meta", http_equiv="Content-Security-Policy")[0]["content"]
    assert (tmp_path / "out" / "case_study.svg").read_text().startswith("<?xml")
    words = " ".join(page.text)
    assert all(one.title in words and one.reading.split(".")[0] in words for one in case_study.case_page.TEXTS.values())


@pytest.mark.parametrize("words, message", [
    (["--runs", "base=nowhere"], "error: cannot read nowhere/run.json"),
    (["--runs", "nowhere"], r"error: --runs takes NAME=DIR\[,DIR...\], not 'nowhere'"),
    (["--model", "fake", "--adapter", "runs/a"], "error: --adapter takes NAME=DIR"),
    (["--model", "fake", "--adapter", "a/b=runs/a"], "error: --adapter takes NAME=DIR"),
    (["--model", "fake", "--adapter", "base=runs/a"], "the name 'base' is taken by the bare model"),
    (["--model", "fake", "--adapter", "a=nowhere"], "error: --adapter a=nowhere: nowhere holds no adapter_config.json"),
    (["--model", "fake", "--tasks", "twinz"], "error: no such task: twinz"),
    (["--model", "fake", "--views", "both,visoin"], "error: no such view: visoin"),
])
def test_refusals(words, message, models, tmp_path) -> None:
    with pytest.raises(SystemExit) as caught:
        case_study.main([*words, "--out", str(tmp_path / "out")])
    assert re.search(message, str(caught.value.code)) and "\n" not in caught.value.code
    assert not models and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, message", [
    (["--runs", "a=b", "--limit", "3"], "--runs asks no model, so it takes no --limit"),
    (["--runs", "a=b", "--adapter", "c=d"], "it takes no --adapter"),
    (["--runs", "a=b", "--views", "both"], "it takes no --views"),
    (["--model", "fake", "--limmit", "3"], "unrecognized arguments: --limmit"),
    (["--model", "fake", "--runs", "a=b"], "not allowed with argument"),
    ([], "one of the arguments --model --runs is required"),
])
def test_options_that_do_not_go_together(words, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        case_study.main([*words, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def test_no_common_task_is_refused(tmp_path) -> None:
    first, second = (write_run(tmp_path / name, {"both": 1.0}, n=10, task=name) for name in "ab")
    with pytest.raises(SystemExit, match="error: 'x' and 'y' have no task in common"):
        case_study.main(["--runs", f"x={first}", f"y={second}", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_table_of_the_documents_keeps_the_order_of_the_models():
    committed = json.loads((Path(__file__).parent.parent / "results" / "preference" / "case_study.json").read_text(encoding="utf-8"))
    lines = case_page.block(committed)
    names = [line.split("|")[1].strip() for line in lines[2:-2]]
    assert names == [f"`{model['name']}`" for model in committed["models"]] and names[0] == "`base`"
    value = committed["tasks"]["twins"]["models"]["debias"]["measures"]["text_preference"]["conflict"]["value"]
    assert f"{100 * value:.1f} [" in lines[2 + names.index("`debias`")]
    assert "598 items in 142 groups" in lines[-1]
