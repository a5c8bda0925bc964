"""Runbooks: one operation a module, as a Prefect flow that reads from top to bottom. The work itself is in tasks/."""
