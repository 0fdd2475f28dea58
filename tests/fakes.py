"""Four fake models that every task meets before a real one: they speak to eval.run where a model would."""

import hashlib

from data_prep.answerer import Generated
from data_prep.read import MARKER


class Fake:
    """What eval.run needs of an Answerer. `say` maps a prompt to the text of its answer."""

    def __init__(self, say, adapter: str | None = None) -> None:
        self.say, self.adapter = say, adapter
        self.asked = 0

    def identity(self):
        return {"model": "fake", "model_sha256": None, "revision": None, "adapter": self.adapter, "adapter_sha256": None,
                "dtype": "float32", "pixels": {"min": 3136, "max": 1003520}}

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
    """A guess from the question's words alone: the same for the same question, whatever picture or facts stand beside it.

    Pictures may stand between the words; where none is shown, their markers do, and are no words either.
    """
    text = "".join(part.get("text", "") for part in prompt.messages[0]["content"])
    text = MARKER.sub("", text)
    question = text.split("\n", 1)[1] if text.startswith("Facts: ") else text
    place = hashlib.sha256(question.encode()).digest()[0]
    return prompt.choices[place % len(prompt.choices)] if prompt.choices else str(place)


def gibberish(prompt) -> str:
    return "?? zxqv ~"


FAKES = {"oracle": oracle, "constant": constant, "blind": blind, "gibberish": gibberish}
