"""What a flow is conditioned on beside its labels, task by task."""
