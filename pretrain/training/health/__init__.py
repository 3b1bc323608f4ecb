"""Health of a run: bad batches are found before their update, and handled by the policy of the recipe.

    window of losses and norms ─▶ limits ─▶ Engine.train_step ─┬─ within: update
           ▲                                                   └─ not: Monitor.action ─▶ skip, rewind or stop
           └── numbers of each update                                     │
                              health.jsonl, the log, the next checkpoint ◀┘

monitor.py decides, events.py stores what happened, response.py acts. docs/guides/operation/health.md explains it to
users.
"""

from pretrain.training.health.config import HealthConfig
from pretrain.training.health.events import HealthEvent, HealthLog

__all__ = ["HealthConfig", "HealthEvent", "HealthLog"]
