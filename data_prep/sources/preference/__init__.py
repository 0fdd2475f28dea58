"""Adapters from public preference data to pairs: one file each, runnable alone."""
