"""What balance methods see: where options part from the right answer, their scores, and what each branch shows."""

import math

import pytest
import torch

from data_prep.answerer import Answerer
from data_prep.encode import Encoded, Encoder
from data_prep.problem import Problem, View, read_problems, render, write_problems
from training.balance.settings import Mnl
from training.balance.views import Seen, branches, see
from training.collate import answer_numbers
from training.objective import BRANCHES, Objective, Role, branch_roles
from training.config import Loss

from .conftest import picture
from .running import ROOT
from .test_train import seeded

END = 9


# -- where options leave the right answer ----------------------------------------------------------


@pytest.mark.parametrize(
    "answers, right, expected",
    (
        ([(1, END), (2, END), (3, END)], 1, [(0, 2), (0, 1), (0, 3)]),
        # One leaves at the first token, one at the second by ending, one at the third.
        ([(4, END), (5, 6, 7, END), (5, 6, 8, END), (5, END)], 1, [(2, 7), (0, 4), (2, 8), (1, END)]),
        # The right one is the beginning of another, and ends where that goes on.
        ([(5, 6, END), (5, END)], 1, [(1, END), (1, 6)]),
        # Two wrong ones that begin alike are one; two that part at another place are two.
        ([(4, END), (5, 1, END), (5, 2, END)], 0, [(0, 4), (0, 5)]),
        ([(5, 1, 1, END), (5, 2, END), (5, 1, 2, END)], 0, [(2, 1), (1, 2), (2, 2)]),
        ([(1, END)], 0, [(0, 1)]),
    ),
)
def test_branches_by_hand(answers, right, expected):
    assert branches(answers, right) == expected


def test_an_option_with_the_tokens_of_the_right_one_is_refused():
    with pytest.raises(ValueError, match="option 2 has the same tokens as the right answer"):
        branches([(1, END), (2, END), (1, END)], 0)


def test_scores_by_hand():
    """Three answers of 2, 3 and 1 tokens in a vocabulary of 4; the third is open."""
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.4, 0.1],     # says 3, 2
                      [0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.1, 0.2], [0.3, 0.3, 0.2, 0.2],    # says 0, 1, 2
                      [0.6, 0.2, 0.1, 0.1]])    # says 1
    labels, answer = torch.tensor([3, 2, 0, 1, 2, 1]), torch.tensor([0, 0, 1, 1, 1, 2])
    at = torch.tensor([[0, 0, 0], [1, 0, 1], [-1, -1, -1]])
    token = torch.tensor([[3, 0, 1], [1, 2, 3], [-1, -1, -1]])
    hidden = torch.arange(12.0).reshape(6, 2)
    seen = see(p.log(), labels, answer, hidden, at, token)
    expected = torch.tensor([[0.4, 0.1, 0.2], [0.7 * 0.5, 0.1, 0.7 * 0.2], [0.0, 0.0, 0.0]]).log()
    torch.testing.assert_close(seen.options, expected)
    torch.testing.assert_close(seen.log_prob.exp(), torch.tensor([(0.4 * 0.4) ** 0.5, (0.7 * 0.5 * 0.2) ** (1 / 3), 0.2]))
    assert seen.hidden.tolist() == hidden[[0, 2, 5]].tolist() and seen.right.tolist() == [3, 0, 1]
    torch.testing.assert_close(seen.first, p[[0, 2, 5]].log())
    # What is decided by a later token is not an option of the output layer at the first one.
    assert seen.tokens.tolist() == [[3, 0, 1], [-1, 2, -1], [-1, -1, -1]]
    assert seen.closed.tolist() == [True, True, False]


def test_options_are_events_that_exclude_each_other():
    """Whatever the model says, the ways to leave the right answer, and keeping to it, have probabilities of at most 1 in all."""
    torch.manual_seed(0)
    answers = [(5, 6, 7, END), (4, END), (5, 6, 8, END), (5, END), (5, 3, 3, END), (2, 5, 6, END)]
    found = branches(answers, 0)
    at, token = torch.tensor(found)[None].unbind(-1)
    for _ in range(20):
        log_probs = (3 * torch.randn(4, 10)).log_softmax(-1)
        seen = see(log_probs, torch.tensor(answers[0]), torch.zeros(4).long(), torch.zeros(4, 1), at, token)
        assert 0 < seen.options.exp().sum().item() <= 1 + 1e-6


