"""The training loop: optimizer steps, and the logging, saves and validations between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from model.vision import Towers
from pipeline.checkpoint.saver import Saved, Saver
from pipeline.data.loader import GlobalBatch, TrainData
from pipeline.distributed.collectives import broadcast_from_main
from pipeline.engine import Engine
from pipeline.lr_schedule import learning_rate
from pipeline.metrics.history import has_event
from pipeline.metrics.logger import MetricsLogger, append_event
from pipeline.metrics.spikes import SpikeDetector
from pipeline.metrics.timers import GarbageCollection, TowerTimer
from pipeline.run.failure import DivergedError
from pipeline.run.folder import RunFolder
from pipeline.run.watchdog import Watchdog
from pipeline.step import Requests, StepReport, Timings, optimizer_step, reduce_step
from pipeline.validation import Validation
from pipeline.visualization.held_out import HeldOutImages

MAX_NONFINITE = 3  # consecutive steps without an update, after which the training has failed


@dataclass(kw_only=True)
class Loop:
    """The training loop of one rank. All ranks make the same decisions, because their step reports are equal."""

    run_folder: RunFolder
    engine: Engine
    towers: Towers
    data: TrainData
    validation: Validation | None
    drawings: HeldOutImages | None
    saver: Saver
    metrics: MetricsLogger
    watchdog: Watchdog
    spikes: SpikeDetector = field(default_factory=SpikeDetector)
    nonfinite: int = 0  # consecutive steps whose loss or gradient was not finite, and which updated nothing

    def run(self, step: int) -> int:
        """Train from `step` to the recipe's last step, or until a stop request. Return the number of steps done."""
        if self._missed_validation(step):
            self._validate(step)
        tower_timer, towers_s = TowerTimer(self.towers, self.engine.device), 0.0
        with GarbageCollection() as garbage:
            for batch in self.data.from_step(step):
                lr = learning_rate(self.run_folder.recipe, step, self.data.total_steps)
                losses = optimizer_step(self.engine, self.towers, self.run_folder.recipe, batch, lr)
                timings = Timings(data_wait_s=batch.wait_s, towers_s=towers_s, gc_s=garbage.pop_seconds())
                report = reduce_step(losses, self._requests(), timings)
                step += 1
                # The device has finished this step, so the towers' time is known. It is sent to the other ranks with
                # the all-reduce of the next step.
                towers_s = tower_timer.pop_seconds()
                self.watchdog.step_done(step)
                self.metrics.log_step(step, batch, report, lr)
                if self.saver.in_progress and not report.requests.writing:
                    self._save_with(self.saver.commit)
                self._record_anomalies(step, batch, report)
                self._check_finite(step, batch, report)
                # Do not save after a step without an update, because a save deletes an older checkpoint.
                if report.finite or self._is_last(step):
                    self._save_and_validate(step, report.requests)
                    tower_timer.pop_seconds()  # discard the towers' time in a validation or a probe
                if report.requests.stop and report.finite:
                    break
                garbage.after_step(step)
        return step

    def _requests(self) -> Requests:
        control = self.run_folder.control
        return Requests(stop=control.stop_requested(), save=control.save_requested(), writing=self.saver.writing)

    def _is_last(self, step: int) -> bool:
        return step == self.data.total_steps

    def _record_anomalies(self, step: int, batch: GlobalBatch, report: StepReport) -> None:
        """Log slow reads of this rank, and spikes of the loss or the gradient norm."""
        for shard, key, seconds in batch.slow_reads:
            facts = {"rank": self.run_folder.ranks.rank, "shard": shard, "key": key, "seconds": round(seconds, 1)}
            append_event(self.run_folder.folder, "slow_read", step, **facts)
        for spike in self.spikes.check(report, has_images=batch.images > 0):
            self.metrics.log_event("spike", step, **spike.facts(), samples=batch.ids.tolist())

    def _check_finite(self, step: int, batch: GlobalBatch, report: StepReport) -> None:
        """Count consecutive steps without an update. Raises: DivergedError on all ranks after MAX_NONFINITE of them."""
        if report.finite:
            self.nonfinite = 0
            return
        self.nonfinite += 1
        self.metrics.log_event("nonfinite", step, samples=batch.ids.tolist())
        if self.nonfinite == MAX_NONFINITE:
            self._save_with(self.saver.finish)
            raise DivergedError(
                f"no finite loss or gradient in steps {step - MAX_NONFINITE + 1} to {step}; lower optim.lr, or look at "
                "the samples that the `nonfinite` events in metrics.jsonl name"
            )

    def _save_and_validate(self, step: int, requests: Requests) -> None:
        finish = requests.stop or requests.save or self._is_last(step)
        if finish or self.saver.due(step):
            self._save_with(lambda: self.saver.save(step))
        if finish:
            self._save_with(self.saver.finish)
            self.run_folder.control.clear("save")
        # A stop must not wait for a validation. The next launch runs the validation that was missed.
        if not requests.stop and self._validation_due(step):
            self._validate(step)
        if not requests.stop and self.drawings is not None and self.drawings.due(step):
            self._draw(self.drawings, step)

    def _save_with(self, action: Callable[[], Saved | None]) -> None:
        """Run one phase of a save, and log the checkpoint that it published, if any."""
        with self.watchdog.allow_time_for("the save"), self.metrics.exclude_time("save"):
            saved = action()
        if saved:
            seconds = {"seconds": round(saved.stall_s, 2), "whole_s": round(saved.whole_s, 2)}
            self.metrics.log_event("save", saved.step, **seconds)

    def _validation_due(self, step: int) -> bool:
        return self.validation is not None and (self._is_last(step) or self.validation.due(step))

    def _missed_validation(self, step: int) -> bool:
        """Return whether the previous launch saved at this step, but stopped before the validation that was due."""
        if step == 0 or not self._validation_due(step):
            return False
        folder = self.run_folder.folder
        return broadcast_from_main(self.run_folder.ranks, lambda: not has_event(folder, "heldout", step))

    def _validate(self, step: int) -> None:
        assert self.validation is not None
        began = time.monotonic()
        with self.watchdog.allow_time_for("the validation"), self.metrics.exclude_time("heldout"):
            losses = self.validation.losses(self.engine, self.towers)
        self.metrics.log_validation(step, losses, seconds=time.monotonic() - began)

    def _draw(self, drawings: HeldOutImages, step: int) -> None:
        """Draw held-out images. The main rank writes the file while the other ranks wait in the next step."""
        began = time.monotonic()
        with self.watchdog.allow_time_for("the drawing"), self.metrics.exclude_time("heldout"):
            maps = drawings.maps(self.engine, self.towers)
            path = drawings.write(maps, step) if self.run_folder.ranks.is_main else None
        if path:
            self.metrics.log_drawing(step, path, seconds=time.monotonic() - began)
