"""What a run reports: console, metrics.jsonl, TensorBoard and one log file per rank.

metrics.jsonl holds one JSON object a line. Lines with "kind": "train" are optimizer steps, lines
with "kind": "scores" evaluations; within a kind no step occurs twice, however often the run was
resumed. Numbers are finite or null.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat, TextIO

from tqdm import tqdm

from dalr_scale.errors import UserError
from dalr_scale.runstate import write_durably

NOT_TERMS = ("loss", "lr", "grad_norm")


class Meter:
    """Means and throughput over the last `window` steps.

    Args:
        clock: seconds; replaced in tests.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        # One entry a step: values, samples, seconds of the step, of them waiting for data.
        self._steps: deque[tuple[dict[str, float], int, float, float]] = deque(maxlen=window)

    def add(self, values: Mapping[str, float], *, samples: int, data_seconds: float = 0.0) -> None:
        """Close a step: `samples` is the global batch, the time runs from the previous call."""
        now = self._clock()
        self._steps.append((dict(values), samples, max(now - self._last, 1e-9), data_seconds))
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside (evaluation, saving)."""
        before = self._clock()
        try:
            yield
        finally:
            self._last += self._clock() - before

    def means(self) -> dict[str, float]:
        """Mean of each value over the steps that had it; NaN stays NaN."""
        columns: dict[str, list[float]] = {}
        for values, *_ in self._steps:
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        return {name: sum(column) / len(column) for name, column in columns.items()}

    @property
    def seconds(self) -> float:
        """Time of all steps in the window."""
        return sum(seconds for _, _, seconds, _ in self._steps)

    @property
    def step_seconds(self) -> float:
        return self.seconds / len(self._steps) if self._steps else math.nan

    @property
    def samples_per_second(self) -> float:
        return sum(s[1] for s in self._steps) / self.seconds if self._steps else math.nan

    @property
    def data_share(self) -> float:
        """Fraction of the time that the step waited for data, 0 to 1."""
        return sum(s[3] for s in self._steps) / self.seconds if self._steps else math.nan


class RunLog:
    """The reports of one run; rank 0 writes, on other ranks every method does nothing.

    Args:
        start_step: step that the run resumes from; records of later steps are dropped from
            metrics.jsonl, because they are about to be made again.
        every: steps between two console lines.
        console: where progress goes, stderr by default. A bar is drawn only on a terminal.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        total_steps: int,
        start_step: int = 0,
        every: int = 10,
        tensorboard: bool = True,
        console: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._main = rank == 0
        self._total, self._every = total_steps, max(1, every)
        self._console = console if console is not None else sys.stderr
        self.meter = Meter(self._every, clock)
        self._bar: tqdm | None = None
        self._writer: Any = None
        self._file: TextIO | None = None
        if not self._main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        # a run that starts at 0 makes all its records anew, those before the first step too
        drop_later_records(path, start_step or -1)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if tensorboard:
            # Imported here: it takes seconds, and only one rank needs it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)
        if self._console.isatty():
            self._bar = tqdm(
                total=total_steps, initial=start_step, file=self._console, dynamic_ncols=True
            )

    def step(
        self,
        step: int,
        values: Mapping[str, SupportsFloat],
        *,
        samples: int,
        data_seconds: float = 0.0,
        tags: Mapping[str, str | int] | None = None,
    ) -> None:
        """Report one optimizer step.

        Args:
            step: steps done, this one included.
            values: "loss", "lr", "grad_norm" and the terms of the loss by their short names.
            samples: items of the global batch.
            data_seconds: how long the step waited for its batch.
            tags: further plain fields for metrics.jsonl ("stream", a hash of the item ids, ...).
        """
        if not self._main:
            return
        numbers = {name: float(value) for name, value in values.items()}
        self.meter.add(numbers, samples=samples, data_seconds=data_seconds)
        rates = {
            "samples_per_second": self.meter.samples_per_second,
            "data_share": self.meter.data_share,
        }
        self._record({"kind": "train", "step": step, **(tags or {})}, numbers | rates)
        for name, value in (numbers | rates).items():
            self._scalar(f"train/{name}", value, step)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(self._postfix(), refresh=False)
        if step % self._every == 0 or step == self._total:
            self.say(self.line(step))

    def scores(self, step: int, scores: Mapping[str, SupportsFloat]) -> None:
        """Report an evaluation after `step` steps."""
        if not self._main:
            return
        numbers = {name: float(value) for name, value in scores.items()}
        self._record({"kind": "scores", "step": step}, numbers)
        for name, value in numbers.items():
            self._scalar(f"scores/{name}", value, step)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in numbers.items())
        self.say(f"step {step:>6}/{self._total}  scores  {shown}")

    def line(self, step: int) -> str:
        """The console line: means over the last `every` steps."""
        means = self.meter.means()
        parts = [f"step {step:>6}/{self._total}", f"loss {_short(means.get('loss', math.nan))}"]
        parts += [f"{n} {_short(v)}" for n, v in means.items() if n not in NOT_TERMS]
        if "lr" in means:
            parts.append(f"lr {means['lr']:.1e}")
        if "grad_norm" in means:
            parts.append(f"|g| {_short(means['grad_norm'])}")
        parts.append(f"{self.meter.samples_per_second:.0f} samples/s")
        parts.append(f"data {100 * self.meter.data_share:.1f} %")
        parts.append(f"eta {_clock_time((self._total - step) * self.meter.step_seconds)}")
        return "  ".join(parts)

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if not self._main:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._console)
        else:
            print(text, file=self._console, flush=True)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Keep evaluation and saving out of the throughput: `with log.paused(): ...`."""
        return self.meter.paused()

    def close(self) -> None:
        """Flush and close everything; harmless when called again."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.close()
        self._bar = self._writer = self._file = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _postfix(self) -> str:
        loss = self.meter.means().get("loss", math.nan)
        return f"loss {_short(loss)}, {self.meter.samples_per_second:.0f} samples/s"

    def _record(self, fields: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        finite = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        if self._file is not None:
            self._file.write(json.dumps({**fields, **finite}, allow_nan=False) + "\n")

    def _scalar(self, name: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)


def drop_later_records(path: Path, step: int) -> None:
    """Keep the whole lines of `path` up to `step`; a line torn by a crash goes as well."""
    if not path.exists():
        return
    data = path.read_bytes()
    kept = b"".join(line for line in data.splitlines(keepends=True) if _is_until(line, step))
    if kept != data:
        write_durably(path, kept)


def _is_until(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    known = isinstance(record, dict) and isinstance(record.get("step"), int)
    return known and line.endswith(b"\n") and record["step"] <= step


def _short(value: float) -> str:
    """Four significant digits, short: 3.214, 0.04, 1.2e-05, nan."""
    return f"{value:.4g}"


def _clock_time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


# Tables


def format_table(title: str, rows: Sequence[Mapping[str, object]]) -> str:
    """A text table; columns are the rows' keys in order of appearance, numbers to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    numeric = [any(isinstance(row.get(n), int | float) for row in rows) for n in names]

    def text(values: Sequence[str]) -> str:
        pairs = zip(values, widths, numeric, strict=True)
        return "  ".join(v.rjust(w) if right else v.ljust(w) for v, w, right in pairs).rstrip()

    rule = "-" * (sum(widths) + 2 * max(0, len(widths) - 1))
    return "\n".join([title, rule, text(names), rule, *map(text, cells), rule])


def print_table(
    title: str, rows: Sequence[Mapping[str, object]], *, file: TextIO | None = None
) -> None:
    """Print `format_table`; stdout by default."""
    print("\n" + format_table(title, rows), file=file or sys.stdout, flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


# Logging


class _BarSafeHandler(logging.StreamHandler):
    """Writes above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def logging_to(run_dir: Path, rank: int, *, verbose: bool = False) -> Iterator[Path]:
    """Send the project's log to RUN/log/rankN.log, and on rank 0 to stderr as well.

    Every line carries rank and process, so that the files of a failed job can be merged by time.

    Args:
        verbose: show debug lines on the console too; the file always has them.

    Yields:
        The path of this rank's file. Handlers and level are taken back at the end.
    """
    path = run_dir / "log" / f"rank{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run_dir} cannot be a run folder: {error}; choose another") from error
    project = logging.getLogger("dalr_scale")
    former, propagated = project.level, project.propagate
    project.propagate = False  # libraries configure the root logger: every line would come twice
    form = logging.Formatter(
        f"%(asctime)s rank {rank} pid {os.getpid()} %(levelname)s %(name)s: %(message)s"
    )
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8")]
    if rank == 0:
        handlers.append(_BarSafeHandler(sys.stderr))
        handlers[-1].setLevel(logging.DEBUG if verbose else logging.INFO)
    for handler in handlers:
        handler.setFormatter(form)
        project.addHandler(handler)
    project.setLevel(logging.DEBUG)
    try:
        yield path
    finally:
        project.setLevel(former)
        project.propagate = propagated
        for handler in handlers:
            project.removeHandler(handler)
            handler.close()
