"""The report: what it shows is what the rows hold, and nothing in them breaks or leaves it."""

from __future__ import annotations

import csv
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pocketslm.errors import UsageError
from pocketslm.profiling import charts
from pocketslm.profiling.charts import Axis, Bar, Series
from pocketslm.profiling.machine import Limits, Machine
from pocketslm.profiling.records import Energy, Measurement, TracePoint, append_records
from pocketslm.profiling.report import _Rows, html, write_report

HOSTILE = "<script>alert('x')</script>&\"\x00\ud800"
SECTIONS = [
    "Summary",
    "Prompts with answers",
    "Decoding",
    "Prefill",
    "Time to the first token",
    "Operators",
    "Roofline",
    "Memory",
    "Over time",
    "Quality and size",
    "Speed and size",
    "Energy",
    "Devices",
]
ROUNDING = 0.06  # px; coordinates have one decimal


def svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg .*?</svg>", page, re.DOTALL)]


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def full(make_row: Any, **changes: Any) -> list[Measurement]:
    """Rows with all that a report can show, of two artefacts."""
    trace = tuple(
        TracePoint(i * 10**9, {"cpu": 40.0 + i}, (2_000_000 - i,), 10**8 + i, 10**8, 3.5)
        for i in range(4)
    )
    common = {
        "bytes_per_token": 90_000_000,
        "macs_per_token": 106_000_000,
        "head_macs": 28_000_000,
        "limits": Limits(30e9, 400e9),
        "energy": Energy(12.0, "/sys/energy", "package"),
        "trace": trace,
        "operator_ns": {f"operator {i}": i for i in range(12)},
    } | changes
    rows = []
    for artefact, size, kl in (("q4", 98_000_000, 0.003), ("q3", 70_000_000, 0.2)):
        own = common | {"artefact": artefact, "size_bytes": size, "quality": {"kl": kl}} | changes
        rows += [make_row(**own, n_prompt=n) for n in (64, 512)]
        decode = own | {"n_prompt": 0, "n_gen": 2, "step_ns": (1, 2, 3, 4)}
        rows += [make_row(**decode, n_depth=n) for n in (0, 512)]
        rows.append(make_row(**decode | {"n_prompt": 64, "prefill_ns": (9, 8)}, workload="ask"))
    return rows


def test_every_section_of_full_rows_is_well_formed(make_row: Any) -> None:
    page = html(full(make_row))
    assert titles(page) == SECTIONS
    assert len(svgs(page)) == 13
    assert "http" not in page
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import|\bsrc=|\bhref=", page)
    assert "nan" not in re.sub("[a-z]{2}nan|nan[a-z]", "", page)


def test_a_section_stands_only_where_there_is_data(make_row: Any) -> None:
    bare = {"peak_rss_bytes": None, "rss_anon_bytes": None, "quality": None}
    page = html([make_row(**bare)])
    assert titles(page) == ["Summary", "Prefill", "Time to the first token", "Devices"]


def test_points_stand_where_their_values_are(make_row: Any) -> None:
    """Runs of one setup are one point: the median over all their repetitions."""
    one = make_row(n_prompt=100, samples_ns=(100_000_000,) * 2)  # 1000 tokens/s
    two = make_row(n_prompt=100, samples_ns=(50_000_000,) * 3)  # 2000
    page = html([one, two])
    found = re.findall(r"<title>(.*?)</title>", page)
    assert "tiny · pocketslm 0.1.0 (onnxruntime 1.0): 100, 2000" in found
    assert "tiny · pocketslm 0.1.0 (onnxruntime 1.0): 100, 50" in found


def test_scales_are_straight() -> None:
    """Of a linear and a logarithmic axis equal steps are equally wide; zero is at the bottom."""
    text = charts.plot(
        [Series("", [(1, 0), (10, 50), (100, 100)])], Axis("x", log=True), Axis("y"), "t"
    )
    dots = [
        (float(c.attrib["cx"]), float(c.attrib["cy"])) for c in ET.fromstring(text).iter("circle")
    ]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert abs((x1 - x0) - (x2 - x1)) < 2 * ROUNDING
    assert abs((y0 - y1) - (y1 - y2)) < 2 * ROUNDING
    assert y0 == charts.TOP + charts.PLOT_HEIGHT
    assert x0 < x1 < x2


def test_bars_are_as_long_as_their_values() -> None:
    text = charts.bars([Bar("a", [(10, 0), (30, 1)], "40", 80.0), Bar("b", [(80, 0)], "80")], "t")
    widths = [float(rect.attrib["width"]) for rect in ET.fromstring(text).iter("rect")]
    assert [width / widths[2] for width in widths] == pytest.approx([1 / 8, 3 / 8, 1], abs=1e-3)


