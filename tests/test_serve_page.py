"""The page, in a real browser: pip install playwright, and a Chromium (Debian's, or Playwright's own)."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = pytest.mark.slow

GRAPH = "n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7"
KEYS = {"ann": "ann-has-a-long-key", "ben": "ben-has-a-long-key"}
SECONDS = 60


class Server:
    """The shipped model, served; it can go away and come back."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder, self.options = folder, options
        self.process = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "lmsleep", "serve", "--port", str(self.port), *self.options]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--store", self.folder / "store"], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert any("Ctrl-C" in line for line in self.process.stdout), (self.folder / "log").read_text()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def serving(tmp_path_factory, *options):
    server = Server(tmp_path_factory.mktemp("page"), *options)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    yield from serving(tmp_path_factory)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    yield from serving(tmp_path_factory, "--keys", str(file))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        path = shutil.which("chromium") or started.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("there is no Chromium: install Debian's, or run `playwright install chromium`")
        made = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def visit(browser):
    """Open the page of a server in a browser of its own; in the end, say what went wrong there."""
    contexts, wrong = [], []

    def visited(server, *, refused=(), **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(1000 * SECONDS)
        page = context.new_page()
        expect.set_options(timeout=1000 * SECONDS)

        def console(message):
            # A status that a test asks for is told here too, and nothing can keep a browser from it.
            if message.type in ("error", "warning") and not any(said in message.text for said in refused):
                wrong.append(message.text)

        page.on("console", console)
        page.on("pageerror", lambda error: wrong.append(str(error)))

        def requested(request):
            if urlsplit(request.url).scheme in ("http", "https") and not request.url.startswith(
                f"{server.url}/"
            ):
                wrong.append(f"asked another server: {request.url}")

        page.on("request", requested)
        page.goto(server.url)
        return page

    yield visited
    for context in contexts:
        context.close()
    assert not wrong


def say(page, text):
    """Say something and wait for the whole answer; return what the model said."""
    answers = page.locator("#said .assistant:not(.pending) small")
    before = answers.count()
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    expect(answers).to_have_count(before + 1)
    return page.locator("#said .assistant .text").last.inner_text()


def drop_on(page, name, text):
    """Drop a file anywhere on the page."""
    made = """([name, text]) => {
        const carried = new DataTransfer();
        carried.items.add(new File([text], name));
        return carried;
    }"""
    carried = page.evaluate_handle(made, [name, text])
    page.dispatch_event("h1", "dragover", {"dataTransfer": carried})
    assert "over" in page.locator("body").get_attribute("class")
    page.dispatch_event("h1", "drop", {"dataTransfer": carried})


def memory(page, name):
    return page.locator("#list > li").filter(has=page.locator(".name").get_by_text(name, exact=True))


def remember(page, name, text=GRAPH):
    drop_on(page, name, text)
    expect(page.locator("#taken")).to_have_text(f"{name} was read.")
    return memory(page, name)


def widths(page):
    return page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")


def test_a_conversation_and_its_sleeps_are_seen(visit, server):
    page = visit(server)
    expect(page.locator("#model")).to_have_text("depo-N4: window of 8 tokens, 4 passes a sleep")
    expect(page.locator("#welcome-text")).to_contain_text("window of 8 tokens")
    expect(page.get_by_role("button", name="Begin anew")).to_be_disabled()
    page.get_by_role("button", name=GRAPH).click()
    page.keyboard.press("Enter")
    expect(page.locator("#said .assistant .text")).to_have_text("n8")
    expect(page.locator("#said .assistant small")).to_have_text("1 token written, 2 sleeps")
    expect(page.locator("#welcome")).to_be_hidden()
    expect(page.locator("#window-said")).to_have_text("3 of 8 tokens")
    expect(page.get_by_role("meter")).to_have_attribute("aria-valuenow", "3")
    expect(page.get_by_role("img", name="Hypnogram: 19 tokens read, 2 sleeps of 4 passes")).to_be_visible()
    assert page.locator("#hypnogram .asleep").count() == 2 * 4
    assert page.locator("#hypnogram .awake").count() == 3
    # What is heard of it is the answer as a whole, not letter by letter.
    expect(page.locator("#told")).to_have_text("The model answered: n8. 1 token written, 2 sleeps.")
    page.get_by_text("What the last turn changed").click()
    expect(page.locator("#heads tbody tr")).to_have_count(4)
    figures = [float(text) for text in page.locator("#heads tbody td:nth-child(3)").all_inner_texts()]
    assert all(figure > 0 for figure in figures)
    say(page, "HOP_1 n1")
    expect(page.locator("#sleeps-said")).to_have_text("22 tokens read, 2 sleeps")
    smaller = page.locator("#heads tbody td:nth-child(3)").first
    expect(smaller).not_to_have_text(str(figures[0]))  # of this turn now


def test_while_it_sleeps_the_page_says_so_and_stop_ends_it(visit, tmp_path_factory):
    for slow in serving(tmp_path_factory, "--passes", "2000"):
        page = visit(slow)
        page.get_by_label("Your message").fill(GRAPH)
        page.keyboard.press("Enter")
        expect(page.locator("#phase")).to_have_text("asleep: 2,000 passes")
        expect(page.locator("#window-said")).to_have_text("8 of 8 tokens")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#said .failed")).to_contain_text("Stopped. This turn is not part of")
        expect(page.locator("#phase")).to_have_text("awake")
        expect(page.locator("#sleeps-said")).to_have_text("0 tokens read, 0 sleeps")
        expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_a_turn_that_failed_can_be_taken_back(visit, server):
    page = visit(server, refused=["400"])
    assert say(page, "nonsense") == ""
    expect(page.locator("#said .failed")).to_contain_text("'nonsense' is not in the task's vocabulary")
    page.get_by_role("button", name="Take it back").click()
    expect(page.get_by_label("Your message")).to_have_value("nonsense")
    expect(page.get_by_label("Your message")).to_be_focused()
    assert page.locator("#said li").count() == 0
    assert say(page, f"{GRAPH} HOP_3 n1") == "n8"


def test_a_reload_keeps_the_conversation_and_beginning_anew_forgets_it(visit, server):
    page = visit(server, refused=["404"])
    say(page, GRAPH)
    first = page.evaluate("JSON.parse(sessionStorage.getItem('lmsleep.conversation')).responses[0]")
    said, drawn = page.locator("#said").inner_text(), page.locator("#hypnogram").inner_html()
    page.reload()
    # The answer has run past its window: the server sleeps when it is done.
    expect(page.locator("#window-said")).to_have_text("9 of 8 tokens, a sleep is due")
    assert page.locator("#said").inner_text() == said and page.locator("#hypnogram").inner_html() == drawn
    with page.expect_request("**/v1/responses") as asked:
        say(page, "HOP_3 n1")
    assert asked.value.post_data_json["previous_response_id"] == first
    expect(page.locator("#sleeps-said")).to_have_text("20 tokens read, 2 sleeps")
    status = f"async () => (await fetch('v1/responses/{first}')).status"
    assert page.evaluate(status) == 200
    page.get_by_role("button", name="Begin anew").click()
    expect(page.locator("#sleeps-said")).to_have_text("0 tokens read, 0 sleeps")
    page.wait_for_load_state("networkidle")
    assert page.evaluate(status) == 404  # on the server too
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()


def test_texts_are_dropped_read_asked_and_carried_away(visit, server, tmp_path):
    page = visit(server, refused=["400"])
    expect(page.locator("#no-memory")).to_be_visible()
    drop_on(page, "long.txt", f"{GRAPH} " * 250)
    expect(memory(page, "long.txt").get_by_role("progressbar", name="Reading long.txt")).to_be_visible()
    expect(memory(page, "long.txt").locator(".reading small")).to_contain_text("of 4,000 tokens read")
    expect(memory(page, "long.txt").get_by_role("button", name="Read text")).to_be_disabled()
    expect(page.locator("#taken")).to_have_text("long.txt was read.")
    expect(memory(page, "long.txt").locator(".counts")).to_contain_text("4,000 tokens")
    graph = remember(page, "graph.txt")
    expect(page.locator("#no-memory")).to_be_hidden()
    assert page.locator("#list .name").all_inner_texts() == ["graph.txt", "long.txt"]
    graph.get_by_label("Ask graph.txt something").fill("HOP_3 n1")
    page.keyboard.press("Enter")
    expect(graph.locator(".answer")).to_have_text("n8")
    graph.get_by_role("button", name="Sleep").click()
    expect(graph.locator(".counts")).to_have_text("16 tokens, 2 sleeps")
    graph.get_by_role("button", name="Fork").click()
    fork = memory(page, "graph.txt (fork)")
    expect(fork.locator(".counts")).to_have_text("16 tokens, 2 sleeps, a fork")
    fork.get_by_role("button", name="Read text").click()
    expect(fork.get_by_label("Text for graph.txt (fork) to read")).to_be_focused()
    page.keyboard.type("n1 n3")
    fork.get_by_role("button", name="Read it").click()
    expect(fork.locator(".counts")).to_have_text("18 tokens, 2 in the open window, 2 sleeps, a fork")
    for each in (graph, fork):
        each.get_by_role("checkbox").check()
    page.get_by_role("button", name="Merge 2").click()
    expect(page.locator("#taken")).to_contain_text("2 tokens in its open window")  # what to do is said
    fork.get_by_role("button", name="Sleep").click()
    expect(fork.locator(".counts")).to_have_text("18 tokens, 3 sleeps, a fork")
    page.get_by_role("button", name="Merge 2").click()
    expect(memory(page, "graph.txt + graph.txt (fork)").locator(".counts")).to_contain_text("merged")
    expect(page.get_by_role("button", name="Merge")).to_be_disabled()
    with page.expect_download() as downloaded:
        graph.get_by_role("button", name="Download").click()
    file = tmp_path / "back.mem"
    downloaded.value.save_as(file)
    assert downloaded.value.suggested_filename == "graph.txt.mem"
    page.locator("#file").set_input_files(file)
    back = memory(page, "back")
    back.get_by_label("Ask back something").fill("HOP_3 n1")
    back.get_by_role("button", name="Ask").click()
    expect(back.locator(".answer")).to_have_text("n8")
    many = page.locator("#list > li").count()
    back.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    expect(page.locator("#list > li")).to_have_count(many)
    back.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#list > li")).to_have_count(many - 1)
    file.write_bytes(b"\xff\x00 no memory")
    page.locator("#file").set_input_files(file)
    expect(page.locator("#taken")).to_contain_text("back.mem: ")
    expect(page.locator("#taken")).to_have_class("error")
    page.locator("#file").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": b"\x89PNG\xff"}
    )
    expect(page.locator("#taken")).to_have_text("a.png: this is no text in UTF-8.")


