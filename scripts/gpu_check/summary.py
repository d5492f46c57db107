"""What a run found in all: JSON, a short table, and the exit status; needs no torch."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .files import Json, write

INTERRUPTED = 130
#: Most lines of a kind in the table: a terminal's, and a log's, last lines are what is read.
MOST = 40
#: Sections without checks show nothing.
COMPARING = ("build", "kernels")


def report(
    path: Path, results: dict[str, Json], *, chosen: Sequence[str], seconds: float, cut: bool
) -> int:
    """Writes and prints the summary.

    Args:
        path: of the summary.
        results: each section's file and what it has, in the order in which they ran.
        chosen: the sections that were to run.
        seconds: of the whole check.
        cut: whether it was interrupted.

    Returns:
        The exit status: 0, or 1 where correctness was not shown, or that of an interruption.
    """
    problems = failures(results)
    missing = [name for name in chosen if name not in results]
    status = INTERRUPTED if cut else int(bool(problems))
    aims = [
        row for found in results.values() for row in found.get("rows", ()) if row["aim"] is not None
    ]
    missed = [_aim(row) for row in aims if not row["met"]]
    content: Json = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["./scripts/gpu-check", *_given()]),
        "seconds": round(seconds, 1),
        "exit_status": status,
        "interrupted": cut,
        "machine": results.get("rates", {}).get("facts", {}),
        "sections": {name: _section(found) for name, found in results.items()},
        "not_begun": missing,
        "failures": problems,
        "aims_missed": missed,
        "skipped": [
            {"section": name, **entry}
            for name, found in results.items()
            for entry in found.get("skipped", ())
        ],
    }
    write(path, content)
    print("\n".join(_table(content, len(aims), path.parent)), flush=True)
    return status


def failures(results: dict[str, Json]) -> list[str]:
    """What speaks against correctness: failed checks, errors, and kernels that nobody compared."""
    found: list[str] = []
    for name, result in results.items():
        checks = result.get("checks", [])
        found += [f"{name}: {c['name']}: {c['detail']}" for c in checks if not c["passed"]]
        found += [f"{name}: {e['where']}: {e['message']}" for e in result.get("errors", ())]
        known = {check["name"] for check in checks} | {e["where"] for e in result.get("errors", ())}
        wanted = result.get("facts", {}).get("to_compare", [])
        found += [f"{name}: {case}: not compared" for case in wanted if case not in known]
        if name in COMPARING and not checks:
            found.append(f"{name}: nothing was checked")
    return [entry[:400] for entry in found]


def _given() -> list[str]:
    """The arguments that a person gave."""
    given = sys.argv[1:]
    return given[4:] if given[:1] == ["--root"] else given


def _section(found: Json) -> Json:
    checks, rows = found.get("checks", []), found.get("rows", [])
    aimed = [row for row in rows if row["aim"] is not None]
    return {
        "state": found.get("state"),
        "seconds": found.get("seconds"),
        "limit": found.get("limit"),
        "file": found.get("file"),
        "checks_passed": sum(check["passed"] for check in checks),
        "checks": len(checks),
        "aims_met": sum(bool(row["met"]) for row in aimed),
        "aims": len(aimed),
        "rows": len(rows),
        "errors": len(found.get("errors", [])),
        "skipped": len(found.get("skipped", [])),
    }


def _aim(row: Json) -> str:
    sign = ">=" if row["at_least"] else "<="
    value = "nan" if row["value"] is None else f"{row['value']:.4g}"
    return f"{row['group']} {row['name']}: {value} {row['unit']}, aim {sign} {row['aim']:.4g}"


def _table(content: Json, aims: int, folder: Path) -> list[str]:
    lines = ["", f"{'section':<9} {'state':<12} {'seconds':>8}  checks    aims      rows  file"]
    for name, one in content["sections"].items():
        seconds = "" if one["seconds"] is None else f"{one['seconds']:.1f}"
        checks, met = f"{one['checks_passed']}/{one['checks']}", f"{one['aims_met']}/{one['aims']}"
        lines.append(
            f"{name:<9} {one['state']:<12} {seconds:>8}  {checks:<9} {met:<9} "
            f"{one['rows']:>4}  {one['file']}"
        )
    lines += [f"not begun: {name}" for name in content["not_begun"]]
    for title, entries in (("aim MISSED", content["aims_missed"]), ("FAILED", content["failures"])):
        lines += [f"{title}: {entry}" for entry in entries[:MOST]]
        if len(entries) > MOST:
            lines.append(f"{title}: {len(entries) - MOST} more in the JSON")
    reasons = [f"{entry['what']} ({entry['why']})" for entry in content["skipped"]]
    if reasons:
        lines.append(f"skipped: {'; '.join(reasons)[:1500]}")
    missed = len(content["aims_missed"])
    verdict = "correctness holds" if not content["failures"] else "correctness was NOT shown"
    if not content["failures"] and not any(one["checks"] for one in content["sections"].values()):
        verdict = "correctness was not looked at"
    if content["interrupted"]:
        verdict = f"interrupted; so far: {verdict}"
    lines.append(
        f"{verdict}; {aims - missed} of {aims} aims met; {content['seconds']:.0f} s; {folder}"
    )
    return lines
