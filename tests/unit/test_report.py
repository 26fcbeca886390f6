"""The report of a run: what is drawn and said, and that any folder is shown as what it is."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.cli import main
from distft.errors import JobError
from distft.orchestrate.run import report as write_report
from distft.report import charts, page
from distft.report.brief import brief, runs_in
from distft.report.charts import Chart, Line, Mark, running_mean, thin
from distft.report.compare import differing
from distft.report.compare import render as compared
from distft.report.curves import curves
from distft.report.facts import Facts, read
from distft.report.page import render, write
from distft.report.tables import plan, settings_beyond
from distft.report.verdict import judge, sentence_case
from distft.report.words import size
from distft.runs import Run, append_line, read_json, update_result, write_json
from distft.tuning.progress import SearchProgress
from tests.unit.tiny_runs import card, job_of, run_of, scores

MARKUP = "<script>document.title='taken'</script><img src=x onerror=alert(1)> & \"quoted\""
KINDS = ("language_modeling", "generation", "classification")


class Seen(HTMLParser):
    """The elements of a page, what its attributes do, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data


numbers = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), min_size=1, max_size=600)


@given(numbers, st.integers(1, 50))
def test_thinned_lines_keep_their_ends_and_extremes(heights: list[float], columns: int) -> None:
    y = np.array(heights)
    x = np.arange(len(y), dtype=np.float64)
    kept_x, kept_y = thin(x, y, columns)
    known = np.isfinite(y)
    assert len(kept_x) <= 4 * columns
    assert (y[kept_x.astype(int)] == kept_y).all()
    assert (np.diff(kept_x) > 0).all()
    if known.any():
        assert (kept_y.min(), kept_y.max()) == (y[known].min(), y[known].max())
        assert (kept_x[0], kept_x[-1]) == (x[known][0], x[known][-1])


def test_a_spike_of_one_step_among_many_stays_where_it_is() -> None:
    y = np.ones(100_000)
    y[77_777], y[12_345] = 9.0, -3.0
    x, kept = thin(np.arange(100_000.0), y)
    assert (x[kept.argmax()], x[kept.argmin()]) == (77_777, 12_345)


