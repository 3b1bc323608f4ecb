"""What all packages share; imports nothing of theirs."""
