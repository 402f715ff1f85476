from search.early_stopping import EarlyStopping


def test_early_stopping() -> None:
    def epochs_until_stopped(losses: list[float], seconds: float = 1) -> int | None:
        stopper = EarlyStopping(patience=3, min_delta=0.1, max_seconds=100, max_epochs=20)
        results = [{"epoch": i, "loss": loss, "seconds": i * seconds} for i, loss in enumerate(losses, 1)]
        return next((result["epoch"] for result in results if stopper("trial", result)), None)

    assert epochs_until_stopped([5.0 - 0.2 * i for i in range(30)]) == 20
    assert epochs_until_stopped([5.0, 4.0, 4.0, 4.0, 4.0, 4.0]) == 5  # three epochs after the last fall
    assert epochs_until_stopped([5.0, 4.95, 4.91, 4.91]) == 4  # 0.09 is no fall
    assert epochs_until_stopped([5.0, 6.0, 6.0, 4.0, 4.5, 4.5]) is None  # nor is a rise an end
    assert epochs_until_stopped([5.0, float("nan")]) == 2
    assert epochs_until_stopped([float("inf")]) == 1
    assert epochs_until_stopped([5.0, 4.0, 3.0], seconds=40) == 3

    stopper = EarlyStopping(patience=2, min_delta=0.0, max_seconds=100, max_epochs=20)
    for epoch in (1, 2, 2, 2, 2):  # an epoch repeated after a restore counts once
        assert not stopper("trial", {"epoch": epoch, "loss": 1.0, "seconds": 1})


def test_early_stopping_tells_why() -> None:
    stopper = EarlyStopping(patience=2, min_delta=0.1, max_seconds=1000, max_epochs=20)
    for name, result, reason in (
        ("a", {"epoch": 20, "loss": 1.0, "seconds": 1}, "all epochs done"),
        ("b", {"epoch": 2, "loss": 1.0, "seconds": 1000}, "its 1,000 seconds are over"),
        ("c", {"epoch": 2, "loss": float("nan"), "seconds": 1}, "its loss became NaN or infinite"),
    ):
        assert stopper(name, result)
        assert stopper.reasons[name] == reason
    for epoch in (1, 2, 3):
        stopper("d", {"epoch": epoch, "loss": 1.0, "seconds": 1})
    assert stopper.reasons["d"] == "no progress for 2 epochs"
    assert not stopper("e", {"epoch": 1, "loss": 1.0, "seconds": 1})
    assert "e" not in stopper.reasons


def test_the_search_ends_with_its_time() -> None:
    for time_left, over in ((None, False), (1e6, False), (0.0, True)):
        assert EarlyStopping(2, 0.1, 1000, 20, time_left).stop_all() == over
