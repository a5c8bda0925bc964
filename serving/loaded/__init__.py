"""Which versions are in memory: loading, sleeping, waking, exchanging, letting go."""
