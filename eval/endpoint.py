"""A model behind a server that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp), asked over HTTP.

    python -m eval.run --endpoint http://localhost:8000/v1 --model NAME --tasks twins --out results/answers/served

A prompt is sent as it was rendered: the same text, pictures as lossless PNG in the places of their parts, temperature 0. The
rest is the server's: the chat template, how small a picture is made, the precision, what its defaults add to greedy decoding
(vLLM takes a repetition penalty from the model's generation_config.json, as a local run does). It cannot be seen from here, so
run.json has no fingerprints, dtype or pixels for such a run, and eval.gap compares it with other served runs only.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import httpx2       # the client of huggingface_hub
from tqdm import tqdm

from data_prep.problem import Prompt
from eval.chat import Said, Unusable, chat_messages, complaint, pause_of, read_answer, read_models

AHEAD = 8                           # prompts per parallel request that are ready or asked, so that a slow one holds up no other
BACKOFF_S, LONGEST_S = 1.0, 60.0    # the first pause, which doubles, and the longest
AGAIN = {408, 409, 429}             # and 5xx: statuses that another attempt may change
NOTICE_S = 10.0                     # at most one line about new attempts in this time
DEFAULTS = {"api_key_env": None, "parallel": 16, "timeout": 120.0, "retries": 5}
NOT_SERVED = {
    "adapter": "the server loads adapters: give the adapter's name on the server as --model, or merge it",
    "revision": "the server has loaded the weights already",
    "dtype": "the server has loaded the weights already",
    "min_pixels": "the server sizes the pictures: set its own limits where it is started (vLLM: --mm-processor-kwargs)",
    "max_pixels": "the server sizes the pictures: set its own limits where it is started (vLLM: --mm-processor-kwargs)",
    "batch_size": "the server makes the batches: --parallel says how many requests it has at once",
    "corrupt": "tokens and patches go missing after encoding, which the server does",
}
T = TypeVar("T")


class EndpointError(ValueError):
    """A server that cannot be asked, or refuses; one sentence with its own words."""


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a served model")
    group.add_argument("--endpoint", metavar="URL",
                       help="ask a server that speaks OpenAI's chat completions, such as http://localhost:8000/v1, for the "
                            "model that it calls --model; implies --mode generate")
    group.add_argument("--api-key-env", metavar="VARIABLE",
                       help="environment variable that holds the server's key, which is never written anywhere")
    group.add_argument("--parallel", type=int, help=f"requests at once (default: {DEFAULTS['parallel']})")
    group.add_argument("--timeout", type=float, metavar="SECONDS",
                       help=f"for one attempt, waiting at the server included (default: {DEFAULTS['timeout']:g})")
    group.add_argument("--retries", type=int, help="further attempts after lost connections, time-outs, 408, 409, 429 and 5xx, "
                                                   f"with growing pauses (default: {DEFAULTS['retries']})")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a sentence where options do not go together; else fill in the defaults of those above."""
    if args.endpoint is None:
        if given := [name for name in DEFAULTS if getattr(args, name) is not None]:
            parser.error(f"{_option(given[0])} goes with --endpoint")
        return
    if given := [name for name in NOT_SERVED if getattr(args, name) is not None]:
        parser.error(f"{_option(given[0])} does not go with --endpoint: {NOT_SERVED[given[0]]}")
    if args.mode == "likelihood":
        parser.error("--mode likelihood does not go with --endpoint: a chat server tells the likeliest tokens only, and an "
                     "option need not be among them; leave it out, and answers are generated")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.parallel < 1 or not args.timeout > 0 or args.retries < 0:
        parser.error("--parallel is at least 1, --timeout above 0 and --retries at least 0")
    try:
        _parts(args.endpoint)
    except ValueError as error:
        parser.error(str(error))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parts(endpoint: str) -> tuple[str, tuple[str, str] | None]:
    """(URL without credentials, user and password where it has them). ValueError: not the URL of a server."""
    parts = urlsplit(endpoint)
    try:
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        known = False
    if not known or parts.query or parts.fragment:
        # Not quoted: it may hold a password.
        raise ValueError("--endpoint takes a URL such as http://localhost:8000/v1, without ? and #")
    login = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}", login


