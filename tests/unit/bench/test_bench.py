"""A load on whatever answers: what is no endpoint is told of in one line, and before the load."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dllm_core.errors import ConfigError, DataError
from workflows.bench.flow import BenchOptions, _prompts, bench
from workflows.bench.load import Load, Mix, drive
from workflows.console import Console

MODELS = (200, b'{"data": [{"id": "m"}]}')
ANSWER = (200, b'{"choices": [{"text": "x"}]}')
STREAM = (200, b'data: {"choices": [{"text": "x"}], "usage": {"completion_tokens": 3}}\n\ndata: [DONE]\n\n')


@pytest.fixture
def endpoint():
    """A server, and what it answers to a question for models, for an answer and for a stream."""
    said = {"models": MODELS, "answer": ANSWER, "stream": STREAM}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def _say(self, what):
            code, body = said[what]
            self.send_response(code)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self._say("models")

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._say("stream" if asked["stream"] else "answer")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", said
        server.shutdown()


def loaded(url, out):
    options = BenchOptions.checked({"url": url, "lengths": [8], "concurrency": [1], "seconds": 0.1})
    return bench(options, out, Console("json"))


def test_a_line_of_a_file_of_prompts_ends_at_its_newline_alone(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone\u2028prompt\n\ntwo\x0c\n", encoding="utf-8")
    assert _prompts(BenchOptions.checked({"url": "http://x", "prompts": str(path)})) == ["one\u2028prompt", "two\x0c"]


def test_a_load_is_counted_and_written(endpoint, tmp_path):
    url, _ = endpoint
    [load] = loaded(f"{url}/v1/", tmp_path / "out")["loads"]
    assert load["by_status"] == {"200": load["requests"]}
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["loads"] == [load]
    assert (tmp_path / "out" / "bench.html").exists()


@pytest.mark.parametrize(
    ("what", "answer", "line"),
    [
        ("models", (200, b"[1]"), "its answer is no JSON object"),
        ("models", (200, b'{"data": [{}]}'), "its list of models is none of OpenAI's shape"),
        ("models", (200, b'{"data": 3}'), "its list of models is none of OpenAI's shape"),
        ("models", (404, b'{"error": "Not Found"}'), "bench: {'error': 'Not Found'}, got 404"),
        ("answer", (500, b'"oops"'), "bench: oops, got 500"),
        ("answer", (400, b'{"error": {"message": "too long"}}'), "bench: too long, got 400"),
    ],
)
def test_what_is_no_endpoint_is_a_line(endpoint, tmp_path, what, answer, line):
    url, said = endpoint
    said[what] = answer
    with pytest.raises(DataError) as caught:
        loaded(url, tmp_path)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "event", [b"null", b"3", b'{"choices": 3}', b'{"usage": [1]}', b'{"usage": {"completion_tokens": "3"}}']
)
def test_a_stream_of_another_shape_is_a_request_that_failed(endpoint, tmp_path, event):
    url, said = endpoint
    said["stream"] = (200, b"data: " + event + b"\n\ndata: [DONE]\n\n")
    [load] = loaded(url, tmp_path)["loads"]
    assert load["by_status"] == {"0": load["requests"]}


def test_a_usage_that_is_not_known_is_no_failure(endpoint, tmp_path):
    url, said = endpoint
    said["stream"] = (200, b'data: {"usage": {"completion_tokens": null}}\n\ndata: [DONE]\n\n')
    [load] = loaded(url, tmp_path)["loads"]
    assert (load["by_status"], load["tokens_per_s"]) == ({"200": load["requests"]}, 0)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_whatever_a_text_holds_an_event_ends_at_its_newline(endpoint, tmp_path, end):
    url, said = endpoint
    event = {"choices": [{"text": "\u2028\x85\u2029"}], "usage": {"completion_tokens": 3}}
    said["stream"] = (200, b"data: " + json.dumps(event, ensure_ascii=False).encode() + end + b"data: [DONE]" + end)
    [load] = loaded(url, tmp_path)["loads"]
    assert load["by_status"] == {"200": load["requests"]}
    assert load["tokens_per_s"] > 0


def test_a_client_that_falls_behind_hides_no_wait_of_an_open_loop(endpoint):
    def stand_still(done):
        if done == 1:
            time.sleep(0.4)

    load, mix = Load("open", 50, 0.5), Mix("m", ["a"], [4], {})
    answered = asyncio.run(drive(endpoint[0], load, mix, {}, stand_still))
    assert max(one.whole for one in answered) > 0.25
    assert all(one.began < 0.5 for one in answered)


def test_results_that_could_not_be_kept_are_refused_before_the_load(endpoint, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", Path("/proc/self")):  # the second is there, and takes no files from anyone
        with pytest.raises(DataError, match="--out: is no folder to write to"):
            loaded(endpoint[0], out)


def test_an_address_without_http_is_no_endpoint_that_is_down(tmp_path):
    with pytest.raises(ConfigError, match="URL: is no address of an endpoint"):
        loaded("127.0.0.1:8000", tmp_path)
