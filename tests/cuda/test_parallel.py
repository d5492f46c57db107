"""How the host's loops are shared between threads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lowrank.cuda import build

PROGRAM = """
#include "host/parallel.h"

#include <mutex>
#include <set>

namespace lowrank {
int threads() { return 4; }
}  // namespace lowrank

namespace {
using namespace lowrank;

std::mutex guard;

// How many threads took part; -1 if an index was left out, or the caller had none.
int used(std::int64_t count, std::int64_t entries_each, Cost cost) {
  std::set<std::thread::id> who;
  std::int64_t sum = 0, calls = 0;
  parallel_for(count, entries_each, cost, [&](std::int64_t begin, std::int64_t end) {
    const std::lock_guard<std::mutex> lock(guard);
    who.insert(std::this_thread::get_id());
    ++calls;
    for (std::int64_t i = begin; i < end; ++i) sum += i + 1;
  });
  const bool whole = sum == count * (count + 1) / 2;
  return whole && who.count(std::this_thread::get_id()) ? static_cast<int>(calls) : -1;
}

int check() {
  if (used(0, 256, kCopied) != 1 || used(1, 1, kComputed) != 1) return 1;
  // Small jobs stay on the calling thread: up to two parts of 2^20 units.
  if (used((1 << 13) - 1, 256, kCopied) != 1 || used((1 << 10) - 1, 256, kComputed) != 1) return 2;
  if (used(1 << 13, 256, kCopied) != 2 || used(1 << 10, 256, kComputed) != 2) return 3;
  if (used(1 << 20, 1, kRounded) != 2 || used(3 << 19, 1, kRounded) != 3) return 4;
  // Large ones use all threads, but no more than there are pieces.
  if (used(1 << 20, 256, kCopied) != 4 || used(3, 1 << 30, kCopied) != 3) return 5;
  return 0;
}
}  // namespace

int main() { return check(); }
"""


@pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")
def test_small_jobs_start_no_threads(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    flags = ["-std=c++20", "-pthread", "-Wall", "-Werror", f"-I{build.SOURCES}"]
    build.run([compiler, *flags, str(source), "-o", str(program)])
    assert subprocess.run([program], check=False).returncode == 0
