"""Progress output in a terminal and in a log file."""

import io

from rich.console import Console
from rich.progress import Progress, TextColumn

from aem_jax.launch.progress import clock_time, left_timer, live_progress, open_progress, plain_progress, shown


class Clock:
    """A clock that the test moves forward."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_plain_lines_without_a_terminal():
    stream, clock = io.StringIO(), Clock()
    with open_progress(stream, clock) as report:
        for done in range(1, 5):
            clock.now += 4
            report("train", done, 4, {"rollout/success": 0.25 * done, "entropy/response": 0.5})
        report("evaluate", 1, 1, {})
    # 4 s after the first line is too soon; 8 s after it a line is due; the last of a phase is always printed
    assert stream.getvalue().splitlines() == [
        "train 1/4  success 25%  entropy 0.500",
        "train 3/4  success 75%  entropy 0.500  0:04 left",
        "train 4/4  success 100%  entropy 0.500",
        "evaluate 1/1",
    ]


def test_time_left_starts_where_a_resumed_phase_starts():
    clock = Clock()
    left = left_timer(clock)
    assert left("train", 60, 100) == ""
    clock.now += 20
    assert left("train", 70, 100) == "1:00"  # 10 took 20 s, so 30 take 60 s
    assert left("warm start", 1, 5) == "" and left("train", 100, 100) == ""


def test_clock_time():
    assert [clock_time(seconds) for seconds in (0.4, 187, 3729)] == ["0:00", "3:07", "1:02:09"]


def test_shown_leaves_out_missing_metrics():
    assert shown({}) == ""
    assert shown({"learner/loss": None, "parity/max": 3.2e-6, "other": 1}) == "parity 3e-06"


def test_live_bars_keep_the_numbers_of_a_finished_phase():
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(TextColumn("{task.description}"), console=console) as bars:
        report = live_progress(bars, clock)
        report("warm start", 1, 2, {"learner/loss": 2.0})
        clock.now += 3
        report("warm start", 2, 2, {"learner/loss": 1.0})
        report("train", 1, 3, {})
        clock.now += 5
        report("train", 2, 3, {"rollout/success": 0.5})
        first, second = bars.tasks
    assert (first.completed, first.total, first.fields["values"], first.fields["left"]) == (2, 2, "loss 1.0000", "")
    assert (second.completed, second.fields["values"], second.fields["left"]) == (2, "success 50%", "0:05 left")
    assert first.stop_time is not None and second.stop_time is None


def test_a_repeated_phase_starts_a_new_line():
    stream, clock = io.StringIO(), Clock()
    report = plain_progress(stream, clock)
    for phase in ("train", "evaluate", "train"):
        report(phase, 1, 9, {})
    assert stream.getvalue().split("\n") == ["train 1/9", "evaluate 1/9", "train 1/9", ""]
