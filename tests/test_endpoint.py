"""eval.run --endpoint against a real server: the answers of a local run, and whatever a server or a network does to them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import httpx2
import numpy as np
import pytest

from data_prep.problem import Prompt, read_problems, render
from eval import chat, endpoint, gap
from eval import run as eval_run
from eval.endpoint import Endpoint, EndpointError
from tests.conftest import picture
from tests.server_for_tests import Server, completion, cut, hang, prompt_of, serving, status, text

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "assets" / "tiny")
KEY = "sk-not-to-be-written"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.01)


def words(twins: Path, out: Path, server: Server, *more: str, views: str = "both,vision") -> list[str]:
    return ["--endpoint", server.url, "--model", "served", "--tasks", str(twins / "test.jsonl"), "--views", views,
            "--out", str(out), *more]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def info(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def refusal(*argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        eval_run.main(argv)
    assert str(caught.value.code).startswith("error: "), caught.value.code
    return caught.value.code


def plain(*said: str) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": [{"type": "text", "text": one}]}], (), "", None, None, "") for one in said]


def echo(body: dict) -> str:
    """The first word of the text, so that every prompt has an answer of its own."""
    content = body["messages"][0]["content"]
    return (content if isinstance(content, str) else content[-1]["text"]).split()[0]


# ---- what is asked and answered --------------------------------------------------------------------------------------

def test_answers_are_those_of_a_local_run(twins, tmp_path):
    import torch

    from data_prep.answerer import Answerer

    torch.set_num_threads(1)
    answerer, one_at_a_time = Answerer(TINY), threading.Lock()

    def answer(body: dict) -> dict:
        with one_at_a_time:
            said, = answerer.generate([prompt_of(body)], body["max_tokens"])
        return completion(said.text, said.tokens, said.finish)

    common = ["--tasks", str(twins / "test.jsonl"), "--views", "both,vision,text,blind", "--limit", "20",
              "--max-new-tokens", "3"]
    local = eval_run.parse(["--model", TINY, "--mode", "generate", "--out", str(tmp_path / "local"), *common])
    eval_run.run(local, lambda: answerer)
    with serving(answer) as server:
        eval_run.main(["--endpoint", server.url, "--model", "served", "--out", str(tmp_path / "served"), *common])
    here, there = ({(row["id"], row["view"]): {**row, "key": None} for row in rows(tmp_path / name)}
                   for name in ("local", "served"))
    assert here == there and len(there) == len(rows(tmp_path / "served")) >= 4 * 15
    assert not {row["key"] for row in rows(tmp_path / "local")} & {row["key"] for row in rows(tmp_path / "served")}

    recorded = info(tmp_path / "served")
    assert recorded["finished"] and recorded["model"] == "served" and recorded["mode"] == "generate"
    assert [recorded[key] for key in ("model_sha256", "adapter_sha256", "revision", "dtype", "pixels", "device")] == [None] * 6
    served = {"id": "served", "owned_by": "tests", "root": "/models/served"}
    assert recorded["endpoints"] == [{"url": server.url, "served": served}]
    with pytest.raises(SystemExit, match="differ in pixels: .* against null; evaluate both with the same"):
        gap.main([str(tmp_path / "local"), str(tmp_path / "served")])
    gap.main([str(tmp_path / "served"), str(tmp_path / "served")])


def test_a_prompt_is_sent_as_it_is():
    pictures = picture(30, 40), picture(50, 20, 1)
    parts = [{"type": "text", "text": "Left:"}, {"type": "image"}, {"type": "text", "text": "right:"}, {"type": "image"},
             {"type": "text", "text": "Which <b>?"}]
    prompt = Prompt([{"role": "user", "content": parts}], pictures, "A", ("A", "B"), None, "A")
    with serving() as server:
        Endpoint(server.url + "/", "served").generate([prompt, *plain("Two\nlines")], 7)
    body, other = sorted(server.bodies, key=lambda one: isinstance(one["messages"][0]["content"], str))
    assert other["messages"] == [{"role": "user", "content": "Two\nlines"}]
    assert {key: value for key, value in body.items() if key != "messages"} == {
        "model": "served", "temperature": 0, "n": 1, "max_tokens": 7}
    back = prompt_of(body)
    assert back.messages == prompt.messages
    for sent, got in zip(pictures, back.images, strict=True):
        assert got.mode == "RGB" and np.array_equal(np.asarray(sent), np.asarray(got))


@pytest.mark.parametrize("said, expected", (
    (completion(" B. blue\n", 3), ("B. blue", 3, "stop")), (completion("blue and", 2, "length"), ("blue and", 2, "length")),
    (completion(None), ("", 1, "stop")), (completion("", finish="content_filter"), ("", 1, "content_filter")),
    ({"choices": [{"message": {"content": None, "refusal": "B: I cannot."}}]}, ("", None, "stop")),
))
def test_answers_of_all_kinds(said, expected):
    assert chat.read_answer(httpx2.Response(200, json=said)) == expected


def test_no_content_is_an_unparsed_answer(twins, tmp_path):
    with serving(lambda body: completion(None, 0)) as server:
        eval_run.main(words(twins, tmp_path, server))
    assert {(row["pred"], row["correct"], row["text"]) for row in rows(tmp_path)} == {(None, False, "")}


def test_equal_prompts_are_asked_once(twins, tmp_path):
    lines = [json.loads(line) for line in (twins / "test.jsonl").read_text(encoding="utf-8").splitlines()[:6]]
    for line in lines:
        line["meta"]["keep_order"] = True       # else the options' order is the id's
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({**line, "id": line["id"] + again}) + "\n" for line in lines
                                                 for again in ("", "-again")), encoding="utf-8")
    shutil.copytree(twins / "images", tmp_path / "images")
    with serving() as server:
        eval_run.main(words(tmp_path, tmp_path / "out", server))
    found = rows(tmp_path / "out")
    assert len(server.bodies) == 12
    assert [row["id"] + "-again" for row in found[::2]] == [row["id"] for row in found[1::2]]


def test_as_many_at_once_as_allowed_and_in_order():
    names = [f"w{n}" for n in range(30)]
    with serving(lambda body: (time.sleep(0.03 * (echo(body) == "w3")), echo(body))[1], hold_s=0.01) as server:
        said = Endpoint(server.url, "served", parallel=5).generate(plain(*names), 4)
    assert [one.text for one in said] == names and server.most == 5


def test_prompts_are_taken_as_they_are_needed():
    taken = []

    def prompts():
        for n, one in enumerate(plain(*(f"w{n}" for n in range(60)))):
            taken.append(n)
            yield str(n), one

    with serving(echo) as server:
        answers = Endpoint(server.url, "served", parallel=2).answers(prompts(), 4)
        assert next(answers) == ("0", ("w0", 1, "stop")) and len(taken) <= 2 * endpoint.AHEAD
        assert len(list(answers)) == 59 and len(taken) == 60


# ---- servers that fail -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", (
    status(500, {"error": {"message": "out of memory"}}), status(503), status(408), status(409), status(429), hang, cut,
    text("<html>proxy</html>"), text('{"choices": []}'), text('{"error": {"message": "busy"}}'), text("[1"),
    text(json.dumps(completion("half of an ans", finish="abort"))),
), ids=lambda fault: getattr(fault, "__name__", None))
def test_what_another_attempt_may_change(fault):
    with serving(echo) as server:
        server.faults.append(fault)
        said = Endpoint(server.url, "served", timeout_s=0.3, parallel=1).generate(plain("one", "two"), 4)
    assert [one.text for one in said] == ["one", "two"]
    assert [echo(body) for body in server.bodies] == ["one", "one", "two"]


def test_a_server_says_when_to_come_back():
    with serving(echo) as server:
        server.faults.append(status(429, {"error": {"message": "slow down"}}, Retry_After="0.4"))
        started = time.monotonic()
        Endpoint(server.url, "served").generate(plain("one"), 4)
    assert time.monotonic() - started >= 0.4
    assert chat.pause_of(None, 3.0) == chat.pause_of("soon", 3.0) == chat.pause_of("inf", 3.0) == 3.0
    assert chat.pause_of("7", 3.0) == 7.0 and chat.pause_of("-1", 3.0) == 0.0
    assert 50 < chat.pause_of(formatdate(time.time() + 60, usegmt=True), 3.0) <= 60
    assert chat.pause_of(formatdate(time.time() - 60, usegmt=True), 3.0) == 0.0


def test_pauses_grow(monkeypatch, capsys):
    pauses = []
    sleep = endpoint.asyncio.sleep
    monkeypatch.setattr(endpoint, "BACKOFF_S", 1.0)
    monkeypatch.setattr(endpoint.asyncio, "sleep", lambda pause: (pauses.append(pause), sleep(0))[1])
    with serving() as server, pytest.raises(EndpointError) as caught:
        server.faults.extend([status(500, {"message": "out of memory"})] * 9)
        Endpoint(server.url, "served", retries=8).generate(plain("one"), 4)
    assert str(caught.value) == f"prompt 1: {server.url} answers 500: out of memory (attempts: 9)"
    assert len(server.bodies) == 9
    assert all(0.5 * full <= pause <= full for full, pause in zip((1, 2, 4, 8, 16, 32, 60, 60), pauses, strict=True))
    assert capsys.readouterr().err.count("out of memory; asking again in ") == 1, "told once in a while"


@pytest.mark.parametrize("fault, message", (
    (text("<html>proxy</html>"), "{url}/chat/completions gives no chat completion, but '<html>proxy</html>' (attempts: 2)"),
    (cut, "{url} cannot be asked: peer closed connection"), (hang, "{url} gives no answer within 0.2 s (attempts: 2)"),
    (status(400, {"object": "error", "message": "The prompt is\ntoo long."}), "{url} answers 400: The prompt is too long."),
    (status(422, {"detail": [{"loc": "n"}]}), '{url} answers 422: [{{"loc": "n"}}]'),
    (status(404, {"error": "no such\tmodel"}), "{url} answers 404: no such model"),
    (status(307, Location="http://elsewhere/"), "{url} answers 307: Temporary Redirect"),
), ids=lambda one: "" if isinstance(one, str) else None)
def test_the_end_is_a_sentence_with_the_item(fault, message, twins, tmp_path):
    problem = read_problems(twins / "test.jsonl")[0]
    with serving() as server:
        server.faults.extend([fault] * 2)
        said = refusal(*words(twins, tmp_path, server, "--parallel", "1", "--retries", "1", "--timeout", "0.2"))
        assert said.startswith(f"error: test, {problem.id}, view both: {message.format(url=server.url)}")
        assert (len(server.bodies) == 2) == ("attempts" in said)
        server.faults.clear()
        eval_run.main(words(twins, tmp_path, server, "--parallel", "1"))
    assert info(tmp_path)["finished"]


def test_answers_behind_a_refusal_are_kept(twins, tmp_path):
    problem = read_problems(twins / "test.jsonl")[0]
    first = render(problem, "both")

    def answer(body: dict) -> str:
        if prompt_of(body).messages == first.messages and refusing:
            while len(server.bodies) < 6:       # until others are done
                time.sleep(0.01)
            time.sleep(0.1)
            raise ConnectionError
        return "A"

    refusing = True
    with serving(answer) as server:
        refusal(*words(twins, tmp_path, server, "--parallel", "3", "--retries", "0"))
        before = rows(tmp_path)
        assert len(before) >= 3 and (problem.id, "both") not in {(row["id"], row["view"]) for row in before}
        refusing, asked = False, len(server.bodies)
        eval_run.main(words(twins, tmp_path, server))
        again = rows(tmp_path)
        assert again[:len(before)] == before and len({row["key"] for row in again}) == len(again)
        assert len(server.bodies) - asked <= len(again) - len(before)


def test_a_refusal_waits_for_what_is_under_way_and_asks_no_more():
    def answer(body: dict) -> dict | str:
        if echo(body) == "w1":
            raise ConnectionError       # at once, while the others are under way
        time.sleep(0.3)
        return echo(body)

    got = []
    with serving(answer) as server:
        with pytest.raises(EndpointError, match="^w1: .* \\(attempts: 1\\)$"):
            for name, said in Endpoint(server.url, "served", parallel=3, retries=0).answers(
                    ((one, *plain(one)) for one in (f"w{n}" for n in range(20))), 4):
                assert said.text == name
                got.append(name)
    assert got == ["w0", "w2"] and len(server.bodies) == 3


def test_a_picture_that_cannot_be_read_keeps_the_answers(twins, tmp_path):
    with serving(echo, hold_s=0.02) as server:
        def prompts():
            for n, one in enumerate(plain("a", "b", "c")):
                yield str(n), one
            while len(server.bodies) < 3 or server.now:
                time.sleep(0.01)
            time.sleep(0.1)
            raise OSError("no such picture")

        got = []
        with pytest.raises(OSError, match="no such picture"):
            for name, _ in Endpoint(server.url, "served").answers(prompts(), 4):
                got.append(name)
    assert got == ["0", "1", "2"]


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGINT))
def test_a_run_that_is_ended_goes_on(how, twins, tmp_path):
    with serving(hold_s=0.05) as server:
        command = words(twins, tmp_path, server, "--parallel", "2", "--timeout", "60")
        process = subprocess.Popen([sys.executable, "-m", "eval.run", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and not (
                (tmp_path / "answers.jsonl").exists() and len(rows(tmp_path)) >= 5):
            time.sleep(0.01)
        if how == signal.SIGINT:
            server.hold_s = 30          # what is under way must not be waited for
            time.sleep(0.2)
        process.send_signal(how)
        said = process.communicate(timeout=20)[1]
        if how == signal.SIGINT:
            assert process.returncode == 130 and "stopped; the same command continues" in said, said[-2000:]
        assert not info(tmp_path)["finished"]
        server.hold_s, before, asked = 0, rows(tmp_path), len(server.bodies)
        assert 5 <= len(before) < 30
        eval_run.main(words(twins, tmp_path, server))
        after = rows(tmp_path)
        assert after[:len(before)] == before and info(tmp_path)["finished"]
        assert len(server.bodies) - asked == len(after) - len(before), "every prompt of these views is asked once"
        asked = len(server.bodies)
        eval_run.main(words(twins, tmp_path, server))
        assert len(server.bodies) == asked


def test_the_model_may_move(twins, tmp_path):
    with serving() as one, serving() as two:
        one.faults.extend([None] * 10 + [status(400)] * 99)
        refusal(*words(twins, tmp_path, one, "--parallel", "1"))
        eval_run.main(words(twins, tmp_path, two))
        assert len(one.bodies) - 1 + len(two.bodies) == len(rows(tmp_path))
        assert [where["url"] for where in info(tmp_path)["endpoints"]] == [one.url, two.url]
        two.models = ("other",)
        assert "serves no model served: it lists other" in refusal(*words(twins, tmp_path, two))
        said = refusal(*words(twins, tmp_path, two, "--model", "other"))
        assert "holds answers of another run; it differs in model: give another --out" in said


# ---- who may ask -----------------------------------------------------------------------------------------------------

def test_the_key_is_sent_and_never_written(twins, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    with serving(key=KEY) as server:
        server.faults.append(status(500, {"error": {"message": f"cannot serve {KEY}"}}))
        eval_run.main(words(twins, tmp_path / "a", server, "--api-key-env", "SOME_KEY"))
        assert {seen["Authorization"] for seen in server.seen} == {f"Bearer {KEY}"}
        server.faults.append(status(400, {"error": {"message": f"{KEY} has no rights"}}))
        told = refusal(*words(twins, tmp_path / "b", server, "--api-key-env", "SOME_KEY"))
        server.key = "another"
        told += refusal(*words(twins, tmp_path / "c", server, "--api-key-env", "SOME_KEY"))
        assert "*** has no rights" in told and "answers 401: Incorrect API key: Bearer ***" in told
        assert "(--api-key-env names the variable that holds the key)" in refusal(*words(twins, tmp_path / "d", server))
    with serving() as server:
        url = server.url.replace("http://", f"http://me:{KEY}@")
        eval_run.main(words(twins, tmp_path / "e", server, "--endpoint", url))
        assert all(seen["Authorization"].startswith("Basic ") for seen in server.seen)
        assert info(tmp_path / "e")["endpoints"][0]["url"] == server.url
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"a", "e"} <= {path.parent.name for path in files}
    for written in (*(path.read_text(encoding="utf-8") for path in files), *capsys.readouterr(), told):
        assert KEY not in written


def test_a_key_that_is_not_there(twins, tmp_path, monkeypatch):
    monkeypatch.setenv("EMPTY_KEY", " ")
    monkeypatch.setenv("ODD_KEY", f"{KEY}\u00e9")
    with serving() as server:
        for variable in ("NO_SUCH_KEY", "EMPTY_KEY"):
            said = refusal(*words(twins, tmp_path, server, "--api-key-env", variable))
            assert said == f"error: --api-key-env {variable}: no such environment variable, or it is empty"
        assert KEY not in refusal(*words(twins, tmp_path, server, "--api-key-env", "ODD_KEY"))
        twice = words(twins, tmp_path, server, "--api-key-env", "ODD_KEY", "--endpoint", "http://me:word@localhost/v1")
        assert "--endpoint holds a user or a password" in refusal(*twice)
        assert not server.seen and not any(tmp_path.iterdir())


def test_what_the_server_lists():
    with serving(models=tuple(f"m{n}" for n in range(10))) as server:
        with pytest.raises(EndpointError, match=r"serves no model served: it lists m0, m1, .*, m7 and 2 more$"):
            Endpoint(server.url, "served").identity()
        server.models = None        # a server without the list
        assert Endpoint(server.url, "served").identity()["endpoint"] == {"url": server.url, "served": None}
    with pytest.raises(EndpointError, match=r"^http://127.0.0.1:\d+/v1 cannot be asked: .* \(attempts: 3\)$"):
        Endpoint(server.url, "served", retries=2).identity()


@pytest.mark.parametrize("given, message", (
    (["--mode", "likelihood"], "--mode likelihood does not go with --endpoint: a chat server tells the likeliest tokens only"),
    (["--max-pixels", "1000"], "--max-pixels does not go with --endpoint: the server sizes the pictures"),
    (["--min-pixels", "0"], "--min-pixels does not go with"), (["--adapter", "a"], "--adapter does not go with --endpoint"),
    (["--dtype", "float32"], "--dtype does not go with"), (["--revision", "main"], "--revision does not go with"),
    (["--batch-size", "8"], "--batch-size does not go with"), (["--corrupt", "text=0.1"], "--corrupt does not go with"),
    (["--parallel", "0"], "--parallel is at least 1"), (["--timeout", "nan"], "--timeout above 0"),
    (["--retries", "-1"], "--retries at least 0"),
    (["--endpoint", "localhost:8000"], "--endpoint takes a URL such as http://localhost:8000/v1"),
    (["--endpoint", "http://h:port/v1"], "--endpoint takes a URL"), (["--endpoint", "http://h/v1?key=1"], "without ? and #"),
))
def test_what_does_not_go_with_a_server(given, message, capsys):
    with pytest.raises(SystemExit):
        eval_run.parse(["--endpoint", "http://h/v1", "--model", "m", "--out", "o", *given])
    assert message in capsys.readouterr().err


def test_options_and_their_defaults(capsys):
    served = eval_run.parse(["--endpoint", "http://h/v1", "--model", "m", "--out", "o"])
    assert (served.mode, served.parallel, served.timeout, served.retries) == ("generate", 16, 120.0, 5)
    local = eval_run.parse(["--model", "m", "--out", "o"])
    assert (local.mode, local.batch_size, local.dtype, local.endpoint) == ("likelihood", 32, "auto", None)
    for given in (["--parallel", "4"], ["--timeout", "3"], ["--retries", "0"], ["--api-key-env", "K"]):
        with pytest.raises(SystemExit):
            eval_run.parse(["--model", "m", "--out", "o", *given])
        assert f"{given[0]} goes with --endpoint" in capsys.readouterr().err


def test_no_model_library_is_loaded_to_ask_a_server():
    code = "import sys, eval.run; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ}).returncode == 0
