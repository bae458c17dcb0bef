from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddetr_cli.evaluate.report.comparison import compare, write_comparison
from ddetr_cli.evaluate.report.evaluated import Evaluated
from ddetr_cli.evaluate.report.report import data_name, write_report

MakeRun = Callable[..., Evaluated]
NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images];
  const found = document.createElement("p");
  found.id = "probe";
  found.textContent = JSON.stringify({
    images: images.length,
    broken: images.filter(image => !image.complete || image.naturalWidth === 0).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    small: [...document.querySelectorAll("p, td, figcaption")].filter(
      e => e.offsetParent && parseFloat(getComputedStyle(e).fontSize) < 11).length,
  });
  document.body.append(found);
});</script>"""


def test_a_report_is_one_page_and_the_plots(
    make_run: MakeRun, images: Path, tmp_path: Path, checked: Callable[[str], Any]
) -> None:
    path = write_report(make_run(name="model <1>", images=images), tmp_path / "out", NOW)
    page = checked(path.read_text())
    assert "model <1> on" in page.text
    assert "2026-01-02 03:04" in page.text
    assert all(value.startswith("data:") for _, name, value in page.attributes if name in ("src", "href"))
    plots = sorted((tmp_path / "out/plots").iterdir())
    assert [plot.stem for plot in plots] == [
        "ap_by_size", "calibration", "confusion", "mistakes", "precision_recall_classes", "precision_recall_sizes",
    ]  # fmt: skip
    for plot in plots:
        with Image.open(plot) as picture:
            assert min(picture.size) > 300
    # Every picture that has a mistake, and every plot.
    assert sum(tag == "img" and name == "src" for tag, name, _ in page.attributes) == 2 + 6


def test_the_page_says_the_numbers_first(make_run: MakeRun, tmp_path: Path, checked: Callable[[str], Any]) -> None:
    run = make_run()
    text = checked(write_report(run, tmp_path, NOW).read_text()).text
    assert f"AP{run.metrics.overall['AP']:.3f}" in text
    assert text.index("AP500.") < text.index("Precision, recall and size") < text.index("The worst pictures")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("cells/annotations/val.json", "cells, val"), ("bccd/val/_annotations.coco.json", "val, _annotations.coco")],
)
def test_a_data_set_is_called_by_its_folder_and_split(path: str, expected: str) -> None:
    assert data_name(Path(path)) == expected


@pytest.fixture
def browser() -> str:
    """A Chromium without a screen."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("no chromium is installed (apt-get install chromium)")
    return found


def opened(browser: str, page: Path, width: int, tmp_path: Path) -> tuple[dict[str, int], str]:
    """What the page looks like to a browser without a network, and what that wrote on its console."""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", f"--window-size={width},900",
         "--virtual-time-budget=10000", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<p id="probe">(.*?)</p>', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found[1]), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_the_report_whole(
    browser: str, width: int, make_run: MakeRun, images: Path, tmp_path: Path
) -> None:
    page = write_report(make_run(images=images), tmp_path / "out", NOW)
    found, console = opened(browser, page, width, tmp_path)
    assert console == ""
    assert found == {"images": 8, "broken": 0, "overflow": 0, "small": 0}


@pytest.mark.slow
def test_a_browser_shows_the_comparison_whole(browser: str, make_run: MakeRun, images: Path, tmp_path: Path) -> None:
    run = make_run(images=images)
    page = write_comparison(compare(run, run), tmp_path / "out", NOW)
    found, console = opened(browser, page, 500, tmp_path)
    assert console == ""
    assert (found["broken"], found["overflow"]) == (0, 0)


@pytest.mark.slow
def test_the_browser_would_notice_what_is_broken(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><body><img src="data:image/png;base64,AAAA"><img src="http://example.com/a.png">'
        '<div style="width:5000px">wide</div><script>nothing()</script></body>'
    )
    found, console = opened(browser, page, 800, tmp_path)
    assert (found["images"], found["broken"]) == (2, 2)
    assert found["overflow"] > 1000
    assert "nothing is not defined" in console
