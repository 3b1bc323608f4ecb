"""Terminal output: lines, tables, progress bars, and crash files."""
