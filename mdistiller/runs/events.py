"""TensorBoard's event files, written in the training process itself.

tensorboardX's SummaryWriter hands events to a thread through a bounded queue; where that thread dies, of a full disk
for one, the queue fills up and training waits for ever. Here a failed write is an error of the run like any other.
"""

import os
import struct
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c


class Events:
    """One event file of `folder`. Events are kept until `flush`."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        # the process and the clock tell sessions apart, even where the clock stands still or goes back
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{time.monotonic_ns()}"
        self.pending = bytearray()
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalar(self, name: str, value: float, step: int) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value)))

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=summary.histogram(name, values, bins=64)))

    def _add(self, event: Event) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self.pending += (
            length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
        )

    def flush(self) -> None:
        with open(self.path, "ab") as file:
            file.write(self.pending)
        self.pending.clear()
