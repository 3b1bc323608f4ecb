"""Guard of a job with spares: `python -m launchers.slurm.guard JOB`, a step on another node than the supervisor's.

Slurm lets such a job live on when it loses a node. If that node is the supervisor's, the job would hold its other nodes
until its time limit, and do nothing. The guard then requeues it.
"""

import re
import signal
import sys
import time

from launchers.slurm import calls, scheduler
from launchers.slurm.hosts import expand_hosts

GUARD_SECONDS = 10.0
"""Time between two looks at the job."""


def has_lost_its_host(shown: str) -> bool:
    """Return whether Slurm has taken the node of the batch script from a running job.

    Args:
        shown: answer of `scontrol show job`; empty if Slurm does not answer.
    """
    fields = dict(re.findall(r"(?:^| )(JobState|NodeList|BatchHost)=(\S*)", shown))
    is_running = fields.get("JobState") == "RUNNING" and "BatchHost" in fields
    return is_running and fields["BatchHost"] not in expand_hosts(fields["NodeList"])


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGUSR2):  # they are for the ranks
        signal.signal(number, signal.SIG_IGN)
    while not has_lost_its_host(calls.look("scontrol", "--oneliner", "show", "job", sys.argv[1])):
        time.sleep(GUARD_SECONDS)
    scheduler.requeue(sys.argv[1])
