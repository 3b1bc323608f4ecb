"""Training of a run, and the files of its folder.

loop.py        steps of a start, in one page        config.py     config nodes, and the recipe as training reads it
start.py       from a recipe to a run that is ready checks.py     checks that refuse a start
run.py         state of a run on one rank           weights.py    weights of runs, checkpoints and exports
callbacks/     checkpoint, validation, tracking, …  exports.py    weights as safetensors
stop.py        requests to stop, and the decision   run_folder.py files of a run
meter.py       times and metrics of a step          run_status.py status of a run
"""
