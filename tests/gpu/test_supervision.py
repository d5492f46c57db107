"""gpu-check: sections that break, hang or take too long stop nothing, and what they found stays."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import part
from support import ROOT


def begun(file: Path, **options: Any) -> Any:
    return part("record").Record("some", file, {}, **options)


def fail(error: BaseException) -> Any:
    def work() -> None:
        raise error

    return work


# One section's record


def test_an_exception_is_recorded_and_the_next_work_goes_on(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = begun(file)
    assert not record.attempt("bad", fail(ValueError("no such thing")))
    assert record.attempt("good", lambda: record.add("g", "speed", 2.0, "ms"))
    found = json.loads(file.read_text())
    (error,) = found["errors"]
    assert (error["where"], error["message"]) == ("bad", "ValueError: no such thing")
    assert "fail" in error["traceback"] or "raise error" in error["traceback"]
    assert [row["name"] for row in found["rows"]] == ["speed"]
    assert "ERROR in bad: ValueError: no such thing" in capsys.readouterr().out


def test_what_finds_no_memory_is_skipped(file: Path) -> None:
    record = begun(file)
    record.attempt("large", fail(torch.OutOfMemoryError("CUDA out of memory.\nmore")))
    found = json.loads(file.read_text())
    assert found["errors"] == []
    assert found["skipped"] == [{"what": "large", "why": "out of memory: CUDA out of memory."}]


def test_the_file_is_whole_while_something_goes_on(file: Path) -> None:
    record = begun(file)
    seen: list[Any] = []
    record.attempt("now", lambda: seen.append(json.loads(file.read_text())))
    assert seen[0]["current"] == "now"
    assert json.loads(file.read_text())["current"] is None
    record.add("g", "nothing", float("nan"), "ms", aim=1.0)
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["value"], row["met"]) == (None, False)
    assert list(file.parent.iterdir()) == [file]


def test_a_section_that_is_taken_up_again_does_not_repeat(file: Path) -> None:
    record = begun(file)
    record.add("g", "speed", 2.0, "ms", details={"samples": 3})
    record.check("equal", True)
    record.attempt("done", lambda: None)
    record.attempt("fatal", lambda: setattr(record, "at", file.read_text()))
    file.write_text(record.at)  # as a process leaves it that ends there
    again = begun(file, resume=True)
    called: list[str] = []
    for label in ("done", "fatal", "next"):
        again.attempt(label, lambda label=label: called.append(label))
    again.attempt("done", lambda: called.append("set up"), again=True)
    assert called == ["next", "set up"]
    assert again.value("g", "speed") == 2.0
    assert again.rows[0].details == {"samples": 3}
    assert json.loads(file.read_text())["checks"][0]["name"] == "equal"


def test_aims_are_met_or_missed_from_their_own_side() -> None:
    row = part("record").Row
    assert row("g", "n", 2.0, "ms").met is None
    assert row("g", "n", 2.0, "ms", aim=2.0).met
    assert not row("g", "n", 2.1, "ms", aim=2.0).met
    assert row("g", "n", 0.9, "", aim=0.8, at_least=True).met
    assert "aim >= 0.8 MISSED" in row("g", "n", 0.7, "", aim=0.8, at_least=True).line()
    assert "aim <= 2 met" in row("g", "n", 1.0, "ms", aim=2.0).line()


# Processes


def job(tmp_path: Path, body: str, limit: float = 20.0) -> Any:
    """A section of its own, whose `record` does what is given."""
    program = tmp_path / "section.py"
    path = tmp_path / "section.json"
    program.write_text(
        textwrap.dedent("""
            import os, signal, sys, time, types
            from pathlib import Path
            sys.path.insert(0, SCRIPTS)
            # What a record needs of torch, without the seconds that its import takes.
            cuda = types.SimpleNamespace(is_initialized=bool, is_available=bool)
            sys.modules["torch"] = types.SimpleNamespace(OutOfMemoryError=MemoryError, cuda=cuda)
            from gpu_check.record import Record
            record = Record("some", Path(FILE), {}, resume="--resume" in sys.argv)
        """)
        .replace("SCRIPTS", repr(str(ROOT / "scripts")))
        .replace("FILE", repr(str(path)))
        + textwrap.dedent(body)
        + '\nrecord.state = "complete"\nrecord.save()\n'
    )
    return part("supervisor").Job("some", path, limit, [sys.executable, str(program)])


def test_a_section_that_ends_well_is_left_as_it_is(tmp_path: Path) -> None:
    found, status = part("supervisor").run(job(tmp_path, "record.check('equal', True)"))
    assert (found["state"], status) == ("complete", 0)
    assert found["errors"] == []


def test_a_process_that_dies_is_taken_up_behind_what_killed_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
        record.attempt("first", lambda: record.add("g", "first", 1.0, "ms"))
        record.attempt("fatal", lambda: os.kill(os.getpid(), signal.SIGSEGV))
        record.attempt("last", lambda: record.add("g", "last", 3.0, "ms"))
    """
    found, status = part("supervisor").run(job(tmp_path, body))
    assert (found["state"], status) == ("complete", 0)
    assert [row["name"] for row in found["rows"]] == ["first", "last"]
    assert [error["where"] for error in found["errors"]] == ["fatal"]
    assert "-11" in found["errors"][0]["message"]
    assert "taken up again after 'fatal'" in capfd.readouterr().out


