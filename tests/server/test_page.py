"""The page at /, in a real browser: what a person does, and what must not happen to them."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from serving import Running, running, wait_until

from synthia_vllm.admission.users import new_key
from synthia_vllm.engine.fake import BOS, FakeEngine
from synthia_vllm.template.prompt import TREE_OF_THOUGHT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from selenium.webdriver.remote.webelement import WebElement

QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"
HOSTILE = "<img src=x onerror='window.harmed=1'><b>bold</b>"
ANSWER = f"Hello. {HOSTILE}"
PIECES = (" Hello", ". ", HOSTILE, "\nUSER:", " more")


class Page:
    """The page in a browser, by what a person sees of it."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def open(self, url: str) -> None:
        self.browser.get(url)
        wait_until(lambda: self("#model").get_attribute("value") or self.status)

    def __call__(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[str]:
        return [e.text for e in self.browser.find_elements(By.CSS_SELECTOR, selector)]

    @property
    def status(self) -> str:
        return str(self("#status").text)

    @property
    def answers(self) -> list[str]:
        return self.all(".assistant .text")

    def do(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def write(self, selector: str, text: str) -> None:
        self.do("document.getElementById('settings').open = true")
        self(selector).clear()
        self(selector).send_keys(text)

    def say(self, text: str) -> None:
        """Send `text` and wait for the end of its answer."""
        self("#input").send_keys(text, Keys.ENTER)
        self.wait()

    def wait(self) -> None:
        wait_until(lambda: self("#send").is_displayed() and (self.status or self.answers))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    assert driver, "The page is tested in Chromium (Debian: chromium and chromium-driver)."
    assert chromium, "The page is tested in Chromium (Debian: chromium and chromium-driver)."
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "no-proxy-server", "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Chrome) -> Iterator[Page]:
    """The browser; whatever a test does, the page must not complain on its console."""
    browser.get("about:blank")
    browser.get_log("browser")
    yield Page(browser)
    complaints = [
        entry["message"]
        for entry in browser.get_log("browser")
        # The browser's own note of a refusal, which the page tells the user itself.
        if entry["level"] in ("SEVERE", "WARNING")
        and "Failed to load resource" not in entry["message"]
    ]
    assert complaints == []


@contextmanager
def scripted(pieces: tuple[str, ...] = PIECES, **changes: Any) -> Iterator[tuple[Any, Any]]:
    engine = FakeEngine(pieces, delay=changes.pop("delay", 0.0))
    with running(engine, **changes) as server:
        yield server, engine


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(PIECES)) as here:
        yield here


def prompt_of(server: Running) -> str:
    """The text of the last prompt the engine got."""
    ids = server.engine.seen[-1].prompt_token_ids  # type: ignore[attr-defined]
    assert ids[0] == BOS
    return b"".join(server.engine.token_bytes(token) for token in ids).decode()


def test_answer_of_the_real_engine(page: Page, live: Running) -> None:
    """The page shows the API's answer, the time to the first token, the rate, the count."""
    page.open(live.url)
    page.write("#temperature", "0")
    page.say(QUESTION)
    plain = live.client.chat.completions.create(
        model="synthia-demo", messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    assert page.answers == [plain.choices[0].message.content]
    [note] = page.all(".note")
    assert plain.usage
    assert note.startswith("first token after ")
    assert "tokens/s" in note
    assert f", prompt of {plain.usage.prompt_tokens} tokens (" in note
    assert note.endswith(f" cached), answer of {plain.usage.completion_tokens} tokens")


def test_stop_frees_the_engine(page: Page, live: Running) -> None:
    """The stop button ends the request in vLLM; what arrived stays."""

    def left() -> float:
        return live.value("synthia_aborted_by_client_total", model="synthia-demo")

    before = left()
    page.open(live.url)
    page.do(
        "new MutationObserver(() => {"
        "  const text = document.querySelector('.assistant .text');"
        "  if (text && text.textContent) document.getElementById('stop').click();"
        "}).observe(document.getElementById('log'), {childList: true, subtree: true})"
    )
    page.say(QUESTION)
    wait_until(lambda: left() == before + 1)
    wait_until(lambda: not live.engine._llm.output_processor.request_states)  # type: ignore[attr-defined]
    [answer], [note] = page.answers, page.all(".note")
    assert answer
    assert note.endswith("; stopped")


def test_model_text_is_text(page: Page, server: Running) -> None:
    """Markup in an answer, and in a question, is shown and not done."""
    page.open(server.url)
    page.say(HOSTILE)
    assert page.answers == [ANSWER]
    assert page.all(".user .text") == [HOSTILE]
    assert page.browser.find_elements(By.CSS_SELECTOR, "#log img, #log b") == []
    assert page.do("return window.harmed") is None


def test_conversation(page: Page, server: Running) -> None:
    """Turns follow each other; an edit goes back to its turn; the last answer can be had anew."""
    page.open(server.url)
    page.say("one")
    page.say("two")
    turn = f"\nASSISTANT: {ANSWER}\n"
    assert prompt_of(server) == f"USER: one{turn}USER: two\nASSISTANT:"
    page(".again").click()
    page.wait()
    assert prompt_of(server) == f"USER: one{turn}USER: two\nASSISTANT:"
    assert len(page.answers) == 2
    page.browser.find_elements(By.CSS_SELECTOR, ".edit")[0].click()
    box = page("#log textarea")
    assert box.get_attribute("value") == "one"
    box.clear()
    box.send_keys("three", Keys.ENTER)
    page.wait()
    assert prompt_of(server) == "USER: three\nASSISTANT:"
    assert page.all(".user .text") == ["three"]
    page("#new").click()
    assert page.answers == []
    page.say("four")
    assert prompt_of(server) == "USER: four\nASSISTANT:"


def test_settings_are_sent(page: Page, server: Running) -> None:
    """The card's defaults stand in the fields; what is changed reaches the engine."""
    page.open(server.url)
    page.say("one")
    sampling = server.engine.seen[-1].sampling  # type: ignore[attr-defined]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (
        0.75, 1.0, 50, 1024
    )  # fmt: skip
    for name, value in (("temperature", "0.3"), ("top_p", "0.9"), ("top_k", "7")):
        page.write(f"#{name}", value)
    page.write("#max_tokens", "5")
    page.write("#system", "Be brief.")
    page("#new").click()
    page.say("two")
    sampling = server.engine.seen[-1].sampling  # type: ignore[attr-defined]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (
        0.3, 0.9, 7, 5
    )  # fmt: skip
    assert prompt_of(server) == "SYSTEM: Be brief.\nUSER: two\nASSISTANT:"
    assert page.all(".note")[0].endswith("; cut at the longest answer")
    page("#tot").click()
    assert not page("#system").is_enabled()
    page("#new").click()
    page.say("three")
    assert prompt_of(server) == f"SYSTEM: {TREE_OF_THOUGHT.system}\nUSER: three\nASSISTANT:"
    page.write("#temperature", "9")
    seen = len(server.engine.seen)  # type: ignore[attr-defined]
    page.say("four")
    assert len(server.engine.seen) == seen  # type: ignore[attr-defined]


