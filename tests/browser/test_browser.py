"""The notebooks in a real JupyterLab, in a real browser: each opens, those with widgets run to their end, and the widgets answer.

Asks for text and names on the page, never for pixels. ``--screenshots DIR`` keeps pictures for a person to look at.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from course import CHROMIUM, NOTEBOOKS, WITH_WIDGETS, check_like_kept, check_ran, in_quick_mode
from playwright.sync_api import expect, sync_playwright

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: `make test` installs Debian's, as root or with sudo; or `apt-get install chromium`")
MINUTE = 60_000  # Playwright counts milliseconds
expect.set_options(timeout=MINUTE)  # a step of training may take several seconds, and a pause waits for its end


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """``safelab lab`` on copies of the notebooks in quick mode -> its address, token and folder; stopped with all its kernels."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    for path in NOTEBOOKS:
        nbformat.write(in_quick_mode(path), home / "notebooks" / path.name)
    own = {f"JUPYTER{name}_DIR": str(home / name) for name in ("LAB_SETTINGS", "LAB_WORKSPACES", "_CONFIG", "_RUNTIME")} | {"IPYTHONDIR": str(home / "ipython")}
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "safelab.cli", "lab", "--no-browser", "--port", "0", "--folder", str(home / "notebooks")],
            env=os.environ | own, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG: when the tests are killed, it ends too
        )  # fmt: skip
    try:
        runtime, deadline = home / "_RUNTIME" / f"jpserver-{server.pid}.json", time.monotonic() + 120
        while not (runtime.is_file() and runtime.read_text().endswith("}")):
            assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.1)
        yield json.loads(runtime.read_text()) | {"folder": home / "notebooks"}
    finally:
        server.terminate()  # it shuts its kernels down
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(path, lab, browser, screenshots):
    """A page with the notebook open and its title seen; its kernel is shut down afterwards. It has asked no other machine for anything."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(MINUTE)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(f"{lab['url']}lab/tree/{path.name}?token={lab['token']}&reset")
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")
        page.get_by_role("heading", name=title).wait_for()
        yield page
        assert not [url for url in asked if not url.startswith((lab["url"], "blob:", "data:"))]
    finally:
        if screenshots:
            keep_screenshots(page, screenshots / path.stem)
        header = {"Authorization": f"token {lab['token']}"}
        for session in page.request.get(f"{lab['url']}api/sessions", headers=header).json():
            page.request.delete(f"{lab['url']}api/sessions/{session['id']}", headers=header)
        page.close()


def keep_screenshots(page, folder) -> None:
    """The notebook, one picture a screenful."""
    folder.mkdir(parents=True, exist_ok=True)
    panel = page.locator(".jp-WindowedPanel-outer").first
    end, step = panel.evaluate("panel => [[...panel.querySelectorAll('.jp-Cell')].pop().getBoundingClientRect().bottom + panel.scrollTop, panel.clientHeight]")
    for i, top in enumerate(range(0, int(end), step)):
        panel.evaluate("(panel, top) => panel.scrollTop = top", top)
        page.screenshot(path=folder / f"{i:02}.png")


def run_all_cells(page) -> None:
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        """() => {
            const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent).join('');
            return document.querySelector('.jp-Dialog') || (/[0-9]/.test(prompts) && !prompts.includes('*'));  // after an error the rest is not marked
        }""",
        timeout=15 * MINUTE,
    )
    expect(page.locator(".jp-Dialog")).to_have_count(0)  # such as that its kernel has died


def saved(page, path):
    """The notebook as JupyterLab writes it."""
    with page.expect_response(lambda response: response.request.method == "PUT" and path.name in response.url):
        page.keyboard.press("Control+s")
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in WITH_WIDGETS], ids=lambda p: p.stem)
def test_opens(path, lab, browser, screenshots):
    with opened(lab["folder"] / path.name, lab, browser, screenshots) as page:
        expect(page.locator(".jp-Dialog")).to_have_count(0)


@pytest.mark.parametrize("path", WITH_WIDGETS, ids=lambda p: p.stem)
def test_runs_and_its_widgets_answer(path, lab, browser, screenshots):
    with opened(lab["folder"] / path.name, lab, browser, screenshots) as page:
        run_all_cells(page)
        notebook = saved(page, lab["folder"] / path.name)
        check_ran(notebook)
        check_like_kept(path, notebook)
        assert "widgets" not in notebook.metadata, "the state of widgets was saved"
        boxes = page.locator("[class*=safelab-]").all()
        for box in boxes:
            check_keyboard_and_names(box)
        for box in boxes:
            OPERATE[name_of(box)](box)


# ------------------------------------------------------------------------------------------------------- the widgets


def check_keyboard_and_names(box) -> None:
    """Tab reaches every control in use, and each, like every picture, has a name for a screen reader."""
    controls = box.locator("button, input, select, textarea, [role=slider], [contenteditable=true]").locator("visible=true")
    controls = [control for control in controls.all() if control.is_enabled()]
    nameless = [found for one in [*controls, *box.locator("img").all()] if not re.match(r'- \w+ "\S', found := one.aria_snapshot())]
    assert not nameless and controls
    controls[0].focus()
    for control in controls[1:]:
        box.page.keyboard.press("Tab")
        expect(control).to_be_focused()


SHOWN = """box => [
    ...[...box.querySelectorAll('.widget-html-content')].map(text => text.innerText),
    ...[...box.querySelectorAll('img')].map(picture => picture.src + (picture.complete && picture.naturalWidth > 100 ? '' : '\u2026')),
]"""


@contextlib.contextmanager
def changes(box):
    """What is done inside changes a text or a picture of the widget; a text that ends in an ellipsis only says that it is at work."""
    for shown in [box, *box.locator("img").all()]:  # what is out of sight is neither dragged nor drawn
        shown.scroll_into_view_if_needed()
    before = box.evaluate(SHOWN)
    yield
    box.page.wait_for_function(
        f"""([box, before]) => {{
            const now = ({SHOWN})(box);
            return String(now) !== String(before) && !now.some(shown => shown.endsWith('\u2026'));
        }}""",
        arg=[box.element_handle(), before],
        polling=250,  # not by frame: a page that shows nothing new may draw none
    )


def threshold(box) -> None:
    with changes(box):
        box.get_by_role("slider", name="threshold").press("Home")  # everything is flagged
    with changes(box):
        drag(box.get_by_role("slider", name="threshold"), 100)


def drag(handle, pixels: int) -> None:
    handle.scroll_into_view_if_needed()
    at, mouse = handle.bounding_box(), handle.page.mouse
    mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    mouse.down()
    mouse.move(at["x"] + at["width"] / 2 + pixels, at["y"] + at["height"] / 2, steps=4)
    mouse.up()


def schedule_designer(box) -> None:
    with changes(box):
        drag(box.get_by_role("slider", name="bounds to"), -60)  # below 0.5 nothing is held
    with changes(box):
        drag(box.get_by_role("slider", name="bounds to"), 60)
    granularity = box.get_by_role("combobox", name="granularity")
    other = "batch-max" if granularity.evaluate("control => control.selectedOptions[0].text") == "batch" else "batch"
    with changes(box):
        granularity.select_option(other)
    with changes(box):
        box.get_by_role("slider", name="smoothing").press("PageUp")


def layer_explorer(box) -> None:
    text = box.locator(".widget-html-content")
    with changes(box):
        box.get_by_role("slider", name="layer").press("ArrowLeft")
    expect(box.get_by_role("slider", name="layer")).to_have_attribute("aria-valuetext", box.locator(".widget-readout").first.inner_text())
    expect(text).to_have_attribute("aria-live", "polite")
    with changes(box):
        box.get_by_role("combobox", name="projection").select_option("LDA")
    with changes(box):
        box.get_by_role("slider", name="prompt", exact=True).press("ArrowRight")
    expect(text.last).to_contain_text("Prompt 1,")


def prompt_box(box) -> None:
    text = box.locator(".widget-html-content")
    expect(text).to_contain_text(re.compile("refused|answered"))
    with changes(box):
        box.get_by_role("textbox", name="prompt").fill("Name three rivers in Europe.")
        box.get_by_role("button", name="Ask").click()
    with changes(box):
        box.get_by_role("textbox", name="prompt").fill(" ")
        box.get_by_role("button", name="Ask").click()
    expect(text).to_contain_text("there is no prompt yet")


def trade_off(box) -> None:
    with changes(box):
        box.get_by_role("combobox", name="up").select_option("everyday prompts refused")
    with changes(box):
        box.get_by_role("checkbox").first.uncheck()


def training_dashboard(box) -> None:
    """Start; while it trains another control of the page answers; pause, go on, stop."""
    line = box.locator(".widget-html-content").first
    start, stop = box.get_by_role("button", name="Start").first, box.get_by_role("button", name="Stop").first
    with changes(box):
        start.click()
    expect(line).to_contain_text(re.compile(r"training.* step [1-9]"), timeout=3 * MINUTE)
    for other in box.page.locator(".safelab-schedule-designer, .safelab-layer-explorer").all():
        with changes(other):
            other.get_by_role("slider").first.press("ArrowRight")
    expect(line).to_contain_text("training")
    box.get_by_role("button", name="Pause").first.click()
    expect(line).to_contain_text("paused")
    box.get_by_role("button", name="Resume").first.click()
    expect(line).to_contain_text("training")
    stop.click()
    expect(line).to_contain_text("stopped", timeout=5 * MINUTE)


def name_of(box) -> str:
    return re.search(r"safelab-([\w-]+)", box.get_attribute("class")).group(1)


OPERATE = {
    "threshold": threshold, "schedule-designer": schedule_designer, "layer-explorer": layer_explorer, "prompt-box": prompt_box,
    "trade-off": trade_off, "training-dashboard": training_dashboard,
}  # fmt: skip
