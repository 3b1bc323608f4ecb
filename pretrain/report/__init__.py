"""Report of runs: one HTML page that needs no network.

run folder ─▶ run_data.py: numbers, events, corpora, evaluations ─▶ page.py ─▶ report.html
                                                                      ▲
                                assets/: uPlot, page.css, page.js ────┘

assets/uplot.js and uplot.css are dist/uPlot.iife.min.js and dist/uPlot.min.css of uPlot 1.6.32 (`npm pack uplot`).
"""