def test_keyboard(page: Page) -> None:
    """Enter sends, Shift+Enter begins a line, Esc stops, the arrow edits; fields have names."""
    with scripted((" a", " b", " c", " d"), delay=0.4) as (server, engine):
        page.open(server.url)
        assert page.browser.switch_to.active_element == page("#input")
        page("#input").send_keys("one", Keys.SHIFT + Keys.ENTER + Keys.NULL, "two", Keys.ENTER)
        wait_until(lambda: page.answers and page.answers[0])
        page("body").send_keys(Keys.ESCAPE)
        wait_until(lambda: len(engine.aborted) == 1)
        page.wait()
        assert prompt_of(server) == "USER: one\ntwo\nASSISTANT:"
        assert page.answers[0]
        page("#input").send_keys(Keys.ARROW_UP)
        assert page.browser.switch_to.active_element.get_attribute("value") == "one\ntwo"
        page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        nameless = page.do(
            "return [...document.querySelectorAll('input, textarea, select')]"
            ".filter(e => !e.labels.length && !e.getAttribute('aria-label')).map(e => e.id)"
        )
        assert nameless == []


def test_key_is_kept_in_memory_only(page: Page, tmp_path: Path) -> None:
    """Without a key the page asks for it; it works with one, and forgets it when closed."""
    key, hashed = new_key()
    file = tmp_path / "keys.yaml"
    file.write_text(f"users:\n  ann:\n    keys: ['{hashed}']\n")
    with scripted(keys_file=file) as (server, _):
        page.open(server.url)
        assert "API key" in page.status
        assert page.browser.switch_to.active_element == page("#key")
        page("#key").send_keys(key, Keys.TAB)
        wait_until(lambda: page("#model").get_attribute("value") == "synthia-demo")
        page.say("Hi")
        assert page.answers == [ANSWER]
        kept = page.do(
            "return [localStorage.length, sessionStorage.length, document.cookie, location.search]"
        )
        assert kept == [0, 0, "", ""]
        page.browser.refresh()
        wait_until(lambda: "API key" in page.status)
        assert page("#key").get_attribute("value") == ""


def test_saved_and_loaded(page: Page, server: Running, tmp_path: Path) -> None:
    """The file is the card's, and a conversation goes on from it."""
    page.browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    page.open(server.url)
    page.say("Où?")
    page("#save").click()
    file = tmp_path / "Synthia-7B-conversations.jsonl"
    wait_until(file.exists)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"prompt": "Où?", "answer": ANSWER}
    ]
    page.open(server.url)
    page("#file").send_keys(str(file))
    wait_until(lambda: page.status == "1 turns were loaded.")
    assert page.answers == [ANSWER]
    page.say("two")
    assert prompt_of(server) == f"USER: Où?\nASSISTANT: {ANSWER}\nUSER: two\nASSISTANT:"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 1}\n')
    page("#file").send_keys(str(bad))
    wait_until(lambda: "not a conversation" in page.status)
    assert len(page.answers) == 2


