"""Looks at a page in Chromium, in a narrow window and in a wide one."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import HANG_SECONDS

WIDTHS = (420, 1280)
_FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars"
_FLAGS += " disable-component-update disable-sync dump-dom"
_WINDOWS = """<!DOCTYPE html><body>{frames}<pre id="seen"></pre><script>
onload = () => {{
  const frames = [...document.querySelectorAll("iframe")];
  const seen = frames[0].contentWindow.seen || {{}};
  seen.widths = frames.map((frame) => frame.contentDocument.documentElement.scrollWidth);
  document.querySelector("#seen").textContent = JSON.stringify(seen);
}};
</script>"""


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


needs_chromium = pytest.mark.skipif(_chromium() is None, reason="needs Chromium")


def look_at(page: Path, folder: Path, script: str = "") -> dict:
    """Open a page of ours at `WIDTHS`, and run a script in it.

    Returns:
        What the script of the narrow window left in `window.seen`; and `widths`, the page's width in each.
        folder/page.png is a picture.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page's content security policy must allow our script.
    # The page's own script still needs the right digest.
    text = re.sub(r"(script-src '[^']+')", rf"\1 'sha256-{digest}'", page.read_text(encoding="utf-8"), count=1)
    text = html.escape(text.replace("</body>", f"<script>{script}</script></body>"))
    frames = [f'<iframe width="{width}" height="2400" frameborder="0" srcdoc="{text}"></iframe>' for width in WIDTHS]
    (folder / "page.html").write_text(_WINDOWS.format(frames="".join(frames)), encoding="utf-8")
    flags = [f"--{flag}" for flag in _FLAGS.split()]
    places = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}"]
    command = [_chromium(), *flags, *places, "--window-size=1800,2400", f"file://{folder}/page.html"]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=folder)
    found = re.search(r'<pre id="seen"[^>]*>(.+?)</pre>', dumped.stdout, re.DOTALL)
    assert found, dumped.stderr
    return json.loads(html.unescape(found[1]))
