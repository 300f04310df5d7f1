"""What a run's result is made of."""

from rst.training.fit import summarize


def test_summary_takes_the_last_epoch_and_names_the_best():
    def row(epoch, accuracy):
        return {
            "epoch": epoch, "steps": 10 * epoch, "sam_steps": epoch, "propagations": 11 * epoch,
            "images": 100, "skipped_steps": 0,
            "test_accuracy": accuracy, "test_loss": 1.0, "train_accuracy": 0.9, "train_loss": 0.1 * epoch,
            "seconds_train": 3.0, "seconds_evaluate": 1.0, "seconds_data": 1.0,
        }  # fmt: skip

    rows = [row(1, 0.7), row(2, 0.8), row(3, 0.8), row(4, 0.75)]
    summary = summarize(rows)
    assert summary["test_accuracy"] == 0.75
    assert (summary["best_test_accuracy"], summary["best_epoch"]) == (0.8, 2)  # the earliest of equals
    assert summary["seconds"] == {"train": 12.0, "evaluate": 4.0, "data": 4.0, "total": 20.0}
    assert summary["images_per_second"] == 400 / 16
    assert (summary["steps"], summary["propagations"]) == (40, 44)
    for key in ("test_accuracy", "test_loss", "seconds_evaluate"):
        del rows[1][key]  # an epoch that was not evaluated
    summary = summarize(rows)
    assert (summary["best_test_accuracy"], summary["best_epoch"]) == (0.8, 3)
    assert summary["seconds"]["total"] == 19.0
