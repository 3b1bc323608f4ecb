"""Start of a run: the steps to its first batch, and the checks that refuse it.

start.py             from a recipe to a run that is ready    checks.py   checks that refuse a start
schedule_changes.py  warnings about a rate that rises        log.py      log of a start
"""
