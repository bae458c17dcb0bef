"""How fast a run goes, when it will end, and what holds it up."""

from __future__ import annotations

from ddetr_cli.train.loop import Pace

# Weight of the newest step in the running means: about the last fifty count.
_NEWEST = 0.02
# A step that waits longer than this share of its time for pictures is held up by them; a host that waits shorter than
# this for its device keeps it waiting.
DATA_SHARE, DEVICE_SHARE = 0.2, 0.05


class Pacemaker:
    """Takes the times of a run's steps and validations."""

    def __init__(self, epochs: int, eval_every: int, device: str) -> None:
        self.epochs, self.eval_every, self.device = epochs, eval_every, device
        self._steps = 0
        self._images = self._seconds = self._waited = self._device = 0.0
        self._validation: float | None = None

    def step(self, images: int, seconds: float, waited: float, device_seconds: float) -> None:
        """A step of so many images and seconds, of them waiting for pictures and for the device."""
        self._steps += 1
        newest = max(_NEWEST, 1 / self._steps)
        self._images += newest * (images - self._images)
        self._seconds += newest * (seconds - self._seconds)
        self._waited += newest * (waited - self._waited)
        self._device += newest * (device_seconds - self._device)

    def end_of_epoch(self, seconds: float, *, is_validated: bool) -> None:
        """So long took what follows the steps of an epoch."""
        if is_validated:
            self._validation = seconds

    def now(self, epoch: int, step: int, steps: int) -> Pace:
        """After ``step`` of ``steps`` in the epoch that follows ``epoch`` finished ones."""
        left = (self.epochs - epoch) * steps - step
        validations = -(-self.epochs // self.eval_every) - epoch // self.eval_every
        # The first steps prepare libraries; and how long a validation takes is not known before there was one.
        is_known = self._steps >= 5 and (self._validation is not None or self._steps >= steps / 2)
        seconds_left = left * self._seconds + validations * (self._validation or 0.0) if is_known else None
        return Pace(
            self.epochs,
            self._images / max(self._seconds, 1e-9),
            seconds_left,
            self.bottleneck(self._seconds, self._waited, self._device),
        )

    def bottleneck(self, seconds: float, waited: float, device_seconds: float) -> str:
        """``data``, ``host`` or ``device``; a CPU is a device that no host waits for."""
        if waited > DATA_SHARE * seconds:
            return "data"
        return "host" if self.device != "cpu" and device_seconds < DEVICE_SHARE * seconds else "device"
