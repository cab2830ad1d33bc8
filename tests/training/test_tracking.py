import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssd_torchrec.training.tracking import METRICS_FILE, MetricsLog, read_metrics


class Clock:
    """Tells half a second more each time it is read, from some beginning."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        self.now += 0.5
        return self.now


def train(folder, steps, resume_step=0):
    with MetricsLog(folder, resume_step=resume_step, clock=Clock()) as log:
        for step in steps:
            log.step(step, {"loss_nats": 8.0 - step, "learning_rate": 1e-3})
            if step % 2 == 0:
                log.evaluation(step, "valid", {"ndcg@10": step / 10})


def test_each_logged_step_and_each_evaluation_is_a_line(tmp_path):
    train(tmp_path, [1, 2])
    assert [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [
        {"kind": "step", "step": 1, "wall_s": 0.5, "loss_nats": 7.0, "learning_rate": 1e-3},
        {"kind": "step", "step": 2, "wall_s": 1.0, "loss_nats": 6.0, "learning_rate": 1e-3},
        {"kind": "evaluation", "step": 2, "split": "valid", "wall_s": 1.5, "ndcg@10": 0.2},
    ]


def test_a_resumed_run_leaves_the_file_of_a_run_that_never_stopped(tmp_path):
    train(tmp_path / "whole", range(1, 7))
    train(tmp_path / "resumed", range(1, 6))
    train(tmp_path / "resumed", range(4, 7), resume_step=3)
    assert (tmp_path / "resumed" / METRICS_FILE).read_text() == (tmp_path / "whole" / METRICS_FILE).read_text()


def test_a_line_that_a_kill_tore_is_dropped(tmp_path):
    train(tmp_path, [1, 2])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "step", "st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 2]
    train(tmp_path, [3], resume_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 2, 3]


def test_a_fresh_run_starts_with_an_empty_log(tmp_path):
    train(tmp_path, [1, 2])
    train(tmp_path, [1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_lines_reach_the_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path)
    log.step(1, {"loss_nats": 7.0})
    assert len(read_metrics(tmp_path)) == 1
    log.close()


def test_figures_that_are_not_finite_are_null_so_that_every_line_is_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.step(1, {"loss_nats": float("nan"), "learning_rate": 1e-3})
    assert read_metrics(tmp_path)[0]["loss_nats"] is None


def test_tensorboard_shows_the_same_and_forgets_what_was_taken_back(tmp_path):
    train(tmp_path, range(1, 6))
    train(tmp_path, range(4, 7), resume_step=3)
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in board.Scalars("train/loss_nats")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("valid/ndcg_at_10")] == [2, 4, 6]


def test_a_folder_without_metrics_has_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []
