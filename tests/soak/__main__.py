"""``make soak``: run the bank for some minutes, and write the report."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from tests.soak import page
from tests.soak.databases import DATABASES
from tests.soak.run import run

ROOT = Path(__file__).parents[2]
#: where the report of a run is written, ignored by git, and that of a run to be committed
BUILD, COMMITTED = ROOT / "build" / "soak", ROOT / "benchmarks"


def main() -> int:
    """Run, and return 1 if a promise was broken, or a control was not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--transfers", type=int, default=0, help="stop after so many")
    parser.add_argument("--database", choices=DATABASES, default="postgres")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--render", action="store_true", help="the last run's report once more")
    parser.add_argument("--publish", action="store_true", help="write it into benchmarks/")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    raw = BUILD / "results.json"
    if not arguments.render:
        print(f"seed {arguments.seed}", flush=True)
        facts = page.circumstances()
        with DATABASES[arguments.database]() as database:
            run(
                database,
                minutes=arguments.minutes,
                seed=arguments.seed,
                transfers=arguments.transfers,
                save=lambda made: raw.write_text(json.dumps({**made.asdict(), **facts})),
            )
    results = json.loads(raw.read_text())
    directory = COMMITTED if arguments.publish else BUILD
    (directory / "SOAK.md").write_text(page.render(results, directory))
    print(f"wrote {directory / 'SOAK.md'}")
    failures = page.failures(results)
    for failure in failures[:50]:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
