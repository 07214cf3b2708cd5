"""How good samples are, and whether they follow what they were asked for."""
