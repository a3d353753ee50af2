"""The page that compares attention before and after training."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

from experiments.__main__ import main
from experiments.report import change
from experiments.tasks import load
from experiments.training import runs
from experiments.training.runs import Flags
from experiments.training.task import AttentionView
from experiments.training.train import run

TOKENS = ["The", "</p>", "fox"]


def probabilities(seed, heads=2, size=3):
    x = np.exp(np.random.default_rng(seed).normal(0, 2, (2, heads, size, size)))
    return x / x.sum(-1, keepdims=True)


def view(seed, tokens=TOKENS, note="", title="encoder"):
    weights = probabilities(seed, size=len(tokens))
    return AttentionView(title, tokens, tokens, weights, note)


def decoded(page):
    """The pictures of a page, as arrays of colors."""
    pictures = []
    for text in re.findall(r'src="data:image/png;base64,([^"]*)"', page):
        colors = imread(io.BytesIO(base64.b64decode(text)), format="png")
        pictures.append(np.rint(255 * colors[..., :3]).astype(np.uint8))
    return pictures


def test_change_is_the_share_of_attention_that_moved():
    p, q = probabilities(0), probabilities(1)
    found = change.changes(p, q)
    for layer in range(2):
        for head in range(2):
            moved = [
                sum(max(0.0, b - a) for a, b in zip(before, after, strict=True))
                for before, after in zip(p[layer, head], q[layer, head], strict=True)
            ]
            assert found[layer, head] == pytest.approx(np.mean(moved))
    assert not change.changes(p, p).any()
    one = np.eye(3)[None, None]
    assert change.changes(one, np.roll(one, 1, axis=-1)).tolist() == [[1.0]]


def test_heads_are_in_the_order_of_their_change_and_pictures_show_the_numbers():
    before, after = view(0), view(1, note="The class: number")
    page = change.page("trec: pretrained", "weights of step 3", [before], [after])
    found = change.changes(before.weights, after.weights)
    shown = re.findall(r"<h3>Layer (\d), head (\d): ([\d.]+)</h3>", page)
    expected = sorted(np.ndindex(2, 2), key=lambda at: -found[at])
    assert shown == [(str(i), str(j), f"{found[i, j]:.2f}") for i, j in expected]
    cells = re.findall(r"<td style=[^>]*>([\d.]+)</td>", page)
    assert cells == [f"{x:.2f}" for x in found.ravel()]
    assert f"The mean of all heads is\n    {found.mean():.2f}." in page
    assert "The class: number" in page

    p, q = before.weights[expected[0]], after.weights[expected[0]]
    first, second, difference = decoded(page)[:3]
    top = max(p.max(), q.max())
    for picture, weights in ((first, p), (second, q)):
        np.testing.assert_allclose(255 - picture[..., 0], 228 * weights / top, atol=0.51)
    strongest = np.unravel_index(np.abs(q - p).argmax(), p.shape)
    color = change.BLUE if (q - p)[strongest] > 0 else change.RED
    assert tuple(difference[strongest]) == color
    for more, pixel in zip((q > p).ravel(), difference.reshape(-1, 3).astype(int), strict=True):
        assert (pixel[2] >= pixel[0]) if more else (pixel[0] >= pixel[2])

    table = page[page.index("<th>before</th>") :]
    row = re.search(r"\((\d)\)</td><td>.*?\((\d)\)</td>.*?>([\d.]+)</td>.*?>([\d.]+)<", table)
    i, j = strongest
    assert row.groups() == (str(i), str(j), f"{p[i, j]:.2f}", f"{q[i, j]:.2f}")


def test_page_is_self_contained_and_text_is_escaped():
    tokens = ["</script>", "<b>&", "\u202e"]
    views = [view(0, tokens, note="<i>", title="<u>")], [view(1, tokens, note="<i>", title="<u>")]
    page = change.page("<b>&{{content}}", "</title>", *views)
    assert "<h1>&lt;b&gt;&amp;{{content}}</h1>" in page
    for text in ("</script>", "<b>&<", "<i>", "<u>", "\u202e", "http://", "https://", "<script"):
        assert text not in page
    assert "[U+202E]" in page
    assert "default-src 'none'" in page
    assert set(re.findall(r'src="(\w+:image/png)', page)) == {"data:image/png"}


def test_long_text_has_no_labels_on_its_maps_but_is_written_once():
    tokens = [f"word{i}" for i in range(60)]
    page = change.page("heading", "subtitle", [view(0, tokens)], [view(1, tokens)])
    assert "<li>" not in page
    assert page.count(" ".join(tokens)) == 1
    assert decoded(page)[0].shape == (60, 60, 3)
    assert len(page) < 300_000


@pytest.mark.parametrize(
    "other", [view(0, ["The", "red", "fox"]), view(0, TOKENS[:2]), view(0, title="decoder")]
)
def test_views_of_other_tokens_raise(other):
    with pytest.raises(ValueError, match="differ, so the two cannot be compared: choose a text"):
        change.page("heading", "subtitle", [other], [view(1)])


def test_page_without_views_raises():
    with pytest.raises(ValueError, match="at least one view"):
        change.page("heading", "subtitle", [], [])


@pytest.mark.slow
def test_command_compares_a_run_with_its_model_before_training(tmp_path, capsys):
    task = load("trec")
    config = task.configured("smoke", model="attention", learning_rate=0.03)
    run(task, config, preset="smoke", flags=Flags(out=tmp_path))
    folder = tmp_path / "trec" / "attention-smoke-seed0"
    assert main(["look", str(folder), "--compare"]) == 0
    assert f"wrote {folder / 'compare.html'}" in capsys.readouterr().out
    page = (folder / "compare.html").read_text()

    trained = runs.load(folder, load)
    fresh = runs.untrained(trained)
    views = [task.look(trained.config, x, trained.data, None) for x in (fresh, trained.model)]
    found = change.changes(*(x[0].weights for x in views))
    assert found.max() > 0.01  # training changed it
    cells = re.findall(r"<td style=[^>]*>([\d.]+)</td>", page)
    assert cells == [f"{x:.2f}" for x in found.ravel()]
    assert re.search(r"The class: \w+, with probability 0\.\d\d; (right|wrong)", page)
