"""Reports: Markdown, HTML and plots of what was measured."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.reports.model import Report as Report
    from lightning_accel.reports.page import render_html as render_html
    from lightning_accel.reports.run_report import render_markdown as render_markdown

_PUBLIC = {
    "Report": "reports.model",
    "render_html": "reports.page",
    "render_markdown": "reports.run_report",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