@pytest.mark.slow
def test_what_hangs_is_killed_and_the_rest_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = part("supervisor")
    monkeypatch.setattr(supervisor, "STALL", 2.0)
    body = """
        def hang():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(100)
        record.attempt("stuck", hang)
        record.attempt("last", lambda: record.add("g", "last", 3.0, "ms"))
    """
    found, _ = supervisor.run(job(tmp_path, body, limit=60.0))
    assert found["state"] == "complete"
    assert [row["name"] for row in found["rows"]] == ["last"]
    assert found["errors"][0]["where"] == "stuck"
    assert "no news" in found["errors"][0]["message"]


@pytest.mark.slow
def test_the_limit_ends_a_section_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = part("supervisor")
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    body = """
        record.add("g", "first", 1.0, "ms")
        record.attempt("long", lambda: time.sleep(100))
    """
    begin = time.monotonic()
    found, _ = supervisor.run(job(tmp_path, body, limit=2.5))
    assert time.monotonic() - begin < 8
    assert found["state"] == "out of time"
    assert [row["name"] for row in found["rows"]] == ["first"]
    assert found["errors"] == []
    assert {"what": "long", "why": "out of time"} in found["skipped"]


def test_a_section_that_can_not_begin_is_said(tmp_path: Path) -> None:
    supervisor = part("supervisor")
    program = [sys.executable, "-c", "raise SystemExit(7)"]
    found, status = supervisor.run(supervisor.Job("some", tmp_path / "section.json", 20.0, program))
    assert (found["state"], status) == ("broken", 7)
    assert "status 7" in found["errors"][0]["message"]
    assert json.loads((tmp_path / "section.json").read_text()) == found


# All of them


def check(**changes: Any) -> dict[str, Any]:
    return {"name": "equal", "passed": True, "detail": "", **changes}


def section(**changes: Any) -> dict[str, Any]:
    empty = {name: [] for name in ("checks", "rows", "skipped", "errors")}
    return {"state": "complete", "seconds": 1.0, "file": "f", "facts": {}, **empty, **changes}


def reported(tmp_path: Path, cut: bool = False, **results: Any) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "summary.json"
    status = part("summary").report(
        path, results, chosen=["build", "kernels"], seconds=1.0, cut=cut
    )
    return status, json.loads(path.read_text())


def test_only_correctness_decides_on_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"group": "1b", "name": "galore", "value": 9.0, "unit": "ms", "at_least": False}
    slow = section(rows=[row | {"aim": 8.0, "met": False}], checks=[check()])
    status, found = reported(tmp_path, build=section(checks=[check()]), kernels=slow)
    assert status == found["exit_status"] == 0
    assert found["aims_missed"] == ["1b galore: 9 ms, aim <= 8"]
    printed = capsys.readouterr().out
    assert "aim MISSED: 1b galore: 9 ms, aim <= 8" in printed
    assert "correctness holds; 0 of 1 aims met" in printed


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            {"checks": [check(passed=False, detail="bit 3 differs")]},
            "kernels: equal: bit 3 differs",
        ),
        (
            {"checks": [check()], "errors": [{"where": "adam", "message": "RuntimeError: x"}]},
            "kernels: adam: RuntimeError: x",
        ),
        ({"checks": [check()], "facts": {"to_compare": ["equal", "int4"]}}, "int4: not compared"),
        ({}, "kernels: nothing was checked"),
    ],
)
def test_what_was_not_shown_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: dict[str, Any], said: str
) -> None:
    build = section(checks=[check()])
    status, found = reported(tmp_path, build=build, kernels=section(**broken))
    assert status == found["exit_status"] == 1
    assert any(said in entry for entry in found["failures"])
    printed = capsys.readouterr().out
    assert said in printed
    assert "correctness was NOT shown" in printed


