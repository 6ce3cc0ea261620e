"""Parts of a page: every text is escaped, and nothing outside of the page is named."""

import base64
import re

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmearth_ray.report.html import bullets, document, facts, heading, image, paragraph, png, row, table

ODD = '<script>alert("x")</script> & more'
SAFE = "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; more"


def test_every_text_is_escaped() -> None:
    parts = [
        heading(ODD), paragraph(ODD, "soft"), bullets([ODD]), table([ODD], [row([ODD]), row([], ODD)]),
        facts({ODD: [ODD], "command": [ODD]}), image(ODD, b"x"),
    ]  # fmt: skip
    html = document(ODD, parts)
    assert "<script" not in html
    assert html.count(SAFE) == 11
    assert f"<code>{SAFE}</code>" in html


def test_a_failure_takes_the_place_of_the_cells_that_a_row_lacks() -> None:
    assert row(["atto"], "no memory", 3) == '<tr><td>atto</td><td class="failed" colspan="3">failed: no memory</td></tr>'
    assert row(["atto", "1"]) == "<tr><td>atto</td><td>1</td></tr>"


def test_a_figure_lies_within_the_page() -> None:
    figure = Figure(figsize=(1, 1))
    FigureCanvasAgg(figure)
    content = png(figure)
    assert content.startswith(b"\x89PNG")
    html = document("a", [image("a", content, full=True)])
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert found
    assert base64.b64decode(found[1]) == content
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?://", html)
