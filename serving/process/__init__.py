"""The process itself: its parent, its threads, its heap, and whether it still turns."""
