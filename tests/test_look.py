"""The page that shows attention weights: its checks, its text, and its behavior in a browser."""

import html.parser
import itertools
import re
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow

from experiments.report import look
from experiments.training.task import AttentionView

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")

WORDS = ["The", "quick", "brown", "fox", "jumps", "over", "it", "."]
HOSTILE = (
    "</script><b>bold</b>",
    "<img src=x onerror=alert(1)>",
    "&lt;",
    "{{data}}",
    "<!--",
    "'\"",
)


def probabilities(layers, heads, queries, keys, seed=0):
    x = np.exp(np.random.default_rng(seed).normal(0, 2, (layers, heads, queries, keys)))
    return x / x.sum(-1, keepdims=True)


def view(title="encoder", queries=WORDS, keys=WORDS, layers=3, heads=4):
    return AttentionView(
        title, queries, keys, probabilities(layers, heads, len(queries), len(keys))
    )


# --- The page as text.


@pytest.mark.parametrize(
    "shape", [(3, 4, 8), (3, 4, 8, 7), (3, 4, 7, 8), (1, 3, 4, 8, 8), (0, 4, 8, 8)]
)
def test_weights_of_another_shape_raise(shape):
    wrong = AttentionView("translation to source", WORDS, WORDS, np.zeros(shape))
    with pytest.raises(ValueError, match="'translation to source'") as problem:
        look.page("heading", "subtitle", [view(), wrong])
    assert "[layers heads 8 8]" in str(problem.value)
    assert str(list(shape)) in str(problem.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5, 1.5])
def test_weights_that_are_not_probabilities_raise(bad):
    weights = probabilities(3, 4, 8, 8)
    weights[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=f"'encoder': .* probabilities, got .*{bad:.4g}"):
        look.page("heading", "subtitle", [AttentionView("encoder", WORDS, WORDS, weights)])


def test_page_without_views_raises():
    with pytest.raises(ValueError, match="at least one view"):
        look.page("heading", "subtitle", [])


def test_any_float_dtype_works():
    weights = probabilities(1, 1, 8, 8)
    for dtype in (jnp.bfloat16, jnp.float32):
        page = look.page(
            "heading", "subtitle", [AttentionView("x", WORDS, WORDS, jnp.asarray(weights, dtype))]
        )
        assert '"layers": 1' in page


def test_text_is_escaped():
    page = look.page(
        "<b>&{{subtitle}}",
        "</title><script>",
        [view(title="</script>", queries=HOSTILE, keys=HOSTILE)],
    )
    assert "<title>&lt;b&gt;&amp;{{subtitle}} – attention</title>" in page
    assert "&lt;/title&gt;&lt;script&gt;" in page
    assert page.count("<script") == page.count("</script>") == 3
    for token in HOSTILE[:2]:
        assert token not in page


def test_page_is_self_contained():
    page = look.page("heading", "subtitle", [view()])
    for load in ("http://", "https://", "src=", "@import", "url(", "fetch(", "import("):
        assert load not in page
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]
    assert "default-src 'none'" in page
    assert '<html lang="en">' in page


def test_page_is_small():
    small, large = (
        len(look.page("heading", "subtitle", [view(queries=["word"] * n, keys=["word"] * n)]))
        for n in (1, 128)
    )
    assert small < 50_000
    assert large - small < 12 * 128**2 * 2.7 + 3_000  # two bytes per pair in base64, and the tokens


def test_write(tmp_path):
    look.write(tmp_path / "look.html", "Übersetzung", "subtitle", [view()])
    written = (tmp_path / "look.html").read_text(encoding="utf-8")
    assert written == look.page("Übersetzung", "subtitle", [view()])


# --- The page in a browser.

# Helpers for the scripts below.
HELP = """
const q = i => by("queries").children[i];
const key = name => new KeyboardEvent("keydown", { key: name, bubbles: true });
"""


class Elements(html.parser.HTMLParser):
    """The elements of a document: their attributes, and their text under "text"."""

    EMPTY = ("meta", "link", "input", "br", "img")

    def __init__(self, document):
        super().__init__()
        self.all, self.open = [], []
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.all.append(element)
        if tag not in self.EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag):
        if self.open and tag not in self.EMPTY:
            self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def named(self, name):
        return [x for x in self.all if name in (x.get("class") or "").split()]

    def id(self, name):
        (found,) = (x for x in self.all if x.get("id") == name)
        return found

    def key_tokens(self):
        """The elements of the keys: token, weight and color."""
        return [x for x in self.named("token") if x["tag"] == "li"]

    def numbers(self):
        return [x["data-value"] for x in self.key_tokens()]


