"""How long `memtrace check` takes for ten cases on two processors.

usage: python -m benchmarks.check

Plans five models of regressions/memtrace.toml with both recipes. Prints the time by the wall and of the processors; the
exit status is 1 where the wall's is above the bound, or a case cannot be planned.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

CASES = Path(__file__).parents[1] / "regressions"
MODELS = ("llama", "gpt2", "bert", "mistral", "mixtral")
BOUND_SECONDS = 60.0


def main() -> int:
    names = [f"{model}-{recipe}" for model in MODELS for recipe in ("autocast", "bf16")]
    chosen = [word for name in names for word in ("--case", name)]
    command = [sys.executable, "-m", "memtrace", "check", "--json", "--jobs", "2", *chosen]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=CASES, check=True, stdout=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    planned = json.loads(done.stdout)["cases"]
    print(
        f"{len(planned)} cases of {len(names)} in {wall:.1f} s of {BOUND_SECONDS:.0f}, {taken:.1f} s of the processors"
    )
    return int(wall > BOUND_SECONDS or planned.keys() != {*names})


if __name__ == "__main__":
    sys.exit(main())
