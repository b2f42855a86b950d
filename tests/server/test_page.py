"""The page at /, in a real browser: what a person does, and what must not happen to them."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
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

    def do(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

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


def test_edit_given_up_while_an_answer_comes(page: Page) -> None:
    """What was open for a change is as it was, and the answer is shown on."""
    with scripted((" a", " b", " c", " d"), delay=0.3) as (server, engine):
        page.open(server.url)
        page.say("one")
        page(".edit").click()
        page("#input").send_keys("two", Keys.ENTER)
        wait_until(lambda: len(page.answers) == 2 and page.answers[1])
        page("#log textarea").send_keys(" and more", Keys.ENTER)  # not now
        page("#log .tools button:last-child").click()
        assert page.all(".user .text") == ["one", "two"]
        wait_until(lambda: page.answers[1].startswith("a b"))
        assert not page("#send").is_displayed()
        page.wait()
        assert page.answers == ["a b c d", "a b c d"]
        assert len(engine.seen) == 2


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
TAGS = {
    *("p", "h2", "h3", "h4", "h5", "h6", "em", "strong", "code", "pre", "div", "span", "button"),
    *("ul", "ol", "li", "blockquote", "table", "tbody", "tr", "th", "td", "hr"),
}


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
    """Markdown is shown as such; a switch shows what the model sent; questions stay as typed."""
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


def test_stream_is_shown_as_the_whole(page: Page, server: Running) -> None:
    """However the text arrives, the end is the same; blocks that are complete are not made anew."""
    page.open(server.url)
    streamed, whole, kept = page.do(
        "const [text] = arguments, box = element('div'), all = element('div');"
        "const write = writer(box), first = [];"
        "for (let end = 1; end <= text.length; end += 1) {"
        "  write(text.slice(0, end));"
        "  if (end > text.indexOf('snake')) first.push(box.firstChild);"
        "}"
        "writer(all)(text);"
        "return [box.innerHTML, all.innerHTML, new Set(first).size]",
        MARKDOWN,
    )
    assert streamed == whole
    assert kept == 1


HARMFUL = r"""[x](javascript:alert(1)) ![y](https://example.org/y.png "t") <https://example.org>
[a]: javascript:alert(1)
[![i](x)](javascript:alert(1)) [a][a] <a href="javascript:alert(1)">here</a>
# <img src=x onerror="window.harmed=1">
- <script>window.harmed=1</script>
> <svg onload=window.harmed=1>

| <b>a</b> | [t](data:text/html,x) |
|--|--|
| `</code><b>` | &lt;b&gt; |

```"><img src=x onerror=window.harmed=1>
</code></pre><script>window.harmed=1</script>
"""


def test_hostile_markdown(page: Page) -> None:
    """No link, no picture, no attribute of the model's: only its text, all of it to be seen."""
    with scripted((HARMFUL,)) as (server, _):
        page.open(server.url)
        page.say("Hi")
        tags, attributes, addresses = page.do(
            "const all = [...document.querySelectorAll('.assistant .text *')];"
            "return [[...new Set(all.map(e => e.localName))], all.flatMap(e => [...e.attributes])"
            "  .map(a => `${a.name}=${a.value}`), performance.getEntriesByType('resource')"
            "  .map(e => new URL(e.name).host)]"
        )
        assert set(tags) <= TAGS
        assert set(attributes) <= {
            "class=code", "class=wide", "type=button", "aria-label=Copy this code"
        }  # fmt: skip
        assert set(addresses) == {server.url.removeprefix("http://")}
        [shown] = page.answers
        for text in (
            "x (javascript:alert(1)) y (https://example.org/y.png) <https://example.org>",
            '<a href="javascript:alert(1)">here</a>',
            '<img src=x onerror="window.harmed=1">',
            "<svg onload=window.harmed=1>",
            "t (data:text/html,x)",
            "&lt;b&gt;",
            "</code></pre><script>window.harmed=1</script>",
        ):
            assert text in shown
        assert page.do("return window.harmed") is None


ENDLESS = (
    "*", "_", "**a ", "*a **b ", "a* ", "*_", "`", "` `` ", "``` ", "```\n", "~", "~`",
    "[", "![", "[a](", "[a](b", "[a](b(c)", '[a](b "', "[a](b) ", "](", "(", "> ", ">\n",
    "- ", "-\n", "1. ", "- a\n\n", "- a\n  ", "  ", "\n", "\t", "|", "|-", "a|b\n-|-\n",
    "# ", "#", "\\", "\\*", "a", "a\n", "<b>", "\U0001f600",
)  # fmt: skip