def run(file, address=""):
    """The document after a browser has run its scripts."""
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=5000",
            f"--user-data-dir={file.parent / 'profile'}",
            "--window-size=1280,1000",
            "--dump-dom",
            f"{file.as_uri()}#{address}",
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    return Elements(done.stdout)


def write_with(script, file, views):
    """Writes the page with a script that acts as a reader would."""
    ending = f"<script>{HELP}{script}</script></body>"
    file.write_text(
        look.page("heading", "subtitle", views).replace("</body>", ending), encoding="utf-8"
    )


@pytest.fixture
def browse(tmp_path):
    """Opens a page at an address, runs a script in it, and returns the elements."""

    def browsed(views, address="", script=""):
        write_with(script, tmp_path / "look.html", views)
        found = run(tmp_path / "look.html", address)
        root = found.all[0]
        assert "data-error" not in root, root["data-error"]
        assert root["data-ready"] == "true"
        return found

    return browsed


def as_written(probabilities):
    return [f"{x:.4f}" for x in probabilities]


def brightness(element):
    return sum(map(int, re.search(r"rgb\((\d+), (\d+), (\d+)\)", element["style"]).groups()))


@in_browser
def test_address_selects_and_numbers_and_tints_are_the_weights(browse):
    views = [view("first"), view("second", keys=WORDS[:5])]
    found = browse(views, "view=1&layer=1&head=2&token=3")
    weights = views[1].weights[1, 2, 3]
    keys = found.key_tokens()
    assert found.numbers() == as_written(weights)
    for key, word, weight in zip(keys, WORDS, weights, strict=False):
        name, number = re.fullmatch(r"(\D+?)(\d?(?:\.\d\d)?)", key["text"]).groups()
        assert name == word
        assert float(number) == pytest.approx(weight, abs=0.0051)
    order = np.argsort(weights)
    for less, more in itertools.pairwise(order):  # in the light scheme, larger is darker
        assert brightness(keys[less]) >= brightness(keys[more])
    assert brightness(keys[order[-1]]) < brightness(keys[order[0]])

    lines = {
        int(x["data-key"]): float(x["stroke-opacity"]) for x in found.all if x["tag"] == "path"
    }
    largest = views[1].weights[1, 2].max()
    for i, weight in enumerate(weights):
        assert lines.get(i, 0) == pytest.approx(weight / largest, abs=0.0101)
    assert as_written([largest])[0] == found.id("top")["text"]

    cells = found.named("cell")
    assert sum(x["data-head"] != "mean" for x in cells) == 3 * 4
    assert sum(x["data-head"] == "mean" for x in cells) == 3
    (pressed,) = (x for x in cells if x["aria-pressed"] == "true")
    assert (pressed["data-layer"], pressed["data-head"]) == ("1", "2")
    (pinned,) = (x for x in found.named("token") if x.get("aria-pressed") == "true")
    assert pinned["text"] == WORDS[3]
    tabs = [x for x in found.all if x.get("role") == "tab"]
    assert [x["aria-selected"] for x in tabs] == ["false", "true"]


@in_browser
def test_mean_of_heads_on_the_scale_to_1_without_a_token(browse):
    encoder = view()
    found = browse([encoder], "layer=2&head=mean&token=none&scale=1")
    mean = encoder.weights[2].mean((0, 1))
    got = [float(x) for x in found.numbers()]
    np.testing.assert_allclose(got, mean, atol=1.1e-4)
    assert found.id("top")["text"] == "1.0000"
    assert not [x for x in found.all if x["tag"] == "path"]


@in_browser
def test_hostile_and_invisible_tokens_are_shown_as_text(browse):
    tokens = [*HOSTILE, " ", "\n", "\t", " word", "", "\u202e", "\x00", "日本"]
    written = [
        *(x.replace(" ", "␣") for x in HOSTILE),
        "␣",
        "⏎",
        "⇥",
        "␣word",
        "∅",
        "[U+202E]",
        "␀",
        "日本",
    ]
    found = browse([view(queries=tokens, keys=tokens[:3])], "token=0")
    queries = [x["text"] for x in found.named("token") if x["tag"] == "button"]
    assert queries == written
    assert [x["text"].rstrip(".0123456789") for x in found.key_tokens()] == written[:3]
    assert not [x for x in found.all if x["tag"] in ("b", "img")]