def test_values_and_losses_by_hand():
    """Two options, four with a tie of the best, four, and an open answer, padded to five."""
    p = torch.tensor([[0.6, 0.2, 0, 0, 0], [0.2, 0.1, 0.2, 0.1, 0], [0.1, 0.4, 0.3, 0.2, 0], [0.0] * 5])
    options, log_prob = p.log().requires_grad_(), torch.tensor([0.5, 0.5, 0.5, 0.3]).log().requires_grad_()
    empty = torch.zeros(4, 1)
    seen = Seen(options, log_prob, empty, empty.long(), empty, torch.zeros(4).long())
    value = seen.value("probability")
    expected = [(0.75 - 1 / 2) / (1 / 2), (1 / 3 - 1 / 4) / (3 / 4), (0.1 - 1 / 4) / (3 / 4), 0.3]
    torch.testing.assert_close(value, torch.tensor(expected))
    accuracy = seen.value("accuracy")
    torch.testing.assert_close(accuracy, torch.tensor([1.0, (1 / 2 - 1 / 4) / (3 / 4), (0 - 1 / 4) / (3 / 4), 0.3]))
    assert not value.requires_grad and not accuracy.requires_grad
    loss = seen.own_loss()
    torch.testing.assert_close(loss, -torch.tensor([0.75, 1 / 3, 0.1, 0.3]).log())
    loss.sum().backward()
    # d loss / d options = p - onehot among the options there are; a closed answer's own log-probability has no part in it.
    torch.testing.assert_close(options.grad[0], torch.tensor([-0.25, 0.25, 0, 0, 0]))
    assert options.grad[3].tolist() == [0.0] * 5 and log_prob.grad.tolist() == [0.0, 0.0, 0.0, -1.0]
    assert torch.isfinite(options.grad).all()


# -- against the model's own scoring of every option -----------------------------------------------


def looked(trainer, view: View, count: int, branch: str = "both"):
    """The prompts of the first draws and how a trainer sees them in a view."""
    collator, model = trainer.data_collator, trainer.model.eval()
    draws = [collator.plan.draw(n)._replace(view=view) for n in range(count)]
    role = Role({one: one for one in View}, False, True)
    batch = collator.branches(draws, {branch: role}, Objective(Loss(), ()))
    shown = batch["branches"][branch]
    found = trainer.look_at(model, shown, False, True)
    prompts = [collator.plan.conversation(draw)[2][0] for draw in draws]
    return prompts, trainer.seen(found, shown["labels"], batch["at"], batch["token"])