class Endpoint:
    """A served model, with the interface of an Answerer as far as a chat server has it.

    Args:
        url: where `/chat/completions` is added. A user and a password in it are sent, and neither shown nor recorded.
        model: the model's name on the server.
        key: sent as bearer token.
        parallel: requests under way at once.
        timeout_s: for one attempt.
        retries: further attempts.

    Raises:
        EndpointError: key and password both given, or a key that no header can hold.
    """

    def __init__(self, url: str, model: str, *, key: str | None = None, parallel: int = DEFAULTS["parallel"],
                 timeout_s: float = DEFAULTS["timeout"], retries: int = DEFAULTS["retries"]) -> None:
        self.url, self._login = _parts(url)
        self.model, self.parallel, self.timeout_s, self.retries = model, parallel, timeout_s, retries
        if key is not None and self._login:
            raise EndpointError("--endpoint holds a user or a password, so it takes no --api-key-env")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise EndpointError("--api-key-env: the key holds characters that no HTTP header can")
        self._key = key
        self._secrets = [secret for secret in (key, self._login and self._login[1]) if secret]
        self._told = -NOTICE_S

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Endpoint":
        """From the options of `add_options` and --model. EndpointError: the variable of the key is not set."""
        key = None
        if args.api_key_env is not None and not (key := os.environ.get(args.api_key_env, "").strip()):
            raise EndpointError(f"--api-key-env {args.api_key_env}: no such environment variable, or it is empty")
        return cls(args.endpoint, args.model, key=key, parallel=args.parallel, timeout_s=args.timeout, retries=args.retries)

    def identity(self) -> dict[str, Any]:
        """What answers depend on, as far as a client can know, and under `endpoint` where they come from: the URL and what the
        server's list of models says of this one (None where there is no list).

        Raises:
            EndpointError: the server cannot be reached, refuses, or lists other models only.
        """
        with self._connected() as (client, submit):
            models = submit(self._talk(client, "GET", "/models", None, read_models, absent=(404, 405))).result()
        served = next((one for one in models or () if one.get("id") == self.model), None)
        if models and served is None:
            names = [str(one.get("id")) for one in models]
            raise EndpointError(f"{self.url} serves no model {self.model}: it lists {', '.join(names[:8])}"
                                + (f" and {len(names) - 8} more" if len(names) > 8 else ""))
        if served:      # but for what is new at every call
            served = {key: value for key, value in served.items() if key not in ("object", "created", "permission")}
        return {"model": self.model, "model_sha256": None, "revision": None, "adapter": None, "adapter_sha256": None,
                "dtype": None, "pixels": None, "endpoint": {"url": self.url, "served": served}}

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Said]:
        """Greedy answers, in the prompts' order. EndpointError as with `answers`."""
        return [said for _, said in self.answers(((f"prompt {n}", one) for n, one in enumerate(prompts, 1)), max_new_tokens)]

    def answers(self, prompts: Iterable[tuple[str, Prompt]], max_new_tokens: int) -> Iterator[tuple[str, Said]]:
        """(name, answer) of named prompts, in their order, each as soon as it and those before it are there.

        Prompts are taken as they are needed, and requests go on while the caller makes the next ones. When it fails or is
        interrupted, the answers that came all the same are given first, though one before them is missing.

        Raises:
            EndpointError: no usable answer after all attempts, or a refusal that no further attempt would change. It names the
                prompt.
        """
        waiting: deque[tuple[str, Future[Said]]] = deque()
        room, over = asyncio.Semaphore(self.parallel), threading.Event()

        async def answer(client: httpx2.AsyncClient, name: str, prompt: Prompt) -> Said:
            async with room:
                if over.is_set():
                    raise asyncio.CancelledError
                body = await asyncio.to_thread(self._body, prompt, max_new_tokens)
                try:
                    return await self._talk(client, "POST", "/chat/completions", body, read_answer, over=over)
                except EndpointError as error:
                    over.set()
                    raise EndpointError(f"{name}: {error}") from error

        def first() -> tuple[str, Said]:
            name, future = waiting[0]
            said = future.result()          # before it is taken away: waiting may be interrupted
            waiting.popleft()
            return name, said

        with self._connected() as (client, submit):
            try:
                for name, prompt in prompts:
                    waiting.append((name, submit(answer(client, name, prompt))))
                    while waiting and (len(waiting) >= AHEAD * self.parallel or waiting[0][1].done()):
                        yield first()
                while waiting:
                    yield first()
            except (Exception, KeyboardInterrupt) as error:
                # After a refusal no attempt is begun, and those under way may still bring answers.
                yield from ((name, future.result()) for name, future in waiting
                            if (future.done() or isinstance(error, EndpointError)) and _came(future))
                raise

    def _body(self, prompt: Prompt, max_new_tokens: int) -> bytes:
        return json.dumps({"model": self.model, "messages": chat_messages(prompt), "temperature": 0, "n": 1,
                           "max_tokens": max_new_tokens}).encode()

    async def _talk(self, client: httpx2.AsyncClient, method: str, path: str, body: bytes | None,
                    read: Callable[[httpx2.Response], T], *, absent: Sequence[int] = (),
                    over: threading.Event | None = None) -> T | None:
        """What `read` makes of the response, after as many attempts as are allowed; None for a status of `absent`.

        over: once it is set, no further attempt is begun.
        """
        for attempt in range(self.retries + 1):
            # Servers that refuse many at once would otherwise have them all back at once.
            pause = random.uniform(0.5, 1) * min(BACKOFF_S * 2 ** attempt, LONGEST_S)
            try:
                async with asyncio.timeout(self.timeout_s):
                    response = await client.request(method, self.url + path, content=body)
                if response.is_success:
                    return read(response)
                if response.status_code in absent:
                    return None
                trouble = f"{self.url} answers {response.status_code}: {self._shown(complaint(response))}"
                if response.status_code < 500 and response.status_code not in AGAIN:
                    raise EndpointError(trouble + self._advice(response.status_code))
                pause = pause_of(response.headers.get("retry-after"), pause)
            except TimeoutError:
                trouble = f"{self.url} gives no answer within {self.timeout_s:g} s"
            except httpx2.HTTPError as error:
                trouble = f"{self.url} cannot be asked: {self._shown(str(error) or type(error).__name__)}"
            except Unusable as error:
                trouble = f"{self.url}{path} {self._shown(str(error))}"
            if over is not None and over.is_set():
                break
            if attempt < self.retries:
                self._tell(f"{trouble}; asking again in {pause:.1f} s")
                await asyncio.sleep(pause)
        raise EndpointError(f"{trouble} (attempts: {attempt + 1})")

    def _advice(self, status: int) -> str:
        if status in (401, 403) and not self._secrets:
            return " (--api-key-env names the variable that holds the key)"
        return " (a server's URL usually ends in /v1)" if status == 404 and not self.url.endswith("/v1") else ""

    def _shown(self, text: str) -> str:
        """Words of others on one line, not too long, without what is secret."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = " ".join(text.split())
        return text if len(text) <= 300 else text[:297] + "..."

    def _tell(self, text: str) -> None:
        if time.monotonic() - self._told >= NOTICE_S:
            self._told = time.monotonic()
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def _connected(self) -> Iterator[tuple[httpx2.AsyncClient, Callable[[Coroutine[Any, Any, T]], Future[T]]]]:
        """A client, and a way to have a coroutine run by a thread that ends, with all it has under way, together with this."""
        # Attempts have a time limit of their own, and `room` limits how many there are.
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        client = httpx2.AsyncClient(headers=headers, auth=self._login, timeout=None,
                                    limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self.parallel))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield client, lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop)
        finally:
            asyncio.run_coroutine_threadsafe(_end(client), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def _came(answer: Future) -> bool:
    """Whether it is an answer, once it is done."""
    try:
        return answer.exception() is None
    except CancelledError:
        return False


async def _end(client: httpx2.AsyncClient) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
    await asyncio.get_running_loop().shutdown_default_executor()
