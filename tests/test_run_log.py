"""The log of a run survives kills and resumes."""

from training.run_log import RunLog, read_log


def test_records_after_the_resumed_step_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, step=0)
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    RunLog(path, step=2).write(3, loss=9.0)
    assert read_log(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]


def test_no_log_yet(tmp_path):
    assert read_log(tmp_path / "nowhere.jsonl") == []
