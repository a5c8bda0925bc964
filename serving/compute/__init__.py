"""One loaded version at work: its queue, its thread, its batches, the runtimes that compute, and its golden cases."""
