"""Sets of runs: grids of values, budgets, and tables of results.

words of a command ─▶ words.py: recipes, overrides ─▶ grid.py: points of a sweep
                                                   └▶ plan.py: steps of a comparison, from budget.py
run folders ─▶ results.py: rows, means and spreads ─▶ text, CSV, JSON
"""
