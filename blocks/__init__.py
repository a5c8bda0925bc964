"""Prefect blocks: what the flows connect to. Generated from the settings, which win; only flows resolve them."""

import registry  # noqa: F401  # before Prefect is imported: it settles that nothing is reported
