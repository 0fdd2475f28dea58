"""Twins: pixels say what the facts say, answers follow, splits share nothing, and a blind reader is at chance."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.problem import View, possible_views, read_problems, render
from data_prep.twins import __main__ as command
from data_prep.twins.questions import KINDS, Balance, ask
from data_prep.twins.worlds import (
    BACKGROUND,
    CELL,
    COLOURS,
    DIGITS,
    FAMILIES,
    HEIGHTS,
    LEVELS,
    PLACES,
    SHAPES,
    SPLITS,
    WAYS,
    Thing,
    World,
    draw,
    possible_values,
)

from .solver import NUMBER, solve

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sample():
    """(world, question) pairs of every split, as written by the default command but for fewer in train."""
    pictures = {**command.PICTURES, "train": 3000}
    return {
        split: [(world, question) for world, questions in command.generate(split, n, seed=0) for question in questions]
        for split, n in pictures.items()
    }


def worlds(sample, split) -> list[World]:
    return list({world.key: world for world, _ in sample[split]}.values())


def parse(family: str, facts: str) -> World:
    """Facts back to a world."""
    assert facts.endswith(".")
    things = []
    for sentence in facts[:-1].split(". "):
        place, *values = sentence.split(" ")
        things.append(Thing(place, tuple(values)))
    return World(family, tuple(things))


# -- facts and pixels ------------------------------------------------------------------------------


def test_facts_are_enough_to_draw_the_picture(sample):
    for world in worlds(sample, "test") + worlds(sample, "test_new"):
        again = parse(world.family, world.facts)
        assert again == world and draw(again).tobytes() == draw(world).tobytes()


def cell(pixels: np.ndarray, place: str) -> np.ndarray:
    column, row = PLACES.index(place) % 3, PLACES.index(place) // 3
    return pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


def test_colour_and_shape_can_be_read_off_the_pixels(sample):
    """The colour at the centre of the cell; the shape from how many pixels it fills and how its rows grow."""
    seen = Counter()
    for world in worlds(sample, "test") + worlds(sample, "test_new"):
        if world.family != "shapes":
            continue
        pixels, there = np.asarray(draw(world)), {thing.place: thing for thing in world.things}
        for place in PLACES:
            part = cell(pixels, place)
            if place not in there:
                assert not any((part == colour).all(-1).any() for colour in COLOURS.values())
                continue
            colour, shape = there[place].values
            assert tuple(part[15, 15]) == COLOURS[colour]
            rows = (part == COLOURS[colour]).all(-1).sum(1)
            rows = rows[rows > 0]
            read = (
                "square"
                if (rows == rows[0]).all()
                else "triangle"
                if rows[-1] > 2 * rows[0]
                else "cross"
                if len(set(rows.tolist())) == 2
                else "circle"
            )
            assert read == shape
            seen[shape] += 1
    assert set(seen) == set(SHAPES)


def test_heights_can_be_read_off_the_pixels(sample):
    for world in worlds(sample, "test") + worlds(sample, "test_new"):
        if world.family == "charts":
            pixels = np.asarray(draw(world))
            assert pixels.shape == (3 * CELL, CELL * max(2, len(world.things)), 3)
            for i, bar in enumerate(world.things):
                column = (pixels[:, i * CELL + CELL // 2] == COLOURS[bar.place]).all(-1)
                assert column.sum() == NUMBER[bar.values[0]] * CELL // 2 and column[-1]


def test_ways_can_be_read_off_the_pixels(sample):
    """An arrow has more ink on the side of its head."""
    for world in worlds(sample, "test") + worlds(sample, "test_new"):
        if world.family == "paths":
            pixels, there = np.asarray(draw(world)), {thing.place: thing.values[0] for thing in world.things}
            for place in PLACES:
                y, x = np.nonzero((cell(pixels, place) == 0).all(-1))
                assert (len(x) > 0) == (place in there)
                if place in there:
                    offset = {"right": x.mean() - 15, "left": 15 - x.mean(), "down": y.mean() - 15, "up": 15 - y.mean()}
                    assert max(offset, key=offset.get) == there[place] and offset[there[place]] > 0.5


def test_digits_can_be_told_apart(sample):
    """Nine digits, nine different cells; a cell without one has no black."""
    looks = {}
    for digit in DIGITS:
        part = cell(np.asarray(draw(World("tables", (Thing("E", (digit,)),)))), "E")
        looks[digit] = part.tobytes()
        assert (part < 40).all(-1).sum() > 20
    assert len(set(looks.values())) == 9
    for world in worlds(sample, "test"):
        if world.family == "tables":
            pixels, there = np.asarray(draw(world)), {thing.place for thing in world.things}
            assert {place for place in PLACES if (cell(pixels, place) < 40).all(-1).any()} == there


def test_pictures_lie_on_the_grid_of_the_vision_tower(sample):
    for world in worlds(sample, "test"):
        picture = draw(world)
        assert picture.mode == "RGB" and picture.width % CELL == picture.height % CELL == 0
        assert picture.width * picture.height >= 56 * 56
        assert (
            Counter(
                picture.get_flattened_data() if hasattr(picture, "get_flattened_data") else picture.getdata()
            ).most_common(1)[0][0]
            == BACKGROUND
        )


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_facts(sample, split):
    kinds = Counter()
    for world, question in sample[split]:
        assert solve(world.family, world.facts, question.text, question.options) == question.answer, (
            world.facts,
            question,
        )
        assert 2 <= len(set(question.options)) == len(question.options) <= 4 and question.answer in question.options
        kinds[world.family, question.kind] += 1
    assert set(kinds) == {(family, kind) for family in FAMILIES for kind in KINDS}


# -- rationales ------------------------------------------------------------------------------------


def settles(family: str, facts: str, question) -> bool:
    """Whether these facts are enough for the right answer."""
    try:
        return solve(family, facts, question.text, question.options) == question.answer
    except (AssertionError, KeyError, ValueError, IndexError):
        return False


@pytest.mark.parametrize("split", SPLITS)
def test_rationales_are_the_facts_that_decide_and_no_others(sample, split):
    """Enough for the solver, and with any sentence taken away not enough; two values only where the second is asked for."""
    kinds, shorter = Counter(), 0
    for world, question in sample[split]:
        assert settles(world.family, question.rationale, question), question
        facts, said = ([*text[:-1].split(". ")] for text in (world.facts, question.rationale))
        if question.rationale == "none.":
            assert question.kind == "count" and question.answer == "zero"
        else:
            assert all(any(f"{fact} ".startswith(f"{one} ") for fact in facts) for one in said), question
            assert all(one.count(" ") == 1 for one in said) or question.text.startswith("Which shape")
            for n in range(len(said)):
                fewer = ". ".join(said[:n] + said[n + 1 :])
                assert not settles(world.family, f"{fewer}." if fewer else "none.", question), question
        assert len(said) <= len(facts)
        shorter += len(question.rationale) < len(world.facts)
        kinds[world.family, question.kind] += 1
    assert set(kinds) == {(family, kind) for family in FAMILIES for kind in KINDS}
    assert shorter > 0.93 * kinds.total()


SHAPES_WORLD = "A red circle. C red cross. E blue circle. I green square."
BARS_WORLD = "white two. red five. blue three. green six."
DIGITS_WORLD = "B three. D five. E three. H nine."
WAYS_WORLD = "A right. E up. F left. H up."


@pytest.mark.parametrize(
    "family, facts, question, rationale",
    (
        ("shapes", SHAPES_WORLD, "What colour is the shape at C?", "C red."),
        ("shapes", SHAPES_WORLD, "Which shape is at C?", "C red cross."),
        ("shapes", SHAPES_WORLD, "How many shapes are red?", "A red. C red."),
        ("shapes", SHAPES_WORLD, "How many shapes are white?", "none."),
        ("shapes", SHAPES_WORLD, "Which of these colours is there?", ("A red.", "E blue.", "I green.")),
        ("shapes", SHAPES_WORLD, "Which cell has the same colour as C?", "C red. A red."),
        ("shapes", SHAPES_WORLD, "Which is further left, green or blue?", "I green. E blue."),
        ("charts", BARS_WORLD, "How tall is the red bar?", "red five."),
        ("charts", BARS_WORLD, "How many bars are taller than three?", "red five. green six."),
        ("charts", BARS_WORLD, "How many bars are taller than two?", "red five. blue three. green six."),
        ("charts", BARS_WORLD, "Which of these heights has a bar?", ("white two.", "red five.", "blue three.", "green six.")),
        ("charts", BARS_WORLD, "Which bar is taller, blue or white?", "blue three. white two."),
        ("charts", BARS_WORLD, "Which bar is just right of the red bar?", "red five. blue three."),
        ("tables", DIGITS_WORLD, "Which number is at H?", "H nine."),
        ("tables", DIGITS_WORLD, "How many cells hold three?", "B three. E three."),
        ("tables", DIGITS_WORLD, "Which of these numbers is there?", ("B three.", "D five.", "H nine.")),
        ("tables", DIGITS_WORLD, "Which holds the larger number, H or D?", "H nine. D five."),
        ("tables", DIGITS_WORLD, "Which is higher up, nine or five?", "H nine. D five."),
        ("paths", WAYS_WORLD, "Which way does the arrow at F point?", "F left."),
        ("paths", WAYS_WORLD, "How many arrows point up?", "E up. H up."),
        ("paths", WAYS_WORLD, "Which of these ways does an arrow point?", ("A right.", "E up.", "F left.")),
        ("paths", WAYS_WORLD, "Which arrow points the same way as H?", "H up. E up."),
        ("paths", WAYS_WORLD, "To which cell does the arrow at E lead?", "E up."),
    ),
    ids=lambda value: value if isinstance(value, str) and value.endswith("?") else "",
)
def test_rationale_of(family, facts, question, rationale):
    """By hand, one or more per family and kind; where the answer is drawn from several, every one that is drawn."""
    world, found = parse(family, facts), {}
    for seed in range(150):
        for one in ask(world, random.Random(seed), Balance()):
            found[one.text, one.answer] = one.rationale
    said = {why for (text, _), why in found.items() if text == question}
    assert said == ({rationale} if isinstance(rationale, str) else set(rationale))


# -- blind -----------------------------------------------------------------------------------------


def chance(questions) -> tuple[float, float]:
    """Expected share of right answers by guessing, and its standard error."""
    p = np.array([1 / len(question.options) for question in questions])
    return p.mean(), np.sqrt((p * (1 - p)).sum()) / len(p)


@pytest.mark.parametrize("split", ("train", "test"))
def test_no_constant_answer_beats_chance_by_much(sample, split):
    """Per wording, the best answer to give every time; with n questions it cannot help winning a few by luck."""
    of = defaultdict(list)
    for world, question in sample[split]:
        of[world.family, question.wording].append(question)
    checked = 0
    for wording, questions in of.items():
        if len(questions) < 20:
            continue
        right = Counter(question.answer for question in questions).most_common(1)[0][1]
        shown = np.mean([1 / len(question.options) for question in questions])
        assert right <= shown * len(questions) + 4, (wording, Counter(question.answer for question in questions))
        checked += 1
    assert checked > 40 or split == "test"


class Blind:
    """Knows for each wording how often each option was right when it was shown; says the likeliest of those shown."""

    def __init__(self, rows) -> None:
        self.shown, self.right = defaultdict(Counter), defaultdict(Counter)
        for world, question in rows:
            key = world.family, question.text, len(question.options)
            self.shown[key].update(question.options)
            self.right[key][question.answer] += 1

    def __call__(self, world, question) -> str:
        key = world.family, question.text, len(question.options)
        return max(question.options, key=lambda option: self.right[key][option] / max(1, self.shown[key][option]))


def above_chance(blind: Blind, rows) -> dict:
    """Per kind and family, how many standard errors a blind reader is above chance."""
    of = defaultdict(list)
    for world, question in rows:
        of[question.kind, world.family].append((question, blind(world, question) == question.answer))
    return {
        kind: (np.mean([right for _, right in some]) - chance([question for question, _ in some])[0])
        / chance([question for question, _ in some])[1]
        for kind, some in of.items()
    }


def test_what_is_learned_blind_on_one_half_does_not_help_on_the_other(sample):
    rows = sample["train"]
    scores = above_chance(Blind(rows[::2]), rows[1::2])
    assert len(scores) == 20 and max(scores.values()) < 3, scores


@pytest.mark.parametrize("split", ("val", "test", "test_new"))
def test_what_is_learned_blind_in_training_does_not_help_in_a_test(sample, split):
    blind, rows = Blind(sample["train"]), sample[split]
    scores = above_chance(blind, rows)
    assert max(scores.values()) < 3, scores
    right = np.mean([blind(*row) == row[1].answer for row in rows])
    mean, error = chance([question for _, question in rows])
    assert right < mean + 2.5 * error


def test_this_measure_would_see_a_leak(sample):
    rows = [row for row in sample["train"] if row[1].answer == max(row[1].options)]
    assert max(above_chance(Blind(rows[::2]), rows[1::2]).values()) > 3


# -- splits ----------------------------------------------------------------------------------------


def combinations(world: World) -> set[tuple]:
    """What is kept from training: colour with shape, bar with height, cell with digit, cell with way."""
    return {
        (world.family, *thing.values) if world.family == "shapes" else (world.family, thing.place, *thing.values)
        for thing in world.things
    }


def test_no_world_is_in_two_splits(sample):
    keys = {split: {(world.family, world.facts) for world in worlds(sample, split)} for split in SPLITS}
    assert all(len(worlds(sample, split)) == len(keys[split]) > 0 for split in SPLITS)
    for n, one_split in enumerate(SPLITS):
        for other in SPLITS[n + 1 :]:
            assert not keys[one_split] & keys[other]


def test_no_world_is_in_two_splits_of_two_seeds():
    """The split is a function of the world, so that data of another seed cannot leak into a test."""
    seen = {
        split: {world.key for seed in (1, 2) for world, _ in command.generate(split, 200, seed=seed)}
        for split in SPLITS
    }
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))


def test_new_combinations_are_in_every_world_of_test_new_and_nowhere_else(sample):
    known = set().union(*(combinations(world) for world in worlds(sample, "train")))
    for split in ("val", "test"):
        assert all(combinations(world) <= known for world in worlds(sample, split))
    assert all(combinations(world) - known for world in worlds(sample, "test_new"))
    # Every part of a new combination is known from other combinations: only the combination is new.
    new = set().union(*(combinations(world) for world in worlds(sample, "test_new"))) - known
    assert {family for family, *_ in new} == set(FAMILIES)
    for family, first, second in new:
        assert any((family, first) == (f, a) for f, a, _ in known) and any(
            (family, second) == (f, b) for f, _, b in known
        )


def test_levels_count_things_and_come_in_equal_shares(sample):
    for split in SPLITS:
        for family in FAMILIES:
            levels = Counter(world.level for world in worlds(sample, split) if world.family == family)
            assert set(levels) == set(LEVELS)
            assert max(levels.values()) <= 1.5 * min(levels.values()) + 2 or split == "train"
        assert all(len(world.things) == world.level + 1 for world in worlds(sample, split))
        assert all(len({thing.place for thing in world.things}) == len(world.things) for world in worlds(sample, split))
    assert {value for value in possible_values("charts", "A")} == {(height,) for height in HEIGHTS} and set(WAYS) == {
        "up",
        "right",
        "down",
        "left",
    }


def test_things_stand_in_reading_order(sample):
    for world in worlds(sample, "test"):
        if world.family != "charts":
            assert [thing.place for thing in world.things] == sorted(thing.place for thing in world.things)


# -- files -----------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ARGUMENTS = ("--pictures", "train=12,val=3,test=6,test_new=4")


def test_the_same_arguments_write_the_same_bytes(tmp_path):
    """Also in another process with other hashes of strings, whose sets come in another order."""
    command.main(["--out", str(tmp_path / "a"), *ARGUMENTS])
    subprocess.run(
        [sys.executable, "-m", "data_prep.twins", "--out", str(tmp_path / "b"), *ARGUMENTS],
        check=True,
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    command.main(["--out", str(tmp_path / "c"), *ARGUMENTS, "--seed", "1"])
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and len(a) > 25
    assert a["train.jsonl"] != c["train.jsonl"]


def test_questions_are_still_those_of_committed_results(tmp_path):
    """Results name the files that they were measured on by hash. A change may add to `meta`, but ask nothing else."""
    command.main(["--out", str(tmp_path), "--pictures", "train=60,test_new=20"])
    digest = hashlib.sha256()
    for split in ("train", "test_new"):
        for line in (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            del row["meta"]["rationale"]
            digest.update(json.dumps(row, sort_keys=True).encode())
    assert digest.hexdigest() == "33ac4ef2bba8cd81ffb8400e03c875f5ee0e903a60c92d970877e1b6ed57dd39"


def test_more_of_one_split_leaves_the_others_alone(tmp_path):
    command.main(["--out", str(tmp_path / "a"), "--pictures", "train=8,test=4"])
    command.main(["--out", str(tmp_path / "b"), "--pictures", "train=30,test=4"])
    assert files(tmp_path / "a")["test.jsonl"] == files(tmp_path / "b")["test.jsonl"]


def test_files_are_problems_in_every_view(twins):
    problems = read_problems(twins / "train.jsonl")
    assert len({problem.group for problem in problems}) == 24 and len(problems) > 80
    for problem in problems:
        assert {View.both, View.vision, View.text, View.blind, View.white} <= set(possible_views(problem))
        world = parse(problem.source, problem.facts)
        rationale = problem.meta.pop("rationale")
        assert problem.meta == {"kind": problem.id.rpartition("-")[2], "level": world.level, "answer_with": "text"}
        assert solve(problem.source, rationale, problem.question, problem.options) == problem.answer
        assert Image.open(problem.root / problem.image).tobytes() == draw(world).tobytes()
        assert solve(problem.source, problem.facts, problem.question, problem.options) == problem.answer
        prompt = render(problem, "both")
        assert (
            prompt.images[0].tobytes() == draw(world).tobytes()
            and f"Facts: {world.facts}" in prompt.messages[0]["content"][1]["text"]
        )
    assert len({problem.id for problem in problems}) == len(problems)


def test_families_and_levels_can_be_chosen(tmp_path, capsys):
    command.main(["--out", str(tmp_path), "--pictures", "test=6", "--families", "tables,paths", "--levels", "2,4"])
    problems = read_problems(tmp_path / "test.jsonl")
    assert {problem.source for problem in problems} == {"tables", "paths"} and {
        problem.meta["level"] for problem in problems
    } == {2, 4}
    assert f"{len(problems)} problems about 6 pictures" in capsys.readouterr().out
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, said",
    (
        (("--pictures", "train"), "train=6000"),
        (("--pictures", "train=-1"), "train=6000"),
        (("--pictures", "dev=3"), "dev=3"),
        (("--pictures", ""), "train=6000"),
        (("--levels", "9"), "9"),
        (("--levels", "x"), "x"),
        (("--families", "maps"), "maps"),
        (("--seed", "x"), "x"),
    ),
    ids=str,
)
def test_wrong_arguments(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        command.main(["--out", str(tmp_path / "out"), *arguments])
    assert caught.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_more_worlds_than_there_are(tmp_path):
    with pytest.raises(SystemExit, match="error: test: no new world of charts after .* ask for fewer"):
        command.main(["--out", str(tmp_path), "--pictures", "test=2000", "--families", "charts", "--levels", "1"])
    assert not (tmp_path / "test.jsonl").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: "):
        command.main(["--out", str(tmp_path / "file" / "out"), *ARGUMENTS])
