import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from vembed.evaluation.curves import build_panels, panel_svg
from vembed.evaluation.intervals import MetricChange
from vembed.evaluation.moved import MovedQueries, MovedQuery
from vembed.evaluation.page import shorten
from vembed.evaluation.report import render_moved, render_table, write_report

NASTY = '<script>alert("1")</script> & "quoted" \'single\''


def change(metric="ndcg@10", before=0.633, after=0.727, half=0.02, *, count=1203, p_value=0.0001):
    difference = after - before
    return MetricChange(
        metric=metric, count=count, items="queries", p_value=p_value,
        before=before, before_low=before - half, before_high=before + half,
        after=after, after_low=after - half, after_high=after + half, difference=difference,
        difference_low=difference - half / 2, difference_high=difference + half / 2,
    )  # fmt: skip


CHANGES = [change(), change("mrr@10", 0.5, 0.505), change("recall@1", 0.6, 0.5)]
MOVED = MovedQueries(
    improved=[MovedQuery(f"fixed {NASTY}", f"right {NASTY}", 57, 1, "wrong [b]before[/b]", "")],
    worsened=[MovedQuery("broken", "lost", 1, 1200, "lost", "found instead")],
    improved_count=700,
    worsened_count=3,
    unchanged_count=500,
)
HISTORY = [
    {
        "step": s,
        "epoch": s / 100,
        "loss": 2 * math.exp(-s / 50),
        "lr": 1e-5,
        "grad_norm": 1.0,
        "part": 3.0,
    }
    for s in range(1, 101)
] + [{"step": 100, "epoch": 1.0, "val_loss": 0.4, "val_ndcg@10": 0.7, "val_map@100": 0.6}]


def write(tmp_path, **overrides):
    arguments = {
        "title": f"Search {NASTY}", "changes": CHANGES, "moved": MOVED, "history": HISTORY,
        "settings": {"lr": 5e-5, "query_prompt": NASTY, "teacher_model_name": None,
                     "use_lora": False, "loss_kwargs": {"a": [1, True]}},
        "facts": {"Model": NASTY, "Seed": 42},
    }  # fmt: skip
    return write_report(tmp_path / "report", **{**arguments, **overrides})


