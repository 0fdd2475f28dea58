"""Four fake models that every task meets before a real one: they speak to eval.run where a model would."""

import hashlib
from types import SimpleNamespace

from data_prep.answerer import Generated


class Fake:
    """What eval.run needs of an Answerer. `say` maps a prompt to the text of its answer."""

    dtype = "float32"

    def __init__(self, say) -> None:
        self.say = say
        self.model = SimpleNamespace(config=SimpleNamespace(_commit_hash=None))
        self.encoder = SimpleNamespace(pixel_bounds={"min": 3136, "max": 1003520})
        self.asked = 0

    def generate(self, prompts, max_new_tokens):
        self.asked += len(prompts)
        return [Generated(self.say(prompt), 1, "stop") for prompt in prompts]

    def likelihoods(self, prompts):
        self.asked += len(prompts)
        return [[0.0 if choice == self.say(prompt) else -1.0 for choice in prompt.choices] for prompt in prompts]


def oracle(prompt) -> str:
    return prompt.answer


def constant(prompt) -> str:
    return prompt.choices[0] if prompt.choices else "42"


def blind(prompt) -> str:
    """A guess from the question's words alone: the same for the same question, whatever picture or facts stand beside it."""
    text = prompt.messages[0]["content"][-1]["text"]
    question = text.split("\n", 1)[1] if text.startswith("Facts: ") else text
    return prompt.choices[hashlib.sha256(question.encode()).digest()[0] % len(prompt.choices)]


def gibberish(prompt) -> str:
    return "?? zxqv ~"


FAKES = {"oracle": oracle, "constant": constant, "blind": blind, "gibberish": gibberish}
