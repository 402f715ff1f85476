"""When a trial ends by itself, whatever the other trials do."""

import math
import time
from collections import defaultdict

from ray import tune


class EarlyStopping(tune.Stopper):
    """Stops a trial whose loss has not fallen by min_delta for patience epochs, is not finite, or whose time is up.

    Args:
        patience: epochs.
        min_delta: in nats.
        max_seconds: of training and validation.
        max_epochs: after which the trial has ended as it should.
        time_left: seconds, after which all trials are stopped, to be gone on with; None for no end.

    Attributes:
        reasons: trial id → why it was stopped for good.
    """

    def __init__(
        self, patience: int, min_delta: float, max_seconds: float, max_epochs: int, time_left: float | None = None
    ) -> None:
        self.patience, self.min_delta = patience, min_delta
        self.max_seconds, self.max_epochs = max_seconds, max_epochs
        self.deadline = math.inf if time_left is None else time.monotonic() + time_left
        self.reasons = {}
        self.losses = defaultdict(dict)  # trial id → epoch → loss: an epoch repeated after a restore counts once

    def __call__(self, trial_id: str, result: dict) -> bool:
        epoch, losses = result["epoch"], self.losses[trial_id]
        losses[epoch] = result["loss"]
        before = [loss for e, loss in losses.items() if e <= epoch - self.patience]
        since = [loss for e, loss in losses.items() if epoch - self.patience < e <= epoch]
        if not math.isfinite(result["loss"]):
            self.reasons[trial_id] = "its loss became NaN or infinite"
        elif epoch >= self.max_epochs:
            self.reasons[trial_id] = "all epochs done"
        elif result["seconds"] >= self.max_seconds:
            self.reasons[trial_id] = f"its {self.max_seconds:,} seconds are over"
        elif before and min(since) > min(before) - self.min_delta:
            self.reasons[trial_id] = f"no progress for {self.patience} epochs"
        return trial_id in self.reasons

    def stop_all(self) -> bool:
        return time.monotonic() >= self.deadline