def test_two_users_see_nothing_of_each_other(visit, keyed):
    def enter(page, key):
        page.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")

    ann = visit(keyed, refused=["401"])
    expect(ann.get_by_role("dialog", name="This server asks for a key")).to_be_visible()
    enter(ann, "this-key-is-not-known")
    expect(ann.locator("#key-error")).to_have_text("This key is not known here.")
    enter(ann, KEYS["ann"])
    expect(ann.locator("#model")).to_contain_text("depo-N4")
    say(ann, GRAPH)
    remember(ann, "ann.txt")
    ben = visit(keyed, refused=["401"])
    expect(ben.get_by_role("dialog")).to_be_visible()
    ben.keyboard.press("Escape")
    expect(ben.locator("#model")).to_have_text("This server asks for a key.")
    ben.get_by_role("button", name="Change key").click()
    enter(ben, KEYS["ben"])
    expect(ben.locator("#no-memory")).to_be_visible()
    assert "ann" not in ben.locator("body").inner_text().replace("cannot", "")
    # One browser, another user: what the one before said goes with them.
    ann.get_by_role("button", name="Change key").click()
    enter(ann, KEYS["ben"])
    expect(ann.locator("#no-memory")).to_be_visible()
    expect(ann.locator("#said li")).to_have_count(0)
    expect(ann.locator("#welcome")).to_be_visible()
    assert KEYS["ann"] not in ann.evaluate("JSON.stringify({...sessionStorage, ...localStorage})")


