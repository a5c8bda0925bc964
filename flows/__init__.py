"""Runbooks: one operation a module, as a Prefect flow that reads from top to bottom. The work itself is in tasks/."""

import registry  # noqa: F401  # before Prefect is imported: it settles that nothing is reported
