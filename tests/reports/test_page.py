"""The page in a browser: what it holds, that its script works, that it asks nobody for anything."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import image, make
from torch import Tensor, nn

import fxprune
from fxprune.reports.page import Figure, Section, write_page
from fxprune.reports.rows import GroupRow, Row

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Blocks(nn.Module):
    """A residual stream through two blocks, the first registered last; one layer is locked by what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.two = nn.Sequential(nn.Conv2d(12, 20, 1), nn.ReLU(), nn.Conv2d(20, 12, 1))
        self.one = nn.Sequential(nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1))
        self.stem = nn.Conv2d(3, 12, 3)
        self.held = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        x = x + self.two(x)
        return self.head(x.mean((2, 3))) + self.held(x).cumsum(1).mean()


LAYERS = ["stem", "one.0", "one.3", "two.0", "two.2", "head", "held"]


@pytest.fixture(scope="module")
def report() -> fxprune.Report:
    result: fxprune.Report = fxprune.prune(make(Blocks), image(), flops=0.6, progress=False).meta["fxprune"]
    return result


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
    with api.sync_playwright() as started:
        own = started.chromium.executable_path
        found = next(filter(None, map(shutil.which, BROWSERS)), own if Path(own).exists() else None)
        if found is None:
            pytest.skip(f"needs a browser: install one of {', '.join(BROWSERS)}, or run `playwright install chromium`")
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page; at the end nothing may have been asked for but its file, and nothing complained about."""
    told: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_page(write: Callable[[Path], None], **options: Any) -> Any:
        path = tmp_path / "page.html"
        write(path)
        context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("dialog", lambda dialog: told.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url.partition("#")[0]))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert told == []
    assert set(asked) == {(tmp_path / "page.html").as_uri()}


def texts(page: Any, selector: str) -> list[str]:
    return [element.inner_text().strip() for element in page.query_selector_all(selector)]


def test_everything_is_there_also_without_the_script(opened: Any, report: fxprune.Report) -> None:
    page = opened(report.to_html, java_script_enabled=False)
    assert page.title() == "Blocks – fxprune"
    assert texts(page, "header p") == ["method l2, flops=0.6"]
    assert texts(page, "#layers tbody th code") == LAYERS == [row.name for row in report.rows]
    assert len(page.query_selector_all("#chart g")) == len(page.query_selector_all("#lanes .line")) == len(LAYERS)
    assert len(page.query_selector_all("#groups tbody tr")) == len(report.groups)
    for row, cells in zip(report.rows, page.query_selector_all("#layers tbody tr"), strict=True):
        text = cells.inner_text()
        for part in (row.kind, row.source, row.locked, *map(str, row.width), "×".join(map(str, row.after))):
            assert part in text
    body = page.inner_text("body")
    assert f"{report.oracle_error:.1e}" in body
    assert f"{report.macs_after / report.macs_before:.1%} stay" in body
    assert f"torch {torch.__version__}" in body
    assert all(f"{stage}\t{value:.2f} s" in body for stage, value in report.seconds.items())
    locked = page.inner_text("section:has(h2:text-is('What may not be cut'))")
    held = next(row for row in report.rows if row.name == "held")
    assert held.locked.startswith("cumsum across channels (tests/reports/test_page.py:")
    assert f"{held.locked}\n1 layer: held" in locked


def test_tables_are_filtered_and_sorted(opened: Any, report: fxprune.Report) -> None:
    page = opened(report.to_html)
    names = "#layers tbody tr:not([hidden]) th code"
    page.fill("[aria-label='filter layers']", "conv2d two")
    assert texts(page, names) == ["two.0", "two.2"]
    page.fill("[aria-label='filter layers']", "one")
    assert texts(page, names) == ["one.0", "one.3"]
    assert texts(page, "[data-table=layers] output") == [f"2 of {len(LAYERS)}"]
    page.fill("[aria-label='filter layers']", "")
    page.select_option("[aria-label='state of layers']", "locked")
    assert texts(page, names) == ["head", "held"]
    page.select_option("[aria-label='state of layers']", "all")
    page.click("#layers th:has-text('outputs') >> nth=0")
    widths = [int(text) for text in texts(page, "#layers tbody tr td:nth-of-type(3)")]
    assert widths == sorted((row.width[0] for row in report.rows), reverse=True)
    assert page.get_attribute("#layers th[aria-sort]", "aria-sort") == "descending"
    page.click("#layers th:has-text('layer')")
    assert texts(page, names) == sorted(LAYERS)
    page.click("#layers th:has-text('#')")
    assert texts(page, names) == LAYERS


def test_a_group_is_shown_with_its_layers(opened: Any, report: fxprune.Report) -> None:
    page = opened(report.to_html)
    hit = "#lanes .line.hit title"
    page.click("#groups .pick:has-text('one.0')")
    assert page.get_attribute("#groups .pick:has-text('one.0')", "aria-pressed") == "true"
    lit = [element.text_content() for element in page.query_selector_all(hit)]
    assert lit == ["one.0", "one.3"]
    detail = page.inner_text("#detail")
    group = next(group for group in report.groups if group.name == "one.0")
    assert {str(group.before), str(group.after), "one.3", "and one.1"} <= {line.strip() for line in detail.splitlines()}
    page.click("#groups .pick:has-text('one.0')")
    assert page.query_selector(hit) is None
    assert "Point at a lane or a layer." in page.inner_text("#detail")
    page.dispatch_event("#lanes .line:has-text('two.0')", "mouseover")
    lanes = [element.text_content() for element in page.query_selector_all("#lanes .lane.hit title")]
    (stream,) = (g for g in report.groups if any(name == "stem.weight" and not read for name, _, read in g.members))
    assert lanes == [f"{g.name}: {g.before} → {g.after} channels" for g in (stream, by_name(report, "two.0"))]
    assert {("stem.weight", 0, False), ("one.3.weight", 0, False), ("two.0.weight", 1, True)} <= set(stream.members)


def by_name(report: fxprune.Report, name: str) -> GroupRow:
    return next(group for group in report.groups if group.name == name)


def test_it_can_be_seen_by_day_and_by_night(opened: Any, report: fxprune.Report) -> None:
    from PIL import Image

    grounds = []
    for scheme in ("light", "dark"):
        page = opened(report.to_html, color_scheme=scheme)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        colors = sorted(picture.getcolors(1 << 24) or [], reverse=True)
        assert len(colors) > 100, "blank"
        assert colors[0][0] < 0.9 * picture.width * picture.height, "nearly blank"
        grounds.append(sum(picture.getpixel((2, 2))))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    light, dark = grounds
    assert light > 600
    assert dark < 200


def test_an_analysis_has_the_page_too(opened: Any) -> None:
    graph = fxprune.analyze(make(Blocks), image())
    page = opened(graph.to_html)
    assert page.title() == "Blocks – fxprune"
    assert texts(page, "#layers tbody th code") == LAYERS
    heads = texts(page, "#layers thead th")
    assert heads == ["#", "layer", "kind", "outputs", "weight", "outputs locked because"]
    assert texts(page, "header p") == ["what can be cut"]
    assert "cut away" not in page.inner_text(".legend")


def test_names_are_text_whatever_they_say(opened: Any) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>"

    def write(path: Path) -> None:
        write_page(
            path,
            title=evil,
            subtitle=evil,
            figures=[Figure(evil, evil, evil, 0.5)],
            held={evil: 0.5},
            rows=[
                Row(evil, evil, (4, 3), (2, 3), evil, evil, (4, 2)),
                Row("b", "Linear", (4, 4), (4, 2), "", "", (4, 4)),
            ],
            groups=[GroupRow(evil, 4, 2, 2, False, evil, ((f"{evil}.weight", 0, False), ("b.weight", 1, True)))],
            sections=[Section(evil, [(evil, evil)], [0.5])],
            notes=[evil],
            versions=evil,
        )

    page = opened(write)
    assert page.query_selector("img") is None
    assert len(page.query_selector_all("script")) == 1
    page.click(".pick")
    page.dispatch_event("#lanes .line", "mouseover")
    assert page.title() == f"{evil} – fxprune"
    assert page.inner_text("#detail h3").startswith("<img src=x")
    assert page.inner_text("body").count("alert(1)") >= 15


def test_what_onnxruntime_found_is_shown(report: fxprune.Report, tmp_path: Path) -> None:
    names = list(fxprune.Validation.__dataclass_fields__)
    found: Any = fxprune.Validation(**dict.fromkeys(names, 1.25e-7))
    report.to_html(tmp_path / "page.html", found)
    text = (tmp_path / "page.html").read_text()
    assert "<h2>ONNX</h2>" in text
    assert text.count("<td>1.25e-07</td>") == len(names)
    report.to_html(tmp_path / "page.html")
    assert "<h2>ONNX</h2>" not in (tmp_path / "page.html").read_text()
    with pytest.raises(fxprune.FxpruneError, match=r"validation is a str; pass what fxprune.export returned\."):
        report.to_html(tmp_path / "page.html", "small.onnx")
    with pytest.raises(fxprune.FxpruneError, match=r"the folder .* does not exist; create it first"):
        report.to_html(tmp_path / "no" / "page.html")
