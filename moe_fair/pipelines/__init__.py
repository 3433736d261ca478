"""One flow on one screen each: what the commands do, from checkpoint to result."""
