"""Backups: what they are made of (manifest, objects, components), how they are taken, verified, kept and restored. No Prefect in here."""