def rendered(renderable, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


class TagChecker(HTMLParser):
    """Every tag closed in order; notes the tags and attributes seen."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes = [], set(), []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path):
    path = write(tmp_path)
    assert path == tmp_path / "report" / "report.html"
    page = path.read_text(encoding="utf-8")
    checked = TagChecker(page)
    assert not checked.tags & {"script", "link", "img", "iframe", "object", "base"}
    names = {name for name, _ in checked.attributes}
    assert "src" not in names
    assert not any(name.startswith("on") for name in names)
    # Within the page only: clip paths and shared marks of the curves.
    assert all(v.startswith("#") for n, v in checked.attributes if n in ("href", "xlink:href"))
    assert not re.search(r"url\((?!#)|@import", page)
    assert (tmp_path / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_users_wrote_is_escaped(tmp_path):
    page = write(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page
    # title twice, query, right answer, setting, fact
    assert (
        page.count("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &quot;quoted&quot;")
        == 6
    )


def test_the_page_tells_the_numbers(tmp_path):
    page = write(tmp_path).read_text(encoding="utf-8")
    text = " ".join(re.sub(r"<(style|svg).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL).split())
    assert "nDCG@10 rose from 0.633 to 0.727 on 1,203 test queries." in text
    assert "+0.094 95&nbsp;% interval +0.084 to +0.104, p&nbsp;&lt;&nbsp;0.001." in text
    assert (
        "Of 1,203 queries, the right answer stands higher for 700 , lower for 3 , and where" in text
    )
    assert "rank 57 → 1" in text
    assert "teacher_model_name null" in text
    assert "use_lora false" in text
    assert "loss_kwargs {a: [1, true]}" in text
    assert "lr 5e-05" in text


@pytest.mark.parametrize(
    ("main", "said"),
    [
        (change(after=0.5), "nDCG@10 fell from"),
        (change(after=0.634), "The interval holds zero: this may be chance."),
        (change(p_value=0.125), "p is above 0.05: this may be chance."),
        (change(p_value=0.125, count=8), "too few test queries (8) to conclude"),
    ],
)
def test_the_verdict_is_honest(tmp_path, main, said):
    page = write(tmp_path, changes=[main]).read_text(encoding="utf-8")
    assert said in page
    assert "rose from" not in page
    assert (said in " ".join(rendered(render_table([main])).split())) == (said in main.doubt)


def test_one_query_is_not_queries(tmp_path):
    one = [change(count=1)]
    assert "1 query; below" in rendered(render_table(one))
    assert "1 test query." in write(tmp_path, changes=one).read_text(encoding="utf-8")


def test_few_queries_that_agree_are_enough():
    assert change(p_value=0.01, count=8).verdict == "better"
    assert change(p_value=0.01, count=8).doubt == ""


def test_a_page_without_curves_or_moves(tmp_path):
    page = write(tmp_path, history=[], moved=MovedQueries(), facts={}, settings={}).read_text()
    TagChecker(page)
    assert "<h2>Training</h2>" not in page
    assert "Queries that moved" not in page
    assert not (tmp_path / "report" / "curves.png").exists()


def test_panels_are_those_there_are_numbers_for():
    panels = build_panels(HISTORY, ["ndcg@10", "mrr@10"])
    assert [panel.title for panel in panels] == [
        "Loss",
        "Validation",
        "Learning rate",
        "Gradient norm",
    ]
    loss, validation = panels[0].series, panels[1].series
    assert [s.label for s in loss] == ["training", "training, smoothed", "validation"]
    assert [s.label for s in validation] == ["nDCG@10"]
    assert (validation[0].steps, validation[0].values) == ([100], [0.7])
    assert build_panels([], ["ndcg@10"]) == []


def test_the_smoothed_loss_is_a_centred_mean():
    history = [{"step": s, "loss": float(s)} for s in range(80)]
    raw, smooth = build_panels(history, [])[0].series
    assert raw.values == [float(s) for s in range(80)]
    # half a window of 80 // 40 = 2: five points, fewer at the ends
    assert smooth.values[:3] == [1.0, 1.5, 2.0]
    assert smooth.values[40] == 40
    assert smooth.values[-1] == 78


def test_curves_follow_the_theme_and_have_a_text_alternative():
    svgs = [panel_svg(panel) for panel in build_panels(HISTORY, ["ndcg@10"])]
    for svg in svgs:
        assert svg.startswith("<svg ")
        assert "var(--ink)" in svg
        assert "#01010" not in svg
    assert 'aria-label="Loss: training, smoothed from 1.922 at step 1 to ' in svgs[0]
    assert svgs == [panel_svg(panel) for panel in build_panels(HISTORY, ["ndcg@10"])]


def test_ids_of_two_curves_do_not_clash():
    svgs = [panel_svg(panel) for panel in build_panels(HISTORY, [])]
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', svg)) for svg in svgs]
    assert all(clips)
    assert not clips[0] & clips[1]


def test_the_table_fits_eighty_columns():
    text = rendered(render_table([*CHANGES, change("recall@10", -0.8, -0.9)], title="test set"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "nDCG@10" in text
    assert "0.7270" in text
    assert "+0.0940" in text
    assert "+0.084 to +0.104" in text
    assert "<0.001" in text
    assert "…" not in text


def test_moved_queries_on_a_narrow_terminal():
    text = rendered(render_moved(MOVED), width=60)
    assert "higher for 700 queries, lower for 3" in " ".join(text.split())
    assert "57 → 1" in text
    assert "1 → 1,200" in text
    assert "[b]before[/b]" in text
    assert text.count("right answer") == 2
    assert "first after  found instead" in text
    assert max(map(len, text.splitlines())) <= 60


def test_shorten_cuts_at_a_space():
    assert shorten("one\n two", 20) == "one two"
    assert shorten("alpha beta gamma", 13) == "alpha beta…"
    assert shorten("x" * 30, 10) == "x" * 9 + "…"
