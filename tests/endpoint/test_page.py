"""The live page in a real browser: typing, watching, stepping, stopping, infilling, editing."""

import ast
import re
import shutil

import httpx
import pytest
from conftest import runs_by_kind

from endpoint.conftest import all_rows_are_freed
from workflows.placement import ServePlacement
from workflows.serve.app import AppArgs
from workflows.serve.config import ServeConfig, ServedRun

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def url(tmp_path_factory, deployed, port):
    long = {"packing": {"seq_len": 256}}  # an answer long enough to be stopped
    of = runs_by_kind(
        tmp_path_factory, {"absorbing": long, "autoregressive": {"objective": {"type": "autoregressive"}}}
    )
    runs = {kind: of(kind) for kind in ("absorbing", "autoregressive")}
    models = {kind: ServedRun(run=run.url, decode=corpus.recipe.decode) for kind, (corpus, run) in runs.items()}
    placement = ServePlacement(max_replicas=1, cpus_per_replica=0.25)
    return deployed(AppArgs(models=models, serve=ServeConfig(port=port), placement=placement))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, url):
    """The page, opened; whatever its console complains of fails the test."""
    complaints = []
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    sync_api.expect(page.locator("#model option")).to_have_count(2)
    yield page
    page.close()
    assert [text for text in complaints if not text.startswith("Failed to load resource: the server responded")] == []


def canvas(page):
    return page.locator(".canvas").first.inner_text()


def run(page):
    page.click("#run")
    sync_api.expect(page.locator("#run")).to_be_enabled()
    assert page.inner_text("#error") == ""


def test_a_prompt_is_denoised_and_every_step_can_be_seen_again(page, url):
    page.fill("#text", "RED CIRCLE")
    page.fill("#tokens", "16")
    page.fill("#temperature", "1")
    run(page)
    body = {"model": "absorbing", "prompt": "RED CIRCLE", "max_tokens": 16, "temperature": 1, "seed": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body).json()
    assert canvas(page) == "RED CIRCLE" + answer["choices"][0]["text"]
    facts = page.locator("dl.facts").inner_text().split()
    assert int(facts[facts.index("calls") + 1]) == answer["usage"]["diffusion"]["num_calls"]
    steps = int(page.get_attribute("#step", "max"))
    assert steps == answer["usage"]["diffusion"]["num_calls"]
    open_at = []
    for step in range(1, steps + 1):
        page.evaluate(f"drawStep({step})")
        open_at.append(page.locator(".canvas .open").count())
    assert open_at == sorted(open_at, reverse=True)
    assert page.locator(".canvas .sure, .canvas .likely, .canvas .unsure").count() > 0
    assert f"{answer['usage']['completion_tokens']} tokens" in page.locator("#said").inner_text()
    assert "/v1/completions" in page.locator("#curl").text_content()


def test_the_python_that_is_shown_asks_the_same(page):
    text = 'is it true, "false"\n\\ or é?'
    page.fill("#text", text)
    shown = re.search(r"json=(\{.*\})\)\nprint", page.text_content("#python"), re.DOTALL)
    assert ast.literal_eval(shown[1])["prompt"] == text


def test_holes_are_filled_and_a_selected_span_is_edited(page):
    page.check("input[value=infill]")
    page.fill("#text", "RED [[4]] AND [[3]] END")
    run(page)
    assert canvas(page).startswith("RED ")
    assert " AND " in canvas(page)
    assert canvas(page).endswith(" END")
    page.check("input[value=edit]")
    page.fill("#text", "RED CIRCLE 17")
    page.evaluate("document.getElementById('text').setSelectionRange(4, 10)")
    page.click("#select")
    assert "CIRCLE" in page.inner_text("#span-out")
    page.fill("#temperature", "2")
    run(page)
    assert canvas(page).startswith("RED ")
    assert canvas(page).endswith(" 17")


def test_a_hole_put_into_the_text_leaves_no_span_of_the_text_before(page):
    page.fill("#text", "RED CIRCLE 17")
    page.check("input[value=edit]")
    page.evaluate("document.getElementById('text').setSelectionRange(4, 10)")
    page.click("#select")
    page.check("input[value=infill]")
    page.evaluate("document.getElementById('text').setSelectionRange(0, 0)")
    page.click("#mark")
    assert page.input_value("#text") == "[[8]]RED CIRCLE 17"
    page.check("input[value=edit]")
    assert page.inner_text("#span-out") == "edits all of the text"


@pytest.mark.parametrize(("there", "field", "mode"), [("infill", "#hole", "write"), ("write", "#tokens", "infill")])
def test_a_field_that_is_hidden_hinders_nothing(page, there, field, mode):
    """The browser sends no form with a number that is out of bounds, and cannot point at what is not shown."""
    page.check(f"input[value={there}]")
    page.fill(field, "0")
    page.check(f"input[value={mode}]")
    page.fill("#text", "RED [[2]]")
    run(page)
    assert page.locator(".canvas").count() == 1


