"""Checks of nodes before a start. They run on the nodes, and import little."""
