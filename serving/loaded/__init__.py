"""Which versions are in memory, and how they do: loading, sleeping, waking, exchanging, letting go; the last good state on disk."""
