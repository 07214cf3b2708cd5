"""Flow matching without a network: probability paths, counter-based noise, times and the objective."""
