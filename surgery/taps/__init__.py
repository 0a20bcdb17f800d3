"""Looking into two networks."""
