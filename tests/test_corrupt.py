"""Which words of a prompt may be missing, prompts without their question, and rows with missing words and parts of pictures."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_prep.corrupt import corrupt_row, generator
from data_prep.encode import Encoder
from data_prep.problem import View, partners, read_problems, render

from .conftest import assistant, picture, user
from .test_problem import folder, make, one, other, text_of  # noqa: F401  fixtures

QUESTION, FACTS = "What colour is the circle?", "a1 red circle"


def shown(text):
    """The characters that are open, range by range."""
    return [text[start:end] for start, end in text.open]


# -- what is open ----------------------------------------------------------------------------------


def test_facts_and_question_are_open_in_every_view(one, other):
    for view in View:
        text = text_of(render(one, view, other))
        facts = {View.both: FACTS, View.text: FACTS, View.conflict: other.facts, View.other_facts: other.facts}.get(view)
        expected = ([f" {facts}"] if facts else []) + [QUESTION]
        assert shown(text) == ([] if view is View.rendered else expected), view


def test_white_space_at_the_ends_moves_what_is_open(folder):
    text = text_of(render(make(folder, question="  Which one? \n", options=None, answer="x", facts=" \n f "), "both"))
    assert text == "Facts:  \n f \nWhich one? \n\nAnswer briefly." and shown(text) == ["  \n f ", "Which one? \n"]
    text = text_of(render(make(folder, question="  Which one? \n", options=None, answer="x"), "blind"))
    assert text == "Which one? \n\nAnswer briefly." and shown(text) == ["Which one? \n"]


def test_pictures_between_the_words_divide_what_is_open(folder):
    several = make(folder, image=("images/a.png", "images/b.png"), question="Is <image 2> after <image 1> or <image 3>?",
                   facts="both <image 1> are small")
    content = render(several, "both").messages[0]["content"]
    assert [part.get("text", part["type"]).split("\n")[0] for part in content] == [
        "Facts: both ", "image", " are small", "image", " after <image 1> or <image 3>?"]
    assert [shown(part["text"]) for part in content if part["type"] == "text"] == [
        [" both "], [" are small", "Is "], [" after <image 1> or <image 3>?"]]


def test_words_are_the_text_they_hold(one):
    text = text_of(render(one, "both"))
    plain = "".join(text)
    assert type(plain) is str and text == plain and hash(text) == hash(plain) and json.dumps([text]) == json.dumps([plain])
    assert pickle.loads(pickle.dumps(text)).open == text.open


# -- without the question --------------------------------------------------------------------------


def test_options_and_instruction_stay_without_the_question(one, other):
    whole, tail = render(one, "vision"), f"Options: {', '.join(render(one, 'blind').options)}\nAnswer with one of the options."
    prompt = render(one, "vision", question=False)
    assert text_of(prompt) == tail and shown(text_of(prompt)) == []
    assert replace(prompt, messages=whole.messages, images=()) == replace(whole, images=())
    assert text_of(render(one, "blind", question=False)) == tail
    assert text_of(render(one, "both", question=False)) == f"Facts: {FACTS}\n{tail}"
    assert shown(text_of(render(one, "conflict", other, question=False))) == [f" {other.facts}"]
    letters = text_of(render(replace(one, meta={}), "vision", question=False))
    assert letters.startswith("A. ") and letters.endswith("\nAnswer with the option's letter.")


def test_of_an_open_question_the_instruction_stays(folder):
    problem = make(folder, options=None, answer="blue", meta={"rationale": "It is blue."})
    assert text_of(render(problem, "vision", question=False)) == "Answer briefly."
    assert text_of(render(problem, "vision", question=False, rationale=True)).startswith("Answer briefly. Say first")


def test_pictures_of_a_question_left_out_stand_before_the_text(folder):
    several = make(folder, image=("images/a.png", "images/b.png"), question="Is <image 2> in this: <image 1>?",
                   options=["<image 2>", "no"], answer="no")
    prompt = render(several, "vision", question=False)
    kinds = [part["type"] for part in prompt.messages[0]["content"]]
    assert kinds[0] == "image" and kinds.count("image") == 2 and kinds[-1] == "text"
    # The first picture's marker is gone with the question; the second one's stands in an option as well.
    assert [image.size for image in prompt.images] == [(40, 30), (20, 50)]


def test_a_question_in_the_picture_cannot_be_left_out(one, folder):
    drawn = make(folder, meta={"published": {"vision": {"image": "images/b.png", "question": None}}})
    for problem, view in ((one, "rendered"), (drawn, "vision")):
        with pytest.raises(ValueError, match=f"p1: view {view}: the picture shows the question, which cannot be left out"):
            render(problem, view, question=False)


# -- tokens ----------------------------------------------------------------------------------------


def test_open_tokens_lie_entirely_in_facts_and_question(encoder, one):
    """Labels, options and line ends are kept; the space before the facts is theirs."""
    prompt = render(one, "both")
    answer = {"role": "assistant", "content": "blue"}
    row = encoder.encode([*prompt.messages, answer, *render(one, "blind").messages, answer], prompt.images)
    runs = np.split(np.arange(len(row)), np.flatnonzero(np.diff(row.open.astype(int))) + 1)
    said = [encoder.tokenizer.decode(row.ids[run]) for run in runs if row.open[run[0]]]
    assert said == [" a1 red circle", "What colour is the circle?", "What colour is the circle?"]
    assert not (row.open & row.trained).any() and not row.open[row.ids == encoder.image_id].any()


def test_a_token_across_the_border_is_kept(encoder):
    ids = encoder.text_ids("a? \n b")
    tokens = [encoder.tokenizer.decode(one) for one in ids]
    from data_prep.problem import Words

    for end in range(7):
        row = encoder.encode([{"role": "user", "content": [{"type": "text", "text": Words("a? \n b", [(0, end)])}]}])
        count = int(row.open.sum())
        assert len("".join(tokens[:count])) <= end and (count == len(tokens) or len("".join(tokens[:count + 1])) > end)


def test_plain_text_is_not_open(encoder):
    row = encoder.encode([user("What colour?"), assistant("red")])
    assert row.open.dtype == bool and row.open.shape == row.ids.shape and not row.open.any()


# -- slots -----------------------------------------------------------------------------------------


def test_slots_stand_before_the_first_text_of_the_first_user(tiny, one):
    encoder, plain = Encoder(tiny), Encoder(tiny)
    encoder.slots = 8
    prompt = render(one, "both")
    messages = [*prompt.messages, assistant("blue"), *render(one, "blind").messages, assistant("red")]
    row, bare = encoder.encode(messages, prompt.images), plain.encode(messages, prompt.images)
    places = np.flatnonzero(row.ids == encoder.slot_id)
    assert places.tolist() == list(range(places[0], places[0] + 8))
    assert encoder.tokenizer.decode(row.ids[places[-1] + 1:]).startswith("Facts: a1")
    assert encoder.tokenizer.decode(row.ids[:places[0]]).endswith("<|image_pad|><|vision_end|>")
    for name in ("ids", "trained", "open"):
        assert np.delete(getattr(row, name), places).tolist() == getattr(bare, name).tolist()
    assert not row.trained[places].any() and not row.open[places].any()


def test_slots_without_a_text_or_a_token_are_an_error(tiny):
    encoder = Encoder(tiny)
    encoder.slots = 8
    with pytest.raises(ValueError, match="8 slots, but no user says a text to put them before"):
        encoder.encode([{"role": "user", "content": [{"type": "image"}]}, assistant("red")], (picture(56, 56),))
    encoder.slot_id = None
    with pytest.raises(ValueError, match=r"8 slots, but the tokenizer has no <\|quad_start\|>"):
        encoder.encode([user("x")])


# -- corrupted rows --------------------------------------------------------------------------------


@pytest.fixture
def rows(encoder, one):
    def make_row(view="both", sizes=((84, 56), (56, 56)), encoder=encoder):
        prompt = render(one, view)
        images = tuple(picture(*size, seed=n) for n, size in enumerate(sizes))
        content = [{"type": "image"}] * len(sizes) + [prompt.messages[0]["content"][-1]]
        return encoder.encode([{"role": "user", "content": content}, assistant("blue")], images)

    return make_row


def corrupted(encoder, row, text=0.0, image=0.0, seed=("s", 1)):
    return corrupt_row(row, text=text, image=image, seed=seed, missing=encoder.missing_id, image_id=encoder.image_id)


def test_rates_of_none_and_all(encoder, rows):
    row = rows()
    before = row.ids.copy(), row.pixel_values.copy()
    none, every = corrupted(encoder, row), corrupted(encoder, row, 1.0, 1.0)
    assert none.ids.tolist() == row.ids.tolist() and np.array_equal(none.pixel_values, row.pixel_values)
    assert every.ids.tolist() == np.where(row.open, encoder.missing_id, row.ids).tolist()
    assert not every.pixel_values.any() and every.pixel_values.dtype == np.float32
    for same in (none, every):
        assert same.trained is row.trained and same.grid is row.grid and same.open is row.open
    assert np.array_equal(before[0], row.ids) and np.array_equal(before[1], row.pixel_values), "what came in is not changed"


def test_words_by_hand(encoder, rows):
    row = rows("vision", ())
    places = np.flatnonzero(row.open)
    draws = generator((("s", 1), "text")).random(len(places))
    gone = [place for place, draw in zip(reversed(places), draws) if draw < 0.4]
    found = corrupted(encoder, row, 0.4, 1.0)
    assert np.flatnonzero(found.ids != row.ids).tolist() == sorted(gone) and 0 < len(gone) < len(places)
    assert found.pixel_values is None


def test_cells_by_hand(encoder, rows):
    """84 x 56 pixels are 3 x 2 cells, 56 x 56 are 2 x 2; the four patches of a cell follow each other."""
    row = rows()
    found = corrupted(encoder, row, image=0.5)
    draws = [generator((("s", 1), "image", n)).random((1, 2, width)).ravel() for n, width in enumerate((3, 2))]
    gone = np.repeat(np.concatenate(draws) < 0.5, 4)
    assert np.array_equal(found.pixel_values, np.where(gone[:, None], 0, row.pixel_values))
    assert gone.any() and not gone.all() and np.array_equal(found.ids, row.ids)


def test_a_cell_is_what_one_image_token_sees(encoder, rows):
    """A picture that is white in one cell and black elsewhere: the cell's patches are the white ones."""
    canvas = Image.new("RGB", (84, 56))
    canvas.paste((255, 255, 255), (28, 28, 56, 56))        # row 1, column 1 of 2 x 3
    row = encoder.encode([user("x", 1)], (canvas,))
    assert np.flatnonzero(row.pixel_values.max(1) > 0).tolist() == [4 * 4 + n for n in range(4)]


