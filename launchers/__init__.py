"""Ways to start the train entry. A launcher knows it by name, and hands it the path of a resolved recipe."""
