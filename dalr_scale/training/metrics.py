"""What a run reports: console, metrics.jsonl, TensorBoard and one log file per rank.

metrics.jsonl holds one JSON object a line. Its "kind" is "train" for an optimizer step, "scores"
for an evaluation before or during training, "final" for the scores of the last encoder after
training and "best" for those of the selected one ("model_step"). Within a kind no step occurs
twice, however often the run was resumed. Scores are x 100, as the papers print them. Numbers are
finite or null.

TensorBoard draws the same numbers: the values of a step by stream (train/text/loss,
train/pair/loss, ...), because text-only and paired batches have different losses; train/lr and the
rates of the window for all steps; scores/TASK from the untrained to the last encoder, and
best/TASK. A tag has one point a step, however often the run was resumed.
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
from typing import TYPE_CHECKING, SupportsFloat, TextIO, cast

from tqdm import tqdm

from dalr_scale.errors import UserError
from dalr_scale.eval.unit import UNIT, in_percent
from dalr_scale.run.files import JsonTable, JsonValue, write_durably

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

NOT_TERMS = ("loss", "lr", "grad_norm")
OF_ALL_STREAMS = ("lr", "samples_per_second", "data_share")
AFTER_TRAINING = ("final", "best")  # kinds that follow the last step's checkpoint


class Meter:
    """Means by stream and throughput over the last `window` steps.

    Args:
        clock: seconds; replaced in tests.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        # One entry a step: values, samples, seconds of the step, of them waiting for data, stream.
        self._steps: deque[tuple[dict[str, float], int, float, float, str]] = deque(maxlen=window)

    def start(self) -> None:
        """Begin the first step now: what came before is no part of the throughput."""
        self._last = self._clock()

    def add(
        self,
        values: Mapping[str, float],
        *,
        samples: int,
        data_seconds: float = 0.0,
        stream: str = "",
    ) -> None:
        """Close a step: `samples` is the global batch, the time runs from the previous call."""
        now = self._clock()
        seconds = max(now - self._last, 1e-9)
        self._steps.append((dict(values), samples, seconds, data_seconds, stream))
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside (evaluation, saving)."""
        before = self._clock()
        try:
            yield
        finally:
            self._last += self._clock() - before

    @property
    def streams(self) -> list[str]:
        """Streams of the window's steps, text before pairs."""
        return sorted({stream for *_, stream in self._steps}, reverse=True)

    def means(self, stream: str = "") -> dict[str, float]:
        """Mean of each value over the steps of a stream that had it; NaN stays NaN."""
        columns: dict[str, list[float]] = {}
        for values, *_, own in self._steps:
            for name, value in values.items() if own == stream else ():
                columns.setdefault(name, []).append(value)
        return {name: sum(column) / len(column) for name, column in columns.items()}

    @property
    def seconds(self) -> float:
        """Time of all steps in the window."""
        return sum(step[2] for step in self._steps)

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
            metrics.jsonl and TensorBoard, because they are about to be made again, and so are
            those of the step itself that follow its checkpoint. At 0 all are.
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
        self._writer: SummaryWriter | None = None
        self._file: TextIO | None = None
        self._drawn: dict[str, int] = {}
        if not self._main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        # a run that starts at 0 writes all its records again, those before the first step too
        drop_later_records(path, start_step or -1)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if tensorboard:
            # Imported here: it takes seconds, and only one rank needs it.
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard can drop whole steps only: what stays of this one is drawn again
            self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=start_step)
            for record in _records_at(path, start_step):
                values = {n: math.nan if v is None else v for n, v in record.items()}
                self._draw(record, {n: v for n, v in values.items() if isinstance(v, float)})
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
        stream = str((tags or {}).get("stream", ""))
        self.meter.add(numbers, samples=samples, data_seconds=data_seconds, stream=stream)
        rates = {
            "samples_per_second": self.meter.samples_per_second,
            "data_share": self.meter.data_share,
        }
        self._record({"kind": "train", "step": step, **(tags or {})}, numbers | rates)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(self._postfix(), refresh=False)
        if step % self._every == 0 or step == self._total:
            self.print_line(self.line(step))

    def scores(self, step: int, scores: Mapping[str, SupportsFloat]) -> None:
        """Report an evaluation after `step` steps; `scores` are fractions, as they are computed."""
        self._scores({"kind": "scores", "step": step}, scores)

    def final_scores(
        self,
        step: int,
        last: Mapping[str, SupportsFloat],
        best: Mapping[str, SupportsFloat],
        best_step: int | None,
    ) -> None:
        """Report the scores after training.

        They are those of the last encoder and, where a task selected one, of the best encoder,
        which is that of `best_step`.
        """
        self._scores({"kind": "final", "step": step}, last)
        if best_step is not None:
            self._scores({"kind": "best", "step": step, "model_step": best_step}, best)

    def _scores(self, fields: JsonTable, scores: Mapping[str, SupportsFloat]) -> None:
        if not self._main or not scores:
            return
        numbers = in_percent(scores)
        self._record(fields, numbers)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in numbers.items())
        self.print_line(f"step {fields['step']:>6}/{self._total}  {fields['kind']} {UNIT}  {shown}")

    def line(self, step: int) -> str:
        """The console line: means over the last `every` steps."""
        parts = [f"step {step:>6}/{self._total}"]
        rates = []
        for stream in self.meter.streams:
            means = self.meter.means(stream)
            parts.append(f"{stream} loss {_short(means.get('loss', math.nan))}".strip())
            parts += [f"{n} {_short(v)}" for n, v in means.items() if n not in NOT_TERMS]
            if "grad_norm" in means:
                parts.append(f"|g| {_short(means['grad_norm'])}")
            rates += [means["lr"]] if "lr" in means else []
        if rates:
            parts.append(f"lr {min(rates):.1e}")
        parts.append(f"{self.meter.samples_per_second:.0f} samples/s")
        parts.append(f"data {100 * self.meter.data_share:.1f} %")
        parts.append(f"eta {_clock_time((self._total - step) * self.meter.step_seconds)}")
        return "  ".join(parts)

    def print_line(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if not self._main:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._console)
        else:
            print(text, file=self._console, flush=True)

    def start_timing(self) -> None:
        """The first batch is there: evaluation and loader start are no part of the throughput."""
        self.meter.start()

    def flush(self) -> None:
        """Bring everything to the disk.

        Called before a checkpoint from which a run may continue: what was reported up to
        there is not reported again.
        """
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

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
        losses = [
            f"{stream} loss {_short(self.meter.means(stream).get('loss', math.nan))}".strip()
            for stream in self.meter.streams
        ]
        return ", ".join([*losses, f"{self.meter.samples_per_second:.0f} samples/s"])

    def _record(self, fields: JsonTable, numbers: Mapping[str, float]) -> None:
        finite = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        if self._file is not None:
            self._file.write(json.dumps({**fields, **finite}, allow_nan=False) + "\n")
        self._draw(fields, numbers)

    def _draw(self, fields: JsonTable, numbers: Mapping[str, float]) -> None:
        """Adds a record to TensorBoard; a point that is there already is not drawn again."""
        if self._writer is None:
            return
        step = cast("int", fields["step"])
        for name, value in numbers.items():
            tag = _tag(fields, name)
            if self._drawn.get(tag) != step:
                self._writer.add_scalar(tag, value, step)
                self._drawn[tag] = step


def _tag(fields: JsonTable, name: str) -> str:
    """The curve of a value: train/STREAM/NAME, train/NAME, scores/NAME or best/NAME."""
    kind = fields["kind"]
    if kind == "train" and "stream" in fields and name not in OF_ALL_STREAMS:
        return f"train/{fields['stream']}/{name}"
    return f"{'scores' if kind == 'final' else kind}/{name}"


def _records_at(path: Path, step: int) -> list[dict[str, JsonValue]]:
    """The records of one step."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["step"] == step]


def drop_later_records(path: Path, step: int) -> None:
    """Keep the whole lines of `path` up to the checkpoint of `step`.

    A line that a crash has cut is dropped as well.
    """
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
    if not known or not line.endswith(b"\n"):
        return False
    return record["step"] < step + (record.get("kind") not in AFTER_TRAINING)


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
        raise UserError(f"{run_dir} cannot be a run directory: {error}; choose another") from error
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