ACTS = {
    "pointed at": "q(5).dispatchEvent(new PointerEvent('pointerover', { bubbles: true }))",
    "in focus": "q(5).focus()",
    "walked to": "q(4).focus(); q(4).dispatchEvent(key('ArrowRight'))",
    "left": (
        "q(5).click(); q(2).dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));"
        "by('queries').dispatchEvent(new PointerEvent('pointerleave'))"
    ),
}


@in_browser
@pytest.mark.parametrize("act", mostly_slow(ACTS, {"left"}))
def test_query_is_selected(act, browse):
    encoder = view()
    found = browse([encoder], "layer=0&head=1&token=1", ACTS[act])
    assert found.numbers() == as_written(encoder.weights[0, 1, 5])
    (active,) = found.named("active")[:1]
    assert active["text"] == WORDS[5]


@in_browser
def test_heads_are_selected_by_keys_clicks_and_lists(browse):
    views = [view("first"), view("second", keys=WORDS[:5])]
    script = """
    const states = [];
    const state = () => [chosen.view, chosen.layer, chosen.head, location.hash].join(" ");
    const note = () => states.push(state());
    const press = name => document.activeElement.dispatchEvent(key(name));
    by("overview").querySelector("[data-layer='1'][data-head='2']").click(); note();
    by("overview").querySelector("[aria-pressed=true]").focus();
    press("ArrowRight"); press("ArrowRight"); note();
    press("ArrowDown"); press("ArrowDown"); press("Home"); note();
    by("head").value = "mean"; by("head").dispatchEvent(new Event("change")); note();
    by("layer").value = "1"; by("layer").dispatchEvent(new Event("change")); note();
    by("tabs").children[0].focus(); press("ArrowRight"); note();
    dispatchEvent(key("Escape")); note();
    document.body.append(make("pre", { id: "states" }, states.join("\\n")));
    """
    found = browse(views, "token=7", script)
    assert found.id("states")["text"].splitlines() == [
        "0 1 2 #view=0&layer=1&head=2&token=7",
        "0 1 mean #view=0&layer=1&head=mean&token=7",
        "0 2 0 #view=0&layer=2&head=0&token=7",
        "0 2 mean #view=0&layer=2&head=mean&token=7",
        "0 1 mean #view=0&layer=1&head=mean&token=7",
        "1 1 mean #view=1&layer=1&head=mean&token=4",
        "1 1 mean #view=1&layer=1&head=mean&token=none",
    ]
    np.testing.assert_allclose(
        [float(x) for x in found.numbers()], views[1].weights[1].mean((0, 1)), atol=1.1e-4
    )


@in_browser
def test_error_of_the_page_is_reported(browse):
    with pytest.raises(AssertionError, match="nothing_of_this_name"):
        browse([view()], script="nothing_of_this_name()")


@in_browser
def test_long_sequence_scrolls_within_its_panels(tmp_path):
    words = [f"word{i}" for i in range(256)]
    script = """
    const inside = (pane, item) => {
      const [a, b] = [pane.getBoundingClientRect(), item.getBoundingClientRect()];
      return a.top <= b.top && b.bottom <= a.bottom;
    };
    parent.postMessage([
      innerWidth,
      document.documentElement.scrollWidth <= innerWidth,
      by("map").scrollWidth > by("map").clientWidth,
      by("keys").scrollHeight > by("keys").clientHeight,
      inside(by("queries"), q(200)),
      inside(by("map"), by("row-mark")),
    ].join(" "), "*");
    """
    views = [view(queries=words, keys=words, layers=1, heads=2)]
    write_with(script, tmp_path / "look.html", views)
    # A browser window cannot be as narrow as a phone; a frame can.
    (tmp_path / "frame.html").write_text(
        "<p id=layout></p>"
        "<script>onmessage = event => { layout.textContent += event.data + ';' }</script>"
        "<iframe src=look.html#token=200 width=1280 height=900 frameborder=0></iframe>"
        "<iframe src=look.html#token=200 width=400 height=900 frameborder=0></iframe>"
    )
    layouts = run(tmp_path / "frame.html").id("layout")["text"].split(";")
    assert sorted(layouts[:-1]) == [f"{width} true true true true true" for width in (1280, 400)]
