"""metrics.jsonl after a kill, and what goes into it."""

import json

from idm_fast.training.metrics_log import MetricsLog


def write(path, step, *lines, **options):
    log = MetricsLog(path, step, **options)
    for number, values in lines:
        log.write(number, values)
    log.close()


def test_lines_past_the_resumed_step_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, (1, {"loss": 0.5}), (2, {"loss": 0.25}), (2, {"val": {"0.1": {"psnr": 20.0}}}), (3, {"loss": 0.125}))
    write(path, 2, (3, {"loss": 0.0625}))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
        {"step": 2, "val": {"0.1": {"psnr": 20.0}}},
        {"step": 3, "loss": 0.0625},
    ]


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for torn in ('{"step": 2, "lo', '{"step": 2, "loss": 1.0}', "", "\0\0\n"):
        path.write_text('{"step": 1}\n' + torn)
        write(path, 5)
        assert path.read_text() == '{"step": 1}\n'


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write(1, {"loss": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.1}
    log.close()


def test_what_is_not_finite_is_null(tmp_path):
    write(tmp_path / "metrics.jsonl", 0, (1, {"grad_norm": float("inf"), "val": {"1": {"psnr": float("nan")}}}))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "grad_norm": None, "val": {"1": {"psnr": None}}
    }  # fmt: skip


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, board = tmp_path / "metrics.jsonl", tmp_path / "logs"
    write(path, 0, (1, {"loss": 0.5, "val": {"0.1": {"psnr": 20.0}}}), (2, {"loss": 0.25}), tensorboard=board)
    write(path, 1, (2, {"loss": 0.75}), tensorboard=board)
    events = EventAccumulator(str(board)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.75)]
    assert [(event.step, event.value) for event in events.Scalars("val/0.1/psnr")] == [(1, 20.0)]
