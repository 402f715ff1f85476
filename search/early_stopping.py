"""When a trial ends by itself, whatever the other trials do."""

import math
from collections import defaultdict

from ray import tune


class EarlyStopping(tune.Stopper):
    """Stops a trial whose loss has not fallen by min_delta for patience epochs, is not finite, or whose time is up.

    Args:
        patience: epochs.
        min_delta: in nats.
        max_seconds: of training and validation.
        max_epochs: after which the trial has ended as it should.
    """

    def __init__(self, patience: int, min_delta: float, max_seconds: float, max_epochs: int) -> None:
        self.patience, self.min_delta = patience, min_delta
        self.max_seconds, self.max_epochs = max_seconds, max_epochs
        self.losses = defaultdict(dict)  # trial id → epoch → loss: an epoch repeated after a restore counts once

    def __call__(self, trial_id: str, result: dict) -> bool:
        epoch, losses = result["epoch"], self.losses[trial_id]
        losses[epoch] = result["loss"]
        if not math.isfinite(result["loss"]) or result["seconds"] >= self.max_seconds or epoch >= self.max_epochs:
            return True
        before = [loss for e, loss in losses.items() if e <= epoch - self.patience]
        since = [loss for e, loss in losses.items() if epoch - self.patience < e <= epoch]
        return bool(before) and min(since) > min(before) - self.min_delta

    def stop_all(self) -> bool:
        return False
