"""Which axes belong together."""
