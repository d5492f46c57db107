"""The report: complete, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import MIB, RunPlan, write_run

from lowrank.trainers.cli import main
from lowrank.trainers.files import real_name
from lowrank.trainers.report import RunFolderError, read_run, write_comparison, write_report
from lowrank.trainers.report.drawing import DARK, LIGHT, POINT_LIMIT
from lowrank.trainers.report.headline import headline
from lowrank.trainers.report.series import Series, smoothed, thinned

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids.update(value for name, value in attrs if name == "id" and value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def report(folder: Path, plan: RunPlan | None = None) -> Page:
    return Page(write_report(write_run(folder, plan or RunPlan())).read_text(encoding="utf-8"))


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(text)


def test_report_of_a_finished_run_has_every_section_and_figure(tmp_path: Path) -> None:
    page = report(tmp_path / "run-001")
    assert page.tags["figure"] == 12
    assert page.tags["svg"] == 13  # the loss once more for narrow screens
    for words in (
        "run-001",
        "finished",
        "llama_9m (8.82M parameters) trained with galore_adamw on stdlib",
        "46% of AdamW's 68.0 MiB",
        "better than the mark, 6.512",
        "in epoch 2, none skipped",
        "Captured energy at each refresh",
        "update_proj_gap",
        "torch_version 2.13.0",
        "ab" * 32,
    ):
        assert words in page.text


def test_report_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = report(tmp_path / "run")
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")}
    assert "src" not in names
    for name, value in page.attributes:
        if name in ("href", "xlink:href"):
            assert value is not None
            assert value.startswith("#")
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


@pytest.mark.slow
def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    page = report(tmp_path / "run", RunPlan(skips=(20,), events=((50, "merge", "all"),)))
    assert {name: count for name, count in page.ids.items() if count > 1} == {}
    for name, value in page.attributes:
        if value is None:
            continue
        if name == "href" or name == "aria-labelledby":
            assert value.removeprefix("#") in page.ids
        for target in re.findall(r"url\(#([^)]+)\)", value):
            assert target in page.ids


def test_figures_have_titles_and_take_their_colours_from_the_page(tmp_path: Path) -> None:
    page = report(tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.tags["svg"] == len(re.findall(r'role="img" aria-labelledby=', text))
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert "<title" in svg
        # Black and white would vanish in one of the two modes.
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)) == set()
    assert "validation loss from 8.320 to" in page.text


@pytest.mark.slow
def test_report_is_the_same_each_time(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    before = write_report(folder).read_bytes()
    (folder / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"summary\.json is not valid JSON"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_unfinished_run_is_called_so_and_shows_its_latest_figures(tmp_path: Path) -> None:
    page = report(tmp_path / "run", RunPlan(steps=140, total_steps=600, finished=False))
    assert "not finished" in page.text
    assert "140 of 600 steps" in page.text
    assert "This run has not ended" in page.text
    assert "31.0 MiB" in page.text


def test_torn_last_line_is_tolerated_without_a_word(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RunPlan(finished=False))
    whole = read_run(folder)
    append(folder, '{"kind": "train", "step": 301, "lo')
    torn = read_run(folder)
    assert torn.damaged_lines == 0
    assert torn.loss.values.tolist() == whole.loss.values.tolist()


def test_damaged_line_within_is_left_out_and_reported(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    append(folder, '{"kind": "tr\n[1, 2]\n{"kind": "train", "step": 301, "loss": 4.0}\n')
    run = read_run(folder)
    assert run.damaged_lines == 2
    assert run.loss.steps[-1] == 301
    assert "2 damaged lines" in Page(write_report(folder).read_text(encoding="utf-8")).text


@pytest.mark.slow
def test_run_without_refreshes_has_no_subspace_section(tmp_path: Path) -> None:
    page = report(tmp_path / "run", RunPlan(optimizer="adamw", refreshes=False, basis=0))
    assert "Subspaces" not in page.text
    assert page.tags["figure"] == 9


def test_run_that_has_only_begun_still_gives_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.tags["figure"] == 0
    assert "No step has been logged yet." in page.text


def test_run_of_one_step(tmp_path: Path) -> None:
    page = report(tmp_path / "run", RunPlan(steps=1))
    assert page.tags["figure"] >= 9


def test_null_and_missing_values_leave_gaps_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RunPlan(steps=20))
    append(folder, '{"kind": "train", "step": 21, "loss": null, "lr": 0.1, "grad_norm": NaN}\n')
    run = read_run(folder)
    assert run.loss.steps[-1] == 20
    assert run.gradient_norm.steps[-1] == 20
    assert run.learning_rate.steps[-1] == 21
    write_report(folder)


def test_skipped_steps_and_events_are_marked_and_listed(tmp_path: Path) -> None:
    plan = RunPlan(skips=(30, 31), events=((50, "merge", "35 matrices"), (100, "switch", "2 rows")))
    page = report(tmp_path / "run", plan)
    assert "skipped steps, 2" in page.text
    assert "merge, switch" in page.text
    assert "50 merge 35 matrices" in page.text
    assert "30 skipped step nan_loss" in page.text


@pytest.mark.slow
def test_many_events_become_ticks_and_a_closed_list(tmp_path: Path) -> None:
    events = tuple((step, "switch", "") for step in range(1, 280))
    page = report(tmp_path / "run", RunPlan(events=events))
    assert "279 events" in page.text
    assert "The first 200 of 279" in page.text


def test_everything_from_the_config_is_escaped(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>&$\\frac{'
    config = {"note": nasty, "data": {"source": nasty}, nasty: {nasty: [nasty, None, True]}}
    events = ((50, nasty, nasty),)
    plan = RunPlan(config=config, events=events, summary={"model": nasty, "data": nasty})
    folders = [
        write_run(tmp_path / "<b>_$x^{", plan),
        write_run(tmp_path / "_a", RunPlan(steps=60)),
    ]
    page = Page(write_report(folders[0]).read_text(encoding="utf-8"))
    assert page.tags["script"] == 0
    assert page.tags["b"] == 3  # the page's own: model, optimizer, data
    assert nasty in page.text
    compared = Page(write_comparison(folders, tmp_path / "c.html").read_text(encoding="utf-8"))
    assert compared.tags["script"] == compared.tags["b"] == 0
    assert "<b>_$x^{" in compared.text


@pytest.mark.slow
def test_long_run_is_thinned_says_so_and_stays_small(tmp_path: Path) -> None:
    page = report(tmp_path / "run", RunPlan(steps=4000, gap=200, eval_every=500))
    assert f"of 4,000 points at most {POINT_LIMIT} are drawn" in page.text
    assert (tmp_path / "run" / "report.html").stat().st_size < 600_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [1", r"config\.yaml is not valid YAML"),
        ("config.yaml", "- 1", r"config\.yaml holds a list; a mapping is accepted"),
        ("summary.json", "[]", r"summary\.json holds a list; an object is accepted"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = write_run(tmp_path / "run", RunPlan(steps=2))
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(RunFolderError, match=message):
        write_report(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "summary.json", "."])
def test_links_that_lead_nowhere_are_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", RunPlan(steps=2))
    loop = tmp_path / "again" if name == "." else folder / name
    loop.unlink(missing_ok=True)
    loop.symlink_to(loop.name)
    status = main(["report", str(loop if name == "." else folder)])
    errors = capsys.readouterr().err
    assert (status, errors.count("\n")) == (2, 1)
    assert str(loop) in errors
    assert not (folder / "report.html").exists()


def test_a_report_in_place_of_a_link_to_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RunPlan(steps=2))
    (folder / "report.html").symlink_to("report.html")
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert write_report(link).is_file()
    assert read_run(link).name == real_name(tmp_path / "link" / ".") == "run"
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert real_name(loop) == "loop"


def test_folder_of_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run's folder: it holds no metrics\.jsonl"):
        write_report(tmp_path)


def test_headline_calls_a_folder_by_its_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RunPlan())
    for name, section in (("config.yaml", None), ("summary.json", "data")):
        text = (folder / name).read_text()
        if section is None:
            text = text.replace("stdlib", "/somewhere/my-corpus")
        else:
            content = json.loads(text)
            content[section]["source"] = "folder"
            text = json.dumps(content)
        (folder / name).write_text(text)
    assert headline(read_run(folder)).data == "my-corpus"


def test_headline_prefers_the_summary(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RunPlan(summary={"val_loss": 1.5, "bits_per_byte": 0.5}))
    figures = headline(read_run(folder))
    assert figures.val_loss == 1.5
    assert figures.initial_bits_per_byte == pytest.approx(0.5 * 8.32 / 1.5)
    assert figures.data == "stdlib"
    assert figures.peak_memory_bytes == 955 * MIB


def test_comparison_overlays_runs_and_points_out_the_best(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "adamw", RunPlan(optimizer="adamw", refreshes=False, basis=0)),
        write_run(tmp_path / "galore", RunPlan(steps=200, moments=9 * MIB)),
    ]
    text = write_comparison(folders, tmp_path / "deep" / "c.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "Comparison of 2 runs" in page.text
    assert "different numbers of tokens" in page.text
    assert re.search(r'<td class="figure best">16\.0 MiB</td>', text)
    assert {name: count for name, count in page.ids.items() if count > 1} == {}
    subspaces = text[text.index("<h2>Subspaces</h2>") :]
    assert "</i>galore</li>" in subspaces
    assert "</i>adamw</li>" not in subspaces


@pytest.mark.slow
def test_comparison_of_many_runs_tells_them_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run-{i}", RunPlan(steps=12, seed=i)) for i in range(8)]
    text = write_comparison(folders, tmp_path / "c.html").read_text(encoding="utf-8")
    legend = re.findall(r"<li><i([^>]*)></i>(run-\d)</li>", text[: text.index("<h3>Perplexity")])
    assert len({style for style, _ in legend}) == len({name for _, name in legend}) == 8


def test_comparison_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run to compare"):
        write_comparison([], tmp_path / "c.html")


def test_thinning_keeps_the_ends_and_every_extreme() -> None:
    values = np.sin(np.arange(10_000) / 50.0)
    values[1234], values[8765] = 40.0, -30.0
    series = Series(np.arange(10_000), values)
    short = thinned(series, 100)
    assert len(short) <= 102
    assert (short.steps[0], short.steps[-1]) == (0, 9_999)
    assert {40.0, -30.0} <= set(short.values.tolist())
    assert (np.diff(short.steps) > 0).all()
    assert thinned(short, 200) is short
    with pytest.raises(ValueError, match="limit is 3"):
        thinned(series, 3)


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    flat = Series(np.arange(50), np.full(50, 3.25))
    assert smoothed(flat).values == pytest.approx(flat.values)
    falling = Series(np.arange(50), np.linspace(8.0, 4.0, 50))
    curve = smoothed(falling).values
    assert curve[0] == 8.0
    assert (np.diff(curve) <= 0).all()
    assert 4.0 < curve[-1] < 5.0


def test_series_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        Series(np.arange(3), np.zeros(2))


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("colours", "card"), [(LIGHT, "#ffffff"), (DARK, "#1b1f25")])
def test_colours_stand_out_from_the_page(colours: dict[str, str], card: str) -> None:
    for name, colour in colours.items():
        least = {"grid": 1.1, "ink": 4.5, "muted": 4.5}.get(name, 3.0)
        assert contrast(colour, card) >= least, name
    assert len(set(colours.values())) == len(colours)


def test_metrics_records_are_what_the_trainer_writes(tmp_path: Path) -> None:
    lines = (write_run(tmp_path / "run") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = Counter(json.loads(line)["kind"] for line in lines)
    assert kinds == {"train": 300, "eval": 7, "refresh": 8}