def test_a_server_that_went_away_comes_back_to_the_conversation(visit, tmp_path_factory):
    for server in serving(tmp_path_factory):
        page = visit(server, refused=["ERR_"])
        assert say(page, f"{GRAPH} HOP_3 n1") == "n8"
        remember(page, "graph.txt")
        server.stop()
        say(page, "HOP_1 n1")
        expect(page.get_by_role("alert").first).to_have_text("The server cannot be reached. Trying again …")
        expect(page.locator("#said .failed")).to_contain_text(
            "The server cannot be reached. This turn is not"
        )
        server.start()
        expect(page.locator("#connection")).to_be_hidden()
        page.get_by_role("button", name="Take it back").click()
        page.keyboard.press("Enter")
        expect(page.locator("#said .assistant .text").last).to_have_text("n6")
        expect(page.locator("#sleeps-said")).to_have_text("22 tokens read, 2 sleeps")
        expect(memory(page, "graph.txt").locator(".counts")).to_contain_text("16 tokens")


@pytest.mark.parametrize("width", [320, 360, 700, 1024])
def test_no_screen_is_too_narrow(visit, server, width):
    page = visit(server, refused=["400"], viewport={"width": width, "height": 640})
    expect(page.locator("#model")).to_contain_text("depo-N4")
    assert widths(page) == [width, width]
    say(page, "n1" * 200)
    say(page, f"{GRAPH} " * 4)
    page.get_by_text("What the last turn changed").click()
    page.get_by_text("Options").click()
    one = remember(page, f"{width}-{'a-long-name' * 9}.txt")
    one.get_by_role("button", name="Read text").click()
    assert widths(page) == [width, width]
    # Nothing sticks out of its section, or lies over its neighbour.
    out = page.evaluate("""() => [...document.querySelectorAll("section *")].filter((one) => {
        const box = one.getBoundingClientRect(), frame = one.closest("section").getBoundingClientRect();
        const within = box.right < frame.right + 1 && box.left > frame.left - 1;
        return box.width && !within && !one.closest("#heads, .unseen");
    }).map((one) => one.outerHTML.slice(0, 80))""")
    assert out == []


