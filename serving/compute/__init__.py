"""One loaded version at work: its queue, its thread, its batches, and the runtimes that compute."""