@pytest.mark.parametrize("view", (View.both, View.vision, View.text, View.blind))
def test_scores_of_one_token_options_are_what_the_evaluation_finds(recipe_file, view):
    tiny = ROOT / "assets" / "tiny"
    trainer = seeded(recipe_file(model={"name": str(tiny)}, views={"both": 1.0}, batch=6, micro_batch=6))
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()          # the base model itself
    prompts, seen = looked(trainer, view, 6)
    assert len({len(prompt.choices) for prompt in prompts}) > 1, "no question has fewer options than another"
    for prompt, mine, expected in zip(prompts, seen.options, Answerer(str(tiny)).likelihoods(prompts)):
        place = prompt.choices.index(prompt.answer)
        expected = [expected[place], *expected[:place], *expected[place + 1:]]
        assert mine[: len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
        assert (mine[len(expected):] == -math.inf).all()


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """Problems whose options have several tokens, and begin alike; four share a picture, and every fourth is open."""
    folder = tmp_path_factory.mktemp("wordy")
    options = ("red circle", "red square", "red", "blue circle up", "blue circle down")
    rows = []
    for n in range(12):
        picture(56, 56, seed=n // 4).save(folder / f"{n // 4}.png")
        rows.append(Problem(id=str(n), group=str(n), source="demo", image=f"{n // 4}.png", facts=f"number {n // 4}",
                            question="What is at A?", options=None if n % 4 == 3 else options, answer=options[n % 5],
                            license="CC0-1.0", meta={"answer_with": "text"}, root=folder))
    write_problems(folder / "all.jsonl", rows)
    return folder / "all.jsonl"


def test_scores_of_longer_options_are_those_of_their_own_tokens(recipe_file, wordy):
    """Each option is said by itself, as far as the token that tells it from the right one."""
    trainer = seeded(recipe_file(problems=wordy, views={"both": 1.0}, batch=12, micro_batch=12))
    encoder, model = trainer.data_collator.encoder, trainer.model
    prompts, seen = looked(trainer, View.both, 12)
    places, merged = set(), 0
    for row, (prompt, mine) in enumerate(zip(prompts, seen.options)):
        if prompt.choices is None:
            assert (mine == -math.inf).all() and not seen.closed[row]
            continue
        said = {choice: (*encoder.text_ids(choice), encoder.end_id) for choice in prompt.choices}
        gold, expected = said.pop(prompt.answer), {}
        depth = {choice: next(i for i, (a, b) in enumerate(zip(ids, gold)) if a != b) for choice, ids in said.items()}
        for ids, last in [(gold, max(depth.values())), *((ids, depth[choice]) for choice, ids in said.items())]:
            start = encoder.encode(prompt.messages, prompt.images, generate=True)
            whole = Encoded(torch.tensor([*start.ids, *ids[:last]]).numpy(), torch.zeros(len(start) + last).bool().numpy(),
                            start.pixel_values, start.grid)
            with torch.no_grad():
                log_probs = model(**encoder.batch([whole])).logits[0, -last - 1:].log_softmax(-1)
            expected[ids[:last + 1]] = sum(log_probs[i, ids[i]].item() for i in range(last + 1))
        places |= set(depth.values())
        merged += len(said) + 1 - len(expected)
        assert mine[mine != -math.inf].tolist() == pytest.approx(list(expected.values()), abs=1e-4)
    assert len(places) > 1 and merged > 0, "the options are too simple to show anything"


# -- what the branches show ------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", (View.both, View.vision))
@pytest.mark.parametrize("question", ("dropped", "kept"))
def test_what_branches_show(recipe_file, twins, drawn, question):
    trainer = seeded(recipe_file(views={drawn.value: 1.0}, balance={"method": "mnl", "question": question}))
    collator, problems = trainer.data_collator, {p.id: p for p in read_problems(twins / "train.jsonl")}
    batch = collator([{"draw": 0}, {"draw": 1}])
    assert set(batch["branches"]) == {"image", "text"}
    draws = [collator.plan.draw(n) for n in range(2)]
    roles = branch_roles(Mnl(question=question), 0) | {"none": Role(BRANCHES["none"], False, True, question=question == "kept")}
    shown = collator.branches(draws, roles, Objective(Loss(), ()))["branches"]
    for name in ("image", "text"):
        assert torch.equal(shown[name]["input_ids"], batch["branches"][name]["input_ids"])
    for row, draw in enumerate(draws):
        problem = problems[collator.plan.ids(draw)[0]]
        for name, one in shown.items():
            ids = one["input_ids"][row]
            text = collator.encoder.tokenizer.decode(ids)
            assert ("pixel_values" in one) == bool((ids == collator.encoder.image_id).any()) == (name == "image")
            assert ("Facts:" in text) == (problem.facts in text) == (name == "text" and drawn is View.both)
            assert (problem.question in text) == (name == "text" or question == "kept")
            assert "Answer with one of the options." in text and all(option in text for option in problem.options)
            answers = [b["labels"][row][b["labels"][row] != -100] for b in (batch, one)]
            assert torch.equal(*answers), "every view is asked for the same answer"


def test_tables_of_options_are_in_the_order_of_the_answers(recipe_file, wordy):
    """Several questions per conversation: a row of the table per answer, in the order of the labels."""
    path = recipe_file(problems=wordy, turns=3, views={"vision": 1.0}, batch=3, micro_batch=3, balance={"method": "mnl"})
    batch = seeded(path).data_collator([{"draw": n} for n in range(3)])
    numbers, said = answer_numbers(batch["labels"]), batch["labels"][batch["labels"] != -100]
    assert len(batch["at"]) == 9 == numbers[-1] + 1 and (batch["at"][:, 0] < 0).any() and batch["at"].max() > 0
    for row, (places, tokens) in enumerate(zip(batch["at"].tolist(), batch["token"].tolist())):
        answer = said[numbers == row].tolist()
        if places[0] >= 0:
            assert answer[places[0]] == tokens[0], "the first option is not the row's own answer"
            assert all(place < 0 or answer[place] != token for place, token in zip(places[1:], tokens[1:]))


def test_masking_the_question_is_deleting_it(recipe_file, twins):
    """Positions are counted anew from the attention mask, picture and all: what is masked leaves no gap."""
    trainer = seeded(recipe_file(views={"vision": 1.0}))
    encoder: Encoder = trainer.data_collator.encoder
    model = trainer.model.eval()
    changed = 0
    for problem in read_problems(twins / "train.jsonl")[:3]:
        prompt = render(problem, View.vision)
        row = encoder.encode([*prompt.messages, {"role": "assistant", "content": prompt.target}], prompt.images)
        assert row.open.any() and not (row.open & row.trained).any()
        keep = ~row.open
        with torch.no_grad():
            whole = encoder.batch([row])
            masked = model(**whole | {"attention_mask": torch.from_numpy(keep).long()[None]}).logits[0]
            without = model(**encoder.batch([Encoded(row.ids[keep], row.trained[keep], row.pixel_values, row.grid)])).logits[0]
            full = model(**whole).logits[0]
        # Log-probabilities of the answers' tokens, which stand one place before them.
        before = torch.from_numpy(row.trained).roll(-1)
        ids = torch.from_numpy(row.ids[row.trained])[:, None]
        one, two, other = (logits.log_softmax(-1)[place].gather(1, ids) for logits, place in (
            (masked, before), (without, torch.from_numpy(row.trained[keep]).roll(-1)), (full, before)))
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
        changed += bool((one - other).abs().max() > 1e-2)
    assert changed, "the question changes nothing, so nothing was shown"
