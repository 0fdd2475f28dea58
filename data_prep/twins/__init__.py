"""Twins: procedural problems that are exact in words and in pixels, so that the same facts can be posed in either form."""