def test_a_higher_rate_removes_more_of_the_same(encoder, rows):
    row, rates = rows(sizes=((140, 112),)), np.linspace(0, 1, 11)
    steps = [corrupted(encoder, row, rate, rate) for rate in rates]
    for low, high in zip(steps, steps[1:]):
        for gone in (lambda one: one.ids == encoder.missing_id, lambda one: ~one.pixel_values.any(1)):
            assert not (gone(low) & ~gone(high)).any()
    assert len({one.ids.tobytes() for one in steps}) > 4 and len({one.pixel_values.tobytes() for one in steps}) > 4


def test_masks_depend_on_the_seed_alone(encoder, tiny, rows):
    row = rows()
    one = corrupted(encoder, row, 0.5, 0.5)
    assert corrupted(encoder, row, 0.5, 0.5).ids.tolist() == one.ids.tolist()
    assert corrupted(encoder, row, 0.5, 0.0).ids.tolist() == one.ids.tolist(), "not on the other modality"
    other = corrupted(encoder, row, 0.5, 0.5, seed=("s", 2))
    assert other.ids.tolist() != one.ids.tolist() and not np.array_equal(other.pixel_values, one.pixel_values)
    # The question loses the same words without the facts before it, and where slots stand before it.
    with_slots = Encoder(tiny)
    with_slots.slots = 8
    end = corrupted(encoder, rows("vision"), 0.5).ids
    count = int(rows("vision").open.sum())
    for same in (one, corrupted(with_slots, rows(encoder=with_slots), 0.5)):
        assert (same.ids == encoder.missing_id)[same.open][-count:].tolist() == (end == encoder.missing_id)[
            rows("vision").open].tolist()


