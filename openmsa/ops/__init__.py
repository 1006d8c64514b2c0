"""The operations, shaped by hardware: one folder each, one file per backend, the public door in
`__init__`."""
