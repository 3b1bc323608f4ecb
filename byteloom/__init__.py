"""The public package of Byteloom."""