def test_round_ticks() -> None:
    assert charts.linear_ticks(0, 97) == [0, 20, 40, 60, 80]
    assert charts.linear_ticks(0.012, 0.03) == pytest.approx([0.015, 0.02, 0.025, 0.03])
    assert charts.log_ticks(0.9, 60) == pytest.approx([1, 2, 5, 10, 20, 50])
    assert charts.log_ticks(3, 2e4) == pytest.approx([10, 100, 1000, 10_000])
    assert [charts.number(n) for n in (0, 0.05, 1500, 12_000, 2.5e6)] == [
        "0",
        "0.05",
        "1500",
        "12k",
        "2.5M",
    ]


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 9.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (2.0, 5.0)]
    assert charts.front(points) == [(1.0, 9.0), (2.0, 3.0), (4.0, 1.0)]


def test_artefacts_of_one_name_are_two_lines_and_two_colours(make_row: Any) -> None:
    rows = [
        make_row(artefact_sha256=digit * 64, samples_ns=(ns, ns))
        for digit, ns in (("a", 10**9), ("b", 10**7))
    ]
    page = html(rows)
    assert "tiny (aaaaaaaa)" in page
    assert "tiny (bbbbbbbb)" in page
    assert len(_Rows(rows).setups) == 2
    assert [
        len(one.points) for one in _Rows(rows).curves(lambda r: 1, lambda r: r.prefill_tps)
    ] == [
        1,
        1,
    ]


def test_hostile_names_are_text(make_row: Any, tmp_path: Path) -> None:
    machine = Machine(HOSTILE, 2, HOSTILE, 1, HOSTILE, HOSTILE, HOSTILE, HOSTILE, (), HOSTILE)
    named = {"machine": machine, "software": {HOSTILE: HOSTILE}, "started": HOSTILE}
    named |= dict.fromkeys(("artefact", "model", "runtime", "runtime_version"), HOSTILE)
    named |= {"backend": HOSTILE, "energy": Energy(1.0, HOSTILE, HOSTILE)}
    rows = full(make_row, **named)
    append_records(tmp_path / "records.jsonl", rows)
    write_report([tmp_path / "records.jsonl"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(svgs(page)) > 5
    assert "<script" not in page
    assert "\x00" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300, "3", None, [1]])
def test_no_figure_is_nan(make_row: Any, bad: Any) -> None:
    """Records check counts; figures of sensors and probes are as a file has them."""
    trace = tuple(TracePoint(i, {"cpu": bad}, (1,), None, None, bad) for i in range(4))
    rows = full(
        make_row,
        limits=Limits(bad, bad),
        energy=Energy(bad, "", "package"),
        trace=trace,
        quality={"kl": bad, "perplexity": bad},
    )
    page = html(rows)
    assert svgs(page)
    assert not re.search(r"\b(nan|inf)\b", page, re.IGNORECASE)
    assert not {"Roofline", "Energy", "Quality and size"} & set(titles(page))


def test_markdown_and_csv_by_suffix(make_row: Any, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    append_records(records, full(make_row))
    assert write_report([records, records], tmp_path / "report.md") == 20
    assert (tmp_path / "report.md").read_text().count(
        "pp512"
    ) == 8  # of which half in the table of operators
    write_report([records], tmp_path / "report.csv")
    lines = (tmp_path / "report.csv").read_text().splitlines()
    assert len(list(csv.DictReader(lines))) == 10


def test_the_roofline_alone_by_suffix(make_row: Any, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    append_records(records, full(make_row))
    write_report([records], tmp_path / "roofline.svg")
    drawing = ET.fromstring((tmp_path / "roofline.svg").read_text())
    assert "pp512" in "".join(drawing.itertext())


def test_errors_leave_nothing(make_row: Any, tmp_path: Path) -> None:
    empty, records = tmp_path / "empty.jsonl", tmp_path / "records.jsonl"
    empty.write_text("\n")
    append_records(records, [make_row()])
    for sources, name, message in (
        ([empty], "report.html", "holds no records"),
        ([], "report.html", "no records"),
        ([records], "report.pdf", "'.pdf', expected one of: .html, .svg, .md"),
        ([records], "report.svg", "no record has the limits"),
        ([records], "nowhere/report.html", "cannot write the report"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            write_report(sources, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "records.jsonl"]


def test_a_browser_draws_it(make_row: Any, tmp_path: Path) -> None:
    """Headless Chromium lays the page out: every chart has a size, no text leaves its chart."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    page = tmp_path / "page.html"
    probe = (
        "<script>document.title = [...document.querySelectorAll('svg')].map(svg => {"
        "const box = svg.getBoundingClientRect();"
        "const out = [...svg.querySelectorAll('text')].some(text => {"
        "const t = text.getBoundingClientRect();"
        "return t.left < box.left || t.right > box.right || t.bottom > box.bottom;});"
        "return box.width > 300 && box.height > 60 && !out ? 'drawn' : 'broken';}).join(' ')"
        "</script></body>"
    )
    page.write_text(html(full(make_row)).replace("</body>", probe))
    shot = tmp_path / "page.png"
    common = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu"]
    common += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    asked = [*common, f"--screenshot={shot}", "--dump-dom", page.as_uri()]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert title[1].split() == ["drawn"] * 13
