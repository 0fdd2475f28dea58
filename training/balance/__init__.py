"""Balanced learning: one file per published method.

Each begins with pure functions on tensors or floats, without model or trainer, in any floating precision. A modality is called
`image` or `text`; its unimodal branch is the same model, shown a view that lacks the other one.
"""
