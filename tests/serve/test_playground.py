"""The playground in a real browser: Chromium, by Playwright. Skipped where there is none."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Live, live, tiny_folder

from renyi.inference.abstention import write_abstention

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    loaded = tiny_folder(tmp_path_factory.mktemp("page"))
    write_abstention(loaded.folder, {"score": "epistemic", "threshold": 0.0})
    with live(loaded) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


NARROW, WIDE = (400, "dark"), (1280, "light")
narrow = pytest.mark.parametrize("page", [NARROW], ids=["400 dark"], indirect=True)
wide = pytest.mark.parametrize("page", [WIDE], ids=["1280 light"], indirect=True)
both = pytest.mark.parametrize("page", [NARROW, WIDE], ids=["400 dark", "1280 light"], indirect=True)


@pytest.fixture
def page(browser: Any, server: Live, request: pytest.FixtureRequest) -> Iterator[Any]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(90_000)
    opened = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda sent: asked.append(sent.url))
    opened.goto(server.url)
    opened.get_by_text("a mixture of 3 members").wait_for()
    yield opened
    assert [said for said in problems if not said.startswith("Failed to load resource")] == []
    assert [url for url in asked if not url.startswith((server.url, "data:"))] == []  # nothing comes from elsewhere
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    context.close()


def ask(page: Any, text: str = "w1 w2", tokens: int = 8) -> None:
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_label("Seed").fill("1")
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


@both
def test_a_chat_shows_uncertainty_in_two_scales(page: Any) -> None:
    ask(page)
    page.get_by_text("Why unsure?").wait_for()
    tokens = page.locator(".answer .tok")
    assert tokens.count() >= 4
    page.locator(".answer").focus()
    page.keyboard.press("u")  # the most uncertain token
    style = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).borderBottomStyle, e.className]"
    colour, line, name = page.locator(".tok.on").evaluate(style)
    levels = {"l1": "dotted", "l2": "dashed", "l3": "solid", "l4": "double"}
    level = next(part for part in name.split() if part in (*levels, "l0"))
    assert level != "l0"
    assert line == levels[level]
    assert colour != "rgba(0, 0, 0, 0)"
    panel = page.locator("#token")
    assert "under the mixture" in panel.inner_text()
    assert [panel.get_by_text(f"member_{m}", exact=True).count() for m in range(3)] == [1, 1, 1]
    page.keyboard.press("Home")
    assert "Token 1 of" in panel.inner_text()
    page.keyboard.press("ArrowRight")
    assert "Token 2 of" in panel.inner_text()
    tokens.nth(0).hover()
    assert "Token 1 of" in panel.inner_text()
    assert page.locator(".badge").inner_text().startswith("Above the threshold: epistemic is")
    page.get_by_text("Tokens as a table").click()
    assert page.locator("details table tbody tr").count() == tokens.count()
    assert page.locator("#status").inner_text().startswith("The answer is complete:")


@narrow
def test_a_withheld_answer_is_shown_as_such(page: Any) -> None:
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Withhold unsure answers").check()
    page.get_by_text("Settings", exact=True).click()
    ask(page)
    page.locator(".withheld").wait_for()
    assert "I do not know: epistemic is" in page.locator(".withheld").inner_text()
    assert page.locator(".tok").count() == 0


@narrow
def test_members_answer_side_by_side(page: Any) -> None:
    page.get_by_role("tab", name="Members").click()
    page.get_by_label("Every member answers this").fill("w1 w2")
    page.get_by_role("button", name="Ask all").click()
    page.get_by_text("weight 0.33").nth(2).wait_for()
    headings = page.locator("#members-answers h2").all_inner_texts()
    assert headings == ["tiny", "member_0", "member_1", "member_2"]


@narrow
def test_tabs_work_by_keyboard_and_an_answer_is_scored(page: Any) -> None:
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "tab-score"
    page.get_by_label("Prompt", exact=True).fill("w1")
    page.get_by_label("Answer: which members").fill("w5 w6")
    page.get_by_role("button", name="Score").click()
    page.get_by_text("Mixture NLL").wait_for()
    shares = page.locator("#score-result tbody tr td:nth-child(2)").all_inner_texts()
    assert sum(float(share.split()[0]) for share in shares) == pytest.approx(100, abs=0.2)


@wide
def test_an_error_is_said(page: Any, server: Live) -> None:
    ask(page, tokens=100_000)
    alert = page.get_by_role("alert")
    alert.get_by_text("and the most is 1,024").wait_for()
    assert not page.get_by_role("button", name="Send").is_disabled()
