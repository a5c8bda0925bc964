"""Which version answers a request, where it waits for one, and what becomes of copies of it: routes, shadows, captures, verdicts."""