def test_errors_are_told(page: Page) -> None:
    """The server's words are shown, and the question goes back to the field."""
    with scripted() as (server, engine):
        page.open(server.url)
        engine.dead = True
        page.say("Hi")
        assert page.status
        assert page("#input").get_attribute("value") == "Hi"
        assert page.answers == []
    page("#input").send_keys(Keys.ENTER)
    wait_until(lambda: page.status == "The server cannot be reached.")


def test_on_a_phone_and_in_the_dark(page: Page, server: Running) -> None:
    """Nothing is wider than a phone's screen, and dark means dark."""
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    colours = []
    try:
        page.open(server.url)
        page.do("document.getElementById('settings').open = true")
        page.say("x" * 200)
        assert page.do("return document.documentElement.scrollWidth <= innerWidth")
        assert page.do("return innerWidth") == 360
        for scheme in ("light", "dark"):
            page.browser.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            colours.append(page.do("return getComputedStyle(document.body).backgroundColor"))
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours == ["rgb(255, 255, 255)", "rgb(22, 22, 26)"]


def test_nothing_else_may_run(browser: Chrome, server: Running) -> None:
    """The policy: no script and no style but the page's own, and no other server."""
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    page = Page(browser)
    page.open(server.url)
    page.do(
        "const s = document.createElement('script'); s.textContent = 'window.harmed = 1';"
        "document.body.append(s)"
    )
    assert page.do("return window.harmed") is None
    elsewhere = browser.execute_async_script(
        "fetch('http://localhost:9/').catch(e => arguments[0](e.name))"
    )
    assert elsewhere == "TypeError"
    blocked = [entry["message"] for entry in browser.get_log("browser")]
    assert any("Content Security Policy" in message for message in blocked)


def test_can_be_switched_off() -> None:
    """`page: false` leaves no page, and the rest as it is."""
    with running(FakeEngine(), page=False) as server:
        assert httpx.get(server.url).status_code == 404
        assert httpx.get(f"{server.url}/v1/models").status_code == 200


MARKDOWN = """# A *small* title
Some **bold**, *italic*, __bold__, _italic_ and ***both***;
2 * 3 * 4, snake_case_name, \\*stars\\*, **open, `a*b*c` and ``a`b``.

- one
- two, see [the *docs*](https://example.org/a_(b)_c)
  1. deeper
     - deepest
  2. again
- three

  its second paragraph
7. seven
8) eight

> quoted
> > twice

```python
if x:

    y = "<b>*x*</b>"
```

| a | b |
|---|:-:|
| 1 | `x` |

---
![a picture](https://example.org/x.png) [https://x.y](https://x.y)
    indented
"""
SHOWN = (
    "<h2>A <em>small</em> title</h2>"
    "<p>Some <strong>bold</strong>, <em>italic</em>, <strong>bold</strong>, <em>italic</em> and "
    "<strong><em>both</em></strong>;\n"
    "2 * 3 * 4, snake_case_name, *stars*, **open, <code>a*b*c</code> and <code>a`b</code>.</p>"
    "<ul><li><p>one</p></li>"
    "<li><p>two, see <span>the <em>docs</em></span> (https://example.org/a_(b)_c)</p>"
    "<ol start=1><li><p>deeper</p><ul><li><p>deepest</p></li></ul></li>"
    "<li><p>again</p></li></ol></li>"
    "<li><p>three</p><p>its second paragraph</p></li></ul>"
    "<ol start=7><li><p>seven</p></li><li><p>eight</p></li></ol>"
    "<blockquote><p>quoted</p><blockquote><p>twice</p></blockquote></blockquote>"
    '<div><pre><code>if x:\n\n    y = "&lt;b&gt;*x*&lt;/b&gt;"</code></pre><button></button></div>'
    "<div><table><tbody><tr><th>a</th><th>b</th></tr><tr><td>1</td><td><code>x</code></td></tr>"
    "</tbody></table></div>"
    "<hr>"
    "<p><span>a picture</span> (https://example.org/x.png) <span>https://x.y</span>\n"
    "    indented</p>"
)
TAGS = (
    "p h2 h3 h4 h5 h6 em strong code pre div ul ol li blockquote table tbody tr th td hr span button"
)


def markup(page: Page) -> str:
    """What the last answer was made into, without the page's own classes."""
    html = page.do(
        "const shown = document.querySelector('.assistant:last-child .text').cloneNode(true);"
        "for (const e of shown.querySelectorAll('*'))"
        "  for (const name of ['class', 'type', 'aria-label']) e.removeAttribute(name);"
        "return shown.innerHTML"
    )
    return str(html).replace('start="', "start=").replace('">', ">")


def test_markdown(page: Page) -> None:
    """An answer's Markdown is shown; a switch shows what the model sent; questions stay as typed."""
    with scripted(tuple(MARKDOWN)) as (server, _):
        page.open(server.url)
        page.say("**one**")
        assert markup(page) == SHOWN
        assert page.all(".user .text") == ["**one**"]
        page.do("document.getElementById('settings').open = true")
        page("#markdown").click()
        assert markup(page).replace("&lt;", "<").replace("&gt;", ">") == MARKDOWN.strip()
        page("#markdown").click()
        assert markup(page) == SHOWN
