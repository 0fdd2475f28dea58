"""The setting that balanced learning comes from: two encoders, late fusion, one modality that is learned faster than the other.

`task` draws the data and holds the model and what is measured, `training` the loop, `methods` one class per method, `rows` the
list of what is compared, `summary` its statistics, table and figure. `text` is the dominant modality,
`image` the weak one.
"""
