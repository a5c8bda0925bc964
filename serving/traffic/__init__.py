"""Which version answers a request, and what becomes of copies of it: routes, shadows, captures, replays, verdicts."""
