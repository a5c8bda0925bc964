"""Prefect blocks: what the flows connect to. Generated from the settings, which win; only flows resolve them."""
