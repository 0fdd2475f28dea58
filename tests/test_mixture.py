"""Mixtures: rates, epochs, turns, and an order that depends on nothing but the mixture, the data and the seed."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep import images
from data_prep.problem import Problem, ProblemError, View, read_problems, write_problems
from training import mixture as module
from training.config import RecipeError, load_recipe
from training.mixture import Draw, Mixture
from training.plan import Plan

from .conftest import picture
from .running import trainer_of

VIEWS = {"vision": 0.5, "both": 0.3, "text": 0.2}


def mixture_file(folder: Path, sources: dict) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"sources": sources}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """12 pictures; picture n has n % 3 + 1 questions; the last two have no facts. And one problem without picture."""
    folder = tmp_path_factory.mktemp("problems")
    (folder / "images").mkdir()
    rows = []
    for n in range(12):
        picture(28 + n, 28, seed=n).save(folder / f"images/{n}.png")
        rows += [
            Problem(
                id=f"{n}-{turn}",
                group=str(n),
                source="demo",
                image=f"images/{n}.png",
                facts=None if n >= 10 else f"facts {n}",
                question=f"question {turn} of {n}?",
                options=None,
                answer=f"answer {n} {turn}",
                license="CC0-1.0",
                meta={},
                root=folder,
            )
            for turn in range(n % 3 + 1)
        ]
    rows.append(
        Problem(
            id="words",
            group="words",
            source="demo",
            image=None,
            facts="only words",
            question="what?",
            options=None,
            answer="words",
            license="CC0-1.0",
            meta={},
            root=folder,
        )
    )
    write_problems(folder / "all.jsonl", rows)
    return folder / "all.jsonl"


@pytest.fixture
def mixture(problems, tmp_path):
    def make(*, draws=400, seed=0, turns=1, views=None, **sources) -> Mixture:
        sources = sources or {"demo": {"problems": str(problems), "turns": turns, "views": views or VIEWS}}
        return Mixture(mixture_file(tmp_path, sources), seed=seed, draws=draws)

    return make


def order(some: Mixture, n: int | None = None) -> list[Draw]:
    return [some.draw(i) for i in range(len(some) if n is None else n)]


def test_rates_are_met(mixture):
    some = mixture(draws=20_000)
    drawn = Counter(draw.view for draw in order(some))
    for view, rate in VIEWS.items():
        sd = (20_000 * rate * (1 - rate)) ** 0.5
        assert abs(drawn[View(view)] - 20_000 * rate) < 4 * sd


def test_rates_are_met_over_sources(mixture, problems):
    some = mixture(
        draws=20_000,
        one={"problems": str(problems), "views": {"text": 0.1}},
        two={"problems": str(problems), "views": {"text": 0.6, "blind": 0.3}},
    )
    drawn = Counter((draw.source, draw.view.value) for draw in order(some))
    for key, rate in {("one", "text"): 0.1, ("two", "text"): 0.6, ("two", "blind"): 0.3}.items():
        assert abs(drawn[key] - 20_000 * rate) < 4 * (20_000 * rate * (1 - rate)) ** 0.5


def test_the_order_is_a_function_of_the_seed(mixture):
    assert order(mixture(seed=1)) == order(mixture(seed=1))
    assert order(mixture(seed=1)) != order(mixture(seed=2))


def test_a_longer_run_begins_like_a_shorter_one(mixture):
    assert order(mixture(draws=50, turns=2)) == order(mixture(draws=777, turns=2), 50)


def test_draws_may_be_asked_in_any_order(mixture):
    some, numbers = mixture(turns=3), np.random.default_rng(0).permutation(400).tolist()
    expected = order(mixture(turns=3))
    assert [some.draw(n) for n in numbers] == [expected[n] for n in numbers]


@pytest.mark.parametrize("turns", (1, 3))
def test_every_unit_comes_once_before_any_comes_again(mixture, turns):
    some = mixture(turns=turns)
    for part in some.parts:
        mine = [draw.problems for draw in order(some) if draw.view == part.view]
        n = len(part.units)
        unit_of = {problem: u for u, unit in enumerate(part.units) for problem in unit}
        epochs = [[unit_of[problems[0]] for problems in mine[start : start + n]] for start in range(0, len(mine), n)]
        assert len(epochs) >= 3 and all(sorted(epoch) == list(range(n)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1], "the same order in every epoch"


def test_a_published_form_is_a_conversation_of_its_own(problems, tmp_path):
    rows = [replace(row, meta={"published": {"both": {"question": "as published?"}}}) if row.id == "2-1" else row
            for row in read_problems(problems)]
    write_problems(problems.with_name("published.jsonl"), rows)
    source = {"problems": str(problems.with_name("published.jsonl")), "turns": 3, "views": {"both": 0.5, "vision": 0.5}}
    both, vision = Mixture(mixture_file(tmp_path, {"demo": source}), seed=0, draws=10).parts
    place = [row.id for row in rows].index("2-1")
    assert (place,) in both.units and (place - 1, place + 1) in both.units
    assert (place - 1, place, place + 1) in vision.units


def test_turns_are_questions_about_one_picture(mixture):
    some = mixture(turns=2, views={"vision": 1.0})
    seen = set()
    for draw in order(some):
        rows = [some.problems["demo"][i] for i in draw.problems]
        assert len({(row.image, row.facts) for row in rows}) == 1 and len(set(draw.problems)) == len(rows)
        assert len(rows) == min(2, sum(row.image == rows[0].image for row in some.problems["demo"]))
        seen.add(draw.problems)
    assert len({frozenset(problems) for problems in seen if len(problems) == 2}) > 8, (
        "the same two turns of three every time"
    )
    assert any(problems[::-1] in seen for problems in seen if len(problems) == 2), "turns always in the same order"


def test_a_conversation_shows_picture_and_facts_once(mixture):
    some = mixture(turns=3, views={"both": 1.0})
    draw = next(draw for draw in order(some) if len(draw.problems) == 3)
    rows = [some.problems["demo"][i] for i in draw.problems]
    messages, images, prompts = some.conversation(draw)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 and len(images) == 1
    parts = [part for message in messages[::2] for part in message["content"]]
    assert [part["type"] for part in parts] == ["image", "text", "text", "text"]
    texts = [part["text"] for part in parts[1:]]
    assert texts[0].startswith(f"Facts: {rows[0].facts}\n") and not any("Facts" in text for text in texts[1:])
    assert all(row.question in text for row, text in zip(rows, texts))
    assert (
        [message["content"] for message in messages[1::2]]
        == [row.answer for row in rows]
        == [p.answer for p in prompts]
    )


def test_only_problems_that_can_have_a_view_are_drawn_in_it(mixture):
    some = mixture(draws=200, views={"both": 0.3, "vision": 0.3, "text": 0.2, "shuffled": 0.1, "conflict": 0.1})
    for draw in order(some):
        some.conversation(draw)  # would raise
    able = {part.view.value: {some.problems["demo"][i].id for unit in part.units for i in unit} for part in some.parts}
    assert "words" in able["text"] and "words" not in able["both"] | able["vision"]
    assert "11-0" in able["vision"] and "11-0" not in able["both"] | able["text"]


def test_hashes_name_the_data_and_the_mixture(mixture, problems, tmp_path):
    some = mixture()
    assert set(some.hashes) == {str(tmp_path / "mixture.yaml"), str(problems)}
    assert mixture(views={"vision": 0.6, "text": 0.4}).hashes != some.hashes


WRONG = {
    "sum": ({"demo": {"views": {"vision": 0.5, "text": 0.4}}}, ["rates sum to 0.9"]),
    "no source": ({}, ["rates sum to 0"]),
    "rate of 0": ({"demo": {"views": {"vision": 1.0, "text": 0.0}}}, ["sources.demo.views.text"]),
    "rate over 1": ({"demo": {"views": {"vision": 1.5}}}, ["sources.demo.views.vision"]),
    "unknown view": ({"demo": {"views": {"visoin": 1.0}}}, ["sources.demo.views", "no such view: visoin", "vision"]),
    "view by a method's name": ({"demo": {"views": {"title": 1.0}}}, ["no such view: title"]),
    "misspelt key": (
        {"demo": {"views": {"vision": 1.0}, "turn": 2}},
        ["sources.demo.turn: no such key", "did you mean 'turns'"],
    ),
    "turns of 0": ({"demo": {"views": {"vision": 1.0}, "turns": 0}}, ["sources.demo.turns"]),
    "turns when rendered": ({"demo": {"views": {"rendered": 1.0}, "turns": 2}}, ["sources.demo", "turns must be 1"]),
    "missing file": (
        {"demo": {"problems": "nowhere.jsonl", "views": {"vision": 1.0}}},
        ["sources.demo.problems: no such file: nowhere.jsonl"],
    ),
    "missing key": ({"demo": {"problems": None, "views": {"vision": 1.0}}}, ["sources.demo.problems"]),
    "source of nothing": ({"demo": None}, ["sources.demo"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mixture_is_refused_with_file_and_key(problems, tmp_path, name):
    sources, said = WRONG[name]
    path = mixture_file(
        tmp_path, {key: value and {"problems": str(problems), **value} for key, value in sources.items()}
    )
    with pytest.raises(RecipeError) as caught:
        Mixture(path, seed=0, draws=1)
    assert str(path) in str(caught.value) and all(words in str(caught.value) for words in said), caught.value


def test_a_view_that_no_problem_can_have(problems, tmp_path):
    words = tmp_path / "words.jsonl"
    words.write_text(problems.read_text(encoding="utf-8").splitlines()[-1] + "\n", encoding="utf-8")
    path = mixture_file(tmp_path, {"demo": {"problems": "words.jsonl", "views": {"vision": 1.0}}})
    with pytest.raises(RecipeError, match="sources.demo.views: no problem of words.jsonl can be shown as vision"):
        Mixture(path, seed=0, draws=1)


def test_a_bad_row_is_an_error_or_left_out(problems, tmp_path):
    lines = problems.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1])
    (tmp_path / "bad.jsonl").write_text(
        "\n".join([json.dumps({**row, "question": 3}), lines[-1]]) + "\n", encoding="utf-8"
    )
    path = mixture_file(tmp_path, {"demo": {"problems": "bad.jsonl", "views": {"text": 1.0}}})
    with pytest.raises(ProblemError, match="bad.jsonl:1: question"):
        Mixture(path, seed=0, draws=1)
    assert len(Mixture(path, seed=0, draws=1, skip_bad=True).problems["demo"]) == 1


# -- pairs, exhaustion, filters ---------------------------------------------------------------------


def test_paired_views_show_the_same_problems(mixture, problems):
    source = {"problems": str(problems), "turns": 2, "views": {"both": 0.5, "vision": 0.5}, "paired": True}
    some = mixture(demo=source, draws=300)
    both, vision = ([draw.problems for draw in order(some) if draw.view == view] for view in (View.both, View.vision))
    n = min(len(both), len(vision))
    assert both[:n] == vision[:n] and n > 100
    # Only what can be shown in both views is drawn in either.
    assert all(some.problems["demo"][i].facts for unit in vision for i in unit)
    unpaired = mixture(demo={**source, "paired": False}, draws=300)
    both, vision = ([draw.problems for draw in order(unpaired) if draw.view == view] for view in (View.both, View.vision))
    assert both[:n] != vision[:n]


def test_a_used_up_source_leaves_its_rate_to_the_others(mixture, problems):
    """A quarter of the draws until its 23 problems are gone twice, and none after that; the first draws are as without a limit."""
    limited = {"problems": str(problems), "views": {"vision": 0.25}, "max_epochs": 2}
    others = {"problems": str(problems), "views": {"text": 0.5, "blind": 0.25}}
    some = mixture(limited=limited, others=others, draws=2000)
    mine = [n for n, draw in enumerate(order(some)) if draw.source == "limited"]
    size = len(some.parts[0].units)
    assert len(mine) == 2 * size and Counter(draw.problems for draw in order(some) if draw.source == "limited").most_common()[-1][1] == 2
    after = Counter(draw.view for draw in order(some)[mine[-1] + 1 :])
    assert after[View.text] / sum(after.values()) == pytest.approx(2 / 3, abs=0.05)
    endless = mixture(limited={**limited, "max_epochs": None}, others=others, draws=2000)
    assert order(endless)[: mine[-1] + 1] == order(some)[: mine[-1] + 1]
    assert order(mixture(limited=limited, others=others, draws=100)) == order(some, 100)


def test_half_an_epoch(mixture, problems):
    source = {"problems": str(problems), "views": {"vision": 0.5}, "max_epochs": 0.5}
    some = mixture(half=source, rest={"problems": str(problems), "views": {"text": 0.5}}, draws=500)
    assert some.drawn(500)[0] == round(0.5 * len(some.parts[0].units)) and sum(some.drawn(123)) == 123


def test_everything_used_up_is_an_error_before_training(mixture, problems):
    source = {"problems": str(problems), "views": {"vision": 0.5, "text": 0.5}, "max_epochs": 1}
    total = sum(len(part.units) for part in mixture(demo=source, draws=10).parts)
    assert len(mixture(demo=source, draws=total)) == total
    with pytest.raises(RecipeError, match=f"all sources are used up after {total} of {total + 1} conversations"):
        mixture(demo=source, draws=total + 1)


def test_filters_are_applied_told_and_hashed(problems, tmp_path, monkeypatch):
    from data_prep import blind, overlap

    asked = []
    monkeypatch.setattr(blind, "needs_picture", lambda rows, scores, **options: asked.append((scores, options)) or rows[5:])
    monkeypatch.setattr(overlap, "without_overlap", lambda rows, files: asked.append(files) or (rows[1:], []))
    (tmp_path / "scores.jsonl").write_text("{}\n")
    source = {"problems": str(problems), "views": {"vision": 1.0}, "avoid": [str(problems)],
              "needs_picture": {"scores": str(tmp_path / "scores.jsonl"), "min_gain": 0.3, "against": "blind", "max_blind": 0.75}}
    some = Mixture(mixture_file(tmp_path, {"demo": source}), seed=0, draws=5)
    assert len(some.problems["demo"]) == len(read_problems(problems)) - 6
    assert asked == [(tmp_path / "scores.jsonl", {"min_gain": 0.3, "against": "blind", "max_blind": 0.75}), [problems]]
    worth, occurs = some.left_out["demo"]
    assert worth == "5 whose picture is worth less than 0.3 or that are answered without it with more than 0.75"
    assert "1 that occur in" in occurs
    assert str(tmp_path / "scores.jsonl") in some.hashes
    with pytest.raises(RecipeError, match="sources.demo.avoid.0: no such file: nowhere.jsonl"):
        Mixture(mixture_file(tmp_path, {"demo": {**source, "avoid": ["nowhere.jsonl"]}}), seed=0, draws=5)
    monkeypatch.setattr(blind, "needs_picture", lambda rows, scores, **options: [])
    with pytest.raises(RecipeError, match="sources.demo: no problem is left"):
        Mixture(mixture_file(tmp_path, {"demo": source}), seed=0, draws=5)


# -- through the trainer's own data loader ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_the_number_of_workers(recipe_file):
    path = recipe_file(steps=3, batch=4, micro_batch=2, turns=3)
    epochs = [list(trainer_of(path, [f"data.workers={workers}"]).get_train_dataloader()) for workers in (0, 1, 2)]
    assert [len(batches) for batches in epochs] == [6, 6, 6]
    for other in epochs[1:]:
        for expected, batch in zip(epochs[0], other):
            assert set(batch) == set(expected) and batch.pop("stage") == expected["stage"] == 0 and batch.pop("roles") == {}
            assert (batch.pop("views") == expected["views"]).all()
            assert batch.pop("draws") == expected["draws"]
            assert all((batch[key] == expected[key]).all() for key in batch)


def test_a_batch_is_its_draws(recipe_file):
    trainer = trainer_of(recipe_file(steps=2, batch=4, micro_batch=2))
    collator = trainer.data_collator
    for number, batch in enumerate(trainer.get_train_dataloader()):
        expected = collator([{"draw": 2 * number}, {"draw": 2 * number + 1}])
        assert (batch["input_ids"] == expected["input_ids"]).all()


def test_ranks_share_the_draws_of_every_step(recipe_file):
    """What accelerate gives two ranks: together, each optimizer step has the same draws as one rank alone."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    def steps(ranks: int) -> list[set[int]]:
        trainer = trainer_of(recipe_file(steps=3, batch=8, micro_batch=2), world_size=ranks)
        sampler = trainer._get_train_sampler()
        shards = [
            list(BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), ranks, rank)) for rank in range(ranks)
        ]
        accumulation = trainer.args.gradient_accumulation_steps
        assert {len(shard) for shard in shards} == {3 * accumulation}
        return [
            sorted(
                draw
                for shard in shards
                for batch in shard[step * accumulation : (step + 1) * accumulation]
                for draw in batch
            )
            for step in range(3)
        ]

    assert steps(1) == steps(2) == steps(4) == [list(range(8 * n, 8 * n + 8)) for n in range(3)]