def test_where_nothing_was_compared_correctness_is_not_claimed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "summary.json"
    done = {"launches": section()}
    report = part("summary").report
    assert report(path, done, chosen=["launches"], seconds=1.0, cut=False) == 0
    printed = capsys.readouterr().out
    assert "correctness was not looked at" in printed
    assert "holds" not in printed


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        (["--only=speed"], 2, "'speed' is no section"),
        (["--output=taken"], 2, "gpu-check: --output taken can't be written into: File exists"),
        (["--output=/proc/1/x"], 2, "gpu-check: --output /proc/1/x can't be written into"),
    ],
)
def test_wrong_use_is_said_and_leaves_no_links(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    status: int,
    said: str,
) -> None:
    main = part("__main__")
    links = tmp_path / "links"
    links.mkdir()
    (tmp_path / "taken").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    monkeypatch.setattr(main.sys, "argv", ["x", "--root", "r", "--links", str(links), *given])
    try:
        found = main.main()
    except SystemExit as end:
        found = end.code
    assert found == status
    assert said in capsys.readouterr().err
    assert not links.exists()


def test_an_interruption_has_a_status_of_its_own(tmp_path: Path) -> None:
    status, found = reported(tmp_path, cut=True, build=section(checks=[check()]))
    assert status == 130
    assert found["not_begun"] == ["kernels"]


def test_limits_leave_the_later_sections_their_time() -> None:
    main = part("__main__")
    names = list(main.BUDGETS)
    assert sum(main.BUDGETS.values()) + main.RATES + main.RESERVE <= 60 * main.MINUTES == 360
    left = 60 * main.MINUTES - main.RATES - main.RESERVE
    assert main.limit("build", names, left, 1.0) == 150.0
    # What earlier sections did not use goes on, and what they took too much is taken off.
    both = main.BUDGETS["kernels"] + main.BUDGETS["build"]
    assert main.limit("kernels", names, left, 1.0) == both
    assert main.limit("steps", names, left - both, 1.0) == main.BUDGETS["steps"]
    for spent in (0.0, 50.0, 200.0, 330.0):
        assert 0 < main.limit("steps", names, left - spent, 1.0) <= left - spent
    assert main.limit("memory", ["memory"], 300.0, 1.0) == 300.0


def test_sections_run_in_their_order_and_unknown_ones_are_named() -> None:
    main = part("__main__")
    assert main.sections("memory,build") == ["build", "memory"]
    with pytest.raises(argparse.ArgumentTypeError, match="'speed' is no section; accepted are bui"):
        main.sections("build,speed")


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "cpu"])
def test_files_have_the_devices_name(name: str) -> None:
    expected = {"NVIDIA H100 80GB HBM3": "NVIDIA-H100-80GB-HBM3", "cpu": "cpu"}[name]
    assert part("__main__").slug(name) == expected


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as Python handles it; the processes that spread tests ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_of_the_check_ends_the_section(tmp_path: Path) -> None:
    supervisor = part("supervisor")
    slow = job(
        tmp_path, 'record.add("g", "first", 1.0, "ms")\nrecord.attempt("l", lambda: time.sleep(99))'
    )

    def interrupt() -> None:
        while not (tmp_path / "section.json").exists() or '"l"' not in slow.path.read_text():
            time.sleep(0.1)
        import _thread

        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        supervisor.run(slow)
    found = json.loads(slow.path.read_text())
    assert found["state"] == "interrupted"
    assert [row["name"] for row in found["rows"]] == ["first"]
