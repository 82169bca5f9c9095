"""Makes each training step of a process take a while, so that a test has the time to kill it in between."""

import os
import time

import transformers

_PAUSE = float(os.environ.get("DORAN_TEST_SLOW_STEPS", "0"))
_step = transformers.Trainer.training_step


def _slow_step(self, *args, **kwargs):
    time.sleep(_PAUSE)
    return _step(self, *args, **kwargs)


transformers.Trainer.training_step = _slow_step
