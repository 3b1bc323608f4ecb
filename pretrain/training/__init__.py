"""Training of a run, and the files of its folder.

loop.py        steps of a start, in one page        config.py      config nodes, and the recipe as training reads it
starting/      from a recipe to a run that is ready weights/       weights of runs, checkpoints and exports
run.py         state of a run on one rank           run_folder.py  files of a run
callbacks/     checkpoint, validation, tracking, …  run_status.py  status of a run
health/        bad batches: skip, rewind or stop    home_owner.py  the run whose checkpoints a home holds
agreement.py   what all ranks decide together       branching.py   new runs from a checkpoint of another
stop.py        requests to stop, and the decision   rollback.py    return of a run to an earlier checkpoint
meter.py       times and metrics of a step          ancestry.py    runs that a run continues
"""
