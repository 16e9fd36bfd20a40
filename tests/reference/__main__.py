"""Trains rows of the random search and compares them, one line a row; run it in ``tests``.

python -m reference 17 23          these rows
python -m reference 0 --to 300     rows 0 to 299
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from reference.draw import draw
from reference.material import write_material
from reference.rows import try_row


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("numbers", type=int, nargs="+")
    parser.add_argument("--to", type=int, help="all rows from the first number up to this one")
    parser.add_argument("--every", type=int, default=1, help="with --to: only every n-th row")
    parser.add_argument(
        "--data", type=Path, help="directory for the shards, made when it is absent"
    )
    parser.add_argument("--record", type=Path, help="append results here; rows there are left out")
    parser.add_argument("--show", action="store_true", help="print the configurations")
    options = parser.parse_args()
    numbers = options.numbers
    if options.to:
        numbers = range(numbers[0], options.to, options.every)
    done = {result["number"] for result in recorded(options.record)}
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        data = options.data or Path(temporary) / "data"
        if not data.exists():
            write_material(data)
        for number in numbers:
            if number in done:
                continue
            row = draw(number)
            if options.show:
                print(json.dumps(row.changes, indent=1))
            started = time.monotonic()
            result = try_row(row, data, Path(temporary) / str(number))
            bad += not result.good
            print(f"{time.monotonic() - started:5.1f} s  {result}", flush=True)
            if options.record:
                with open(options.record, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result.record()) + "\n")
    return 1 if bad else 0


def recorded(path: Path | None) -> list[dict]:
    """Results that an earlier call has appended to a file; a line torn by a crash is dropped."""
    if path is None or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


if __name__ == "__main__":
    raise SystemExit(main())
