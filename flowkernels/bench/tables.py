"""What the benchmark prints and writes: tables of results, and CSV files."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowkernels._files import whole_file
from flowkernels.bench.timers import WallClock

FIELDS = (
    *("entry", "case", "size", "provider", "gate", "error", "bound", "p20_us", "p50_us", "p80_us", "rounds"),
    *("ratio", "best_torch", "gb_s", "gflop_s", "stream_percent", "fma_percent", "extra_mb"),
    *("device", "threads", "isa", "cpu", "torch", "python", "flowkernels", "commit", "date"),
    *("looped_us", "driver", "cuda", "clocks", "host_us"),  # of a GPU
    *("began_s", "processor"),
)
TEXT = {
    "case",
    "processor",
    "driver",
    "cuda",
    "torch",
    "python",
    "flowkernels",
    "commit",
    "date",
}  # as they were written


def cell(value: Any) -> str:
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"


def print_case(results: list[dict], titles: tuple[str, str] = WallClock.titles) -> None:
    """titles: what the bandwidth and the operations are percentages of."""
    first = results[0]
    print(f"\n{first['entry']}: {first['case']} ({first['threads']} threads)")
    on_gpu = any(row["host_us"] != "" for row in results)
    columns = {"device us" if on_gpu else "p50 us": "p50_us", "p20": "p20_us", "p80": "p80_us"}
    if on_gpu:
        columns |= {"host us": "host_us", "in a loop": "looped_us"}
    columns |= {"x best torch": "ratio", "GB/s": "gb_s", titles[0]: "stream_percent", "GFLOP/s": "gflop_s"}
    columns |= {titles[1]: "fma_percent", "extra MB": "extra_mb"}
    columns |= {"began in s": "began_s"} if on_gpu else {}
    print_rows(results, columns, 24, 13)


def print_rows(results: list[dict], columns: Mapping[str, str], name: int, width: int) -> None:
    """A line for each row: what `columns` name, title -> field, if it has a time; its gate, and its note if it has one.

    name, width: characters of the provider and of each column.
    """
    print(f"  {'':<{name}}" + "".join(f"{title:>{width}}" for title in columns) + "  gate")
    for row in results:
        gate = "ok" if row["gate"] == "ok" else f"RED {row['error']:.2g} > {row['bound']:.2g}"
        gate += f" ({row['note']})" if row.get("note") else ""
        timed = row["p50_us"] != ""
        cells = "".join(f"{cell(row[field] if timed else ''):>{width}}" for field in columns.values())
        print(f"  {row['provider']:<{name}}{cells}  {gate}", flush=True)


PEERS = {"x eager": "torch eager", "x compile": "torch compile", "x loop": "published loop"}


def print_summary(results: list[dict], titles: tuple[str, str]) -> None:
    """One line a case: our default call, how many times as long its peers take on the device, how near it is to the
    limits, and whose gates are red."""
    if not results:
        return
    name = 2 + max(len(f"{row['entry']}: {row['case']}") for row in results)
    columns = ("device us", "host us", "in a loop", *PEERS, *titles)
    print(f"\n{'':<{name}}" + "".join(f"{c:>11}" for c in columns) + "  gate")
    for key in dict.fromkeys((row["entry"], row["case"]) for row in results):
        of = {row["provider"]: row for row in results if (row["entry"], row["case"]) == key}
        ours_of = [row for name, row in of.items() if name.startswith("flowkernels")]
        mine = ours_of[0]
        times = [of.get(peer, {}).get("p50_us", "") for peer in PEERS.values()]
        known = mine["p50_us"] != ""
        ratios = [t / mine["p50_us"] if known and t != "" else "" for t in times]
        cells = [mine[c] for c in ("p50_us", "host_us", "looped_us")]
        cells += [*ratios, mine["stream_percent"], mine["fma_percent"]]
        red = [name.removeprefix("flowkernels ") for name, row in of.items() if row["gate"] != "ok"]
        gates = f"RED: {', '.join(red)}" if red else "ok"
        print(f"{': '.join(key):<{name}}" + "".join(f"{cell(c):>11}" for c in cells) + f"  {gates}", flush=True)


def read_csv(path: Path) -> list[dict]:
    """The rows of `write_csv`, numbers as such."""
    with open(path, newline="") as f:
        return [{k: v if k in TEXT else _number(v) for k, v in row.items()} for row in csv.DictReader(f)]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def write_csv(path: Path, results: Iterable[dict], fields: Sequence[str] = FIELDS) -> None:
    with whole_file(path) as partial, open(partial, "w", newline="") as f:
        writer = csv.DictWriter(f, fields)
        writer.writeheader()
        for row in results:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