CONTRAST = """() => {
    const channels = (text) => text.match(/[\\d.]+/g).map(Number);
    const luminance = (rgb) => {
        const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = rgb.slice(0, 3).map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (one) => {
        const color = channels(getComputedStyle(one).backgroundColor);
        return color.length < 4 || color[3] === 1 ? color : ground(one.parentElement);
    };
    const weak = [];
    for (const one of document.querySelectorAll("body *")) {
        const text = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!text || !one.checkVisibility() || one.closest(":disabled, .unseen, .skip")) continue;
        const [a, b] = [channels(getComputedStyle(one).color), ground(one)].map(luminance);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) weak.push(`${ratio.toFixed(2)}: ${one.outerHTML.slice(0, 60)}`);
    }
    return weak;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(visit, server, scheme):
    page = visit(server, refused=["400"], color_scheme=scheme)
    expect(page.locator("#examples button")).to_be_visible()
    assert page.evaluate(CONTRAST) == []
    say(page, GRAPH)
    say(page, "nonsense")
    page.get_by_text("What the last turn changed").click()
    expect(page.locator("#heads tbody tr")).to_have_count(4)
    remember(page, f"{scheme}.txt")
    assert page.evaluate(CONTRAST) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 300) == (scheme == "dark")


def test_everything_has_a_name_and_is_reached_by_the_keyboard(visit, server):
    page = visit(server)
    expect(page.locator("#model")).to_contain_text("depo-N4")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to your message")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your message")).to_be_focused()
    say(page, GRAPH)
    remember(page, "names.txt")
    snapshot = page.locator("body").aria_snapshot()
    for line in (
        *("- banner", "- main", 'heading "lmsleep" [level=1]', 'textbox "Your message"', 'meter "Window"'),
        *('region "Conversation"', 'region "Awake and asleep"', 'region "Memories"', 'img "Hypnogram'),
    ):
        assert line in snapshot, snapshot
    # A button, box or field without a name would stand there with its role alone.
    assert not re.findall(
        r"- (?:button|textbox|checkbox|spinbutton|link|progressbar)(?: \[|:|$)", snapshot, re.M
    )
    page.goto(server.url)  # to the top
    expect(memory(page, "names.txt")).to_be_visible()
    reached = []
    while True:
        page.keyboard.press("Tab")
        now = page.evaluate("""() => {
            const one = document.activeElement, style = getComputedStyle(one);
            return [one === document.body, one.outerHTML.split(">")[0], style.outline];
        }""")
        if now[0] or len(reached) > 200:
            break
        assert "solid 3px" in now[2], now  # the focus is seen
        reached.append(now[1])
    reachable = "button, input, textarea, summary, [tabindex='0']"
    wanted = page.evaluate(f"""() => [...document.querySelectorAll("{reachable}")]
        .filter((one) => one.checkVisibility() && !one.disabled && one.type !== "file")
        .map((one) => one.outerHTML.split(">")[0])""")
    assert [one for one in reached if "skip" not in one] == wanted  # in the order in which they are read
    assert "question" in wanted[2]


def test_what_is_sent_before_the_page_knows_its_model_is_sent_then(visit, server):
    page, held = visit(server), []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload(wait_until="load")
    page.get_by_label("Your message").fill(f"{GRAPH} HOP_3 n1")
    page.keyboard.press("Enter")
    held[0].continue_()
    expect(page.locator("#said .assistant:not(.pending) .text")).to_have_text("n8")


def test_what_is_said_is_text_and_never_markup(visit, server):
    page = visit(server, refused=["400"])
    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    say(page, markup)
    assert page.locator("#said .user .text").inner_text() == markup
    remember(page, f"{markup}.txt")
    assert page.locator("#said b, #list b, #said img, #list img").count() == 0