def test_skipping_ahead_decodes_nothing(recipe_file, monkeypatch):
    from accelerate import skip_first_batches

    opened = []
    load = images.load
    monkeypatch.setattr(images, "load", lambda *args: opened.append(args) or load(*args))
    trainer = trainer_of(recipe_file(steps=20, batch=4, micro_batch=4, views={"vision": 1.0}))
    batches = skip_first_batches(trainer.get_train_dataloader(), 18)
    assert opened == []
    assert len(list(batches)) == 2 and len(opened) == 8


def test_command_prints_rates_and_items(recipe_file, capsys):
    path = recipe_file(turns=2)
    module.main([str(path), "steps=10", "--items", "3"])
    out = capsys.readouterr().out
    assert "40 draws" in out and all(view in out for view in ("vision", "both", "text"))
    some = Plan(load_recipe(path, ["steps=10"]))
    first = some.stages[0].mixture.problems["twins"][some.draw(0).problems[0]]
    assert first.id in out.replace("\n", "") or first.id[:20] in out
    assert first.question in out and out.count("assistant:") >= 3


def test_command_prints_any_id(recipe_file, problems, tmp_path, capsys):
    """Brackets are markup to the printing library."""
    row = json.loads(problems.read_text(encoding="utf-8").splitlines()[-1])
    (tmp_path / "odd.jsonl").write_text(
        json.dumps({**row, "id": "a[/b]c", "question": "[bold]?"}) + "\n", encoding="utf-8"
    )
    module.main([str(recipe_file(sources={"[/odd]": {"problems": "odd.jsonl", "views": {"text": 1.0}}}))])
    out = capsys.readouterr().out
    assert "a[/b]c" in out and "[bold]?" in out and "[/odd]" in out


def test_command_refuses_in_one_line(recipe_file):
    for changes, said in (
        (dict(views={"vision": 0.3}), "must sum to 1"),
        (dict(model={"name": "/no/where"}), "/no/where"),
    ):
        with pytest.raises(SystemExit) as caught:
            module.main([str(recipe_file(**changes))])
        assert str(caught.value).startswith("error: ") and said in str(caught.value)
