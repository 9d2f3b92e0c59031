"""Reports: Markdown, HTML and plots of what was measured."""