def test_a_replay_goes_on_where_it_was_paused(page):
    page.evaluate("""() => {
        runs = [new Run('m', '', '')];
        for (let i = 0; i < 9; i++) runs[0].take({num_calls: i + 1, changed: [[i, 'x', 1]]});
        $('step').max = 9; $('replay').disabled = $('step').disabled = false;
        drawStep(5);
    }""")
    page.click("#replay")
    page.click("#replay")
    assert page.input_value("#step") in ("5", "6", "7")
    page.evaluate("drawStep(9)")
    page.click("#replay")
    assert int(page.input_value("#step")) < 5


def test_frames_that_come_faster_than_they_can_be_drawn_are_drawn_once(page):
    drawn = page.evaluate("""() => new Promise(done => {
        let count = 0;
        const one = new Run('m', '', ''), draw = one.draw;
        one.draw = function (step) { count++; draw.call(this, step); };
        for (let i = 0; i < 500; i++) one.take({num_calls: i + 1, changed: [[i, 'x', 1]]});
        setTimeout(() => done([count, one.canvas.innerText.length]), 300);
    })""")
    assert drawn == [1, 500]


def test_a_narrow_window_holds_all_and_text_from_right_to_left_begins_at_the_right(page):
    page.set_viewport_size({"width": 360, "height": 740})
    edges = page.evaluate("""() => {
        const one = new Run('m', 'שלום עולם!', ''), place = new Range();
        $('canvases').replaceChildren(one.box);
        one.draw(0);
        place.setStart(one.canvas.firstChild.firstChild, 0);
        place.setEnd(one.canvas.firstChild.firstChild, 1);
        const right = node => Math.round(node.getBoundingClientRect().right);
        return [right(one.canvas), right($('canvases')), right(place), document.documentElement.scrollWidth];
    }""")
    assert edges == [edges[1], edges[1], edges[1], 360]


REFUSED = '{"error": {"message": "refused"}}'


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (503, REFUSED, "refused"),
        (502, "<html>", "502 Bad Gateway"),
        (401, REFUSED, "Give an API key to go on."),
        (200, '{"data": []}', "No model is served yet."),
    ],
)
def test_why_there_is_no_model_is_shown(page, status, body, said):
    page.route("**/v1/models", lambda route: route.fulfill(status=status, body=body))
    page.evaluate("models = []")
    page.click("#run")
    sync_api.expect(page.locator("#error")).to_have_text(said)
    assert page.locator(".canvas").count() == 0
    if status == 401:  # a key that is not taken is told of too, and one that is brings the models
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        sync_api.expect(page.locator("#error")).to_have_text("refused")
        page.unroute("**/v1/models")
        page.fill("#key", "right")
        page.press("#key", "Tab")
        sync_api.expect(page.locator("#error")).to_be_empty()


def test_the_keyboard_starts_and_escape_cancels_on_the_server_too(page, url):
    page.fill("#text", "RED")
    page.fill("#tokens", "192")
    page.evaluate("""() => {
        const ask = fetch, take = Run.prototype.take;
        window.fetch = (path, how) => ask(path, {...how, body: how.body.replace(
            '"frames":"changes"', '"frames":"changes","block_length":1,"steps_per_block":1')});
        Run.prototype.take = function (meta) {
            take.call(this, meta);
            if (this.frames.length === 2) document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
        };
    }""")
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    sync_api.expect(page.locator("#run")).to_be_enabled()
    assert page.locator("#said").inner_text() == "Stopped."
    assert all_rows_are_freed(url)
    page.focus("#run")
    assert page.evaluate("document.activeElement.id") == "run"


def test_beside_a_model_that_writes_from_left_to_right(page):
    page.fill("#text", "RED")
    page.check("#beside")
    run(page)
    assert page.locator(".canvas").count() == 2
    assert page.locator("#canvases h2").all_inner_texts() == ["absorbing", "autoregressive"]
    page.click("#replay")
    sync_api.expect(page.locator("#step-out")).not_to_have_text(re.compile("^0 of"))


def test_a_refusal_is_shown_where_it_is_read_out(page):
    page.fill("#text", "RED " * 200)
    page.click("#run")
    sync_api.expect(page.locator("#error")).not_to_be_empty()
    assert "exceed the context" in page.inner_text("#error")
    assert page.get_attribute("#error", "role") == "alert"
    page.check("input[value=infill]")
    page.fill("#text", "RED [[2-4]]")
    page.click("#run")
    sync_api.expect(page.locator("#error")).to_contain_text("has no hole")
    assert canvas(page) == "RED [[2-4]]"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_ground(browser, url, scheme):
    """WCAG AA: a contrast of 4.5 for every kind of text that the page shows."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(url)
    contrasts = page.evaluate("""() => {
        const light = color => { const c = color.match(/\\d+/g).slice(0, 3).map(v => { v /= 255;
            return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
            return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
        const ground = light(getComputedStyle(document.querySelector('section')).backgroundColor);
        return Object.fromEntries([...document.querySelectorAll('.legend .t, .hint, legend, label')].map(node => {
            const ink = light(getComputedStyle(node).color);
            return [node.className || node.tagName, (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05)]; }));
    }""")
    page.close()
    assert min(contrasts.values()) >= 4.5, contrasts
