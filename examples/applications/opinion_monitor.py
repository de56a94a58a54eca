#!/usr/bin/env python3
r"""Watch public opinion: an alert, and a plot, when the share of negative texts rises.

    megatron-7b finetune --config classify_tiny_cpu --run-dir sentiment --checkpoint.initialize-from minilm \
        --data.train labelled.jsonl
    tail -n +1 -f posts.jsonl | megatron-7b predict --checkpoint sentiment --input - --output - \
        | examples/applications/opinion_monitor.py --negative negative --plot opinion.png --alerts alerts.jsonl

A line of posts.jsonl is {"date": "2026-11-28", "text": "…"}; dates may have a time after them. A day is judged when the
first text of a later one comes, and the last one at the end: the days of the window that ends with it are compared with
those of the baseline before. There is an alert where the share of negative texts is higher by `--margin`, and by more
than chance makes likely (z, of two proportions); the next one comes only after the share has fallen back.
"""

import argparse
import datetime as dt
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Alert:
    """The share of negative texts has risen."""

    date: str
    share: float
    """Of the negative texts in the window."""
    before: float
    """The same in the baseline."""
    texts: int
    """In the window."""
    z: float
    """By how many standard errors the share has risen."""


@dataclass
class Monitor:
    """Counts of the texts of each day, and what follows from them."""

    negative: str
    window: int
    baseline: int
    margin: float
    threshold: float
    fewest: int
    texts: "Counter[dt.date]" = field(default_factory=Counter)
    negatives: "Counter[dt.date]" = field(default_factory=Counter)
    is_raised: bool = False

    def watch(self, lines: Iterable[str]) -> Iterator[Alert]:
        """Yield alerts as texts come, each a line with its date and its prediction."""
        today: dt.date | None = None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                date, label = dt.date.fromisoformat(record["date"][:10]), record["prediction"]["label"]
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"line {number} has no date and prediction of a class: {error!r}") from None
            if today is not None and date > today:
                yield from self._judge(today)
            today = date if today is None else max(today, date)
            self.texts[date] += 1
            self.negatives[date] += label == self.negative
        if today is not None:
            yield from self._judge(today)

    def _judge(self, day: dt.date) -> Iterator[Alert]:
        recent, earlier = self._sum(day, self.window), self._sum(day - dt.timedelta(self.window), self.baseline)
        if min(recent[1], earlier[1]) < self.fewest:
            return
        share, before = recent[0] / recent[1], earlier[0] / earlier[1]
        pooled = (recent[0] + earlier[0]) / (recent[1] + earlier[1])
        error = math.sqrt(max(pooled * (1 - pooled), 1e-9) * (1 / recent[1] + 1 / earlier[1]))
        has_risen = share - before >= self.margin and (share - before) / error >= self.threshold
        if has_risen and not self.is_raised:
            yield Alert(
                day.isoformat(), round(share, 4), round(before, 4), recent[1], round((share - before) / error, 2)
            )
        self.is_raised = has_risen

    def _sum(self, last: dt.date, days: int) -> tuple[int, int]:
        """Return negative texts and all texts of some days that end with one."""
        dates = [last - dt.timedelta(number) for number in range(days)]
        return sum(self.negatives[date] for date in dates), sum(self.texts[date] for date in dates)

    def plot(self, file: Path, alerts: list[Alert]) -> None:
        """Draw the share of negative texts, by day and over the window."""
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot as plt

        first, last = min(self.texts), max(self.texts)
        days = [first + dt.timedelta(number) for number in range((last - first).days + 1)]
        figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
        seen = [day for day in days if self.texts[day]]
        axes.bar(seen, [100 * self.negatives[day] / self.texts[day] for day in seen], color="#c9d3df", label="day")
        sums = [(day, *self._sum(day, self.window)) for day in days]
        smooth = [(day, 100 * negative / all_texts) for day, negative, all_texts in sums if all_texts]
        axes.plot(*zip(*smooth, strict=True), color="#1f4e79", label=f"last {self.window} days")
        for alert in alerts:
            axes.axvline(dt.date.fromisoformat(alert.date), color="#c0392b", linestyle="--")
            axes.annotate("alert", (dt.date.fromisoformat(alert.date), 100 * alert.share), color="#c0392b")
        axes.set(ylabel="negative texts [%]", ylim=(0, None))
        axes.legend(frameon=False)
        figure.autofmt_xdate()
        figure.savefig(file, dpi=120)
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Read predictions from a file or from standard input, and write alerts as they arise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", type=Path, help="output of `megatron-7b predict`; default: standard input")
    parser.add_argument("--negative", default="negative", help="label of negative texts")
    parser.add_argument("--window", type=int, default=3, metavar="DAYS", help="days that are judged together")
    parser.add_argument("--baseline", type=int, default=14, metavar="DAYS", help="days before them")
    parser.add_argument("--margin", type=float, default=0.1, help="rise of the share that matters")
    parser.add_argument("--z", type=float, default=3.0, help="rise in standard errors that is no chance")
    parser.add_argument("--fewest", type=int, default=20, help="texts that both spans must have")
    parser.add_argument("--alerts", type=Path, metavar="FILE", help="JSON lines with the alerts")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of the shares")
    flags = parser.parse_args(argv)
    monitor = Monitor(flags.negative, flags.window, flags.baseline, flags.margin, flags.z, flags.fewest)
    alerts: list[Alert] = []
    with flags.input.open(encoding="utf-8") if flags.input is not None else sys.stdin as lines:
        for alert in monitor.watch(lines):
            alerts.append(alert)
            print(
                f"{alert.date}: {alert.share:.0%} of {alert.texts} texts are negative, {alert.before:.0%} before "
                f"(z {alert.z:.1f})",
                flush=True,
            )
            if flags.alerts is not None:
                flags.alerts.write_text("".join(json.dumps(asdict(one)) + "\n" for one in alerts), encoding="utf-8")
            if flags.plot is not None:
                monitor.plot(flags.plot, alerts)
    if flags.plot is not None and monitor.texts:
        monitor.plot(flags.plot, alerts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
