"""Files that an export for transformers carries as its own code. Byteloom itself does not import them."""
