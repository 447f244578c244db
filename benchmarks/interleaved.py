"""Interleaved timing: calls run in turn, round after round, so that other load on the machine affects all alike."""

import gc
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity


class Line(NamedTuple):
    """A row of a table: its name, the names of the two calls compared, and the smallest ratio of times wanted."""

    name: str
    published: str
    ours: str
    at_least: float | None = None


def clock(call, device, strict=False):
    """Seconds of a call with its work on the device; with `strict`, RuntimeError if it synchronises with the GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with no_synchronisation() if strict else nullcontext():
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@contextmanager
def no_synchronisation():
    """A context in which any synchronisation with the GPU raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure(calls, rounds, warmup, device):
    """Time the calls in turn, round after round; returns {name: seconds of each round}, without `warmup` first rounds.

    On CUDA, a call named "ours ..." that synchronises with the GPU after the warm-up raises RuntimeError.
    """
    seconds = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name, call in calls.items():
            took = clock(call, device, strict=i >= warmup and str(name).startswith("ours"))
            if i >= warmup:
                seconds[name].append(took)
    return seconds


def milliseconds(seconds):
    """Median and quartiles of the rounds of a call, as text."""
    low, middle, high = np.percentile(seconds, [25, 50, 75]) * 1000
    return f"{middle:.4g} ({low:.4g}-{high:.4g})"


HEADERS = "published, ms", "ours, ms", "published / ours"


def table(lines, calls, args, images=None, times=1, headers=HEADERS):
    """Measure the calls and return the Markdown table of the lines. Lines whose calls are missing are marked not run.

    Args:
        lines: the Lines of the table.
        calls: {name: call}.
        args: rounds, warmup and device are used.
        images: images that a call processes; adds a column with ours in images per second.
        times: multiplies `args.rounds`, for calls that take milliseconds.
        headers: of the first two calls of a line, and of their ratio.
    """
    gc.collect()
    seconds = measure(calls, args.rounds * times, args.warmup, args.device)
    rows = [f"| | {' | '.join(headers)} | at least |" + (" images/s |" if images else "")]
    rows.append("|---" * (6 if images else 5) + "|")
    for line in lines:
        least = f"{line.at_least:g}" if line.at_least else ""
        if line.published not in calls or line.ours not in calls:
            rows.append(f"| {line.name} | not run: no avx512_bf16 | | | {least} |" + (" |" if images else ""))
            continue
        base, own = (float(np.median(seconds[name])) for name in (line.published, line.ours))
        cells = [line.name, *(milliseconds(seconds[name]) for name in line[1:3]), f"**{base / own:.2f}**", least]
        rows.append(f"| {' | '.join(cells + ([f'{images / own:.4g}'] if images else []))} |")
    return "\n".join(rows)


def idle_share(spans):
    """Share (0..1) of the time from the first start to the last end that none of the (start, end) spans covers."""
    spans = sorted(spans)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def profiled(call, args, steps=3, top=15):
    """Profile `steps` calls: a Markdown table of the `top` kernels, and on CUDA the share of time the GPU is idle."""
    cuda = args.device.type == "cuda"
    call()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profile:
        for _ in range(steps):
            call()
        if cuda:
            torch.cuda.synchronize()

    def of_kernels(events):
        # An operator's time on the device is that of its kernels, which are listed themselves, as are the annotations
        # around several of them.
        return [each for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation]

    events = of_kernels(profile.key_averages()) if cuda else profile.key_averages()
    own = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in events}
    count, total = {event.key: event.count for event in events}, sum(own.values())
    rows = ["| kernel | calls a step | ms a step | share |", "|---|---|---|---|"]
    for key in sorted(own, key=own.get, reverse=True)[:top]:
        name = key.replace("|", "/")[:80]
        rows.append(f"| `{name}` | {count[key] / steps:.0f} | {own[key] / steps / 1000:.4g} | {own[key] / total:.1%} |")
    if cuda:
        spans = [(each.time_range.start, each.time_range.end) for each in of_kernels(profile.events())]
        rows.append(f"\nThe GPU is idle {idle_share(spans):.1%} of the time.")
    return "\n".join(rows)