def test_rows_that_cannot_be_corrupted(encoder, rows):
    row = rows()
    with pytest.raises(ValueError, match="does not know which of its tokens"):
        corrupted(encoder, replace(row, open=None))
    with pytest.raises(ValueError, match="between 0 and 1, not 1.5"):
        corrupted(encoder, row, text=1.5)
    with pytest.raises(ValueError, match="10 image tokens for pictures of 40 cells of 1 x 1"):
        corrupt_row(row, text=0, image=0, seed=0, missing=0, image_id=encoder.image_id, merge=1)


def test_twins_lose_words_of_facts_and_question_alone(encoder, twins):
    problems = read_problems(twins / "test.jsonl")
    for problem, borrowed in list(zip(problems, partners(problems)))[:6]:
        for view in ("both", "conflict", "vision", "text"):
            prompt = render(problem, view, borrowed)
            row = encoder.encode(prompt.messages, prompt.images, generate=True)
            found = corrupted(encoder, row, 1.0)
            kept = encoder.tokenizer.decode(found.ids[found.ids != encoder.missing_id])
            text = prompt.messages[0]["content"][-1]["text"]
            options = text[text.open[-1][1]:]
            assert kept.endswith(f"{options}<|im_end|>\n<|im_start|>assistant\n"), kept
            facts = problem.facts if view in ("both", "text") else borrowed.facts if view == "conflict" else None
            assert facts is None or not any(len(word) > 3 and word in kept.split("Options")[0] for word in facts.split())
