"""Other projects' networks: the same weights in their classes and in ours."""
