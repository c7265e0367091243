"""The report as a browser sees it: it loads offline without an error, sorts and filters."""

from __future__ import annotations

import math

import pytest
import torch
from tests.analysis.browser import CHROMIUM, DRIVER, chromium
from tests.analysis.small_runs import PlainMlp, capture_plain, noisy_output

import tensortap
from tensortap_analysis.report import write_report

pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver"),
    pytest.mark.xdist_group("chromium"),
]
HOSTILE = "<img\x0bsrc=x\x0bonerror=hacked=1>".replace("\x0b", "%20") + "<script>hacked=1<script>"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two runs of a model, of which one goes wrong in layer 2."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    model = PlainMlp()
    ref = capture_plain(model, folder / "ref")
    broken = capture_plain(model, folder / "broken", broken=[noisy_output("layers.2.up")])
    write_report(folder / "report.html", ref, broken)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, report):
    browser.console()
    browser.open(report)
    return browser


def column(page, heading):
    """Texts of a column of the table of tensors, from the top."""
    return page.script(
        """
        const table = document.getElementById("tensors-table");
        const at = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === arguments[0]);
        return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
        """,
        heading,
    )


def click(page, heading):
    page.script(
        "[...document.querySelectorAll('#tensors-table th button')]"
        ".find(b => b.textContent === arguments[0]).setAttribute('data-test', '')",
        heading,
    )
    page.click("#tensors-table th button[data-test]")
    page.script("document.querySelector('[data-test]').removeAttribute('data-test')")


def numbers(texts):
    return [math.inf if text == "inf" else float(text.replace(",", "")) for text in texts]


def test_it_loads_without_a_word_in_the_console_and_fetches_nothing(page):
    assert page.console() == []
    assert page.script("return performance.getEntriesByType('resource').length") == 0


def test_every_chart_is_drawn(page):
    drawn = page.script(
        "return [...document.querySelectorAll('.chart')].map(c => "
        "[c.id, c.querySelectorAll('.points path, .heatmaplayer image, .lines path').length])"
    )
    assert {"by-depth", "in-order", "grid-0", "spectrum-0", "magnitude-layer"} <= dict(drawn).keys()
    assert all(count > 0 for _, count in drawn)


def test_the_broken_layer_is_named_first_and_as_local(page):
    assert "layers.2.up/forward/output" in page.script(
        "return document.querySelector('.card').textContent"
    )
    tensors, origins = column(page, "tensor"), column(page, "origin")
    assert origins[tensors.index("layers.2.up/forward/output")] == "local"


def test_a_click_on_a_heading_sorts_down_and_a_second_one_up(page):
    before = sorted(column(page, "tensor"))
    click(page, "relative L2")
    down = numbers(column(page, "relative L2"))
    assert down == sorted(down, reverse=True)
    assert down[0] > down[-1]
    click(page, "relative L2")
    up = numbers(column(page, "relative L2"))
    assert up == down[::-1]
    assert sorted(column(page, "tensor")) == before


def test_words_are_sorted_as_people_sort_them(page):
    click(page, "tensor")
    layers = [name for name in column(page, "tensor") if name.startswith("layers.")]
    order = [int(name.split(".")[1].split("/")[0]) for name in layers]
    assert order == sorted(order)


def test_typing_narrows_the_table_and_a_minus_excludes(page):
    page.type("#search", "layers.2 up -grad")
    shown = column(page, "tensor")
    assert shown
    assert all("layers.2" in name and "up" in name and "grad" not in name for name in shown)
    total = page.script("return document.getElementById('shown').textContent")
    assert total == f"{len(shown)} of {len(shown)} shown"


def test_a_search_that_finds_nothing_says_so(page):
    page.type("#search", "no.such.tensor")
    assert column(page, "tensor") == []
    assert page.script("return document.getElementById('shown').textContent") == "0 of 0 shown"


def test_only_tensors_beyond_their_limits_on_request(page):
    every = numbers(column(page, "of limit"))
    page.click("#beyond")
    shown = numbers(column(page, "of limit"))
    assert sorted(shown) == sorted(x for x in every if x >= 1)
    assert 0 < len(shown) < len(every)


def test_it_follows_the_system_into_the_dark(report, tmp_path):
    def brightness(page):
        rgb = page.script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, rgb.removeprefix("rgb(").rstrip(")").split(",")))

    with chromium("--blink-settings=preferredColorScheme=0") as page:
        page.open(report)
        assert brightness(page) < 150
        ink = page.script("return document.querySelector('.chart text.xtitle').style.fill")
        assert ink == "rgb(228, 231, 234)"


def test_names_and_metadata_from_a_run_are_text_and_never_run(browser, tmp_path):
    text = "</script><script>hacked=1</script><img src=x onerror=hacked=1>"
    model = PlainMlp(depth=1)
    for name in ("one", "two"):
        with tensortap.attach(model, tmp_path / name, metadata={text: text}, values="full") as tap:
            out = model(torch.randn(2, 16))
            for layer in range(2):
                tap.record(f"layers.{layer}.{HOSTILE}/forward/x", out)
    write_report(tmp_path / "report.html", tmp_path / "one", tmp_path / "two")
    browser.console()
    browser.open(tmp_path / "report.html")
    assert browser.console() == []
    assert browser.script("return typeof hacked") == "undefined"
    assert browser.script("return document.querySelectorAll('img').length") == 0
    assert f"layers.0.{HOSTILE}/forward/x" in column(browser, "tensor")
    assert text in browser.script("return document.getElementById('environment').textContent")
    labels = browser.script(
        "return [...document.querySelectorAll('#grid-0 .ytick text')].map(t => t.textContent)"
    )
    assert f"{HOSTILE}/forward/x" in labels


def test_no_button_sends_data_anywhere(page):
    buttons = page.script(
        "return [...new Set([...document.querySelectorAll('.modebar-btn')]"
        ".map(button => button.dataset.title || button.getAttribute('data-attr') || ''))]"
    )
    assert "Reset axes" in buttons
    assert not [title for title in buttons if "cloud" in title.lower() or "share" in title.lower()]
