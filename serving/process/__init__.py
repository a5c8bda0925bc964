"""The process itself: its threads, its heap, its pulse, and what it keeps on its disk."""
