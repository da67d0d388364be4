"""The pictures of report.py's page, for the README and docs/report.md.

In: folders of two runs; docs/report.md names the commands that made them. Out: report-curves.png,
report-behaviour.png and report-trajectory.png in docs/. It needs Chromium and `pip install
playwright`.

    python docs/screenshots.py runs/default runs/thrifty
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from report import write_report

CURVES = (
    "held-out Pass@1",
    "Pass@1 on training tasks",
    "mean reward",
    "calls of search",
    "pages opened",
    "turns a trajectory",
)
# Scripts of the page: the title and these curves alone; a right and a wrong attempt side by side.
ONLY_CURVES = """titles => {
  for (const node of document.querySelectorAll("#tables, #panels h3, h2, .note, #trajectories"))
    node.remove();
  const figures = [...document.querySelectorAll("figure")], box = figures[0].parentNode;
  box.append(...titles.map(title => figures.find(f => f.textContent.startsWith(title))));
  for (const figure of figures) {
    if (!titles.includes(figure.firstChild.textContent)) figure.remove();
  }
}"""
SIDE_BY_SIDE = """() => {
  for (const right of shown.filter(r => r.right && r.turns.length === 3)) {
    const wrong = shown.find(r => r.group === right.group && !r.right && r.turns.length === 3);
    if (wrong) return go(place.update, [right.name, wrong.name]);
  }
}"""


def take(page: Page, name: str, selector: str, height: float = 1e9) -> None:
    """A picture of an element with a margin, cut at so many pixels from its top."""
    box = page.locator(selector).first.bounding_box()
    left, top = max(0, box["x"] - 16), max(0, box["y"] - 6)
    size = {"width": box["width"] + 32, "height": min(box["height"], height) + 12}
    clip = {"x": left, "y": top} | size
    page.screenshot(path=DOCS / f"report-{name}.png", clip=clip, full_page=True)


def main():
    folders = [Path(folder) for folder in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        out = Path(folder) / "report.html"
        write_report(folders, out)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1180, "height": 900}, color_scheme="light")
        page.goto(out.as_uri())
        page.wait_for_selector("#detail .card")
        take(page, "behaviour", "#tables", 640)
        page.evaluate(SIDE_BY_SIDE)
        page.wait_for_timeout(500)
        take(page, "trajectory", ".place", 600)
        page.evaluate(ONLY_CURVES, CURVES)
        take(page, "curves", "body", 480)
        browser.close()


if __name__ == "__main__":
    main()
