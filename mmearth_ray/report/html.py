"""Parts of a report that is one HTML file: it needs nothing beside itself, no network either.  Every text is escaped here."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from mmearth_ray.report.page import INK, SOFT

DPI = 160
"""Of figures: at a width of 1200 px they are sharp on a screen of twice as many dots."""

FAILED = "#b3261e"
STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; background: white; max-width: 1240px; margin: 2em auto;
  padding: 0 1.2em; }}
h1 {{ font-size: 1.6em; margin-bottom: 0.2em; }} h2 {{ font-size: 1.15em; margin-top: 2em; }}
p, li, dd, dt {{ max-width: 62em; }} .soft, dt {{ color: {SOFT}; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.3em 0.7em; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }}
th {{ color: {SOFT}; font-weight: 600; vertical-align: bottom; white-space: normal; }}
td:first-child, th:first-child, .words2 td:nth-child(2), .words2 th:nth-child(2), .words3 td:nth-child(-n+3),
  .words3 th:nth-child(-n+3) {{ text-align: left; }}
.failed {{ color: {FAILED}; }} td.failed {{ text-align: left; white-space: normal; }}
figure {{ display: inline-block; margin: 0 0 1em; width: 600px; max-width: 100%; }} figure.full {{ width: 100%; }}
img {{ width: 100%; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0.2em 1.2em; font-size: 13px; }} dd {{ margin: 0; }}
code {{ font-size: 12px; overflow-wrap: anywhere; }} pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole HTML document of parts that are HTML already."""
    head = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">', f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>", "</head>", "<body>",
    ]  # fmt: skip
    return "\n".join([*head, *parts, "</body>", "</html>"]) + "\n"


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(texts: Iterable[str], kind: str = "") -> str:
    """A list of sentences."""
    start = f'<ul class="{escape(kind)}">' if kind else "<ul>"
    return "\n".join([start, *(f"<li>{escape(text)}</li>" for text in texts), "</ul>"])


def row(cells: Iterable[str], failure: str = "", width: int = 1) -> str:
    """A row of a table; a failure takes the place of the last `width` cells."""
    inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    last = f'<td class="failed" colspan="{width}">failed: {escape(failure)}</td>' if failure else ""
    return f"<tr>{inner}{last}</tr>"


def table(head: Sequence[str], rows: Iterable[str], words: int = 1) -> str:
    """A table of rows that `row` made, whose first one to three columns hold words, the others numbers."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    start = [f'<div class="wide"><table class="words{words}">', f"<thead><tr>{names}</tr></thead>", "<tbody>"]
    return "\n".join([*start, *rows, "</tbody>", "</table></div>"])


def facts(found: Mapping[str, Sequence[str]], code: Sequence[str] = ("command",)) -> str:
    """Names with their values; those named in `code` are shown as a terminal would."""
    cells: list[str] = []
    for name, values in found.items():
        words = [f"<code>{escape(v)}</code>" if name in code else escape(v) for v in values]
        cells.append(f"<dt>{escape(name)}</dt><dd>{'<br>'.join(words)}</dd>")
    return "\n".join(["<dl>", *cells, "</dl>"])


def image(title: str, content: bytes, *, full: bool = False) -> str:
    """A PNG file within the page: half of its width, or the full one."""
    data, kind = base64.b64encode(content).decode(), ' class="full"' if full else ""
    return f'<figure{kind}><img alt="{escape(title)}" src="data:image/png;base64,{data}"></figure>'


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
