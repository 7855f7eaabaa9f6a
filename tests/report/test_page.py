import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tokenweights import TokenWeightsError
from tokenweights.report import (
    Run,
    append_metrics,
    append_token_records,
    run_from_directory,
    run_report_html,
    trace_page_html,
)
from tokenweights.report.document import asset
from tokenweights.report.trace import first_and_last

METRICS = [{"step": step, "reward": step / 4} for step in range(4)]
EVALUATIONS = [
    {"step": 30, "accuracy/easy": 0.75, "accuracy/hard": 0.1},
    {"step": 0, "accuracy/easy": 0.5, "accuracy/hard": 0.125},
]


def text_of(page):
    body = page[page.index("<body>") : page.index('<script>"use strict"')]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def figures_of(page):
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


def test_the_table_compares_first_and_last_evaluation():
    text = text_of(run_report_html(Run(metrics=METRICS, evaluations=EVALUATIONS)))
    assert "easy 50.0% step 0 75.0% step 30 +25.0 points" in text
    assert "hard 12.5% step 0 10.0% step 30 \u22122.5 points" in text


def test_a_page_has_description_settings_figures_and_traces(record):
    run = Run(
        title="A <run>",
        description="First & foremost.\n\nSecond.",
        settings={"recipe": "low2high", "layer": 2},
        metrics=METRICS,
        evaluations=EVALUATIONS,
        records=[record(step=0), record(step=9), record(step=30), record(step=30)],
    )
    page = run_report_html(run)
    assert "<h1>A &lt;run&gt;</h1>" in page
    assert "<p>First &amp; foremost.</p>\n<p>Second.</p>" in page
    assert "<dt>recipe</dt><dd>low2high</dd>" in page
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Step 0", "Step 30"]
    assert page.count(asset("trace.css")) == page.count(asset("trace.js")) == 1
    assert "src=" not in page and "@import" not in page


def test_figures_are_well_formed_follow_the_page_and_do_not_clash(record):
    evaluations = [{"step": 0, 'accuracy/--><script>"&': 0.5}]
    page = run_report_html(Run(metrics=METRICS, evaluations=evaluations, records=[record()]))
    figures = figures_of(page)
    assert len(figures) == 5 and "href" in figures[0]
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert not [e for e in root.iter() if e.tag.endswith("script")]
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
        assert {link.removeprefix("#") for link in links} <= set(ids)
        assert "var(--ink, #1c1e21)" in figure and "fill: #1c1e21" not in figure
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_an_empty_run_says_what_is_missing():
    text = text_of(run_report_html(Run()))
    assert "No evaluation was recorded." in text and "No response was recorded." in text
    assert text.count("not recorded") == 8


def test_a_directory_gives_the_page_of_its_parts(tmp_path, record):
    described = {"title": "T", "description": "D", "settings": {"recipe": "full"}}
    (tmp_path / "run.json").write_text(json.dumps(described))
    for line in METRICS:
        append_metrics(tmp_path / "metrics.jsonl", line)
    for line in EVALUATIONS:
        append_metrics(tmp_path / "evaluations.jsonl", line)
    records = [record(step=step) for step in (0, 1, 2)]
    append_token_records(tmp_path / "tokens.jsonl", records)
    run = Run(
        **described, metrics=METRICS, evaluations=EVALUATIONS, records=(records[0], records[2])
    )
    assert run_from_directory(tmp_path) == run
    assert run_report_html(tmp_path) == run_report_html(str(tmp_path)) == run_report_html(run)


def test_a_directory_needs_metrics_only(tmp_path):
    with pytest.raises(TokenWeightsError, match=r"metrics\.jsonl"):
        run_report_html(tmp_path)
    append_metrics(tmp_path / "metrics.jsonl", {"step": 0})
    assert run_from_directory(tmp_path) == Run(metrics=[{"step": 0}])


def test_a_step_that_a_resumed_run_took_again_counts_once(tmp_path):
    for step, reward in ((0, 0.1), (1, 0.2), (2, 0.3), (1, 0.4), (2, 0.5)):
        append_metrics(tmp_path / "metrics.jsonl", {"step": step, "reward": reward})
    rewards = [line["reward"] for line in run_from_directory(tmp_path).metrics]
    assert rewards == [0.1, 0.4, 0.5]


def test_a_response_that_a_resumed_run_recorded_again_counts_once(tmp_path, record):
    taken = [(0, 0, 0.0), (1, 2, 0.1), (2, 4, 0.2), (2, 5, 0.3), (1, 2, 0.4), (2, 4, 0.5)]
    records = [record(step=step, sample_id=sample, reward=r) for step, sample, r in taken]
    append_token_records(tmp_path / "tokens.jsonl", [*records, *records[:1]])
    kept = run_from_directory(tmp_path).records
    assert [(entry.step, entry.sample_id, entry.reward) for entry in kept] == [
        (0, 0, 0.0),
        (2, 4, 0.5),
        (2, 5, 0.3),
    ]
    again = [record(step=0, sample_id=1, reward=reward) for reward in (0.0, 1.0)]
    page = trace_page_html(first_and_last(again))
    assert page == trace_page_html(again[1:])


def test_an_evaluation_that_was_made_again_counts_once():
    again = [{"step": 0, "accuracy/easy": 0.25}, {"step": 30, "accuracy/easy": 1.0}]
    text = text_of(run_report_html(Run(evaluations=[*EVALUATIONS, *again])))
    assert "easy 25.0% step 0 100.0% step 30 +75.0 points" in text


@pytest.mark.parametrize("text", ["{", "[]", '{"title": 1}', '{"name": "x"}'])
def test_a_wrong_description_is_refused(text, tmp_path):
    append_metrics(tmp_path / "metrics.jsonl", {"step": 0})
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TokenWeightsError, match=r"run\.json"):
        run_from_directory(tmp_path)


def test_records_and_traces_do_without_matplotlib():
    code = "import sys, tokenweights.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_trace_pages_and_reports_show_a_trace_alike(record):
    alone = trace_page_html([record()])
    report = run_report_html(Run(metrics=METRICS, records=[record()]))
    section = alone[alone.index('<section class="traces"') : alone.index("</main>")].strip()
    assert section in report
