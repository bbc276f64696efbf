"""Takes report.png, a screenshot of parts of a run's report, with Chromium.

python docs/figures/report.py runs/demo docs/figures/report.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from cemg.report import write_report

WIDTH, HEIGHT, MARGIN = 1200, 3000, 20  # pixels
SHORTENED = """<style>
section:not(#results, #sample-recommendations, #losses, #item-map), .user:nth-child(n + 3),
#losses figure:nth-child(n + 4) { display: none }
.map { max-width: 30rem }
</style></head>"""


def take(run: Path, picture: Path) -> None:
    """Write the report of ``run`` and a screenshot of some sections of it."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("this needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(write_report(run).read_text().replace("</head>", SHORTENED, 1))
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}",
             f"--screenshot={picture.resolve()}", page.as_uri()],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    whole = Image.open(picture).convert("RGB")
    drawn = ImageChops.difference(whole, Image.new("RGB", whole.size, whole.getpixel((0, 0)))).getbbox()
    bottom = min(drawn[3] + MARGIN, HEIGHT) if drawn else HEIGHT
    whole.crop((0, 0, WIDTH, bottom)).quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
