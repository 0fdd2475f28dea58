"""Adapters from public data and users' own files to problems: one file each, runnable alone."""
