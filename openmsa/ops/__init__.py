"""The operations, shaped by hardware: a folder each, a file per backend, the door in front."""