@given(numbers, st.integers(1, 40))
def test_the_running_mean_is_the_mean_of_what_is_around(heights: list[float], width: int) -> None:
    y = np.array(heights)
    found = running_mean(y, width)
    for place in range(len(y)):
        around = y[max(0, place - width // 2) : place + width // 2 + 1]
        around = around[np.isfinite(around)]
        assert np.isnan(found[place]) if not len(around) else found[place] == pytest.approx(around.mean(), abs=1e-3)


def test_a_chart_says_in_words_and_numbers_what_it_draws() -> None:
    x = np.arange(1.0, 101.0)
    line = Line("training", x, np.where(x == 50, 9.0, 3 - x / 100))
    drawn = charts.draw(Chart("loss", "Loss", (line,), marks=(Mark(40.0, "restart"),)))
    assert drawn is not None
    assert drawn.says == (
        "training: 2.99 at step 1, 2 at 100; lowest 2 at 100, highest 9 at 50. Marked: restart at step 40."
    )
    assert drawn.rows[0] == ("1", "2.99")
    assert drawn.rows[-1] == ("100", "2")
    assert len(drawn.rows) == charts.ROWS
    assert drawn.svg.startswith('<svg viewBox="0 0 360 216"')
    assert not re.search(r"#0a00|<metadata|xlink:href=\"(?!#)|url\((?!#)", drawn.svg)
    lens = json.loads(drawn.lens)
    assert lens["lines"][0]["x"] == x.tolist()
    assert "9" in lens["lines"][0]["y"]


def test_what_was_predicted_stands_beside_what_was_measured(tmp_path: Path) -> None:
    run = run_of("language_modeling", tmp_path / "run", steps=4)
    assert plan(read(run)) == []
    predicted = {"peak_memory_bytes": 4.4e9, "step_seconds": 18.0, "tokens_per_second": 110.0, "parameters": 1e8}
    measured = {"peak_memory_bytes": 4.0e9, "step_seconds": 20.0, "tokens_per_second": 100.0, "steps": 12}
    write_json(run.folder / "plan.json", {"predicted": predicted, "measured": measured})
    assert [tuple(row.values()) for row in plan(read(run))] == [
        ("peak memory", "4.4 GB", "4 GB", "+10%"),
        ("step", "18 s", "20 s", "-10%"),
        ("tokens per second", "110", "100", "+10%"),
    ]
    assert "Plan against measured" in render(read(run))


def test_of_an_older_run_the_first_answers_are_shown(tmp_path: Path) -> None:
    run = run_of("generation", tmp_path / "run", steps=4, text="the answer of an older run")
    run.examples.unlink()
    text = Seen(render(read(run))).text
    assert "First in the data" in text
    assert text.count("the answer of an older run") > 3


def test_a_chart_without_a_point_is_none() -> None:
    empty = np.array([])
    assert (
        charts.draw(Chart("loss", "Loss", (Line("a", empty, empty), Line("b", np.ones(1), np.full(1, np.nan))))) is None
    )


@pytest.mark.parametrize(
    ("changes", "call", "title"),
    [
        ({"perplexity": (-4.0, 0.5)}, "ship", "Ship it"),
        ({"perplexity": (-4.0, 0.5), "loss": (0.3, 0.1)}, "look", "Better: ship it after a look at the notes"),
        ({"perplexity": (-0.2, 0.5)}, "hold", "Do not ship: no clear gain"),
        ({"perplexity": (4.0, 0.5)}, "hold", "Do not ship: worse than the base model"),
    ],
)
def test_the_verdict_follows_from_the_interval(
    tmp_path: Path, changes: dict[str, tuple[float, float]], call: str, title: str
) -> None:
    run = run_of("language_modeling", tmp_path / "run")
    write_json(run.evaluation, scores(**changes))
    write_json(run.card, {})  # without leaks
    verdict = judge(read(run))
    assert (verdict.call, verdict.title) == (call, title)
    if call == "ship":
        assert verdict.finding == (
            "Perplexity went from 10.00 to 6.000: 4.000 lower than the base model "
            "(95 % interval 3.500 to 4.500, paired, 80 documents of the test split)."
        )


def test_what_is_pressing_stands_first_and_other_gains_are_told(tmp_path: Path) -> None:
    run = run_of("language_modeling", tmp_path / "run", steps=4)
    write_json(run.evaluation, scores(perplexity=(-4.0, 0.5), loss=(0.3, 0.1), bits_per_byte=(-0.3, 0.1)))
    reasons = judge(read(run)).reasons
    assert [reason.level for reason in reasons] == sorted(
        (reason.level for reason in reasons), key=["bad", "note", "good"].index
    )
    told = [reason.text for reason in reasons]
    assert "Loss got worse by 0.3000 (95 % interval 0.2000 to 0.4000)." in told
    assert "Better for sure in other scores: bits per byte." in told


def test_a_table_of_labels_and_what_each_example_was_taken_for(tmp_path: Path) -> None:
    made = render(read(run_of("classification", tmp_path / "run", steps=4)))
    assert re.search(r'<table id="labels">.*?<th scope="col" class="number">train</th>', made, re.DOTALL)
    assert re.search(r"labels&#39; shares [\d.]+, tuned", made)
    assert 'aria-label="wrong"' in made or 'aria-label="right"' in made


def test_what_did_not_change_is_said_to_be_the_same(tmp_path: Path) -> None:
    run = run_of("language_modeling", tmp_path / "run", steps=4)
    write_json(run.evaluation, scores(perplexity=(0.0, 0.5)))
    assert judge(read(run)).finding == (
        "Perplexity is the same as that of the base model "
        "(95 % interval -0.5000 to 0.5000, paired, 80 documents of the test split)."
    )


def test_what_speaks_against_a_better_model_is_said(tmp_path: Path) -> None:
    run = run_of("generation", tmp_path / "run")
    found = scores(chrf=(5.0, 1.0), stop_rate=(0.0, 1.0))
    found["best"]["test"]["stop_rate"]["value"] = 0.4
    found["difference"]["test"]["chrf"]["n"] = 12
    write_json(run.evaluation, found)
    update_result(run, test_looks=[{"model": "best"}] * 3)
    told = [reason.text for reason in judge(read(run)).reasons if reason.level == "note"]
    assert [text.split()[0:3] for text in told] == [
        ["Only", "12", "documents"],
        ["40%", "of", "the"],
        ["The", "test", "split"],
        ["1", "held-out", "documents"],
        ["1", "held-out", "documents"],
    ]
    (run.export / "distft.json").unlink()
    assert judge(read(run)).title == "Better, but do not ship yet"


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_data_says_is_text(tmp_path: Path, kind: str) -> None:
    run = run_of(kind, tmp_path / "a&<b>", text=MARKUP, searched=4, kill=20, resize=40)
    job_text = f"# {MARKUP}\n{run.job.read_text()}"
    run.job.write_text(job_text)
    update_result(run, reason=MARKUP)
    made = render(read(run))
    seen = Seen(made)
    assert seen.elements.count("script") == 1
    assert not {"img", "iframe", "object", "form", "b" if kind == "language_modeling" else "img"} & set(
        seen.elements[:40]
    )
    assert "img" not in seen.elements
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert seen.text.count(MARKUP) >= 5
    for place in ("a&<b>", job_text.strip().splitlines()[0]):
        assert place in seen.text
    if kind == "classification":
        assert "storm & <b>rain</b>" in seen.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_needs_nothing_but_itself(tmp_path: Path, kind: str) -> None:
    made = render(read(run_of(kind, tmp_path / "run", searched=6)))
    links = [value for name, value in Seen(made).attributes if name in ("src", "href", "xlink:href") and value]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"@import|url\((?!#)", made)
    assert len(made) < 5_000_000


def test_pictures_have_a_text_beside_them_and_ids_are_single(tmp_path: Path) -> None:
    made = render(read(run_of("classification", tmp_path / "run", searched=6, kill=20)))
    pictures = re.findall(r'role="img" aria-label="([^"]*)"[^>]*>\s*<svg', made)
    assert len(pictures) == made.count("<svg ") == 9
    assert all(len(text) > 20 for text in pictures)
    ids = [value for name, value in Seen(made).attributes if name == "id"]
    assert sorted(set(ids)) == sorted(ids)
    assert {"loss", "accuracy", "learning-rate", "grad-norm", "speed", "memory", "search-curves"} <= set(ids)


@pytest.mark.parametrize(
    ("workers", "labels"),
    [(3, ["rank 0", "rank 1", "rank 2"]), (9, ["fullest rank", "emptiest rank"])],
)
def test_memory_is_drawn_by_rank_as_long_as_they_can_be_told_apart(
    tmp_path: Path, workers: int, labels: list[str]
) -> None:
    facts = read(run_of("language_modeling", tmp_path / "run", steps=8, workers=workers))
    (chart,) = (chart for chart in curves(facts) if chart.key == "memory")
    assert [line.label for line in chart.lines] == labels
    peaks = facts.steps[3]["rank_peak_memory_bytes"]
    wanted = peaks if workers == 3 else [max(peaks), min(peaks)]
    assert [line.y[3] for line in chart.lines] == pytest.approx([peak / 1e9 for peak in wanted])


def test_restarts_and_resizes_are_marked_and_steps_done_again_are_shown_once(tmp_path: Path) -> None:
    facts = read(run_of("language_modeling", tmp_path / "run", kill=20, resize=40))
    assert [line["step"] for line in facts.steps] == list(range(1, 61))
    text = Seen(render(facts)).text
    assert facts.spent is not None
    assert facts.spent.replay > 0
    for words in ("Done again", "Restarts", "workers began 3 times", "rank 1 is gone <script>alert(1)</script>"):
        assert words in text
    made = render(facts)
    assert "Marked: restart at step 17, resize at step 40" in made


def _half(run: Run) -> None:
    update_result(run, status="running")
    content = run.metrics.read_bytes()
    run.metrics.write_bytes(content[: len(content) // 2])


def _failed(run: Run) -> None:
    update_result(run, status="failed", reason="the loss is nan")


def _damaged(run: Run) -> None:
    run.result.write_text('{"status": "fin')
    run.card.write_bytes(b"\xff\xfe\x00")
    run.evaluation.write_text("[1, 2]")
    run.metrics.write_text(run.metrics.read_text().replace('"kind": "train"', '"kind": "tra', 7))
    run.trials.write_text('{"id": "000"}\n')


def _older(run: Run) -> None:
    resolved = read_json(run.resolved)
    resolved["job"]["model"]["flavour"] = "vanilla"
    write_json(run.resolved, resolved)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        line.pop("step_seconds", None)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _bare(run: Run) -> None:
    for path in (run.result, run.resolved, run.environment, run.card, run.metrics):
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "title", "says"),
    [
        (_half, "Broken off at step", ["last heard of", "It goes on with --resume."]),
        (_failed, "Failed at step 60", ["It failed: the loss is nan"]),
        (
            _damaged,
            "Broken off at step 60 of 60",
            [
                "result.json is damaged",
                "card.json is damaged: it is no text",
                "evaluation.json holds something else",
                "7 of 74 lines of metrics.jsonl cannot be read",
                "trials.jsonl is damaged or of another version",
            ],
        ),
        (_older, "", ["another version of distft", "where the time went cannot be told"]),
        (_bare, "Begun, and nothing trained yet", ["resolved.json is not there"]),
    ],
)
def test_a_run_is_shown_as_what_it_is(tmp_path: Path, harm: object, title: str, says: list[str]) -> None:
    run = run_of("language_modeling", tmp_path / "run", status="finished" if harm is _older else "trained", searched=3)
    assert callable(harm)
    harm(run)
    facts = read(run)
    assert judge(facts).title.startswith(title)
    assert judge(facts).call == "hold"
    text = Seen(render(facts)).text
    for words in says:
        assert words in text
    told = brief(run)
    assert told.status in ("silent", "failed", "begun", "finished")
    json.dumps(told.as_json(), allow_nan=False)


@pytest.mark.parametrize("harm", [_half, _failed, _damaged, _older, _bare])
def test_json_of_a_run_in_any_state_is_one_document_that_says_so(
    tmp_path: Path, harm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("language_modeling", tmp_path / "run", status="finished" if harm is _older else "trained", searched=3)
    harm(run)
    told = {}
    for command in (["runs"], ["show", "run"], ["report", "run"]):
        assert leaves(*command, "--runs", str(tmp_path), "--json") == 0
        output = capsys.readouterr()
        assert output.err == ""
        told[command[0]] = json.loads(output.out)
    (listed,) = told["runs"]
    assert told["report"]["page"] == str(run.report)
    assert told["report"]["runs"] == [{**listed, "bytes": told["report"]["runs"][0]["bytes"]}]
    assert (listed["status"], listed["verdict"]) == (brief(run).status, judge(read(run)).title)
    assert {name: told["show"][name] for name in ("status", "verdict", "problems")} == {
        name: listed[name] for name in ("status", "verdict", "problems")
    }
    assert bool(listed["problems"]) == (harm is not _failed)


def test_json_where_nothing_was_run_is_an_empty_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaves("runs", "--runs", str(tmp_path / "nowhere"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert leaves("show", "nothing", "--runs", str(tmp_path), "--json") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "there is no run 'nothing'" in output.err


def leaves(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def spoilt(value: Any, draw: random.Random) -> Any:
    """The same with one value in it that is not what it should be."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        return {**value, key: spoilt(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        return [*value[:place], spoilt(value[place], draw), *value[place + 1 :]]
    return draw.choice([None, "?", -1, 1.5, [], {}, [1], {"a": 1}, True])


@pytest.mark.parametrize("seed", range(24))
def test_whatever_a_file_holds_there_is_a_page(tmp_path: Path, seed: int) -> None:
    run = run_of(KINDS[seed % 3], tmp_path / "run", steps=6, searched=3, kill=4)
    draw = random.Random(seed)
    for path in (run.result, run.resolved, run.environment, run.card, run.evaluation, run.examples, run.search_summary):
        value = read_json(path)
        for _ in range(3):
            value = spoilt(value, draw)
        path.write_text(json.dumps(value))
    lines = run.metrics.read_text().splitlines()
    spoilt_lines = [json.dumps(spoilt(json.loads(line), draw)) if draw.random() < 0.3 else line for line in lines]
    run.metrics.write_text("\n".join(spoilt_lines))
    text = Seen(render(read(run))).text
    assert "How to get this again" in text
    assert "run: report" in text
    assert "2 runs compared" in compared([read(run), read(run)])
    assert leaves("show", str(run.folder)) == leaves("show", str(run.folder), "--json") == 0
    assert leaves("runs", "--runs", str(tmp_path)) == 0


def test_a_run_that_goes_on_is_no_broken_one(tmp_path: Path) -> None:
    run = run_of("language_modeling", tmp_path / "run", status="running")
    last = json.loads(run.metrics.read_text().splitlines()[-2])
    append_line(run.metrics, {**last, "time": time.time()})
    assert judge(read(run)).title == "Still running at step 60 of 60"


def test_settings_that_came_with_set_are_part_of_the_command(tmp_path: Path) -> None:
    run = run_of("language_modeling", tmp_path / "run")
    assert settings_beyond(read(run)) == []
    resolved = read_json(run.resolved)
    changed = job_of("language_modeling", tmp_path, train={"steps": 7}, cluster={"workers": {"min": 1, "max": 2}})
    write_json(run.resolved, {**resolved, "job": changed.dump()})
    assert settings_beyond(read(run)) == [
        "train.epochs=null",
        "train.steps=7",
        "cluster.workers.min=1",
        "cluster.workers.max=2",
    ] or settings_beyond(read(run)) == ["train.epochs=null", "train.steps=7", 'cluster.workers={"min": 1, "max": 2}']


def test_a_password_in_the_job_file_is_not_passed_on(tmp_path: Path) -> None:
    track = {"mlflow": "https://me:hunter2@tracking.example/x"}
    runs = [run_of("language_modeling", tmp_path / name, steps=4) for name in ("a", "b")]
    resolved = read_json(runs[0].resolved)
    write_json(runs[0].resolved, {**resolved, "job": job_of("language_modeling", tmp_path, track=track).dump()})
    runs[0].job.write_text(runs[0].job.read_text() + f"\n# {track}\n")
    for made in (render(read(runs[0])), compared([read(run) for run in runs])):
        assert "hunter2" not in made
        assert "https://***@tracking.example/x" in made


def test_runs_are_compared_by_what_differs(tmp_path: Path) -> None:
    first, second = (
        run_of("language_modeling", tmp_path / name, steps=steps) for name, steps in (("a", 60), ("b", 80))
    )
    resolved = read_json(second.resolved)
    resolved["job"]["train"]["learning_rate"] = 3e-4
    write_json(second.resolved, resolved)
    write_json(second.evaluation, scores(perplexity=(-8.0, 0.5)))
    write_json(second.card, {**card("language_modeling", "other"), "fingerprint": "other"})
    both = [read(first), read(second)]
    assert ("train.learning_rate", ["2e-05", "0.0003"]) in differing(both)
    text = Seen(compared(both)).text
    assert "b has the best perplexity: 2.000 (1.000 to 3.000). Its interval is apart from that of a" in text
    assert "different data: their scores do not compare" in text


def test_a_list_of_runs_reads_the_ends_of_long_files_only(tmp_path: Path) -> None:
    run = run_of("language_modeling", tmp_path / "long", steps=600)
    assert run.metrics.stat().st_size > 3 << 16
    few = read(run, whole=False)
    assert 1 < len(few.lines) < 250
    assert (few.step, few.planned, few.when) == (600, 600, read(run).when)
    assert few.problems == ()
    run_of("generation", tmp_path / "short", steps=4)
    found = {one.name: one for one in runs_in(tmp_path)}
    assert set(found) == {"long", "short"}
    assert found["long"].bytes > run.metrics.stat().st_size
    assert (found["short"].metric, found["short"].better) == ("chrf", True)
    assert runs_in(tmp_path / "nowhere") == []


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        run_of("classification", tmp_path / name, steps=8)
    runs = ("--runs", str(tmp_path))
    assert leaves("report", "one", *runs) == 0
    assert capsys.readouterr().out == f"{tmp_path}/one/report.html\n"
    assert leaves("report", "--compare", "one", "two", *runs) == 0
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text()
    assert leaves("report", "one", "two", *runs) == 2
    assert leaves("report", "--compare", "one", *runs) == 2
    capsys.readouterr()
    assert leaves("runs", *runs, "--json") == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["one", "two"]
    assert leaves("runs", *runs) == 0
    assert "accuracy 10.30" in capsys.readouterr().out
    assert leaves("show", "two", *runs, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "Better: ship it after a look at the notes"
    assert told["files"]["export/"] > 0
    assert leaves("show", "two", *runs) == 0
    assert "Accuracy went from 10.00 to 10.30" in capsys.readouterr().out


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """As a user who may write nothing; root may write anywhere, and becomes one."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_where_a_folder_cannot_be_written_another_file_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as made:  # which others may enter, unlike pytest's own
        runs, elsewhere = Path(made, "runs"), Path(made, "elsewhere")
        run = run_of("language_modeling", runs / "run", steps=4)
        elsewhere.mkdir()
        elsewhere.chmod(0o777)
        Path(made).chmod(0o755)
        for folder in (runs, run.folder):
            folder.chmod(0o555)
        other = ("--to", str(elsewhere / "page.html"))
        assert leaves("report", "run", "--runs", str(runs), *other) == 0  # loads what nobody could not
        (elsewhere / "page.html").unlink()
        with nobody():
            assert leaves("report", "run", "--runs", str(runs)) == 2
            assert leaves("report", "run", "--runs", str(runs), *other) == 0
        told = capsys.readouterr().err
        assert f"{run.report}: the report cannot be written: Permission denied" in " ".join(told.split())
        assert "distft report RUN --to FILE.html" in told
        assert (elsewhere / "page.html").stat().st_size > 10_000
        for folder in (runs, run.folder):
            folder.chmod(0o755)


def test_a_page_is_whole_or_not_there(tmp_path: Path) -> None:
    run = run_of("language_modeling", tmp_path / "run", steps=4)
    run.report.mkdir()
    with pytest.raises(JobError, match="cannot be written"):
        write(run)
    assert not list(run.folder.glob("*.part"))


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    digits = colour.lstrip("#")
    digits = "".join(2 * one for one in digits) if len(digits) == 3 else digits
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_in_both_schemes(scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\n *\}", (Path(page.__file__).parent / "page.css").read_text(), re.DOTALL)
    colours = [dict(re.findall(r"--([\w]+): (#\w+)", block)) for block in blocks]
    known = {**colours[0], **colours[scheme]}
    for ink in ("ink", "muted", "accent", "good", "note", "bad"):
        for paper in ("page", "card", "soft"):
            assert contrast(known[ink], known[paper]) >= 4.5, (ink, paper)
    for line in ("a", "b", "c", "d", "e", "f"):
        assert contrast(known[line], known["card"]) >= 3, line


def test_names_begin_a_sentence_without_losing_their_own_letters() -> None:
    found = [sentence_case(name) for name in ("perplexity", "macro F1", "chrF", "ROUGE-L", "bits per byte")]
    assert found == ["Perplexity", "Macro F1", "chrF", "ROUGE-L", "Bits per byte"]


def test_sizes_are_told_in_powers_of_ten() -> None:
    assert [size(count) for count in (812, 5_200, 1_614_308_353)] == ["812 bytes", "5.2 kB", "1.61 GB"]


def test_facts_of_a_run_without_files_are_empty(tmp_path: Path) -> None:
    facts = read(Run(tmp_path))
    assert isinstance(facts, Facts)
    assert (facts.step, facts.kind, facts.headline, facts.problems) == (0, "unknown", None, ())


class Told:
    """A listener that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str) -> None:
        self.notes.append(f"[{name}]")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, done: int, of: int) -> None: ...

    def record(self, record: dict[str, Any]) -> None: ...

    def trials(self, progress: SearchProgress) -> None: ...


def test_a_report_that_fails_fails_no_run_and_is_told_in_a_line(tmp_path: Path) -> None:
    run, told = run_of("language_modeling", tmp_path / "run", steps=4), Told()
    write_report(run, told)
    assert told.notes == ["[report]"]
    assert read_json(run.result)["paths"]["report"] == str(run.report)
    run.report.unlink()
    run.report.mkdir()
    write_report(run, told)
    assert told.notes[2].startswith(f"  no report: {run.report}: the report cannot be written: Is a directory")
    assert "\n" not in told.notes[2]
