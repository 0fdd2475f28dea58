"""What an adapter may add to the model beyond what PEFT knows: modules, what they compute, and how they are saved and loaded.

Imports none of our other rooms. Training and evaluation both load adapters through modeling.adapters, so a model answers with
what it was trained with.
"""
