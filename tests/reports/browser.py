"""A real browser without a window: what a page does at a width. Debian's chromium, or Google's."""

import json
import re
import shutil
import subprocess
import threading
from functools import partial
from html import escape, unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_CONSOLE = re.compile(r'CONSOLE[:(][^"]*"(.*)"')

# The page sits in a frame of the width in question; what frames it looks into it and writes down what it finds.
_PROBE = """<!doctype html><html><head><link rel="icon" href="data:,"></head><body>
<iframe id="page" style="border:0;width:{width}px;height:3000px"></iframe><pre id="found"></pre><script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const wide = [...page.body.querySelectorAll("*")].filter(e => !e.closest(".scroll, pre, svg")
    && e.getBoundingClientRect().right > root.clientWidth + 0.5).map(e => e.tagName + "." + e.className);
  document.getElementById("found").textContent = JSON.stringify({{
    title: page.title, width: root.clientWidth, content: root.scrollWidth, wide,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
    sections: [...page.querySelectorAll("section")].filter(e => e.getBoundingClientRect().height > 20).map(e => e.id),
    small: Math.min(...[...page.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height)),
  }});
}};
frame.src = "{page}";
</script></body></html>"""


class _Handler(SimpleHTTPRequestHandler):
    asked: list[str]

    def __init__(self, *args, asked, **kwargs):
        self.asked = asked
        super().__init__(*args, **kwargs)

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


def look_at(folder, page: str, width: int) -> dict:
    """Open a page of a folder in a frame of some width.

    Returns:
        ``title``, ``width`` and ``content`` (its width and that of what it holds, pixels), ``wide`` (elements that stick out),
        ``fetched`` (resources it asked for), ``asked`` (paths the server was asked for), ``console`` (what the browser's
        console says), ``sections`` (those with a height), ``small`` (height of the smallest letters in a picture).
    """
    (folder / f"probe{width}.html").write_text(_PROBE.format(width=width, page=escape(page)))
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder), asked=asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        command = [
            str(BROWSER),
            "--headless=new",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--no-sandbox",  # the page is our own, and a container may have no user namespaces
            "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--window-size=1400,3100",
            "--dump-dom",
            f"http://127.0.0.1:{server.server_port}/probe{width}.html",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return {**json.loads(unescape(found[1])), "asked": asked, "console": _CONSOLE.findall(done.stderr)}
