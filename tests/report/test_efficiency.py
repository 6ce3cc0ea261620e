"""The page of a comparison: it says everything that it is given, and needs nothing beside itself."""

import re
from dataclasses import replace

from mmearth_ray.report.curves import Line, Mark, Panel
from mmearth_ray.report.efficiency import Efficiency, Table, page

PANEL = Panel("knn", "labels", "accuracy", [Line("ours", [Mark(10, 0.5, 0.4, 0.6)])])
ROW = (["ours", "knn", "0.5", "0.6"], "")
REPORT = Efficiency(
    title="Label efficiency on tiny", lead="What it is.", command="evaluate label-efficiency 'encoders=[a]'",
    settings={"seeds": ["5"]}, findings=["ours is best"], curves=[PANEL], sizes=[PANEL],
    scores=Table(["encoder", "protocol", "1 %", "100 %"], [ROW, (["<bad>", "knn"], "features < 0")]),
    differences=Table(["encoder", "compared with", "protocol", "1 %"], [], 3), encoders=Table(["encoder"], [(["ours"], "")]),
    failures=["features are not finite (2: ours, knn)"], notes=["a note"], machine={"torch": ["2"]},
)  # fmt: skip


def test_the_page_says_everything_and_needs_nothing_beside_itself() -> None:
    html = page(REPORT)
    words = ["Label efficiency on tiny", "What it is.", "label-efficiency &#x27;encoders=[a]&#x27;", "ours is best", "0.6",
             "features are not finite", "a note", "<h2>Failures</h2>", "There is nothing to show."]  # fmt: skip
    assert all(word in html for word in words)
    assert '<td>&lt;bad&gt;</td><td>knn</td><td class="failed" colspan="2">failed: features &lt; 0</td>' in html
    assert html.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?://|<script|<link", html)


def test_without_scores_or_failures_it_says_so() -> None:
    html = page(replace(REPORT, curves=[], sizes=[replace(PANEL, lines=[])], failures=[]))
    assert html.count("No point has a score yet.") == 2
    assert "Failures" not in html
