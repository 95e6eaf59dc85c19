"""The log of a run survives kills and resumes."""

import torch

from training.run_log import Interval, RunLog, heldout_table, read_log


def test_records_after_the_resumed_step_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, step=0)
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    RunLog(path, step=2).write(3, loss=9.0)
    first, second, lost, third = read_log(path)
    assert (first, second) == ({"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0})
    assert (lost, third) == ({"step": 2, "lost_steps": 1}, {"step": 3, "loss": 9.0})


def test_a_start_that_loses_nothing_leaves_the_log_as_it_was(tmp_path):
    RunLog(tmp_path / "log.jsonl", step=0).write(3, loss=1.0)
    RunLog(tmp_path / "log.jsonl", step=3)
    assert read_log(tmp_path / "log.jsonl") == [{"step": 3, "loss": 1.0}]


def test_no_log_yet(tmp_path):
    assert read_log(tmp_path / "nowhere.jsonl") == []


def test_an_interval_counts_skipped_updates_in_time_but_not_in_loss():
    interval = Interval()
    for seconds in (1.0, 2.0, 3.0):
        interval.add_time(seconds)
    interval.add_update(torch.tensor(0.5), torch.tensor(1.0))
    interval.add_update(torch.tensor(1.5), torch.tensor(4.0))
    assert (interval.attempts, interval.seconds, interval.updates) == (3, 6.0, 2)
    assert (interval.loss_sum / interval.updates, interval.grad_norm) == (1.0, 4.0)


def test_table_of_heldout_losses():
    quarters = {f"heldout_loss_q{q}": q / 10 for q in (1, 2, 3, 4)}
    records = [{"step": s, "images_seen": 1000 * s, "heldout_loss": 1 / (1 + s), **quarters} for s in range(5)]
    records += [
        {"step": s, "images_seen": s, "images_per_second": v, "train_seconds": 30 * v} for s, v in [(1, 2), (2, 6)]
    ]
    lines = heldout_table(records).splitlines()
    assert lines[2:5] == [
        f"| {images} | {loss} | 0.1000 | 0.2000 | 0.3000 | 0.4000 |"
        for images, loss in (("0", "1.0000"), ("2,000", "0.3333"), ("4,000", "0.2000"))
    ]
    assert lines[-1] == "3.0 minutes in updates, median 4.0 images/s"
    records += [{"step": 1, "set_up_seconds": s} for s in (9.0, 12.0, 30.0)] + [{"step": 1, "lost_steps": 7}] * 2
    assert heldout_table(records).splitlines()[-1] == (
        "3 starts, 12 s each until the first update (median); 14 updates lost by kills"
    )
