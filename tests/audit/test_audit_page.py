"""The audit's page in a real browser: Chromium, by Playwright. Skipped where there is none."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from renyi.audit import audit, write_audit

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

EVIL = '</script><script>document.title = "taken"</script><img src=x onerror="document.title = 1">\x1b[31m\u202e\x00'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser: Any, folder: Path, width: int) -> tuple[Any, list[str]]:
    page, problems = browser.new_page(viewport={"width": width, "height": 800}), []
    page.set_default_timeout(90_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.goto((folder / "report.html").as_uri())
    return page, problems


@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_of_many_groups_is_filtered_sorted_and_turned(browser: Any, tmp_path: Path, width: int) -> None:
    rows = [
        {"prompt": f"Is {i // 2} it? {EVIL}", "completion": f"{'No' if i % 2 else 'Yes'} {EVIL}"} for i in range(2000)
    ]
    write_audit(audit(rows), tmp_path, f"rows {EVIL}")
    page, problems = opened(browser, tmp_path, width)
    assert page.title().startswith("Audit of rows")
    assert page.inner_text("#shown") == "1,000 groups"
    assert page.locator("article").count() == 50
    page.click("#next")
    assert page.inner_text("#page") == "page 2 of 20"
    page.fill("#words", "row 1234")
    assert page.inner_text("#shown") == "1 group"
    assert page.locator("mark").count() >= 2  # the words that differ
    assert page.locator("img, article script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    assert problems == []
    page.close()


@pytest.mark.parametrize("rows", [[], [{"prompt": "a", "completion": "b"}] * 10], ids=["nothing found", "ten rows"])
def test_a_page_of_few_rows_says_what_was_found(browser: Any, tmp_path: Path, rows: list[dict[str, str]]) -> None:
    write_audit(audit(rows or [{"prompt": "a", "completion": "b"}]), tmp_path, "few")
    page, problems = opened(browser, tmp_path, 400)
    said = page.inner_text("#overview")
    assert ("Nothing was found" in said) == (not rows)
    assert page.locator("article").count() == bool(rows)
    assert page.is_visible("#filter") == bool(rows)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert problems == []
    page.close()
