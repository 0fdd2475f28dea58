"""OpenAI's chat completions over HTTP: how a prompt is sent, and how what comes back is read."""

import base64
import io
import json
import math
import time
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from httpx2 import Response     # the client of huggingface_hub
from PIL import Image

from data_prep.problem import Prompt

BROKEN_OFF = {"abort", "error"}     # finish reasons of an answer that the server gave up


class Unusable(ValueError):
    """An answer that is not what the protocol says; another attempt may bring a better one."""


class Said(NamedTuple):
    text: str               # empty where the server gave no content, as with a refusal
    tokens: int | None      # as the server counts them; most count the end of the turn too
    finish: str             # "stop", "length" when the token budget cut it off, or another word of the server


def chat_messages(prompt: Prompt) -> list[dict]:
    """The prompt's messages in OpenAI's form: pictures as PNG in data URLs, in the places of their parts. A message of one text
    and no picture is that text, which servers of text models take too."""
    pictures = iter(prompt.images)
    found = []
    for message in prompt.messages:
        parts = [{"type": "image_url", "image_url": {"url": _data_url(next(pictures))}} if part["type"] == "image"
                 else {"type": "text", "text": part["text"]} for part in message["content"]]
        alone = len(parts) == 1 and parts[0]["type"] == "text"
        found.append({"role": message["role"], "content": parts[0]["text"] if alone else parts})
    return found


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)     # lossless at every level; higher ones cost more time than they save
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_models(response: Response) -> list[dict]:
    """The entries of a list of models. Raises Unusable: it is none."""
    try:
        return [one for one in response.json()["data"] if isinstance(one, dict)]
    except (ValueError, KeyError, TypeError):
        raise Unusable(f"is no list of models, but {response.text[:80]!r}") from None


def read_answer(response: Response) -> Said:
    """The first choice of a chat completion. Raises Unusable: it is none, or the server gave up on the way."""
    try:
        found = response.json()
        choice = found["choices"][0]
        content, finish = choice["message"].get("content"), choice.get("finish_reason")
        tokens = (found.get("usage") or {}).get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Unusable(f"gives no chat completion, but {response.text[:80]!r}") from None
    if not isinstance(content, str | None) or finish in BROKEN_OFF:
        raise Unusable(f"gives no whole answer: finish_reason {finish!r}, content {str(content)[:80]!r}")
    return Said((content or "").strip(), tokens if isinstance(tokens, int) else None, finish or "stop")


def complaint(response: Response) -> str:
    """What the server says about an error, in one of the forms that are in use: error.message, message, detail, plain text."""
    try:
        found = response.json()
        found = found.get("error", found.get("message", found.get("detail", found)))
        found = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        found = response.text
    return (found if isinstance(found, str) else json.dumps(found)).strip() or response.reason_phrase


def pause_of(retry_after: str | None, otherwise: float) -> float:
    """Seconds to wait by a Retry-After header, which gives seconds or a date; `otherwise` where it gives neither."""
    try:
        pause = float(retry_after)
    except (TypeError, ValueError):
        try:
            pause = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (TypeError, ValueError):
            return otherwise
    return max(0.0, pause) if math.isfinite(pause) else otherwise
