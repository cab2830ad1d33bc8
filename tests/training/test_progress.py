import io

import pytest

from ssd_torchrec.training.progress import Progress, drawn_bar, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def run(progress: Progress, clock: Clock, steps: range, step_s: float, validated_at: int = 0) -> None:
    with progress:
        for step in steps:
            clock.now_s += step_s
            valid = {"ndcg@10": 0.125} if step == validated_at else None
            progress.update(step, 7 - step / 100, 1e-3, 12345.6, valid)


def test_collected_output_gets_a_line_every_five_seconds_and_one_for_the_last_step(clock):
    out = io.StringIO()
    run(Progress(20, "tim4rec", file=out, clock=clock), clock, range(1, 21), step_s=1)
    lines = out.getvalue().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_a_line_tells_share_time_left_loss_speed_and_rate(clock):
    out = io.StringIO()
    run(Progress(40, "tim4rec", file=out, clock=clock), clock, range(10, 11), step_s=30)
    bar = "[#####...............]"
    assert out.getvalue() == (f"tim4rec {bar}  25 %  1:30 left  loss 6.9000  12,346 events/s  lr 1.0e-03  step 10/40\n")


def test_a_validation_gets_its_line_at_once_and_stays_in_view(clock):
    out = io.StringIO()
    run(Progress(4, "tim4rec", file=out, clock=clock), clock, range(1, 5), step_s=0.1, validated_at=2)
    lines = out.getvalue().splitlines()
    assert ["valid ndcg@10 0.1250" in line for line in lines] == [False, True, True]
    assert lines[1].endswith("step 2/4")


def test_a_run_that_stops_early_still_shows_its_last_step(clock):
    out = io.StringIO()
    run(Progress(100, "tim4rec", file=out, clock=clock), clock, range(1, 4), step_s=1)
    assert out.getvalue().splitlines()[-1].endswith("step 3/100")


def test_a_resumed_run_judges_the_time_left_by_its_own_steps(clock):
    out = io.StringIO()
    run(Progress(100, "tim4rec", first_step=90, file=out, clock=clock), clock, range(91, 92), step_s=2)
    assert "0:18 left" in out.getvalue()


def test_a_terminal_gets_one_bar_that_redraws_itself_and_notes_above_it(clock):
    out = Terminal()
    progress = Progress(3, "tim4rec", file=out, clock=clock)
    with progress:
        progress.update(1, 6.5, 1e-3, 10.0)
        progress.note("saved step-1 [x]")
    assert "saved step-1 [x]\n" in out.getvalue().replace(" \n", "\n")
    assert "\x1b[2K" in out.getvalue()
    assert "33 %" in out.getvalue()


def test_notes_are_lines_of_their_own_where_output_is_collected(clock):
    out = io.StringIO()
    with Progress(3, "tim4rec", file=out, clock=clock) as progress:
        progress.note("saved step-1 [x]")
    assert out.getvalue() == "saved step-1 [x]\n"


def test_a_run_of_no_steps_is_shown_without_dividing_by_them(clock):
    out = io.StringIO()
    with Progress(0, "tim4rec", file=out, clock=clock):
        pass
    assert out.getvalue() == ""
    assert drawn_bar(0, 0) == "[" + "." * 20 + "]"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3845, "1:04:05")], ids=lambda case: str(case)
)
def test_durations_read_as_clocks_do(seconds, text):
    assert duration(seconds) == text