def test_no_text_holds_the_page_up(page: Page, server: Running) -> None:
    """What is repeated 200,000 characters long is shown, none of it nested deeper than a few.

    Work that grew with the square of the length would run into the driver's time limit.
    """
    page.open(server.url)
    stairs = "".join(f"{'  ' * depth}- {depth}\n" for depth in range(400))
    runs = " ".join("`" * length for length in range(1, 600))
    for text in (*(piece * (200_000 // len(piece)) for piece in ENDLESS), stairs, runs):
        shown, depth = page.do(
            "const box = element('div');"
            "writer(box)(arguments[0]);"
            "document.getElementById('log').replaceChildren(box);"
            "let depth = 0, level = [box];"
            "for (; level.length; depth += 1) level = level.flatMap(e => [...e.children]);"
            "return [box.textContent.length + box.getElementsByTagName('*').length, depth]",
            text,
        )
        assert shown or not text.strip(), text[:10]
        assert depth < 25, text[:10]


def pasted(page: Page) -> str:
    """What is on the clipboard, as pasted into the message."""
    page("#input").clear()
    page("#input").send_keys(Keys.CONTROL, "v")
    return str(page("#input").get_attribute("value"))


@pytest.mark.parametrize("secure", [True, False])
def test_copy(page: Page, *, secure: bool) -> None:
    """What the model sent is copied, or a block's code; also where no clipboard is given."""
    answer = "Some **bold** text:\n\n```python\nx = '*'\n    y\n```\nEnd."
    with scripted((answer,)) as (server, _):
        page.open(server.url)
        if not secure:
            page.do("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        page.say("Hi")
        page(".copy").click()
        wait_until(lambda: page.status == "Copied.")
        assert page.browser.switch_to.active_element == page(".copy")
        assert pasted(page) == answer
        page("#new").click()
        page.say("Hi")
        page(".code button").click()
        wait_until(lambda: page.status == "Copied.")
        assert pasted(page) == "x = '*'\n    y"
        assert "Copy" not in page.answers[0]


def test_limits_are_told(page: Page, tmp_path: Path) -> None:
    """Who has limits a minute sees what is left of them; who has none sees nothing of it."""
    (key, hashed), (free, unlimited) = new_key(), new_key()
    file = tmp_path / "keys.yaml"
    file.write_text(
        f"users:\n  ann:\n    keys: ['{hashed}']\n    requests_per_minute: 2\n"
        f"    tokens_per_minute: 10000\n  bob:\n    keys: ['{unlimited}']\n"
    )
    with scripted(keys_file=file) as (server, engine):
        page.open(server.url)
        page("#key").send_keys(key, Keys.TAB)
        wait_until(lambda: page("#model").get_attribute("value"))
        page.say("Hi")
        claimed = len(engine.seen[-1].prompt_token_ids) + 1024
        limits = page("#limits").text
        assert limits.startswith("1 of 2 requests, ")
        assert limits.endswith(" of 10,000 tokens left this minute")
        left = int(limits.split()[4].replace(",", ""))
        assert 10_000 - claimed <= left < 10_000
        page.say("Hi")
        page.say("Hi")
        assert "2 requests a minute" in page.status
        assert page("#limits").text.startswith("0 of 2 requests, ")
        page("#key").clear()
        page("#key").send_keys(free, Keys.TAB)
        wait_until(lambda: page("#limits").text == "")
        page.say("Hi")
        assert page.status == ""
        assert page("#limits").text == ""


def test_raw_completion(page: Page) -> None:
    """The prompt goes out as typed, the next one is all of the text; chat is kept apart."""
    with scripted((" *one*", " two\nUSER:")) as (server, _):
        page.open(server.url)
        page.say("Hi")
        page("#mode").send_keys("Raw")
        assert page.answers == []
        assert not page("#save").is_enabled()
        assert not page("#load").is_enabled()
        assert not page("#system").is_enabled()
        assert page("#input").get_attribute("aria-label") == "Prompt"
        page("#input").send_keys(Keys.ENTER)  # there is nothing to go on from
        page.say("  Count: ")
        assert prompt_of(server) == "  Count: "
        assert page.do("return turns[0].answer") == " *one* two\nUSER:"
        assert page.browser.find_elements(By.CSS_SELECTOR, ".assistant em") == []
        assert page.answers == [" *one* two\nUSER:"]
        assert f"answer of {len(' *one* two USER:')} tokens" in page.all(".note")[0]
        page.say("")
        page.say(" more")
        said = " *one* two\nUSER:"
        assert prompt_of(server) == f"  Count: {said}{said} more"
        page(".again").click()
        page.wait()
        assert prompt_of(server) == f"  Count: {said}{said} more"
        page("#mode").send_keys("Chat")
        assert page.answers == ["one two"]
        page.say("Ho")
        assert prompt_of(server) == "USER: Hi\nASSISTANT: *one* two\nUSER: Ho\nASSISTANT:"


def test_examples(page: Page) -> None:
    """A model that knows a few questions has some of them offered, until one is asked."""
    engine = FakeEngine(PIECES)
    questions = tuple(f"Question <b>{number}</b>?" for number in range(40))
    engine.model_info = replace(engine.model_info, examples=questions)
    with running(engine) as server:
        page.open(server.url)
        assert page.all("#examples p") == [
            "synthia-demo is a small demo that knows a few dozen questions, such as these:"
        ]
        offered = page.all("#examples button")
        assert 1 < len(offered) <= 6
        assert set(offered) <= set(questions)
        page.browser.find_elements(By.CSS_SELECTOR, "#examples button")[1].click()
        page.wait()
        assert prompt_of(server) == f"USER: {offered[1]}\nASSISTANT:"
        assert page.all("#examples *") == []
        page("#new").click()
        assert page.all("#examples button") == offered
        page("#mode").send_keys("Raw")
        assert page.all("#examples *") == []


def test_no_examples(page: Page, server: Running) -> None:
    """A model that was not made for a few questions is not said to be."""
    page.open(server.url)
    assert page.all("#examples *") == []
