"""Part limits: a micro-batch that does not fit is refused with a message, and training continues."""

from collections.abc import Iterator

import numpy as np

from gpu_parts import Row, Setting
from gpu_parts.models import LARGEST, batch_of, engine_of, recipe_model
from pretrain.engines import EngineError

TOO_MANY_ROWS = 4096


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the message of a rehearsal that does not fit, and whether the next step works."""
    config = recipe_model(setting, LARGEST)
    engine = engine_of(setting, config)
    message = ""
    try:
        engine.rehearse(TOO_MANY_ROWS)
    except EngineError as error:
        message = str(error)
    yield Row("rehearsal that does not fit", None, "", message or "no error", "lower train.micro_batch" in message)
    engine._drop_gradient()
    result = engine.train_step(batch_of(config), step=0, learning_rate=1e-5)
    yield Row("a step after it", result.nats / result.target_bytes, "nats/byte", "", bool(np.isfinite(result.nats)))
